"""What a store still knows when it is opened again."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hicache import TierError
from hicache.ssd import limit_for, opening
from hicache.ssd.map import Map
from hicache.ssd.pages import Pages
from tests.hicache.ssd.stores import NAMESPACE, SLOT_NBYTES, make_slab, open_tier, pages, part, settle, wait_until
from tests.support.clock import Clock
from transfer.files import System


def test_pages_are_there_after_a_restart(tmp_path: Path) -> None:
    slab = make_slab()
    before = slab[:20].copy()
    tier = open_tier(tmp_path, slab)
    assert tier.store(pages(20, "a")).result() == 20
    tier.close()
    tier = open_tier(tmp_path, slab)
    assert tier.exists(pages(25, "a").keys).result() == 20
    assert tier.load(pages(25, "a", first_slot=100)).result() == 20
    assert np.array_equal(slab[100:120, :4000], before[:, :4000])
    settle(tier)
    assert tier.stats()["filled"] == 20
    assert tier.exists(pages(25, "a").keys).done()
    tier.check_invariants()
    tier.close()


def test_pages_are_found_while_the_map_is_still_being_read(tmp_path: Path) -> None:
    slab = make_slab()
    tier = open_tier(tmp_path, slab)
    tier.store(pages(20, "a")).result()
    tier.store(pages(20, "b", first_slot=20)).result()
    tier.close()
    tier = open_tier(tmp_path, slab)
    middle = part(pages(20, "a"), 5, 15, first_slot=100)
    loaded, found = tier.load(middle), tier.exists(pages(20, "b").keys)
    deleted = tier.delete(pages(20, "b").keys[-32:])
    assert loaded.result() == 10
    assert found.result() == 20
    assert np.array_equal(slab[100:110], slab[5:15])
    assert deleted.result() == 1
    settle(tier)
    assert tier.exists(pages(20, "b").keys).result() == 19
    assert tier.exists(pages(20, "a").keys).result() == 20
    tier.check_invariants()
    tier.close()


def test_pages_of_two_branches_are_deleted_while_the_map_is_still_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path, make_slab())
    for name in "abc":
        assert tier.store(pages(8, name)).result() == 8
    tier.close()
    may_read = threading.Event()
    between = Map.between

    def wait(self: Map, first: int, end: int) -> Any:
        may_read.wait()
        return between(self, first, end)

    monkeypatch.setattr(Map, "between", wait)
    tier = open_tier(tmp_path, make_slab())
    deleted = tier.delete(b"".join(pages(8, name).keys[-32:] for name in "abb"))
    may_read.set()
    assert deleted.result(timeout=20) == 2
    settle(tier)
    assert [tier.exists(pages(8, name).keys).result() for name in "abc"] == [7, 7, 8]
    tier.check_invariants()
    tier.close()


@pytest.mark.parametrize("restart", [False, True])
def test_recency_survives(tmp_path: Path, restart: bool) -> None:
    """Four paths fill the store, two of them are used again, and new ones push out the rest, deepest pages first."""
    slab = make_slab()
    tier = open_tier(tmp_path, slab, n_slots=64)
    for at, name in enumerate("abcd"):
        assert tier.store(pages(16, name, first_slot=16 * at)).result() == 16
    tier.touch(pages(16, "a").keys[-32:])
    tier.touch(pages(16, "b").keys[7 * 32 : 8 * 32])
    if restart:
        tier.close()
        tier = open_tier(tmp_path, slab, n_slots=64)
    settle(tier)
    lengths = []
    for at in range(4):
        assert tier.store(pages(16, f"new {at}", first_slot=64)).result() == 16
        lengths.append([tier.exists(pages(16, name).keys).result() for name in "abcd"])
    assert lengths == [[16, 8, 8, 16], [16, 8, 0, 8], [8, 8, 0, 0], [0, 0, 0, 0]]
    tier.check_invariants()
    tier.close()


def test_hits_are_written_down_from_time_to_time_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    apply = Map.apply

    def telling(self: Map, deleted: Any, saved: Any, touched: Any, clock: int) -> None:
        written.append(len(touched[0]))
        apply(self, deleted, saved, touched, clock)

    monkeypatch.setattr(Map, "apply", telling)
    clock = Clock()
    tier = open_tier(tmp_path, make_slab(), clock=clock)
    assert tier.store(pages(10, "a")).result() == 10
    settle(tier)
    tier.touch(pages(10, "a").keys[-32:])
    assert tier.store(pages(5, "b")).result() == 5
    settle(tier)
    assert set(written) == {0}
    clock.now_s += 31.0
    settle(tier)
    assert sum(written) == 10
    assert tier.load(pages(10, "a", first_slot=100)).result() == 10
    settle(tier)
    assert sum(written) == 10
    tier.close()
    assert sum(written) == 20


def test_a_smaller_cap_drops_the_highest_segments_and_keeps_the_rest(tmp_path: Path) -> None:
    slab = make_slab()
    tier = open_tier(tmp_path, slab, n_slots=64)
    for at in range(4):
        tier.store(pages(16, str(at), first_slot=16 * at)).result()
    tier.close()
    tier = open_tier(tmp_path, slab, n_slots=64, limit_nbytes=limit_for(34, 1, SLOT_NBYTES))
    settle(tier)
    assert 0 < tier.stats()["n_pages"] <= 34
    assert tier.stats()["n_slots"] <= 34
    tier.check_invariants()
    for at in range(4):
        n_found = tier.exists(pages(16, str(at)).keys).result()
        assert tier.load(pages(16, str(at), first_slot=100)).result() == n_found
        assert np.array_equal(slab[100 : 100 + n_found], slab[16 * at : 16 * at + n_found])
    tier.close()


def test_another_namespace_starts_empty_and_leaves_the_first(tmp_path: Path) -> None:
    slab = make_slab()
    tier = open_tier(tmp_path, slab, n_slots=16, limit_nbytes=limit_for(64, 1, SLOT_NBYTES))
    tier.store(pages(4, "a")).result()
    tier.close()
    other = NAMESPACE[::-1]
    tier = open_tier(tmp_path, slab, n_slots=64, namespace=other)
    assert tier.exists(pages(4, "a").keys).result() == 0
    tier.close()
    tier = open_tier(tmp_path, slab, n_slots=64)
    assert tier.exists(pages(4, "a").keys).result() == 4
    tier.close()


def test_a_map_that_was_large_becomes_small_with_the_cap(tmp_path: Path) -> None:
    slab = make_slab()
    open_tier(tmp_path, slab, n_slots=64).close()
    (path,) = tmp_path.glob("*/*/map.db")
    with sqlite3.connect(path) as db:
        rows = ((slot, b"%032d" % slot, bytes(32)) for slot in range(100, 30_000))
        db.executemany("INSERT INTO pages VALUES (?, ?, ?, 0, 0, 0, NULL)", rows)
    db.close()
    assert path.stat().st_size > 3 << 20
    tier = open_tier(tmp_path, slab, n_slots=64)
    assert path.stat().st_size < 1 << 20
    settle(tier)
    assert tier.stats()["n_pages"] == 0
    tier.close()


def test_bytes_are_synced_before_the_map_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Recorder(System):
        def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            events.append("write")
            return super().pwritev(fd, buffers, offset)

        def fdatasync(self, fd: int) -> None:
            events.append("sync")
            super().fdatasync(fd)

    class TellingMap(Map):
        def _apply(self, *arguments: Any) -> None:
            events.append("map")
            super()._apply(*arguments)

    monkeypatch.setattr(opening, "Map", TellingMap)
    tier = open_tier(tmp_path, make_slab(), system=Recorder())
    settle(tier)
    events.clear()
    assert tier.store(pages(3, "a")).result() == 3
    settle(tier)
    assert events == ["write", "sync", "map"]
    tier.close()


@pytest.mark.parametrize("where", ["adopt", "free_unused", "make_newest", "end_fill"])
def test_a_fill_that_breaks_off_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    slab, clock = make_slab(), Clock()
    tier = open_tier(tmp_path, slab)
    assert tier.store(pages(20, "a")).result() == 20
    tier.close()
    with monkeypatch.context() as patched:
        patched.setattr(Pages, where, lambda *_: 1 / 0)
        tier = open_tier(tmp_path, slab, clock=clock)
        wait_until(lambda: not tier.health().available)
        assert tier.store(pages(5, "b")).result() == 0
        if where == "adopt":
            with pytest.raises(TierError, match="met a bug"):
                tier.exists(pages(20, "a").keys).result(timeout=20)
        else:
            assert tier.exists(pages(20, "a").keys).result(timeout=20) == 20
    clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    settle(tier)
    assert tier.stats()["crashes"] >= 1
    assert tier.exists(pages(25, "a").keys).result() == 20
    assert tier.store(pages(5, "b")).result() == 5
    tier.check_invariants()
    tier.close()


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown eviction policy 'mru'; there are: gdsf"):
        open_tier(tmp_path, make_slab(), eviction="mru")
