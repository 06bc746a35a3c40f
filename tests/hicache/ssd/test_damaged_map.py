"""A map that is damaged, while the store is closed or in use, is made anew, and costs what it cannot tell any more."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hicache.ssd import SsdTier
from hicache.ssd.map import Map, NewMap
from tests.hicache.ssd.stores import Slab, make_slab, open_tier, pages, settle, wait_until
from tests.support.clock import Clock


def sqlite_error(code: int, message: str = "database disk image is malformed") -> sqlite3.Error:
    error = sqlite3.DatabaseError(message)
    error.sqlite_errorcode = code
    return error


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise sqlite_error(code)

    return fail


class Case:
    """Six paths of ten pages, in a store that is closed at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.slab: Slab = make_slab()
        tier = self.open()
        for number in range(6):
            assert tier.store(pages(10, str(number), first_slot=10 * number)).result() == 10
        tier.close()
        (self.map,) = path.glob("*/*/map.db")

    def open(self) -> SsdTier:
        return open_tier(self.path, self.slab, n_slots=160, clock=self.clock)

    def n_loaded(self, tier: SsdTier) -> list[int]:
        """Of each path, verified."""
        found = []
        for number in range(6):
            found.append(tier.load(pages(10, str(number), first_slot=100)).result(timeout=20))
            stored = self.slab[10 * number : 10 * number + found[-1], :4000]
            assert np.array_equal(self.slab[100 : 100 + found[-1], :4000], stored)
        return found

    def assert_takes_stores(self, tier: SsdTier) -> None:
        settle(tier)
        assert tier.store(pages(10, "new", first_slot=200)).result(timeout=20) == 10
        settle(tier)
        assert tier.health().available
        assert tier.stats()["crashes"] == 0
        tier.check_invariants()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "store")


def test_a_row_that_is_not_what_the_key_index_says(case: Case) -> None:
    """It cannot be deleted: SQLite finds out only then that the map is damaged."""
    raw = bytearray(case.map.read_bytes())
    leaf, above = pages(10, "3").keys[-32:], pages(10, "3").keys[-64:-32]
    at = raw.index(leaf + above)
    raw[at : at + 64] = bytes(range(64))
    case.map.write_bytes(raw)
    for n_salvaged in (1, 0):
        tier = case.open()
        case.assert_takes_stores(tier)
        assert case.n_loaded(tier) == [10, 10, 10, 9, 10, 10]
        assert tier.stats()["map_salvaged"] == n_salvaged
        tier.close()


@pytest.mark.parametrize("clock", [2**63 - 1, -(2**63), 1.5, b"x"])
def test_a_senseless_clock(case: Case, clock: object) -> None:
    with sqlite3.connect(case.map) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'clock'", (clock,))
    db.close()
    tier = case.open()
    case.assert_takes_stores(tier)
    tier.touch(pages(10, "0").keys[-32:])
    assert case.n_loaded(tier) == [10] * 6
    tier.close()


def test_damage_that_the_fill_meets_unexpectedly(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Map, "between", failing(sqlite3.SQLITE_ERROR))
        tier = case.open()
        wait_until(lambda: not tier.health().available)
    case.clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    case.assert_takes_stores(tier)
    assert case.n_loaded(tier) == [10] * 6
    assert tier.stats()["map_salvaged"] == 1
    tier.close()


@pytest.mark.parametrize("filling", [False, True])
def test_a_trial_that_meets_damage(case: Case, monkeypatch: pytest.MonkeyPatch, filling: bool) -> None:
    """The disk is well: the breaker closes, and the map is made anew."""
    with monkeypatch.context() as disk:
        if filling:
            disk.setattr(Map, "between", failing(sqlite3.SQLITE_IOERR))
        tier = case.open()
        if not filling:
            settle(tier)
            disk.setattr(Map, "apply", failing(sqlite3.SQLITE_IOERR))
            assert tier.store(pages(5, "new", first_slot=200)).result() == 5
        wait_until(lambda: not tier.health().available)
    errors = [sqlite_error(sqlite3.SQLITE_CORRUPT)]
    set_note = Map.set_note

    def fail_once(self: Map, name: str, value: str | int) -> None:
        if errors:
            raise errors.pop()
        set_note(self, name, value)

    monkeypatch.setattr(Map, "set_note", fail_once)
    case.clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    case.assert_takes_stores(tier)
    assert tier.stats()["map_salvaged"] == 1
    assert case.n_loaded(tier) == [10] * 6
    tier.close()
    tier = case.open()
    settle(tier)
    assert case.n_loaded(tier) == [10] * 6
    tier.close()


@pytest.mark.parametrize("when", ["add", "complete", "replace"])
def test_a_new_map_that_cannot_be_finished_costs_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    tier = case.open()
    settle(tier)
    with monkeypatch.context() as patched:
        patched.setattr(Map, "apply", failing(sqlite3.SQLITE_CORRUPT))
        if when == "replace":
            patched.setattr(Map, "__init__", failing(sqlite3.SQLITE_FULL))
        else:
            patched.setattr(NewMap, when, failing(sqlite3.SQLITE_FULL))
        assert tier.store(pages(10, "new", first_slot=200)).result() == 10
        wait_until(lambda: not tier.health().available)
    assert case.n_loaded(tier) == [10] * 6
    case.clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    case.assert_takes_stores(tier)
    assert case.n_loaded(tier) == [10] * 6
    tier.close()
    tier = case.open()
    settle(tier)
    assert case.n_loaded(tier) == [10] * 6
    assert tier.exists(pages(10, "new").keys).result() == 10
    assert not list(case.path.rglob("map.new"))
    tier.close()


def test_a_new_map_is_tried_once_by_a_commit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What damages each map at once is left to the trials."""
    tier = case.open()
    settle(tier)
    with monkeypatch.context() as patched:
        patched.setattr(Map, "apply", failing(sqlite3.SQLITE_CORRUPT))
        assert tier.store(pages(10, "new", first_slot=200)).result() == 10
        wait_until(lambda: not tier.health().available)
        assert tier.stats()["map_salvaged"] == 1
    case.clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    case.assert_takes_stores(tier)
    tier.close()


def test_a_crash_while_a_new_map_is_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written beside the old map is nothing until it has the old one's name."""
    (case.map.parent / "map.new").write_bytes(b"half of it")
    tier = case.open()
    assert case.n_loaded(tier) == [10] * 6
    tier.close()
    assert not list(case.path.rglob("map.new"))
