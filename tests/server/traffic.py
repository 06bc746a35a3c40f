"""Prompts for tests, and how two servers' answers to one prompt are compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tests.support.server import Answer, Server

Prompt: TypeAlias = list[int]

PAGE_SIZE = 16
N_HBM_TOKENS = 4096
FIRST_TOKEN, LAST_TOKEN = 100, 8000
"""Ordinary tokens of the tiny model's vocabulary."""

ROUNDING = 1e-6
"""Logprobs pass through JSON; nothing else separates two that are called equal."""


def prompt(seed: object, n_tokens: int) -> Prompt:
    """The same tokens for the same seed."""
    return random.Random(str(seed)).choices(range(FIRST_TOKEN, LAST_TOKEN), k=n_tokens)


def whole_pages(n_tokens: int) -> int:
    """How many of these tokens lie in whole pages."""
    return n_tokens // PAGE_SIZE * PAGE_SIZE


def reusable(tokens: Sequence[int]) -> int:
    """The longest hit of a prompt that is known from a page of it to the last: SGLang computes its last token anew."""
    return whole_pages(len(tokens) - 1)


def push_out(server: Server, seed: object, n_tokens: int = N_HBM_TOKENS + 1000) -> None:
    """Send that many tokens of other prompts, one after another; by default more than HBM holds."""
    for start in range(0, n_tokens, 1000):
        server.generate(prompt((seed, start), min(1000, n_tokens - start)), 1)


@dataclass(frozen=True)
class Tolerance:
    """How far logprobs of one prompt's answers may be from each other; measured on stock SGLang."""

    logprob: float

    def check(self, answer: Answer, reference: Answer) -> None:
        """The same tokens, with the same logprobs up to the tolerance.

        Greedy decoding amplifies: where two candidates are closer than the tolerance either may win, and what follows
        has nothing in common. So the first token that differs ends the comparison, if its logprob is that close.
        """
        assert len(answer.tokens) == len(reference.tokens) > 0
        pairs = zip(answer.tokens, reference.tokens, answer.logprobs, reference.logprobs, strict=True)
        for position, (token, expected, logprob, expected_logprob) in enumerate(pairs):
            assert abs(logprob - expected_logprob) <= self.logprob + ROUNDING, (
                f"token {position} of {answer.rid}: {token} at {logprob}, and {expected} at {expected_logprob}"
            )
            if token != expected:
                break


def greatest_gap(answers: Sequence[Answer], references: Sequence[Answer]) -> float:
    """The greatest distance of two logprobs up to and with the first token that differs.

    Behind that token nothing is compared, so one of the two may end sooner.
    """
    gap = 0.0
    for answer, reference in zip(answers, references, strict=True):
        pairs = zip(answer.tokens, reference.tokens, answer.logprobs, reference.logprobs, strict=False)
        for token, expected, logprob, expected_logprob in pairs:
            gap = max(gap, abs(logprob - expected_logprob))
            if token != expected:
                break
    return gap
