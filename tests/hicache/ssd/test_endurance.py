"""The endurance budget: no 24 hours see more than it, whatever happens, and running out of it is not a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache.ssd import SsdTier, StoreError
from hicache.ssd.endurance import (
    BURST_PARTS,
    COMMIT_NBYTES,
    MAP_PAGE_NBYTES,
    ROW_NBYTES,
    TELL_AGAIN_S,
    Endurance,
    pages_nbytes,
    smallest_limit,
    touches_nbytes,
)
from tests.hicache.ssd.stores import SLOT_NBYTES, Slab, make_slab, open_tier, pages, part, settle, wait_until
from tests.support.clock import Clock
from tests.support.disk import Disk

DAY_S = 86_400.0
PAGE_COST = SLOT_NBYTES + ROW_NBYTES

# ---- the bucket ----


def most_in_a_day(paid: list[tuple[float, int]]) -> int:
    """The most that was paid in any 24 hours, both ends included. `paid`: (when, how much), in order."""
    return max(
        (
            sum(nbytes for when_s, nbytes in paid[at:] if when_s - start_s <= DAY_S)
            for at, (start_s, _) in enumerate(paid)
        ),
        default=0,
    )


class Wearing:
    """A server that stores and notes last uses, is restarted, and has a clock that begins somewhere each time."""

    def __init__(self, limit_nbytes: int, slot_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.slot_nbytes = slot_nbytes
        self.now_s = 0.0
        self.paid: list[tuple[float, int]] = []
        self.restart(0.0)

    def restart(self, monotonic_s: float) -> None:
        """Stopped or killed: nothing is carried over."""
        ahead_s = monotonic_s - self.now_s
        self.endurance = Endurance(self.limit_nbytes, lambda: self.now_s + ahead_s)

    def store(self, n_pages: int) -> int:
        n_allowed = self.endurance.allowed_pages(n_pages, self.slot_nbytes)
        if n_allowed:
            self._pay(pages_nbytes(n_allowed, self.slot_nbytes))
        return n_allowed

    def note(self, slots: list[int]) -> None:
        nbytes = touches_nbytes(np.array(slots, np.int64))
        if self.endurance.left_nbytes >= nbytes:
            self._pay(nbytes)

    def _pay(self, nbytes: int) -> None:
        self.endurance.pay(nbytes)
        self.paid.append((self.now_s, nbytes))


STEPS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 2 * DAY_S)),
    st.tuples(st.just("wait"), st.floats(0, 600)),
    st.tuples(st.just("store"), st.integers(1, 3000)),
    st.tuples(st.just("note"), st.lists(st.integers(0, 10_000), max_size=20)),
    st.tuples(st.just("restart"), st.floats(0, 1e7)),
)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=60), st.integers(1 << 20, 1 << 32), st.sampled_from([4096, 393_216]))
def test_no_day_sees_more_than_the_budget(steps: list[tuple[str, Any]], limit_nbytes: int, slot_nbytes: int) -> None:
    server = Wearing(limit_nbytes, slot_nbytes)
    for what, value in steps:
        if what == "wait":
            server.now_s += value
        else:
            getattr(server, what)(value)
    assert most_in_a_day(server.paid) <= limit_nbytes


def test_a_busy_server_uses_seven_eighths_of_it_and_is_never_locked_out() -> None:
    server = Wearing(10**9, 4096)
    for _ in range(5 * 24 * 60):
        server.now_s += 60.0
        server.store(64)
    assert 0.99 * 5 * 7 / 8 < sum(nbytes for _, nbytes in server.paid) / 10**9 <= 5 * 7 / 8
    assert most_in_a_day(server.paid) <= 10**9
    longest_s = max(after - before for (before, _), (after, _) in zip(server.paid, server.paid[1:], strict=False))
    assert longest_s <= 60.0


def test_after_a_rest_an_eighth_may_go_at_once() -> None:
    server = Wearing(10**9, 4096)
    assert server.store(1 << 30) == 0
    server.now_s += DAY_S
    nbytes = pages_nbytes(server.store(1 << 30), 4096)
    assert 0.9 / BURST_PARTS < nbytes / 10**9 <= 1 / BURST_PARTS


def test_what_pages_leave_is_for_last_uses() -> None:
    server = Wearing(10**9, 4096)
    server.now_s += DAY_S
    server.store(1 << 30)
    assert server.store(1) == 0
    server.note(list(range(0, 3200, 16)))
    assert server.paid[-1][1] == 200 * MAP_PAGE_NBYTES + COMMIT_NBYTES


def test_a_clock_that_goes_back_gives_nothing_twice_and_locks_nothing_up() -> None:
    clock = Clock()
    clock.now_s = 1000.0
    endurance = Endurance(10**9, clock)
    clock.now_s = 2000.0
    left_nbytes = endurance.left_nbytes
    assert left_nbytes > 0
    for clock.now_s in (500.0, 1500.0, 2000.0):
        assert endurance.left_nbytes == left_nbytes
    clock.now_s = 3000.0
    assert endurance.left_nbytes == pytest.approx(2 * left_nbytes, abs=1)


def test_what_is_owed_is_paid_off_first() -> None:
    clock = Clock()
    endurance = Endurance(10**9, clock)
    endurance.pay(7 * 10**8)
    clock.now_s = 0.79 * DAY_S
    assert endurance.left_nbytes < 0
    assert endurance.allowed_pages(1, 4096) == 0
    clock.now_s = 0.81 * DAY_S
    assert endurance.left_nbytes > 0


@given(st.integers(1, 1 << 12))
def test_the_smallest_budget_allows_a_page_and_a_smaller_one_never_does(n_blocks: int) -> None:
    slot_nbytes = 4096 * n_blocks
    least = smallest_limit(slot_nbytes)
    for limit_nbytes, n_allowed in ((least, 1), (least - 2 * BURST_PARTS, 0)):
        clock = Clock()
        endurance = Endurance(limit_nbytes, clock)
        clock.now_s = 10 * DAY_S
        assert endurance.allowed_pages(5, slot_nbytes) == n_allowed


@given(st.lists(st.integers(0, 1 << 20), unique=True))
def test_last_uses_cost_a_page_of_the_map_for_each_run_of_slots(slots: list[int]) -> None:
    nbytes = touches_nbytes(np.array(slots, np.int64))
    assert nbytes == (len({slot // 16 for slot in slots}) * MAP_PAGE_NBYTES + COMMIT_NBYTES if slots else 0)


def test_it_is_told_at_once_and_then_once_an_hour_if_there_is_something_to_tell(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    endurance = Endurance(10**9, clock)
    told = []
    for now_s, n_refused in ((0, 0), (1, 2000), (2, 3000), (TELL_AGAIN_S + 1, 4000), (1e6, 4000)):
        clock.now_s = now_s
        endurance.tell("/kv", n_refused)
        told.append(len(caplog.messages))
    assert told == [0, 1, 1, 2, 2]
    assert caplog.messages[0] == (
        "sgl_lmcache: the endurance budget of /kv is used up for now: 2,000 pages have not been stored"
    )


# ---- the tier ----


@pytest.fixture
def slab() -> Slab:
    return make_slab()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(path: Path, slab: Slab, clock: Clock, **options: Any) -> SsdTier:
    """The clock leaps by days, and nothing that is under way then hangs."""
    return open_tier(path, slab, clock=clock, hang_after_s=math.inf, **options)


def limit_of(n_pages: int) -> int:
    """A budget whose bucket is full with about so many pages, stored one by one."""
    return BURST_PARTS * n_pages * (PAGE_COST + COMMIT_NBYTES) * 16 // 15


@pytest.fixture
def tier(tmp_path: Path, slab: Slab, clock: Clock) -> Iterator[SsdTier]:
    """Room for 64 pages, and a bucket of 40 that is full."""
    tier = opened(tmp_path, slab, clock, n_slots=64, endurance_nbytes=limit_of(40))
    clock.now_s = DAY_S
    settle(tier)
    yield tier
    tier.check_invariants()
    tier.close()


def use_up(tier: SsdTier) -> int:
    """Store pages one by one until one is refused. Returns how many were stored."""
    for number in range(1000):
        if tier.store(pages(1, f"use up {number}")).result() == 0:
            return number
    raise AssertionError("none was refused")


def test_beyond_the_budget_stores_are_refused_and_reads_go_on(
    tier: SsdTier, slab: Slab, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    n_stored = use_up(tier)
    assert 38 <= n_stored <= 42
    stats = tier.stats()
    for number in range(20):
        assert tier.store(pages(8, f"refused {number}")).result() == 0
    after = tier.stats()
    assert after["skipped_endurance"] - stats["skipped_endurance"] == 20 * 8
    assert (after["stored"], after["n_pages"], after["evicted"]) == (n_stored, n_stored, 0)
    assert (after["write_errors"], after["map_errors"], after["skipped_full"]) == (0, 0, 0)
    assert tier.health().available

    expected = slab[0].copy()
    slab[0] = 0
    assert tier.load(pages(1, "use up 3")).result() == 1
    assert np.array_equal(slab[0][:4000], expected[:4000])

    clock.now_s += 10.0  # the keeper looks every two seconds
    wait_until(lambda: bool(caplog.messages))
    settle(tier)
    assert len(caplog.messages) == 1
    assert "is used up for now" in caplog.messages[0]


def test_it_stores_again_when_time_has_passed(tier: SsdTier, clock: Clock) -> None:
    use_up(tier)
    clock.now_s += DAY_S / 100
    assert 1 <= use_up_again(tier) <= 4
    clock.now_s += DAY_S
    assert use_up_again(tier) >= 38


def use_up_again(tier: SsdTier) -> int:
    n_before = tier.stats()["stored"]
    for number in range(1000):
        if tier.store(pages(1, f"again {n_before} {number}")).result() == 0:
            return number
    raise AssertionError("none was refused")


def test_of_a_batch_the_head_is_stored_that_the_budget_allows(tier: SsdTier) -> None:
    batch = pages(64, "long")
    n_stored = tier.store(batch).result()
    assert 40 <= n_stored < 64
    assert tier.exists(batch.keys).result() == n_stored
    assert tier.stats()["skipped_endurance"] == 64 - n_stored
    assert tier.store(part(batch, 0, n_stored)).result() == n_stored  # they are there, and cost nothing
    assert tier.stats()["deduplicated"] == n_stored


def test_nothing_is_evicted_for_pages_that_may_not_be_stored(tier: SsdTier, clock: Clock) -> None:
    assert tier.store(pages(32, "first")).result() == 32
    clock.now_s += DAY_S
    assert tier.store(pages(32, "second", 32)).result() == 32
    assert tier.stats()["n_pages"] == 64
    n_left = use_up(tier)
    before = tier.stats()
    assert before["evicted"] >= n_left > 0
    for number in range(10):
        assert tier.store(pages(8, f"refused {number}")).result() == 0
    settle(tier)
    assert tier.stats()["n_pages"] == before["n_pages"]
    assert tier.stats()["evicted"] == before["evicted"]


def test_every_start_begins_with_an_empty_bucket(tmp_path: Path, slab: Slab, clock: Clock) -> None:
    limit_nbytes = limit_of(40)
    with closing(opened(tmp_path, slab, clock, endurance_nbytes=limit_nbytes)) as tier:
        assert tier.store(pages(4, "a")).result() == 0
        clock.now_s += DAY_S
        assert tier.store(pages(4, "a")).result() == 4
    with closing(opened(tmp_path, slab, clock, endurance_nbytes=limit_nbytes)) as tier:
        assert tier.load(pages(4, "a")).result() == 4
        assert tier.store(pages(4, "b")).result() == 0
        clock.now_s += DAY_S
        assert tier.store(pages(4, "b")).result() == 4
    with closing(opened(tmp_path, slab, clock)) as tier:
        assert tier.store(pages(4, "c")).result() == 4  # no budget any more


def test_ranks_have_an_equal_share(tmp_path: Path, slab: Slab, clock: Clock) -> None:
    options: dict[str, Any] = {"n_members": 2, "endurance_nbytes": limit_of(40)}
    with (
        closing(opened(tmp_path, slab, clock, member=(0, 2), **options)) as first,
        closing(opened(tmp_path, slab, clock, member=(1, 2), **options)) as second,
    ):
        clock.now_s += DAY_S
        assert [19 <= use_up(tier) <= 21 for tier in (first, second)] == [True, True]


def test_a_store_that_is_made_anew_under_a_server_does_not_renew_the_budget(
    tier: SsdTier, tmp_path: Path, clock: Clock
) -> None:
    use_up(tier)
    settle(tier)
    (tmp_path / "moved").mkdir()
    folder = tier._volume.spec.folder.path
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "moved" / file.name)
    clock.now_s += 5.0  # it is noticed
    wait_until(lambda: not tier.health().available)
    clock.now_s += 5.0  # and tried again
    wait_until(lambda: tier.health().available and not tier._volume.is_filling)
    assert tier.store(pages(1, "anew")).result() == 0
    clock.now_s += DAY_S
    wait_until(lambda: tier.store(pages(1, "anew")).result() == 1)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_last_uses_are_noted_only_if_there_is_enough(
    tmp_path: Path, slab: Slab, clock: Clock, is_allowed: bool
) -> None:
    with closing(opened(tmp_path, slab, clock, endurance_nbytes=10**9)) as tier:
        clock.now_s += DAY_S
        assert tier.store(pages(8, "a")).result() == 8
        settle(tier)
        volume = tier._volume
        with volume.lock:
            assert volume.endurance is not None
            if not is_allowed:
                volume.endurance.pay(volume.endurance.left_nbytes)
            left_nbytes = volume.endurance.left_nbytes
        tier.touch(pages(8, "a").keys[-32:])
        clock.now_s += 0.001  # nothing to speak of flows in
        tier._keeper._touched_at_s = -math.inf
        settle(tier)
        with volume.lock:
            assert volume.pages.changes(100).touched[0].size == (0 if is_allowed else 8)
            paid_nbytes = left_nbytes - volume.endurance.left_nbytes
        assert (paid_nbytes > 0) == is_allowed


class WritingDisk(Disk):
    """A file system that can allocate only by writing."""

    def has_data(self, fd: int) -> bool:
        return True


@pytest.mark.parametrize("system", [Disk(), WritingDisk()])
def test_a_segment_that_was_written_is_paid_for(tmp_path: Path, slab: Slab, clock: Clock, system: Disk) -> None:
    with closing(opened(tmp_path, slab, clock, endurance_nbytes=10**9, system=system)) as tier:
        clock.now_s += DAY_S
        volume = tier._volume
        with volume.lock:
            assert volume.endurance is not None
            left_nbytes = volume.endurance.left_nbytes
        assert tier.store(pages(1, "a")).result() == 1
        with volume.lock:
            paid_nbytes = left_nbytes - volume.endurance.left_nbytes
        written_nbytes = volume.geometry.segment_nbytes if isinstance(system, WritingDisk) else 0
        assert paid_nbytes == pages_nbytes(1, SLOT_NBYTES) + written_nbytes


def test_a_budget_that_no_page_fits_into_is_refused(tmp_path: Path, slab: Slab) -> None:
    least = smallest_limit(SLOT_NBYTES)
    with pytest.raises(StoreError, match=f"give at least {least:,} for each of 2 ranks"):
        open_tier(tmp_path, slab, n_members=2, endurance_nbytes=2 * least - 2)
    open_tier(tmp_path, slab, n_members=2, endurance_nbytes=2 * least).close()


def written_nbytes(tier: SsdTier) -> int:
    """What the keeper's thread has handed to the system: the map, its log and its checkpoints."""
    thread = tier._keeper._thread
    lines = Path(f"/proc/self/task/{thread.native_id}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


@pytest.mark.parametrize("n_pages", [1, 16, 64])
def test_what_is_paid_for_the_map_is_no_less_than_what_is_written_to_it(
    tmp_path: Path, slab: Slab, clock: Clock, n_pages: int
) -> None:
    with closing(opened(tmp_path, slab, clock, n_slots=2000, endurance_nbytes=10**12)) as tier:
        clock.now_s += DAY_S
        settle(tier)
        before_nbytes = written_nbytes(tier)
        for number in range(6400 // n_pages if n_pages > 1 else 300):
            assert tier.store(pages(n_pages, f"{number}")).result() == n_pages
            settle(tier)
        stored = tier.stats()["stored"]
        map_nbytes = written_nbytes(tier) - before_nbytes
        assert map_nbytes <= stored * ROW_NBYTES + stored // n_pages * COMMIT_NBYTES
