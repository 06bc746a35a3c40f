"""The books of a store by themselves: what is in use, and who goes first."""

from __future__ import annotations

import numpy as np
import pytest

from hicache.quotas import Quotas, digest_of
from hicache.ssd.map import PageRows
from hicache.ssd.pages import Pages
from hicache.tier import ROOT_KEY
from radix.departures import CAPACITY, CLEARED, DAMAGED, NOT_KNOWN
from tests.hicache.tier_contract import chain
from tests.support.tiers import split


def books(n_slots: int = 20) -> Pages:
    """All of its slots exist, and are free."""
    pages = Pages(n_slots, "lru", Quotas(n_slots))
    pages.begin_fill(n_slots, 1)
    pages.free_unused(0, n_slots)
    pages.end_fill()
    return pages


def store(pages: Pages, keys: list[bytes], parent: bytes = ROOT_KEY) -> None:
    rows = pages.hold(b"".join(keys), parent)
    assert rows is not None
    pages.begin_write(rows)
    pages.end_write(rows, np.zeros(len(rows), np.uint64))
    pages.let_go(rows)


def commit(pages: Pages) -> None:
    changes = pages.changes(1000)
    pages.committed(changes.deleted)


@pytest.fixture
def path() -> list[bytes]:
    return split(chain(20, "a")[0])


def test_a_read_and_a_store_touch_their_own_pages_only(path: list[bytes]) -> None:
    """Else a path of n batches would be touched n times."""
    pages = books()
    store(pages, path[:10])
    commit(pages)
    read = pages.begin_read(b"".join(path[8:10]))
    pages.end_read(read, np.zeros(2, np.bool_))
    assert set(pages.changes(1000).touched[0]) == set(read.slots)
    store(pages, path[10:12], path[9])
    changes = pages.changes(1000)
    assert len(changes.saved) == 2
    assert set(changes.touched[0]) == {read.slots[-1]}, "and the page above, which must not make room for them"
    pages.touch(path[11])
    assert len(pages.changes(1000).touched[0]) == 12
    pages.check_invariants()


def test_pages_used_after_those_above_them_still_go_first(path: list[bytes]) -> None:
    pages = books()
    store(pages, path[:5])
    store(pages, path[5:10], path[4])
    other = split(chain(5, "b")[0])
    store(pages, other)
    read = pages.begin_read(b"".join(path[5:10]))
    pages.end_read(read, np.zeros(5, np.bool_))
    pages.touch(other[-1])
    for n_left in (7, 3, 0):
        pages.evict(pages.n_found(b"".join(path)) - n_left)
        assert pages.n_found(b"".join(path)) == n_left
        assert pages.n_resident == n_left + 5, "the rest of the path has no hole"
        pages.check_invariants()


def test_a_page_makes_no_room_for_the_one_below_it(path: list[bytes]) -> None:
    pages = books(5)
    store(pages, path[:5])
    rows = pages.hold(path[5], path[4])
    assert rows is not None
    assert pages.evict(1) == 0
    pages.let_go(rows)
    pages.check_invariants()


def test_what_is_touched_again_and_again_is_told_once(path: list[bytes]) -> None:
    pages = books()
    store(pages, path[:10])
    commit(pages)
    for key in path[:10]:
        pages.touch(key)
    first, second, third = (pages.changes(4).touched[0] for _ in range(3))
    assert sorted([*first, *second, *third]) == list(range(10))
    assert not len(pages.changes(4))
    pages.check_invariants()


def test_a_page_that_leaves_and_comes_back_is_saved_once(path: list[bytes]) -> None:
    pages = books(5)
    for _ in range(3):
        store(pages, path[:5])
        pages.delete(b"".join(path[:5]))
        pages.committed(pages.changes(5).deleted)
    store(pages, path[:5])
    pages.check_invariants()
    assert [len(pages.changes(3).saved) for _ in range(3)] == [3, 2, 0]
    pages.check_invariants()


def test_what_could_not_be_committed_is_taken_again(path: list[bytes]) -> None:
    pages = books()
    store(pages, path[:10])
    changes = pages.changes(6)
    assert len(changes.saved) == 6
    pages.delete(path[9])
    pages.uncommitted(changes)
    pages.check_invariants()
    again = pages.changes(100)
    assert (len(again.deleted), len(again.saved)) == (1, 9)


def found(slot: int, key: bytes, parent: bytes) -> PageRows:
    """One row of a map, of a page that is said to be tenant a's."""
    one = np.array([slot])
    return PageRows(one, key, parent, one, one.astype(np.uint64), one, digest_of("a"))


def test_a_first_page_that_is_known_below_another_is_wrong(path: list[bytes]) -> None:
    pages = Pages(20, "lru", quotas := Quotas(20))
    quotas.set("a", 10)
    pages.begin_fill(20, 1)
    assert not len(pages.adopt(found(0, path[0], ROOT_KEY)))
    assert not len(pages.adopt(found(1, path[1], path[0])))
    assert pages.adopt(found(2, path[1], ROOT_KEY)).tolist() == [2]
    assert (pages.n_held(1), len(pages.index)) == (2, 2)


def test_a_first_page_that_has_left_keeps_no_row(path: list[bytes]) -> None:
    pages = Pages(20, "lru", quotas := Quotas(20))
    quotas.set("a", 10)
    pages.begin_fill(20, 1)
    pages.adopt(found(0, path[0], ROOT_KEY))
    pages.delete(path[0])
    assert not len(pages.adopt(found(0, path[0], ROOT_KEY)))
    assert (pages.n_held(1), len(pages.index)) == (0, 0)


def test_taking_changes_scans_nothing(path: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten million slots a look at all flags is milliseconds under the lock, at each commit."""
    pages = books()
    store(pages, path[:10])

    def scan(*_: object) -> None:
        raise AssertionError("all flags are looked at")

    monkeypatch.setattr(np, "flatnonzero", scan)
    assert [len(pages.changes(1000)) for _ in range(2)] == [10, 0]


def test_what_became_of_pages_that_left_is_remembered(path: list[bytes]) -> None:
    pages = books()
    store(pages, path[:4])
    pages.let_pass()
    assert pages.evict(1) == 1
    pages.delete(path[2])
    read = pages.begin_read(b"".join(path[:2]))
    pages.end_read(read, np.array([False, True]))
    reasons = pages.departures.find(b"".join(path[:5])).reason.tolist()
    assert reasons == [NOT_KNOWN, DAMAGED, CLEARED, CAPACITY, NOT_KNOWN]
