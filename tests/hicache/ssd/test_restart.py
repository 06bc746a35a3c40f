"""What a store still knows when it is opened again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hicache.ssd import limit_for
from tests.hicache.ssd.stores import NAMESPACE, SLOT_NBYTES, make_slab, open_tier, pages, part, settle


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
