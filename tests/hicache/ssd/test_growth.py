"""New segments: made beside the keeper's other work, however long the disk takes over one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hicache.ssd import SsdTier, keeper
from tests.hicache.ssd.stores import make_slab, open_tier, pages, settle, wait_until
from tests.support.clock import Clock
from tests.support.disk import Disk


class SlowDisk(Disk):
    """`fallocate` waits until it `may_grow`; `n_growing` are there."""

    def __init__(self) -> None:
        super().__init__()
        self.may_grow = threading.Event()
        self.may_grow.set()
        self.n_growing = 0

    def fallocate(self, fd: int, nbytes: int) -> None:
        self.n_growing += 1
        self.may_grow.wait()
        self.n_growing -= 1
        super().fallocate(fd, nbytes)


class Case:
    """A tier with two full segments, and no room for another page without a third."""

    def __init__(self, path: Path, close_timeout_s: float = 5.0) -> None:
        self.disk = SlowDisk()
        self.clock = Clock()
        self.tier: SsdTier = open_tier(
            path, make_slab(), system=self.disk, clock=self.clock, close_timeout_s=close_timeout_s
        )
        assert self.tier.store(pages(8, "a")).result() == 8
        settle(self.tier)
        assert self.n_slots == 8
        self.disk.may_grow.clear()

    @property
    def n_slots(self) -> int:
        return self.tier.stats()["n_slots"]


def test_a_disk_that_takes_long_over_a_segment_delays_stores_and_nothing_else(tmp_path: Path) -> None:
    case = Case(tmp_path)
    waiting = case.tier.store(pages(8, "b"))
    wait_until(lambda: case.disk.n_growing == 1)
    assert case.tier.flush().result(timeout=20) == 0, "the keeper goes its rounds"
    assert case.tier.load(pages(8, "a", first_slot=100)).result() == 8
    assert not waiting.done()
    case.disk.may_grow.set()
    assert waiting.result(timeout=20) == 8
    assert case.n_slots == 16
    settle(case.tier)
    assert case.tier.exists(pages(8, "a").keys).result() == 8
    assert case.tier.stats()["evicted"] == 0
    case.tier.check_invariants()
    case.tier.close()


def test_a_segment_that_does_not_come_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(tmp_path)
    waiting = case.tier.store(pages(6, "b"))
    wait_until(lambda: case.disk.n_growing == 1)
    case.clock.now_s += keeper.GROWTH_S + 1.0
    assert waiting.result(timeout=20) == 6
    assert case.tier.store(pages(4, "c")).result(timeout=20) == 4
    assert case.tier.clear().result(timeout=20) == 8
    assert case.tier.health().available
    assert case.n_slots == 8
    assert sum("takes the disk long" in record.getMessage() for record in caplog.records) == 1
    case.disk.may_grow.set()
    wait_until(lambda: case.n_slots == 12)
    settle(case.tier)
    case.tier.check_invariants()
    case.tier.close()


def test_a_segment_that_is_there_and_not_yet_in_the_books_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one may be made while the keeper, tired of waiting, has turned to the stores."""
    ended = keeper._Growth.ended
    seen: set[keeper._Growth] = set()

    def is_seen_late(growth: keeper._Growth, timeout_s: float) -> bool:
        assert ended(growth, 20.0)
        is_late = growth in seen
        seen.add(growth)
        return is_late

    monkeypatch.setattr(keeper._Growth, "ended", is_seen_late)
    tier = open_tier(tmp_path, make_slab())
    paths = [pages(4, f"path {number}") for number in range(16)]
    for path in paths:
        assert tier.store(path).result(timeout=20) == 4
    assert [tier.exists(path.keys).result() for path in paths] == [4] * 16
    assert (tier.stats()["n_slots"], tier.stats()["evicted"]) == (64, 0)
    tier.check_invariants()
    tier.close()


def test_closing_does_not_wait_for_a_segment_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(tmp_path, close_timeout_s=0.05)
    waiting = case.tier.store(pages(8, "b"))
    wait_until(lambda: case.disk.n_growing == 1)
    case.tier.close()
    assert waiting.result(timeout=20) == 0
    assert any("is left as it is" in record.getMessage() for record in caplog.records)
    case.disk.may_grow.set()
    wait_until(lambda: case.disk.n_growing == 0)
