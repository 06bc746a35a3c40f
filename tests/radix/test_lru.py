"""Who is evicted, and in what order."""

from __future__ import annotations

import numpy as np
import pytest

from radix import HBM, HOST, Index, State
from tests.radix.model import page_keys

SSD = 2


class Host:
    """An index whose pages are named by their paths, all of them on the host tier."""

    def __init__(self, *paths: str) -> None:
        self.index = Index(64)
        self.paths: dict[bytes, str] = {}
        for path in paths:
            self.store(path)

    def store(self, path: str) -> None:
        keys = page_keys(path)
        self.paths |= {key: path[: n + 1] for n, key in enumerate(keys)}
        rows = self.index.insert(b"".join(keys))
        new = rows[self.index.states(rows, HOST) == State.ABSENT]
        first = len(self.index) + 100 * self.index.now
        self.index.begin(new, HOST, np.arange(first, first + len(new), dtype=np.int32))
        self.index.commit(new, HOST)
        self.index.tick()

    def row(self, path: str) -> int:
        row = self.index.row_of(page_keys(path)[-1])
        assert row is not None
        return row

    def rows(self, *paths: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array([self.row(path) for path in paths], np.int32)

    def evict(self, n: int) -> list[str]:
        evicted = self.index.evict(n)
        self.index.check_invariants()
        assert len(evicted.slots) == len(evicted.keys) // 32
        return [self.paths[evicted.keys[i : i + 32]] for i in range(0, len(evicted.keys), 32)]


def test_the_oldest_run_goes_first_and_its_deepest_page_before_the_others() -> None:
    host = Host("abc", "xyz")
    assert host.evict(4) == ["abc", "ab", "a", "xyz"]
    assert host.evict(9) == ["xy", "x"]
    assert host.evict(9) == []


def test_a_touch_makes_a_path_recent() -> None:
    host = Host("abc", "xyz")
    host.index.touch_path(host.row("abc"))
    host.index.tick()
    assert host.evict(6) == ["xyz", "xy", "x", "abc", "ab", "a"]


def test_a_parent_older_than_its_children_goes_as_soon_as_it_may() -> None:
    """Children that arrive later stand behind it in the list; it is passed, then taken when the last child is."""
    host = Host("ab", "abc", "pq", "abd")
    assert host.evict(9) == ["abc", "pq", "p", "abd", "ab", "a"]


def test_the_walk_comes_to_the_same_end_in_one_call_or_many() -> None:
    paths = ("ab", "abc", "pq", "abd", "pqr", "a", "x")
    at_once, one_by_one = Host(*paths), Host(*paths)
    assert at_once.evict(9) == [path for _ in range(9) for path in one_by_one.evict(1)]


def test_a_leaf_is_of_its_tier_not_of_the_tree() -> None:
    """In HBM the run goes on; in host memory its end is a leaf."""
    host = Host("ab")
    host.index.put(host.index.insert(b"".join(page_keys("abcd"))), HBM)
    assert host.evict(9) == ["ab", "a"]
    assert len(host.index) == 4


def test_a_page_with_a_child_on_its_way_stays() -> None:
    host = Host("ab")
    rows = host.index.insert(b"".join(page_keys("abc")))
    host.index.begin(rows[2:], HOST, np.array([50], np.int32))
    host.index.tick()
    assert host.evict(9) == []
    host.index.abort(rows[2:], HOST)
    assert host.evict(9) == ["ab", "a"]


def test_leased_pages_and_what_is_above_them_stay() -> None:
    host = Host("abc", "xy")
    leased = host.rows("ab")
    host.index.lease(leased)
    assert host.evict(9) == ["abc", "xy", "x"]
    host.index.release(leased)
    assert host.evict(9) == ["ab", "a"]


def test_what_was_used_in_this_pass_stays_until_the_next() -> None:
    host = Host("ab", "xy")
    host.index.touch_path(host.row("ab"))
    assert host.evict(9) == ["xy", "x"]
    host.index.tick()
    assert host.evict(9) == ["ab", "a"]


def test_orphans_are_evicted_like_any_leaf() -> None:
    host = Host("abc")
    host.index.drop(host.rows("ab"), HOST)
    assert host.evict(9) == ["abc", "a"]


def test_touching_pages_that_are_elsewhere_adds_nothing_to_the_list() -> None:
    host = Host("ab")
    rows = host.index.insert(b"".join(page_keys("xy")))
    host.index.put(rows, HBM)
    host.index.touch(rows)
    host.index.tick()
    assert host.evict(9) == ["ab", "a"]


def test_a_page_that_has_left_the_list_does_not_come_back_by_a_touch() -> None:
    host = Host("abc")
    rows = host.rows("a", "ab", "abc")
    host.index.put(rows, HBM)
    host.index.drop(rows[1:], HOST)
    host.index.touch(rows)
    host.index.check_invariants()
    host.index.tick()
    assert host.evict(9) == ["a"]


def test_hearing_again_that_a_page_is_there_is_no_use_of_it() -> None:
    index = Index(16, policies={SSD: "lru"})
    old, new = (index.insert(b"".join(page_keys(path))) for path in ("ab", "xy"))
    index.put(old, SSD)
    index.put(new, SSD)
    index.put(old, SSD)
    index.tick()
    assert index.evict(1, SSD).keys == page_keys("ab")[-1]


def test_victims_are_named_by_keys_that_outlive_their_rows() -> None:
    host = Host("ab")
    slots = host.index.slots(host.rows("ab", "a")).tolist()
    evicted = host.index.evict(2)
    assert evicted.keys == b"".join(reversed(page_keys("ab")))
    assert evicted.slots.tolist() == slots
    host.store("xy")
    assert len(host.index) == 2
    assert evicted.slots.tolist() == slots, "the caller owns them"


def test_a_lower_tier_can_have_a_policy_and_has_no_slots() -> None:
    index = Index(16, policies={SSD: "lru"})
    rows = index.insert(b"".join(page_keys("abc")))
    index.put(rows, SSD)
    index.put(rows[:1], SSD)
    index.tick()
    evicted = index.evict(2, SSD)
    assert evicted.keys == b"".join(page_keys("abc")[:0:-1])
    assert evicted.slots.tolist() == []
    with pytest.raises(ValueError, match="no eviction policy"):
        index.evict(1)
    with pytest.raises(ValueError, match="no eviction policy"):
        index.eviction_order(1)
    index.check_invariants()


def test_nothing_is_asked_for_and_nothing_taken() -> None:
    assert Host("ab").evict(0) == []


def test_the_order_is_told_without_a_change_and_leases_do_not_matter_for_it() -> None:
    host = Host("abc", "xy")
    host.index.lease(host.rows("abc"))
    assert host.index.eviction_order(4).tolist() == host.rows("abc", "ab", "a", "xy").tolist()
    assert host.index.eviction_order(9).tolist() == host.rows("abc", "ab", "a", "xy", "x").tolist()
    assert host.index.eviction_order(0).tolist() == []
    host.index.release(host.rows("abc"))
    assert host.evict(9) == ["abc", "ab", "a", "xy", "x"]


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fifo'.*lru"):
        Index(8, policies={HOST: "fifo"})
