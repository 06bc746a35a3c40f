"""What is remembered of pages while they are in host memory."""

from __future__ import annotations

from hicache import HostTier, Observed, Stats
from radix import Index, Rows
from tests.support.clock import Clock
from tests.support.keys import path_keys


def land(index: Index, host: HostTier, path: str) -> Rows:
    rows = index.insert(path_keys(path))
    host.land(host.admit(rows))
    index.tick()
    return rows


def test_a_flag_is_of_a_page_that_is_held_and_forgotten_with_its_slot() -> None:
    index = Index(16)
    host = HostTier(index, 3, Stats(), Observed(), Clock())
    flags, others = host.new_flags(), host.new_flags()
    rows = land(index, host, "abc")
    flags.put(rows[:2], True)
    assert flags.of(rows).tolist() == [True, True, False]
    assert not others.of(rows).any()
    index.lease(rows)
    land(index, host, "x")
    assert flags.of(rows).tolist() == [True, True, False], "nothing could be evicted"
    index.release(rows)
    land(index, host, "yz")  # in the slots of b and c
    assert flags.of(rows[:1]).tolist() == [True]
    assert not flags.of(index.match(path_keys("yz"))).any()


def test_a_page_that_is_not_held_has_no_flag() -> None:
    index = Index(16)
    host = HostTier(index, 2, Stats(), Observed(), Clock())
    flags = host.new_flags()
    flags.put(land(index, host, "ab"), True)
    absent = index.insert(path_keys("xy"))
    assert flags.of(absent).tolist() == [False, False]
    flags.put(absent, False)
    assert flags.of(index.match(path_keys("ab"))).all(), "nor takes another's"
    flags.clear()
    assert not flags.of(index.match(path_keys("ab"))).any()
