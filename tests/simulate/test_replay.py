"""One run: tiny traces worked out by hand, and what has to hold for any."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache import WRITE_POLICIES
from radix import POLICIES
from sgl_lmcache.config import Prefetch, PrefetchPolicy
from sgl_lmcache.simulate.machine import CONTEXT_TOKENS, TIER_MODELS, Machine, TierModel
from sgl_lmcache.simulate.replay import LowerPlan, Outcome, Plan, Replay, replay
from sgl_lmcache.simulate.tier import TierCounters
from sgl_lmcache.simulate.trace import Trace
from tests.simulate.traces import BLOCK, blocks, conversations, line, trace_of

PAGE_NBYTES = 1000 * BLOCK
MACHINE = Machine(
    token_nbytes=1000,
    tokens_per_s=1600.0,
    tiers={
        **TIER_MODELS,
        "host": TierModel(read=10 * PAGE_NBYTES, write=1.0, latency=0.0),
        "ssd": TierModel(read=4 * PAGE_NBYTES, write=1 * PAGE_NBYTES, latency=0.5),
    },
)
"""A block takes 40 ms and little more, restoring a page 100 ms, reading one from the SSD 250 ms and half a second."""


def run(trace: Trace, plan: Plan, *, machine: Machine = MACHINE, count_from: int = 0) -> Outcome:
    return replay(trace, plan, machine, count_from=count_from, progress=lambda _: None)


def ssd(n_pages: int, write: str = "through", eviction: str = "lru") -> LowerPlan:
    return LowerPlan("ssd", n_pages, write, eviction)


def plan_of(n_slots: int, *lower: LowerPlan, policy: str = "lru", prefetch: PrefetchPolicy = "wait") -> Plan:
    return Plan(policy, n_slots, lower, Prefetch(prefetch))


# ---- by hand ----


def test_host_memory_alone() -> None:
    """Four slots. abc is there for its second request; then de pushes c and b out, the leaves of what is older."""
    trace = blocks(["a", "b", "c"], ["a", "b", "c"], ["d", "e", "f"], ["a", "b"], ["d", "x"])
    outcome = run(trace, plan_of(4))
    assert outcome.hits.tolist() == [[0], [3], [0], [1], [1]]
    assert outcome.traffic == (TierCounters(read=3 + 1 + 1, written=3 + 0 + 3 + 1 + 1, evicted=2 + 1 + 1),)


def test_only_traffic_from_a_request_on_counts() -> None:
    trace = blocks(["a", "b", "c"], ["a", "b", "c"], ["d", "e", "f"], ["a", "b"], ["d", "x"])
    assert run(trace, plan_of(4), count_from=3).traffic == (TierCounters(read=2, written=2, evicted=2),)
    assert run(trace, plan_of(4), count_from=4).traffic == (TierCounters(read=1, written=1, evicted=1),)


def test_a_prompt_longer_than_host_memory_keeps_its_head() -> None:
    outcome = run(blocks([*"abcde"], [*"abcde"]), plan_of(3))
    assert outcome.hits.tolist() == [[0], [3]]
    assert outcome.traffic == (TierCounters(read=3, written=3, skipped=2 + 2),)


def test_an_ssd_brings_back_what_host_memory_has_evicted() -> None:
    """What is computed goes to the SSD as well, a quarter of host memory at a time."""
    trace = blocks(["a", "b"], [*"cdefghij"], ["a", "b", "x"])
    outcome = run(trace, plan_of(8, ssd(100)))
    assert outcome.hits.tolist() == [[0, 0], [0, 0], [0, 2]]
    assert outcome.traffic == (
        TierCounters(read=2, written=2 + 8 + 2 + 1, evicted=2 + 2 + 1),
        TierCounters(read=2, written=2 + 8 + 1),
    )


@pytest.mark.parametrize(
    ("write", "n_written", "n_fetched"),
    [("through", 2 + 6 + 1 + 1, 2), ("selective", 0, 0), ("back", 2 + 6, 2)],
)
def test_when_the_ssd_is_written(write: str, n_written: int, n_fetched: int) -> None:
    """Eight slots: two pages may be on their way down at a time.

    `through` writes all. `back` keeps one page ready to be dropped, which b is when memory is full; the path to it goes
    down. When i and j have pushed out b and a it is h, so the path to that one goes down, two pages at a time.
    """
    trace = blocks(["a", "b"], [*"cdefgh"], ["i"], ["j"], ["a", "b"])
    outcome = run(trace, plan_of(8, ssd(100, write)))
    assert outcome.hits.sum(axis=0).tolist() == [0, n_fetched]
    assert outcome.traffic[1].written == n_written


def test_a_second_use_is_written_by_selective() -> None:
    trace = blocks(["a", "b"], ["a", "b"], [*"cdefghij"], ["a", "b"])
    outcome = run(trace, plan_of(8, ssd(100, "selective")))
    assert outcome.hits.tolist() == [[0, 0], [2, 0], [0, 0], [0, 2]]


def test_two_tiers_each_bring_their_share() -> None:
    """The SSD has what was used twice, the store behind it everything."""
    trace = blocks(["a"], ["a"], ["a", "b"], [*"cdefghijklmnopqr"], ["a", "b"])
    outcome = run(trace, plan_of(16, ssd(100, "selective"), LowerPlan("valkey", 100, "through", "lru")))
    assert outcome.hits.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert [tier.read for tier in outcome.traffic] == [4, 1, 1]


def test_the_time_to_the_first_token_by_hand() -> None:
    trace = blocks(["a", "b"], ["a", "b", "c"])
    outcome = run(trace, plan_of(8))
    cold_s = (128 + 128**2 / 2 / CONTEXT_TOKENS) / 1600
    rest_s = (64 + (192**2 - 128**2) / 2 / CONTEXT_TOKENS) / 1600
    assert outcome.ttft_s.tolist() == pytest.approx([cold_s, 2 / 10 + rest_s])


def test_a_fetch_is_waited_for_behind_another() -> None:
    requests = [line(["a", "b"]), line([*"cdefghij"]), line(["a", "b"], at_ms=10_000), line(["c"], at_ms=10_500)]
    outcome = run(trace_of(requests), plan_of(8, ssd(100)))
    assert outcome.hits[2:].tolist() == [[0, 2], [1, 0]]
    last_s = MACHINE.prefill_s(127, 128)
    assert outcome.ttft_s[2] == pytest.approx(0.5 + 2 / 4 + 2 / 10 + last_s)


def test_auto_computes_what_is_slower_to_fetch() -> None:
    """Reading a page takes longer than computing it, which is known when one was read."""
    trace = blocks(["a"], [*"cdefghij"], ["a"], [*"CDEFGHIJ"], ["a"])
    assert run(trace, plan_of(8, ssd(100), prefetch="wait")).hits[:, 1].tolist() == [0, 0, 1, 0, 1]
    assert run(trace, plan_of(8, ssd(100), prefetch="auto")).hits[:, 1].tolist() == [0, 0, 1, 0, 0]


def test_best_effort_waits_for_nothing() -> None:
    trace = blocks(["a", "b"], [*"cdefghij"], ["a", "b"], ["a", "b"])
    outcome = run(trace, plan_of(8, ssd(100), prefetch="best_effort"))
    assert outcome.hits.tolist() == [[0, 0], [0, 0], [0, 0], [2, 0]]
    assert outcome.ttft_s[2] == pytest.approx(MACHINE.prefill_s(0, 128))


def test_prompts_without_a_full_block() -> None:
    outcome = run(trace_of([line([], rest=3), line([]), line(["a"], rest=3), line([], rest=3)]), plan_of(2))
    assert outcome.hits.tolist() == [[0]] * 4
    assert outcome.ttft_s[0] == pytest.approx(MACHINE.prefill_s(0, 3))
    assert outcome.ttft_s[1] == pytest.approx(MACHINE.prefill_s(0, 1))


def test_a_prompt_that_is_all_there_computes_one_token() -> None:
    outcome = run(blocks(["a"], ["a"]), plan_of(2))
    assert outcome.ttft_s[1] == pytest.approx(1 / 10 + MACHINE.prefill_s(63, 64))


# ---- for any trace ----

SHAPES = [
    plan_of(12),
    plan_of(12, ssd(40)),
    plan_of(16, ssd(30, "selective"), LowerPlan("valkey", 60, "through", "lru"), prefetch="auto"),
    plan_of(16, ssd(40, "back"), prefetch="best_effort"),
]


def with_policy(plan: Plan, policy: str) -> Plan:
    lower = tuple(
        LowerPlan(tier.name, tier.n_pages, tier.write, policy if tier.name == "ssd" else tier.eviction)
        for tier in plan.lower
    )
    return Plan(policy, plan.n_slots, lower, plan.prefetch)


def same(first: Outcome, second: Outcome) -> None:
    assert np.array_equal(first.hits, second.hits)
    assert np.array_equal(first.ttft_s, second.ttft_s)
    assert first.traffic == second.traffic


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
class TestAnyTrace:
    def test_half_a_trace_gives_the_first_half(self, policy: str, shape: Plan) -> None:
        requests = conversations(160, seed=11)
        plan = with_policy(shape, policy)
        whole, half = run(trace_of(requests), plan), run(trace_of(requests[:80]), plan)
        assert np.array_equal(whole.hits[:80], half.hits)
        assert np.array_equal(whole.ttft_s[:80], half.ttft_s)
        assert half.hits.sum() > 30

    def test_the_numbers_of_the_ids_do_not_matter(self, policy: str, shape: Plan) -> None:
        requests = conversations(160, seed=12)
        ids = sorted({block for request in requests for block in request["hash_ids"]}, key=str)
        others = ids.copy()
        random.Random(3).shuffle(others)
        names = dict(zip(ids, others, strict=True))
        permuted = [{**r, "hash_ids": [names[block] for block in r["hash_ids"]]} for r in requests]
        plan = with_policy(shape, policy)
        same(run(trace_of(requests), plan), run(trace_of(permuted), plan))

    def test_a_second_run_is_the_same(self, policy: str, shape: Plan) -> None:
        trace = trace_of(conversations(100, seed=13))
        plan = with_policy(shape, policy)
        same(run(trace, plan), run(trace, plan))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    n_slots=st.integers(1, 30),
    n_below=st.integers(1, 60),
    write=st.sampled_from(sorted(WRITE_POLICIES)),
    prefetch=st.sampled_from(["auto", "wait", "best_effort"]),
)
def test_the_books_are_right_after_every_request(
    policy: str, seed: int, n_slots: int, n_below: int, write: str, prefetch: PrefetchPolicy
) -> None:
    trace = trace_of(conversations(40, seed=seed))
    plan = plan_of(n_slots, ssd(n_below, write, policy), policy=policy, prefetch=prefetch)
    one = Replay(trace, plan, MACHINE)
    n_hits = 0
    for request in range(len(trace)):
        hits, ttft_s = one.serve(request)
        one.check_invariants()
        assert not one.engine.is_pending
        assert min(hits) >= 0
        assert sum(hits) <= trace.starts[request + 1] - trace.starts[request]
        assert ttft_s > 0
        n_hits += sum(hits)
    host, below = one.traffic()
    assert host.read == n_hits
    assert host.written - host.evicted == one.engine.host.n_resident <= n_slots
    assert below.written - below.evicted <= n_below


def test_progress_ends_with_all_requests() -> None:
    trace = trace_of(conversations(600, seed=1))
    told: list[int] = []
    replay(trace, plan_of(10), MACHINE, count_from=0, progress=told.append)
    assert told == [0, 256, 512, 600]
