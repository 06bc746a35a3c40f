"""Clearing a store, in steps, with a map that fails, and beside a store that is just being written."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hicache import TierError
from hicache.ssd import SsdTier
from hicache.ssd.map import Map
from tests.hicache.ssd.stores import make_slab, open_tier, pages, settle, wait_until
from tests.support.clock import Clock

CLOCK = Clock()


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SsdTier]:
    """With twenty pages and twelve free slots; it goes in steps of three."""
    monkeypatch.setattr("hicache.ssd.keeper.FREE_SLICE", 3)
    tier = open_tier(tmp_path, make_slab(), n_slots=256, clock=CLOCK)
    assert tier.store(pages(20, "a")).result() == 20
    settle(tier)
    yield tier
    settle(tier)
    tier.check_invariants()
    assert tier.stats()["crashes"] == 0
    tier.close()
    reopened = open_tier(tmp_path, make_slab(), n_slots=256)
    settle(reopened)
    assert reopened.exists(pages(20, "a").keys).result() == 0
    assert reopened.exists(pages(5, "b").keys).result() == 5
    reopened.close()


def test_it_goes_in_steps(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    changes = tier._volume.pages.changes

    def noted(limit: int, *, touched: bool = True) -> object:
        limits.append(limit)
        return changes(limit, touched=touched)

    monkeypatch.setattr(tier._volume.pages, "changes", noted)
    assert tier.clear().result(timeout=20) == 20
    assert limits.count(3) >= 7
    assert tier.store(pages(5, "b")).result() == 5


def test_a_map_that_fails_is_told_later(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Map) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Map, "delete_all", fail)
        with pytest.raises(TierError):
            tier.clear().result(timeout=20)
    assert tier.exists(pages(20, "a").keys).result() == 0
    CLOCK.now_s += 61.0
    tier._keeper._wanted.set()
    wait_until(lambda: tier.health().available)
    assert tier.store(pages(5, "b")).result() == 5


def test_what_is_stored_meanwhile_is_named(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after its slot has been looked at."""
    take = tier._keeper._take_all_changes

    def store_first() -> object:
        assert tier.store(pages(5, "b")).result(timeout=20) == 5
        return take()

    monkeypatch.setattr(tier._keeper, "_take_all_changes", store_first)
    assert tier.clear().result(timeout=20) == 20
    assert tier.exists(pages(5, "b").keys).result() == 5
