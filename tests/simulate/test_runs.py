"""Which runs there are, and that it does not matter where they run."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from radix import POLICIES
from sgl_lmcache.config import Config
from sgl_lmcache.config_file import parse
from sgl_lmcache.errors import StartError
from sgl_lmcache.quantities import Nbytes
from sgl_lmcache.simulate import runs
from sgl_lmcache.simulate.bound import clairvoyant_hits
from sgl_lmcache.simulate.machine import Assumption, Machine, assume
from sgl_lmcache.simulate.replay import LowerPlan, Plan
from sgl_lmcache.simulate.runs import MAX_PAGES, Capacity, Setup, pages_in, plan_of, run_all
from tests.simulate.traces import conversations, trace_of

HOST = Capacity(Fraction(1, 10), 7)
OTHER_POLICY = sorted(POLICIES)[-1]


@pytest.mark.parametrize(
    ("share", "n_blocks", "n_pages"),
    [
        (Fraction(1, 100), 170_899, 1708),
        (Fraction(1), 170_899, 170_899),
        (Fraction(1, 1000), 10, 1),
        (Fraction("0.3333333"), 3_000, 1_000),
        (Fraction("0.333"), 3_000, 999),
    ],
)
def test_a_share_is_whole_pages_and_one_at_least(share: Fraction, n_blocks: int, n_pages: int) -> None:
    assert Capacity.of_share(share, n_blocks) == Capacity(share, n_pages)


def test_a_share_that_says_so_many_pages_means_so_many() -> None:
    """As when a part of a trace is run with the room that the whole had."""
    for n_pages in range(1, 2000):
        assert Capacity.of_share(Fraction(f"{100 * n_pages / 1997:.7f}") / 100, 1997).n_pages == n_pages


def config_of(*tiers: dict[str, object]) -> Config:
    return parse({"tiers": [{"type": "host", "capacity": "1GiB"}, *tiers]}, source="test")


def plan(config: Config, machine: Machine | None = None, n_blocks: int = 1000) -> Plan:
    return plan_of(config, OTHER_POLICY, HOST, machine or Machine(), page_nbytes=1 << 20, n_blocks=n_blocks)


def test_the_tiers_of_the_configuration() -> None:
    config = config_of(
        {"type": "ssd", "path": "/kv", "capacity": "100MiB", "write": "back"},
        {"type": "mooncake", "master": "m:1", "segment": "50MiB"},
        {"type": "valkey", "url": "valkey://h", "write": "selective"},
    )
    assert plan(config).lower == (
        LowerPlan("ssd", 100, "back", OTHER_POLICY),
        LowerPlan("mooncake", 50, "through", "lru"),
        LowerPlan("valkey", 1000, "selective", "lru"),
    )
    assert plan(config).tiers == ("host", "ssd", "mooncake", "valkey")
    assert plan(config).n_pages == 7 + 100 + 50 + 1000


def test_an_ssd_keeps_the_policy_that_it_names() -> None:
    config = config_of({"type": "ssd", "path": "/kv", "capacity": "100MiB", "eviction": "lru"})
    assert plan(config).lower == (LowerPlan("ssd", 100, "through", "lru"),)


def test_an_ssd_keeps_to_its_endurance() -> None:
    config = config_of({"type": "ssd", "path": "/kv", "capacity": "100MiB", "endurance": "3GiB"})
    assert plan(config).lower == (LowerPlan("ssd", 100, "through", OTHER_POLICY, 3 << 30),)


def test_a_capacity_may_be_assumed() -> None:
    config = config_of(
        {"type": "ssd", "path": "/kv", "capacity": "1MiB"},
        {"type": "mooncake", "master": "m:1", "segment": 0},
        {"type": "valkey", "url": "valkey://h"},
    )
    said = [Assumption(name, "capacity", Nbytes(9 << 20)) for name in ("ssd", "mooncake", "valkey")]
    assert [tier.n_pages for tier in plan(config, Machine(tiers=assume(said))).lower] == [9, 9, 9]


def test_more_room_than_there_are_blocks_is_as_good_as_so_much() -> None:
    config = config_of({"type": "ssd", "path": "/kv", "capacity": "100TiB"})
    assert plan(config, n_blocks=12).lower == (LowerPlan("ssd", 12, "through", OTHER_POLICY),)


def test_what_has_no_room_for_a_page_is_refused() -> None:
    with pytest.raises(StartError, match=r"The ssd tier, 1,048,575 bytes, holds no page of 1,048,576 bytes; give it"):
        plan(config_of({"type": "ssd", "path": "/kv", "capacity": (1 << 20) - 1}))
    with pytest.raises(StartError, match=r"segment is 0, so the size of its pool is not known; give it with --assume"):
        plan(config_of({"type": "mooncake", "master": "m:1", "segment": 0}))
    with pytest.raises(
        StartError, match=r"The host tier has room for 268,435,457 pages of 2 bytes, and 268,435,456 are"
    ):
        pages_in("host", 2 * MAX_PAGES + 2, 2)


@pytest.fixture
def setup() -> Setup:
    return Setup(trace_of(conversations(120, seed=5)), Machine(), count_from=30)


def grid(setup: Setup) -> list[tuple[Capacity, Plan]]:
    n_blocks = setup.trace.n_blocks
    capacities = [Capacity.of_share(Fraction(percent, 100), n_blocks) for percent in (5, 20)]
    return [
        (c, Plan(policy, c.n_pages, (LowerPlan("ssd", 50, "through", policy),)))
        for c in capacities
        for policy in POLICIES
    ]


def test_runs_beside_each_other_give_the_same(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    here = run_all(setup, grid(setup), n_processes=1, progress=told.append)
    assert told[-1] == len(grid(setup)) * 120
    assert told == sorted(told)
    monkeypatch.setattr(runs, "SMALL", 0)
    beside = run_all(setup, grid(setup), n_processes=2, progress=told.append)
    assert told[-1] == len(grid(setup)) * 120
    assert [result.plan for result in beside] == [plan for _, plan in grid(setup)]
    for first, second in zip(here, beside, strict=True):
        assert first.capacity == second.capacity
        assert np.array_equal(first.outcome.hits, second.outcome.hits)
        assert np.array_equal(first.outcome.ttft_s, second.outcome.ttft_s)
        assert first.outcome.traffic == second.outcome.traffic


def test_the_bound_has_the_room_of_all_tiers_together(setup: Setup) -> None:
    for result in run_all(setup, grid(setup), n_processes=1, progress=lambda _: None):
        assert np.array_equal(result.bound_hits, clairvoyant_hits(setup.trace, result.capacity.n_pages + 50))
        assert result.outcome.hits.sum() <= result.bound_hits.sum()
