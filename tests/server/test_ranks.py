"""Two ranks that see the end of a copy at different times: they decide alike all the same, and nobody waits for ever.

One rank is slow at random: its copies, and its calls on the scheduler thread. A hang ends a test by the time-out of a
request, with the stacks of both ranks; that the ranks hold the same in the same order at all times is asserted by
`check_at_rest`, which compares a digest over all moments at which the probe looked.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.server.conftest import CACHED, PLAIN, Fleet, at_tp, check_at_rest
from tests.server.traffic import PAGE_SIZE, Prompt, Tolerance, greatest_gap, prompt, push_out, reusable
from tests.support.inspection import Faults
from tests.support.server import Answer, Server

pytestmark = pytest.mark.server

N_REQUESTS = 500
N_CLIENTS = 24
N_NEW_TOKENS = 8
N_NEW_TOKENS_OF_LONG = 250
"""Four prompts that go on for so long need more than HBM has, and SGLang lets them begin."""


@dataclass(frozen=True)
class Work:
    """Prompts with shared beginnings, how far each is to be continued, and what stock SGLang answers."""

    prompts: Sequence[Prompt]
    n_new_tokens: Sequence[int]
    references: Sequence[Answer]
    tolerance: Tolerance


@pytest.fixture
def pair(fleet: Fleet) -> Iterator[Server]:
    """Two ranks with our cache, empty."""
    server = fleet.get(at_tp(CACHED, 2))
    server.flush()
    yield server
    check_at_rest(server)


@pytest.fixture(scope="module")
def work(fleet: Fleet) -> Work:
    """What batches and retractions do to the answers is measured on stock SGLang, by the same work in two orders."""
    trunks = [prompt(("trunk", number), 160 + 90 * number) for number in range(6)]
    prompts = [trunk + prompt(("leaf", number), 30 + 7 * number) for trunk in trunks for number in range(8)]
    prompts += [prompt(("chunks", number), 1400) for number in range(4)]
    n_new_tokens = [N_NEW_TOKENS] * len(prompts)
    prompts += [prompt(("long", number), 64) for number in range(20)]
    n_new_tokens += [N_NEW_TOKENS_OF_LONG] * 20
    server = fleet.get(at_tp(PLAIN, 2))
    orders = [list(range(len(prompts))), random.Random(2).sample(range(len(prompts)), len(prompts))]
    answers = [_in_order(server, prompts, n_new_tokens, order) for order in orders]
    return Work(prompts, n_new_tokens, answers[0], Tolerance(3 * greatest_gap(answers[1], answers[0])))


def _in_order(server: Server, prompts: Sequence[Prompt], n_new_tokens: Sequence[int], order: list[int]) -> list[Answer]:
    def send(number: int) -> tuple[int, Answer]:
        return number, server.generate(prompts[number], n_new_tokens[number], ignore_eos=False)

    server.flush()
    with ThreadPoolExecutor(N_CLIENTS) as threads:
        return [answer for _, answer in sorted(threads.map(send, order), key=lambda pair: pair[0])]


@pytest.mark.parametrize("slow_rank", [1, 0])
def test_random_requests_with_a_slow_rank(pair: Server, work: Work, slow_rank: int) -> None:
    before = pair.probe.inspect()
    n_lines = len(pair.log_lines("Retract requests"))
    with pair.probe.faults(Faults(rank=slow_rank, copy_delay_s=0.03, call_delay_s=0.01)):
        load = _Load(pair, work, seed=slow_rank)
        load.run()
    after = check_at_rest(pair)

    assert load.ends.total() == N_REQUESTS
    assert load.ends["answered"] > N_REQUESTS / 2
    assert load.ends["aborted"] > 10
    assert load.ends["disconnected"] > 10
    assert len(pair.log_lines("Retract requests")) > n_lines
    assert load.host_tokens > 0
    assert after.restored - before[0].restored > 100
    assert after.stats["evicted"] > before[0].stats["evicted"]
    delays = [now.n_delays - then.n_delays for now, then in zip(pair.probe.inspect(), before, strict=True)]
    assert delays[slow_rank] > 200
    assert delays[1 - slow_rank] == 0


class _Load:
    """`N_REQUESTS` requests by `N_CLIENTS` threads, each sending one after another. The first error ends all."""

    def __init__(self, server: Server, work: Work, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self.host_tokens = 0
        self._server = server
        self._work = work
        self._seed = seed
        self._lock = threading.Lock()
        self._numbers = iter(range(N_REQUESTS))
        self._is_over = False

    def run(self) -> None:
        with ThreadPoolExecutor(N_CLIENTS) as threads:
            for client in [threads.submit(self._client) for _ in range(N_CLIENTS)]:
                client.result()

    def _client(self) -> None:
        try:
            while (number := self._next()) is not None:
                self._send(number)
        except BaseException:
            self._is_over = True
            raise

    def _next(self) -> int | None:
        with self._lock:
            return None if self._is_over else next(self._numbers, None)

    def _send(self, number: int) -> None:
        chance = random.Random(1000 * self._seed + number)
        which = chance.randrange(len(self._work.prompts))
        rid = f"{self._seed}-{number}"
        ways: list[tuple[Callable[[int, str, random.Random], str], int]] = [
            (self._answered, 60),
            (self._streamed, 20),
            (self._disconnected, 10),
            (self._aborted, 10),
        ]
        (way,) = chance.choices([way for way, _ in ways], [weight for _, weight in ways])
        end = way(which, rid, chance)
        with self._lock:
            self.ends[end] += 1

    def _answered(self, which: int, rid: str, _chance: random.Random) -> str:
        answer = self._server.generate(
            self._work.prompts[which], self._work.n_new_tokens[which], rid=rid, ignore_eos=False
        )
        self._check(answer, which)
        return "answered"

    def _streamed(self, which: int, rid: str, _chance: random.Random) -> str:
        tokens, n_new = self._work.prompts[which], self._work.n_new_tokens[which]
        with self._server.stream(tokens, n_new, rid=rid, ignore_eos=False) as answers:
            *_, last = answers
        self._check(last, which)
        return "streamed"

    def _disconnected(self, which: int, rid: str, chance: random.Random) -> str:
        """Somewhere between the first token and the last."""
        with self._server.stream(self._work.prompts[which], N_NEW_TOKENS_OF_LONG, rid=rid) as answers:
            for _ in range(chance.randrange(3)):
                next(answers)
        return "disconnected"

    def _aborted(self, which: int, rid: str, chance: random.Random) -> str:
        """Before it is admitted, while it is prefilled, or later."""
        with self._server.stream(self._work.prompts[which], N_NEW_TOKENS_OF_LONG, rid=rid) as answers:
            for _ in range(chance.randrange(2)):
                next(answers)
            self._server.abort(rid)
            *_, last = answers
        assert last.finish_reason == "abort", last
        return "aborted"

    def _check(self, answer: Answer, which: int) -> None:
        self._work.tolerance.check(answer, self._work.references[which])
        with self._lock:
            self.host_tokens += answer.host_tokens


def test_copy_that_fails_on_one_rank_has_failed(pair: Server) -> None:
    tokens = prompt("one rank fails", 700)
    before = pair.at_rest()
    with pair.probe.faults(Faults(rank=1, n_failing_offloads=1000)):
        cold = pair.generate(tokens)
        failed = check_at_rest(pair)
    push_out(pair, "one rank fails")
    again = pair.generate(tokens)
    push_out(pair, "one rank fails again")
    kept = pair.generate(tokens)

    assert failed.stats["failed"] - before.stats["failed"] >= reusable(tokens) // PAGE_SIZE
    assert failed.host["resident"] == 0
    assert (again.cached_tokens, again.tokens) == (0, cold.tokens)
    assert (kept.host_tokens, kept.tokens) == (reusable(tokens), cold.tokens)
