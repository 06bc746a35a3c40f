"""What is asked of every system: the requests of each workload, the same for all systems in the same round.

A workload is made anew for each round, of tokens that no other round has, so that what is left in a cache from the
round before helps nobody. A round begins with what fills the caches; then comes what is counted. All sizes are here,
and docs/benchmarks.md has them in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

Tokens = tuple[int, ...]

COLD: Final = "cold"
"""The label of requests that fill the caches."""

WARM: Final = "warm"
"""The label of requests that are counted, where a workload has but one kind."""

RESTORED: Final = "restored"
ON_DEVICE: Final = "on device"

POOL_TOKENS: Final = 12_000
"""What HBM holds: less than any workload's set, but for the ones that share nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. label: what it is counted as. n_answer: how many tokens are to be generated, exactly.

    after: the position, in the workload, of an earlier request whose whole conversation, its answer included, comes
    before `tokens`; it has to be over first. window: how many tokens a conversation may have; above that its oldest
    turns are left out, but not its first.
    """

    label: str
    tokens: Tokens
    n_answer: int = 16
    after: int | None = None
    window: int | None = None


Phase = Sequence[Request]
"""Requests of which each but the first ones waits for a user to be free. A phase begins when the one before is over."""


@dataclass(frozen=True, slots=True)
class Workload:
    """counted: the labels that make up its figures. n_users: how many ask at the same time (closed loop). rate:
    arrivals a second of a Poisson process instead, of what is counted (open loop). make: the phases of a round."""

    name: str
    about: str
    make: Callable[[Random], list[Phase]]
    counted: tuple[str, ...] = (WARM,)
    n_users: int = 1
    rate: float | None = None
    pool_tokens: int = POOL_TOKENS
    n_rounds: int = 3

    def of_round(self, number: int) -> list[Phase]:
        """The same for the same number, in any process."""
        return self.make(Random(f"{self.name} {number}"))


def words(rng: Random, n: int) -> Tokens:
    """Random tokens of the models that are made here; two such runs share no page."""
    return tuple(rng.randrange(10, 4000) for _ in range(n))


# ---- the workloads ----


def restore(n_tokens: int, n_prompts: int) -> Callable[[Random], list[Phase]]:
    """Prompts that take turns in HBM, each asked twice in a row: from the cache below, then from HBM."""

    def make(rng: Random) -> list[Phase]:
        prompts = [words(rng, n_tokens) for _ in range(n_prompts)]
        twice = [Request(label, prompt, 4) for prompt in prompts for label in (RESTORED, ON_DEVICE)]
        return [[Request(COLD, prompt, 4) for prompt in prompts], twice]

    return make


def rag(n_documents: int, n_tokens: int, n_questions: int, n_question: int = 48) -> Callable[[Random], list[Phase]]:
    """Documents, of which each has been asked once, and then questions on them in random order."""

    def make(rng: Random) -> list[Phase]:
        documents = [words(rng, n_tokens) for _ in range(n_documents)]
        asked = documents * n_questions
        rng.shuffle(asked)
        return [
            [Request(COLD, document + words(rng, n_question)) for document in documents],
            [Request(WARM, document + words(rng, n_question)) for document in asked],
        ]

    return make


def chat(
    n_users: int, n_turns: int, n_turn: int, window: int | None = None, n_system: int = 200
) -> Callable[[Random], list[Phase]]:
    """Conversations behind one system prompt, one turn of each after another, so that all others come in between."""

    def make(rng: Random) -> list[Phase]:
        system = words(rng, n_system)
        first = [Request(COLD, system + words(rng, n_turn)) for _ in range(n_users)]
        more = [
            Request(WARM, words(rng, n_turn), after=position, window=window)
            for position in range(n_users * (n_turns - 1))
        ]
        return [first, more]

    return make


def code(n_files: int, n_tokens: int, n_completions: int) -> Callable[[Random], list[Phase]]:
    """Completion while files are edited: all that stands before the cursor, which moves some lines on, or back up."""

    def make(rng: Random) -> list[Phase]:
        files = [words(rng, 2 * n_tokens) for _ in range(n_files)]
        cursors = [n_tokens] * n_files
        opened = [Request(COLD, file[:n_tokens]) for file in files]
        typed = []
        for _ in range(n_completions):
            for number, file in enumerate(files):
                cursors[number] += rng.choice((40, 40, 80, -400))
                typed.append(Request(WARM, file[: cursors[number]]))
        return [opened, typed]

    return make


def agents(n_kinds: int, n_system: int, n_tasks: int, n_steps: int, n_step: int) -> Callable[[Random], list[Phase]]:
    """Tasks that take steps behind a long prompt of tools that all tasks of a kind share."""

    def make(rng: Random) -> list[Phase]:
        kinds = [words(rng, n_system) for _ in range(n_kinds)]
        warm_up = [Request(COLD, kind + words(rng, n_step)) for kind in kinds]
        steps: list[Request] = []
        for _ in range(n_tasks):
            begun = len(warm_up) + len(steps)
            steps += [Request(WARM, kind + words(rng, n_step)) for kind in kinds]
            for step in range(1, n_steps):
                before = begun + (step - 1) * n_kinds
                steps += [Request(WARM, words(rng, n_step), after=before + kind) for kind in range(n_kinds)]
        return [warm_up, steps]

    return make


def short(n_prompts: int) -> Callable[[Random], list[Phase]]:
    """Prompts under 1,000 tokens that share nothing: where a cache has nothing to give and must cost nothing."""

    def make(rng: Random) -> list[Phase]:
        return [[Request(WARM, words(rng, 100 + 850 * number // n_prompts), 4) for number in range(n_prompts)]]

    return make


def nothing_shared(n_prompts: int, n_tokens: int, n_answer: int) -> Callable[[Random], list[Phase]]:
    def make(rng: Random) -> list[Phase]:
        return [[Request(WARM, words(rng, n_tokens), n_answer) for _ in range(n_prompts)]]

    return make


def burst(n_requests: int, n_tokens: int) -> Callable[[Random], list[Phase]]:
    """One prompt that nobody has seen, from many users at the same moment."""

    def make(rng: Random) -> list[Phase]:
        return [[Request(WARM, words(rng, n_tokens), 4)] * n_requests]

    return make


def _restores(*shapes: tuple[int, int, int]) -> tuple[Workload, ...]:
    return tuple(
        Workload(
            f"restore-{n_tokens // 1000}k",
            f"{n_prompts} prompts of {n_tokens:,} tokens take turns, each asked twice in a row",
            restore(n_tokens, n_prompts),
            counted=(RESTORED,),
            pool_tokens=pool_tokens,
        )
        for n_tokens, n_prompts, pool_tokens in shapes
    )


_RAG = Workload(
    "rag",
    "8 documents of 3,000 tokens; 3 questions of 48 tokens on each, in random order",
    rag(8, 3000, 3),
    n_users=2,
)
_CHAT = Workload(
    "chat",
    "8 users with 10 turns of 300 tokens, behind a system prompt of 200",
    chat(8, 10, 300),
    n_users=2,
)

FULL: Final = (
    *_restores((2000, 10, POOL_TOKENS), (4000, 5, POOL_TOKENS), (8000, 3, POOL_TOKENS), (16_000, 3, 24_000)),
    _RAG,
    replace(_RAG, name="rag-open", about=f"{_RAG.about}; 0.5 arrivals a second (Poisson)", rate=0.5),
    _CHAT,
    replace(_CHAT, name="chat-open", about=f"{_CHAT.about}; 1 arrival a second (Poisson)", rate=1.0),
    Workload(
        "chat-truncated",
        "the same, and above 1,500 tokens the oldest turns behind the first are left out",
        chat(8, 10, 300, 1500),
        n_users=2,
    ),
    Workload(
        "code",
        "4 files of some 4,000 tokens; 6 completions in each, the cursor 40 or 80 tokens on or 400 back",
        code(4, 4000, 6),
        n_users=2,
    ),
    Workload(
        "agents",
        "3 kinds of agents with prompts of 4,000 tokens; 3 tasks of each, with 3 steps of 150 tokens",
        agents(3, 4000, 3, 3, 150),
        n_users=2,
    ),
    Workload("short", "30 prompts of 100 to 950 tokens that share nothing", short(30), n_rounds=9),
    Workload(
        "no-reuse",
        "16 prompts of 512 tokens that share nothing, 32 tokens each, 8 at a time",
        nothing_shared(16, 512, 32),
        n_users=8,
        n_rounds=9,
    ),
    Workload("burst", "one prompt of 2,001 tokens from 64 users at once", burst(64, 2001), n_users=64),
)
"""All of them."""

QUICK: Final = (
    *(replace(workload, n_rounds=1) for workload in _restores((2000, 5, 5000))),
    Workload(
        "rag",
        "4 documents of 2,000 tokens; 2 questions of 48 tokens on each, in random order",
        rag(4, 2000, 2),
        n_users=2,
        pool_tokens=5000,
        n_rounds=2,
    ),
    Workload(
        "chat",
        "8 users with 5 turns of 300 tokens, behind a system prompt of 200",
        chat(8, 5, 300),
        n_users=2,
        pool_tokens=5000,
        n_rounds=1,
    ),
)
"""Of `--quick`."""
