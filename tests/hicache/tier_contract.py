"""What every tier below host memory must do. A new tier's test subclasses `TierContract` and says how to make one."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from hicache import Batch, Tier
from tests.support.tiers import split

PAGE_NBYTES = 4096
N_SLOTS = 64


def chain(n_pages: int, seed: str) -> tuple[bytes, bytes]:
    """Keys and parents of a path of n pages, chained as SGLang chains them."""
    keys, parents, last = [], [], b"\0" * 32
    for page in range(n_pages):
        parents.append(last)
        last = hashlib.sha256(last + f"{seed}/{page}".encode()).digest()
        keys.append(last)
    return b"".join(keys), b"".join(parents)


def batch(n_pages: int, seed: str, first_slot: int = 0) -> Batch:
    keys, parents = chain(n_pages, seed)
    return Batch(keys, parents, "", np.arange(first_slot, first_slot + n_pages, dtype=np.int32), depth=0)


class TierContract:
    """What differs between tiers is said here, and nothing else does.

    keeps: False for a tier that may hold nothing: then only the shape of its answers is tested.
    is_shared: True for a store that belongs to other servers too: it has a limit of its own, and nobody clears it.
    """

    keeps = True
    is_shared = False

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        raise NotImplementedError

    def open(self, limit_pages: int = N_SLOTS) -> tuple[Tier, npt.NDArray[np.uint8]]:
        rng = np.random.default_rng(7)
        slab = rng.integers(0, 256, (N_SLOTS, PAGE_NBYTES), dtype=np.uint8)
        return self.make_tier(slab, limit_pages), slab

    def test_an_empty_tier_misses(self) -> None:
        tier, _ = self.open()
        keys, _ = chain(5, "a")
        assert tier.exists(keys).result() == 0
        assert tier.load(batch(5, "a")).result() == 0
        assert tier.delete(keys).result() == 0
        tier.close()

    def test_what_was_stored_comes_back_the_same(self) -> None:
        tier, slab = self.open()
        before = slab[:8].copy()
        assert tier.store(batch(8, "a")).result() == (8 if self.keeps else 0)
        n_loaded = tier.load(batch(8, "a", first_slot=20)).result()
        assert n_loaded == (8 if self.keeps else 0)
        assert np.array_equal(slab[20 : 20 + n_loaded], before[:n_loaded])
        tier.close()

    def test_answers_are_prefixes(self) -> None:
        tier, slab = self.open()
        tier.store(batch(8, "a")).result()
        keys, _ = chain(8, "a")
        assert tier.delete(split(keys)[5]).result() == (1 if self.keeps else 0)
        assert tier.exists(keys).result() == (5 if self.keeps else 0)
        assert tier.load(batch(8, "a", first_slot=20)).result() == (5 if self.keeps else 0)
        if self.keeps:
            assert np.array_equal(slab[20:25], slab[:5])
        tier.close()

    def test_storing_again_changes_nothing(self) -> None:
        tier, _ = self.open()
        first = tier.store(batch(4, "a")).result()
        used = tier.capacity().used_nbytes
        assert tier.store(batch(4, "a")).result() == first
        assert tier.capacity().used_nbytes == used
        tier.close()

    def test_paths_do_not_mix(self) -> None:
        tier, slab = self.open()
        tier.store(batch(4, "a", first_slot=0)).result()
        tier.store(batch(4, "b", first_slot=4)).result()
        n_loaded = tier.load(batch(4, "b", first_slot=30)).result()
        assert np.array_equal(slab[30 : 30 + n_loaded], slab[4 : 4 + n_loaded])
        tier.close()

    def test_the_limit_holds(self) -> None:
        tier, _ = self.open(limit_pages=6)
        assert tier.store(batch(10, "a")).result() <= (10 if self.is_shared else 6)
        capacity = tier.capacity()
        assert 0 <= capacity.used_nbytes <= max(capacity.limit_nbytes, 6 * PAGE_NBYTES)
        tier.close()

    def test_a_path_can_be_stored_in_pieces(self) -> None:
        tier, slab = self.open()
        keys, parents = chain(6, "a")
        upper = Batch(keys[:64], parents[:64], "", np.arange(2, dtype=np.int32), depth=0)
        lower = Batch(keys[64:], parents[64:], "", np.arange(2, 6, dtype=np.int32), depth=2)
        assert tier.store(upper).result() == (2 if self.keeps else 0)
        assert tier.store(lower).result() == (4 if self.keeps else 0)
        n_loaded = tier.load(batch(6, "a", first_slot=20)).result()
        assert n_loaded == (6 if self.keeps else 0)
        assert np.array_equal(slab[20 : 20 + n_loaded], slab[:n_loaded])
        tier.close()

    def test_touching_changes_no_answer(self) -> None:
        tier, _ = self.open()
        n_stored = tier.store(batch(4, "a")).result()
        keys, _ = chain(5, "a")
        for key in split(keys):
            tier.touch(key)
        assert tier.exists(keys).result() == n_stored
        tier.close()

    def test_a_cleared_tier_is_empty_and_takes_pages_again(self) -> None:
        tier, slab = self.open()
        tier.store(batch(4, "a", first_slot=0)).result()
        tier.store(batch(3, "b", first_slot=4)).result()
        if self.is_shared:
            assert tier.clear().result() == 0
            assert tier.exists(chain(4, "a")[0]).result() == 4
            tier.close()
            return
        assert tier.clear().result() == (7 if self.keeps else 0)
        assert tier.exists(chain(4, "a")[0]).result() == 0
        assert tier.load(batch(3, "b", first_slot=20)).result() == 0
        assert tier.clear().result() == 0
        assert tier.store(batch(4, "a", first_slot=8)).result() == (4 if self.keeps else 0)
        n_loaded = tier.load(batch(4, "a", first_slot=20)).result()
        assert n_loaded == (4 if self.keeps else 0)
        assert np.array_equal(slab[20 : 20 + n_loaded], slab[8 : 8 + n_loaded])
        tier.close()

    def test_no_load_is_expected_to_take_time_before_one_was_measured(self) -> None:
        tier, _ = self.open()
        assert tier.expected_load_s(100) == 0.0
        tier.store(batch(8, "a")).result()
        tier.load(batch(8, "a", first_slot=20)).result()
        assert 0.0 <= tier.expected_load_s(1) <= tier.expected_load_s(100)
        tier.close()

    def test_an_empty_batch_is_legal(self) -> None:
        tier, _ = self.open()
        assert tier.exists(b"").result() == 0
        assert tier.store(batch(0, "a")).result() == 0
        assert tier.load(batch(0, "a")).result() == 0
        tier.close()

    def test_closing_twice_does_nothing(self) -> None:
        tier, _ = self.open()
        assert tier.health().available
        tier.close()
        tier.close()
        assert isinstance(dict(tier.stats()), dict)
