"""Many requests at once, more than HBM holds: the answers are stock SGLang's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import Tolerances, check_at_rest
from tests.server.traffic import Prompt, greatest_gap, prompt
from tests.support.server import Answer, Server

pytestmark = pytest.mark.server


def test_32_at_once_twice(cached: Server, plain: Server, tolerances: Tolerances) -> None:
    shared = [prompt(("shared", number), 320) for number in range(4)]
    prompts = [trunk + prompt(("tail", number), 40 + 9 * number) for number in range(4) for trunk in shared]
    prompts += [prompt(("distinct", number), 150 + 20 * number) for number in range(16)]
    assert len(prompts) == 32

    references = plain.generate_all(prompts, 12)
    first = cached.generate_all(prompts, 12)
    second = cached.generate_all(prompts, 12)

    for answer, reference in zip(first + second, references * 2, strict=True):
        tolerances.batched.check(answer, reference)
    assert sum(answer.host_tokens for answer in second) > sum(len(tokens) for tokens in prompts) // 4


def test_retraction(cached: Server, plain: Server, tolerances: Tolerances) -> None:
    """Decodes outgrow HBM: SGLang takes some back into the queue, and computes what they had decoded by prefill.

    Stock SGLang's own answers then depend on who was taken back when, so it is compared with itself on this workload.
    """
    prompts = [prompt(("retracted", number), 64) for number in range(32)]
    before = cached.at_rest()
    n_lines = len(cached.log_lines("Retract requests"))
    answers = cached.generate_all(prompts, 250, ignore_eos=False)
    after = cached.at_rest()

    assert len(cached.log_lines("KV cache pool is full. Retract requests")) > n_lines
    assert after.stats["offloaded"] > before.stats["offloaded"]
    assert min(len(answer.tokens) for answer in answers) > 64
    references = plain.generate_all(prompts, 250, ignore_eos=False)
    again = plain.generate_all(prompts[::-1], 250, ignore_eos=False)[::-1]
    own_gap = max(greatest_gap(again, references), tolerances.batched.logprob)
    assert greatest_gap(answers, references) <= 2 * own_gap


N_REQUESTS = 520
N_NEW_TOKENS = 6


def test_random_500(cached: Server, plain: Server, tolerances: Tolerances) -> None:
    """Random branching prompts, alone and several at once, over a working set larger than host memory."""
    batches = list(_batches(seed=1))
    prompts = [tokens for batch in batches for tokens in batch]
    before = cached.at_rest()
    with ThreadPoolExecutor(1) as threads:
        references = threads.submit(_send, plain, batches)
        answers = _send(cached, batches)
    after = check_at_rest(cached)

    n_equal = 0
    for answer, reference in zip(answers, references.result(), strict=True):
        tolerances.batched.check(answer, reference)
        n_equal += (answer.tokens, answer.logprobs) == (reference.tokens, reference.logprobs)
    assert len(answers) >= 500
    assert n_equal > len(answers) / 2  # to the last bit, though batches differ: wrong KV would change every logprob
    assert sum(answer.host_tokens for answer in answers) >= 0.3 * sum(len(tokens) for tokens in prompts)
    assert any(answer.host_tokens > 0 < answer.device_tokens for answer in answers)
    assert after.stats["evicted"] - before.stats["evicted"] >= 1000
    assert after.checked - before.checked >= 1000
    assert after.n_checks > before.n_checks


def _send(server: Server, batches: list[list[Prompt]]) -> list[Answer]:
    return [answer for batch in batches for answer in server.generate_all(batch, N_NEW_TOKENS)]


def _batches(seed: int) -> Iterator[list[Prompt]]:
    """Walks a random tree of prompts that grows and forgets, and gives 1 to 5 of them at a time."""
    chance = random.Random(seed)
    paths = [prompt((seed, number), chance.randint(200, 400)) for number in range(6)]
    n_left = N_REQUESTS
    while n_left:
        batch = [_next_prompt(chance, paths) for _ in range(min(n_left, chance.choice((1, 1, 2, 3, 5))))]
        n_left -= len(batch)
        yield batch


def _next_prompt(chance: random.Random, paths: list[Prompt]) -> Prompt:
    """A known path, a part of one, or one with a new branch, which is known from then on."""
    path = chance.choice(paths)
    action = chance.random()
    if action < 0.75:
        return path
    head = path[: chance.randint(1, len(path))]
    if action < 0.85:
        return head
    branch = head[:800] + chance.choices(range(100, 8000), k=chance.randint(20, 600))
    if len(paths) < 40:
        paths.append(branch)
    else:
        paths[chance.randrange(len(paths))] = branch
    return branch
