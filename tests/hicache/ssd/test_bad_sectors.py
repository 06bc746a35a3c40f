"""A disk of which a part cannot be read or written: that part is left out, and the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hicache import TierError
from hicache.ssd import SsdTier
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, open_tier, pages, part, settle, wait_until
from tests.support.clock import Clock
from tests.support.disk import Disk

N_SLOTS = 160
"""In segments of ten."""


class Case:
    """A tier with ten pages in the slots 0 to 9, one a slot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slab = make_slab()
        self.disk = Disk()
        self.clock = Clock()
        self.tier: SsdTier = open_tier(path, self.slab, n_slots=N_SLOTS, system=self.disk, clock=self.clock)
        assert self.tier.store(pages(10, "a")).result() == 10
        settle(self.tier)
        assert self.tier.stats()["n_slots"] == 10

    def spoil(self, *slots: int) -> None:
        for slot in slots:
            self.disk.bad.setdefault(f"data.{slot // 10}", set()).add(SLOT_NBYTES * (slot % 10) + 100)

    def load(self) -> int:
        n_loaded = self.tier.load(pages(10, "a", first_slot=100)).result()
        assert np.array_equal(self.slab[100 : 100 + n_loaded, :4000], self.slab[:n_loaded, :4000])
        return n_loaded

    def count(self, name: str) -> int:
        return self.tier.stats()[name]

    def try_again(self) -> None:
        self.clock.now_s += 61.0
        self.tier._keeper._wanted.set()
        wait_until(lambda: self.tier.health().available)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    case = Case(tmp_path / "store")
    yield case
    settle(case.tier)
    case.tier.check_invariants()
    assert case.count("crashes") == 0
    case.tier.close()


def test_a_page_that_cannot_be_read_leaves_alone(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.spoil(5)
    assert case.load() == 5
    assert case.tier.health().available
    assert case.tier.exists(pages(10, "a").keys).result() == 5
    assert case.tier.load(part(pages(10, "a"), 6, 10, first_slot=100)).result() == 4
    assert case.load() == 5
    assert case.count("read_errors") == 1
    assert case.count("corrupt") == 0
    settle(case.tier)
    assert case.count("n_bad_slots") == 1
    assert sum("refuses" in record.getMessage() for record in caplog.records) == 1


def test_the_slot_is_not_given_away_again(case: Case) -> None:
    case.spoil(5)
    assert case.load() == 5
    settle(case.tier)
    assert case.tier.store(part(pages(10, "a"), 5, 10)).result() == 5
    for n in range(40):
        assert case.tier.store(pages(4, f"b{n}")).result() == 4
    assert case.count("write_errors") == 0
    assert case.count("evicted") > 0


def test_a_page_of_which_two_readers_learn_leaves_once(case: Case) -> None:
    case.spoil(5)
    case.disk.hold()
    loads = [case.tier.load(pages(10, "a", first_slot=first)) for first in (100, 120)]
    wait_until(lambda: case.disk.n_held == 2)
    case.disk.let_go()
    assert [load.result(timeout=20) for load in loads] == [5, 5]
    settle(case.tier)
    assert case.count("n_bad_slots") == 1


def test_a_page_that_is_read_alone_leaves_if_the_disk_reads_elsewhere(case: Case) -> None:
    case.spoil(0)
    assert case.tier.load(part(pages(10, "a"), 0, 1, first_slot=100)).result() == 0
    assert case.tier.health().available
    assert case.tier.exists(pages(1, "a").keys).result() == 0


def test_most_pages_of_a_read_are_the_disk_once_and_their_slots_the_next_time(case: Case) -> None:
    case.spoil(*range(7))
    with pytest.raises(TierError, match="could not be read"):
        case.load()
    assert not case.tier.health().available
    case.try_again()
    assert case.tier.exists(pages(10, "a").keys).result() == 10, "nothing has left"
    assert case.load() == 0
    assert case.tier.health().available
    assert case.tier.exists(part(pages(10, "a"), 7, 10).keys).result() == 3


def test_pages_that_cannot_be_written_are_a_short_answer(case: Case) -> None:
    assert case.tier.store(pages(1, "z", 50)).result() == 1
    settle(case.tier)
    case.spoil(12)
    assert case.tier.store(pages(4, "b", 20)).result() == 1
    assert case.tier.health().available
    assert case.count("write_errors") == case.count("n_bad_slots") == 1
    assert case.tier.store(pages(4, "b", 20)).result() == 4
    for n in range(40):
        assert case.tier.store(pages(4, f"b{n}")).result() == 4
    assert case.count("write_errors") == 1


def test_slots_that_refused_a_whole_write_are_given_up_the_second_time(case: Case) -> None:
    assert case.tier.store(pages(1, "z", 50)).result() == 1
    settle(case.tier)
    case.spoil(*range(11, 19))
    with pytest.raises(TierError, match="could not be written"):
        case.tier.store(pages(4, "b", 20)).result()
    case.try_again()
    for _ in range(4):
        try:
            n_stored = case.tier.store(pages(4, "b", 20)).result()
        except TierError:
            case.try_again()
        else:
            if n_stored == 4:
                break
    assert n_stored == 4
    assert case.tier.load(pages(4, "b", 100)).result() == 4


def test_a_bad_slot_may_be_used_after_a_restart(case: Case) -> None:
    case.spoil(5)
    assert case.load() == 5
    settle(case.tier)
    case.tier.close()
    case.disk.bad.clear()
    case.tier = open_tier(case.path, case.slab, n_slots=N_SLOTS, system=case.disk, clock=case.clock)
    settle(case.tier)
    assert case.count("n_bad_slots") == 0
    assert case.load() == 5
