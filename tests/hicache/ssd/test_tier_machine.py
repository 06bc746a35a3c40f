"""The tier against a plain model: random stores, loads, touches, deletions, restarts, in any order.

The model is the set of pages that are present. A store may push others out, or find no room: after each one the model
learns what is left, and the tier must have counted everything that is not.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache.ssd import limit_for
from hicache.ssd.directory import used_nbytes
from tests.hicache.ssd.crash_child import N_PATHS, PATH_PAGES, content, path_batch
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, open_tier, part, settle
from tests.support.tiers import split

NUMBERS = st.integers(0, N_PATHS - 1)
ENDS = st.integers(1, PATH_PAGES)


class TierMachine(RuleBasedStateMachine):
    """Slab slots 0 to 99 hold what is stored, in three parts for stores at once; 100 to 107 receive."""

    @initialize(n_slots=st.sampled_from([6, 20, 70]))
    def open(self, n_slots: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.slab = make_slab()
        self.n_slots = n_slots
        self.present: set[bytes] = set()
        self.tier = open_tier(self.folder, self.slab, n_slots=n_slots)

    def fill(self, number: int, end: int, first_slot: int) -> list[bytes]:
        keys = split(path_batch(number, 0).keys)[:end]
        for slot, key in enumerate(keys, first_slot):
            self.slab[slot] = content(key)
        return keys

    def n_present(self, keys: list[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.present), len(keys))

    def look_again(self, n_gone_before: int) -> None:
        """After stores: the model learns what is left. Nothing is missing that the tier has not counted."""
        settle(self.tier)
        n_asked = len(self.present)
        self.present = {key for key in self.present if self.tier.exists(key).result()}
        assert n_asked - len(self.present) <= self.n_gone() - n_gone_before

    def n_gone(self) -> int:
        stats = self.tier.stats()
        return stats["evicted"] + stats["skipped_full"] + stats["orphans"]

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3), end=ENDS)
    def store(self, numbers: list[int], end: int) -> None:
        """Some paths at once: they may share pages."""
        asked, n_gone = [], self.n_gone()
        for at, number in enumerate(numbers):
            keys = self.fill(number, end, first_slot=16 * at)
            asked.append((keys, self.tier.store(part(path_batch(number, first_slot=16 * at), 0, end))))
        for keys, future in asked:
            n_stored = future.result(timeout=30)
            assert 0 <= n_stored <= end
            self.present |= set(keys)
        self.look_again(n_gone)

    @rule(number=NUMBERS, first=st.integers(0, PATH_PAGES - 1))
    def store_the_lower_part(self, number: int, first: int) -> None:
        keys = self.fill(number, PATH_PAGES, first_slot=0)
        n_gone = self.n_gone()
        has_parent = first == 0 or keys[first - 1] in self.present
        n_stored = self.tier.store(part(path_batch(number, 0), first, PATH_PAGES)).result(timeout=30)
        assert has_parent or n_stored == 0
        self.present |= set(keys[first:]) if has_parent else set()
        self.look_again(n_gone)

    @rule(number=NUMBERS, first=st.integers(0, PATH_PAGES - 1))
    def load(self, number: int, first: int) -> None:
        batch = part(path_batch(number, 0), first, PATH_PAGES, first_slot=100)
        n_loaded = self.tier.load(batch).result(timeout=30)
        keys = split(batch.keys)
        assert n_loaded == self.n_present(keys)
        for slot, key in enumerate(keys[:n_loaded], 100):
            assert np.array_equal(self.slab[slot, :4000], content(key)[:4000])

    @rule(number=NUMBERS, end=ENDS)
    def exists(self, number: int, end: int) -> None:
        keys = split(path_batch(number, 0).keys)[:end]
        assert self.tier.exists(b"".join(keys)).result(timeout=30) == self.n_present(keys)

    @rule(number=NUMBERS, end=ENDS)
    def touch(self, number: int, end: int) -> None:
        self.tier.touch(split(path_batch(number, 0).keys)[end - 1])

    @rule(number=NUMBERS, data=st.data())
    def delete(self, number: int, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(split(path_batch(number, 0).keys)), unique=True))
        n_deleted = self.tier.delete(b"".join(keys)).result(timeout=30)
        assert n_deleted == len(self.present & set(keys))
        self.present -= set(keys)

    @rule()
    def clear(self) -> None:
        assert self.tier.clear().result(timeout=30) == len(self.present)
        self.present.clear()

    @rule(wait=st.booleans())
    def restart(self, wait: bool) -> None:
        """Pages whose path has a hole cannot be reached, and do not come back."""
        self.tier.close()
        parents = {
            key: parent
            for number in range(N_PATHS)
            for key, parent in zip(split(path_batch(number, 0).keys), split(path_batch(number, 0).parents), strict=True)
        }
        for key in sorted(self.present, key=lambda key: depth(key, parents)):
            if parents[key] != bytes(32) and parents[key] not in self.present:
                self.present.discard(key)
        self.tier = open_tier(self.folder, self.slab, n_slots=self.n_slots)
        if wait:
            settle(self.tier)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert used_nbytes(self.folder) <= limit_for(self.n_slots, 1, SLOT_NBYTES)
        settle(self.tier)
        self.tier.check_invariants()
        stats = self.tier.stats()
        assert stats["n_pages"] == len(self.present)
        assert stats["crashes"] == stats["corrupt"] == stats["queued_nbytes"] == 0

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            shutil.rmtree(self.folder)


def depth(key: bytes, parents: dict[bytes, bytes]) -> int:
    n_above = 0
    while (key := parents[key]) != bytes(32):
        n_above += 1
    return n_above


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=40, stateful_step_count=30)
