"""Pins: what is pinned stays, for as long as somebody asks for it."""

from __future__ import annotations

import pytest

from hicache import PinError
from hicache.pins import CHECK_TICKS, MAX_PINS
from tests.hicache.rig import Rig
from tests.support.keys import path_keys

HOUR_S = 3600.0


def fill(rig: Rig, *paths: str) -> None:
    for path in paths:
        rig.write_back(path_keys(path))
        rig.engine.hbm_evicted(path_keys(path))
        rig.agree()


def wait(rig: Rig, seconds: float) -> None:
    """Time passes, in which the scheduler turns."""
    rig.clock.now_s += seconds
    for _ in range(CHECK_TICKS):
        rig.engine.tick()
        if rig.engine.is_pending:
            rig.engine.follow(rig.engine.report(decides=True))


def ask(rig: Rig, path: str) -> None:
    rig.engine.close_ticket(rig.engine.open_ticket(path_keys(path), None))


def test_pinned_pages_outlast_a_flood_and_the_others_do_not() -> None:
    rig = Rig(n_slots=8, writes=())
    fill(rig, "ab", "xy")
    rig.engine.pin(path_keys("ab"), HOUR_S)
    fill(rig, *"cdefghijklmnop")
    assert rig.holds(path_keys("ab")) == 2
    assert rig.holds(path_keys("xy")) == 0


def test_a_pin_waits_for_pages_that_are_not_there() -> None:
    rig = Rig(n_slots=8, writes=())
    rig.engine.pin(path_keys("abc"), HOUR_S)
    fill(rig, "ab", "abc", "abcd", *"pqrstuvw")
    assert rig.holds(path_keys("abcd")) == 3


def test_a_pin_takes_what_comes_from_below() -> None:
    rig = Rig(n_slots=8)
    rig.put(0, path_keys("abc"))
    rig.engine.pin(path_keys("abc"), HOUR_S)
    rig.engine.open_ticket(path_keys("abc"), None)
    rig.settle()
    rig.agree()
    fill(rig, *"pqrstuvw")
    assert rig.holds(path_keys("abc")) == 3


def test_it_ends_when_nobody_has_asked_for_its_time_to_live() -> None:
    rig = Rig(n_slots=8, writes=())
    fill(rig, "ab")
    rig.engine.pin(path_keys("ab"), HOUR_S)
    for _ in range(3):
        wait(rig, 0.9 * HOUR_S)
        ask(rig, "abc")
    fill(rig, *"cdefghijklmnop")
    assert rig.holds(path_keys("ab")) == 2
    wait(rig, 0.9 * HOUR_S)
    ask(rig, "ax")  # begins with a part of it only
    wait(rig, 0.2 * HOUR_S)
    fill(rig, *"cdefghijklmnop")
    assert rig.holds(path_keys("ab")) == 0


def test_no_clock_but_that_of_the_deciding_rank_ends_it() -> None:
    rig = Rig(n_slots=8, writes=())
    rig.engine.pin(path_keys("ab"), 1.0)
    rig.clock.now_s += 2.0
    rig.engine.follow(rig.engine.report(decides=False))
    assert rig.engine.unpin(path_keys("ab")), "it is still there"


def test_the_ranks_talk_about_pins_from_time_to_time_and_not_always() -> None:
    rig = Rig(n_slots=8, writes=())
    assert not rig.engine.is_pending
    rig.engine.pin(path_keys("ab"), HOUR_S)
    n_pending = 0
    for _ in range(2 * CHECK_TICKS):
        rig.engine.tick()
        n_pending += rig.engine.is_pending
    assert n_pending == 2


def test_it_is_taken_back_and_its_pages_may_go() -> None:
    rig = Rig(n_slots=4, writes=())
    fill(rig, "ab")
    rig.engine.pin(path_keys("ab"), HOUR_S)
    assert not rig.engine.unpin(path_keys("abc"))
    assert rig.engine.unpin(path_keys("ab"))
    assert not rig.engine.unpin(path_keys("ab"))
    fill(rig, *"cdefgh")
    assert rig.holds(path_keys("ab")) == 0


def test_it_outlasts_a_flush() -> None:
    rig = Rig(n_slots=8, writes=())
    fill(rig, "ab")
    rig.engine.pin(path_keys("ab"), HOUR_S)
    rig.engine.reset()
    rig.engine.check_invariants()
    fill(rig, "ab", *"cdefghijklmnop")
    assert rig.holds(path_keys("ab")) == 2


def test_pinned_again_it_has_another_time_to_live_and_counts_once() -> None:
    rig = Rig(n_slots=4, writes=())
    rig.engine.pin(path_keys("ab"), 1.0)
    rig.engine.pin(path_keys("ab"), HOUR_S)
    wait(rig, 2.0)
    assert rig.engine.unpin(path_keys("ab"))


def test_pins_that_share_pages_hold_them_until_the_last_ends() -> None:
    rig = Rig(n_slots=8, writes=())
    fill(rig, "abc")
    rig.engine.pin(path_keys("ab"), HOUR_S)
    rig.engine.pin(path_keys("a"), HOUR_S)
    rig.engine.unpin(path_keys("ab"))
    fill(rig, *"pqrstuvwx")
    assert rig.holds(path_keys("abc")) == 1


def test_pins_that_cannot_be_are_refused() -> None:
    rig = Rig(n_slots=8, writes=())
    rig.engine.pin(path_keys("abc"), HOUR_S)
    for keys, ttl_s, what in (
        (path_keys("xy"), HOUR_S, "over half of host memory, of which 4 pages"),
        (b"", HOUR_S, "one at least"),
        (b"x" * 33, HOUR_S, "whole pages"),
        (path_keys("x"), 0.0, "above 0 seconds"),
    ):
        with pytest.raises(PinError, match=what):
            rig.engine.pin(keys, ttl_s)
    assert not rig.engine.unpin(path_keys("x"))


def test_there_is_an_end_to_pins() -> None:
    rig = Rig(n_slots=1000, writes=())
    for number in range(MAX_PINS):
        rig.engine.pin(bytes([number]) * 32, HOUR_S)
    with pytest.raises(PinError, match=f"{MAX_PINS} prefixes are pinned"):
        rig.engine.pin(b"x" * 32, HOUR_S)
