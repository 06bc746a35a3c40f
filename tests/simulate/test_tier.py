"""The simulated tier keeps the contract of every tier, evicts by its policy, and tells what moving takes."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest

from hicache import Batch, Tier
from hicache.ssd.endurance import ROW_NBYTES
from radix import POLICIES
from sgl_lmcache.simulate.machine import TierModel
from sgl_lmcache.simulate.tier import SimulatedTier
from tests.hicache.tier_contract import PAGE_NBYTES, TierContract, batch, chain
from tests.support.clock import Clock
from tests.support.tiers import split

MODEL = TierModel(read=1000 * PAGE_NBYTES, write=500 * PAGE_NBYTES, latency=0.25)
"""A millisecond a page up, two down."""


def simulated(
    n_pages: int, *, eviction: str = "lru", clock: Clock | None = None, endurance_nbytes: int | None = None
) -> SimulatedTier:
    return SimulatedTier(
        "ssd",
        n_pages,
        page_nbytes=PAGE_NBYTES,
        eviction=eviction,
        model=MODEL,
        clock=clock or Clock(),
        endurance_nbytes=endurance_nbytes,
    )


class WithBytes(SimulatedTier):
    """One that keeps bytes after all, so that the contract can look at them."""

    def __init__(self, slab: npt.NDArray[np.uint8], n_pages: int) -> None:
        super().__init__("ssd", n_pages, page_nbytes=PAGE_NBYTES, eviction="lru", model=MODEL, clock=Clock())
        self._slab = slab
        self._bytes: dict[bytes, npt.NDArray[np.uint8]] = {}

    def store(self, batch: Batch) -> Future[int]:
        for key, slot in zip(split(batch.keys), batch.slots, strict=True):
            self._bytes.setdefault(key, self._slab[slot].copy())
        return super().store(batch)

    def load(self, batch: Batch) -> Future[int]:
        future = super().load(batch)
        for key, slot in zip(split(batch.keys)[: future.result()], batch.slots, strict=False):
            self._slab[slot] = self._bytes[key]
        return future

    def clear(self) -> Future[int]:
        self._bytes.clear()
        return super().clear()


class TestSimulatedTier(TierContract):
    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return WithBytes(slab, limit_pages)


@pytest.mark.parametrize("eviction", POLICIES)
def test_what_is_stored_makes_others_leave_leaf_first(eviction: str) -> None:
    tier = simulated(6, eviction=eviction)
    assert tier.store(batch(4, "a")).result() == 4
    assert tier.store(batch(4, "b")).result() == 4
    tier.check_invariants()
    assert tier.exists(chain(4, "a")[0]).result() == 2
    assert tier.exists(chain(4, "b")[0]).result() == 4
    assert tier.stats() == {"read": 0, "written": 8, "evicted": 2, "skipped": 0}


def test_what_was_loaded_or_touched_goes_last() -> None:
    tier = simulated(6)
    for seed in ("a", "b", "c"):
        tier.store(batch(2, seed))
    tier.load(batch(2, "a"))
    tier.touch(chain(2, "b")[0][-32:])
    tier.store(batch(2, "d"))
    assert [tier.exists(chain(2, seed)[0]).result() for seed in "abcd"] == [2, 2, 0, 2]
    tier.check_invariants()


def test_pages_below_a_page_that_is_not_here_are_not_stored() -> None:
    tier = simulated(6)
    assert tier.store(batch(4, "a").part(2, 4)).result() == 0
    tier.store(batch(4, "a").part(0, 2))
    assert tier.store(batch(4, "a").part(2, 4)).result() == 2
    tier.check_invariants()


def test_a_path_does_not_make_room_for_its_own_end() -> None:
    tier = simulated(3)
    assert tier.store(batch(5, "a")).result() == 3
    assert tier.store(batch(5, "a").part(3, 5)).result() == 0
    assert tier.exists(chain(5, "a")[0]).result() == 3
    assert tier.stats() == {"read": 0, "written": 3, "evicted": 0, "skipped": 4}
    tier.check_invariants()


def test_reads_queue_behind_reads() -> None:
    clock = Clock()
    tier = simulated(8, clock=clock)
    clock.now_s = 10.0
    tier.store(batch(8, "a"))
    tier.load(batch(2, "a"))
    assert tier.read_until_s == pytest.approx(10.0 + 0.25 + 0.002)
    tier.load(batch(4, "a"))
    assert tier.read_until_s == pytest.approx(10.252 + 0.25 + 0.004)
    assert tier.expected_load_s(1) == pytest.approx(0.506 + 0.25 + 0.001)
    clock.now_s = 20.0
    assert tier.expected_load_s(8) == pytest.approx(0.25 + 0.008)


def test_no_more_is_written_than_the_endurance_budget_allows() -> None:
    clock = Clock()
    limit_nbytes = 100 * (PAGE_NBYTES + ROW_NBYTES)
    tier = simulated(50, clock=clock, endurance_nbytes=limit_nbytes)
    assert tier.store(batch(20, "new")).result() == 0
    for hour in range(24):
        clock.now_s = 3600.0 * hour
        tier.store(batch(20, f"hour {hour}"))
        tier.check_invariants()
    written = tier.stats()["written"]
    assert 50 < written <= 100
    assert written + tier.stats()["skipped"] == 25 * 20


def test_a_load_of_nothing_takes_no_time() -> None:
    tier = simulated(8)
    assert tier.load(batch(4, "a")).result() == 0
    assert tier.read_until_s == 0.0
