"""Several tiers asked as one: who is asked for what and when, and who brings which page."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

from hicache import Batch, Capacity, Health, Tier
from hicache.probe import Load, Probe
from hicache.tier import answer_of, total
from tests.hicache.tier_contract import TierContract, batch, chain
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.tiers import FaultyTier, MemoryTier, done, split

KEYS = path_keys("abcdefgh")
N_PAGES = 8
PATIENCE_S = 0.5


class AskedTier(FaultyTier):
    """Remembers what it has been asked for: the first page and how many, of `KEYS`."""

    def __init__(self, slab: npt.NDArray[np.uint8], n_pages: int) -> None:
        self.memory = MemoryTier(slab, 1000)
        self.memory.put(KEYS[: 32 * n_pages], [key[::-1] for key in split(KEYS)[:n_pages]])
        self.probed: list[tuple[int, int]] = []
        self.loaded: list[tuple[int, int]] = []
        super().__init__(self.memory)

    def exists(self, keys: bytes) -> Future[int]:
        self.probed.append((KEYS.index(keys[:32]) // 32, len(keys) // 32))
        return super().exists(keys)

    def load(self, batch: Batch) -> Future[int]:
        self.loaded.append((batch.depth, len(batch)))
        return super().load(batch)


class Case:
    """Tiers that hold so many pages each, over one slab, and a probe of all of them. Page i goes into slot i."""

    def __init__(self, *n_held: int, slow: tuple[int, ...] = ()) -> None:
        """slow: tiers that answer when they are told to."""
        self.slab = np.zeros((N_PAGES, 32), np.uint8)
        self.tiers = [AskedTier(self.slab, n_pages) for n_pages in n_held]
        for position in slow:
            self.tiers[position].hold()
        self.clock = Clock()
        self.probe = Probe(self.tiers, KEYS, clock=self.clock, patience_s=PATIENCE_S)

    def load(self, n_pages: int, first: int = 0, batch_pages: int = 100) -> list[tuple[int, Load]]:
        slots = np.arange(first, first + n_pages, dtype=np.int32)
        above = KEYS[32 * (first - 1) : 32 * first] or None
        run = Batch.below(above, KEYS[32 * first : 32 * (first + n_pages)], slots, first)
        return self.probe.load(run, first, batch_pages=batch_pages)

    def n_right(self) -> int:
        """How many slots from the first have the bytes of their pages."""
        right = [slot.tobytes() == key[::-1] for slot, key in zip(self.slab, split(KEYS), strict=True)]
        return [*right, False].index(False)

    @property
    def probed(self) -> list[list[tuple[int, int]]]:
        return [tier.probed for tier in self.tiers]

    @property
    def loaded(self) -> list[list[tuple[int, int]]]:
        return [tier.loaded for tier in self.tiers]


# ---- asking ----


def test_each_tier_is_asked_for_what_those_above_lack() -> None:
    case = Case(3, 5, 8)
    assert case.probed == [[(0, 8)], [(3, 5)], [(5, 3)]]
    assert list(case.probe.shares()) == [(0, 0, 3), (1, 3, 5), (2, 5, 8)]
    assert Case(3, 2, 8).probed == [[(0, 8)], [(3, 5)], [(3, 5)]]


def test_who_needs_no_other_asks_no_other() -> None:
    assert Case(8, 8, 8).probed == [[(0, 8)], [], []]


def test_those_that_have_to_be_waited_for_are_asked_at_the_same_time() -> None:
    case = Case(2, 6, 8, slow=(1, 2))
    assert case.probed == [[(0, 8)], [(2, 6)], [(2, 6)]]
    assert not case.probe.done()
    for tier in case.tiers[1:]:
        tier.release()
    assert case.probe.done()
    assert list(case.probe.shares()) == [(0, 0, 2), (1, 2, 6), (2, 6, 8)], "of two that have a page, the faster"


def test_a_tier_that_fails_has_nothing() -> None:
    case = Case(8, 3)
    case.tiers[0].fail_next(1)
    probe = Probe(case.tiers, KEYS, clock=case.clock, patience_s=PATIENCE_S)
    assert probe.done()
    assert probe.n_found == 3


def test_a_tier_that_does_not_answer_holds_others_up_for_a_short_time_only() -> None:
    case = Case(3, 8, slow=(1,))
    assert not case.probe.done()
    case.clock.now_s = PATIENCE_S
    assert case.probe.done()
    assert case.probe.n_found == 3


def test_a_tier_that_alone_may_have_something_is_waited_for() -> None:
    case = Case(0, 8, slow=(1,))
    case.clock.now_s = 10 * PATIENCE_S
    assert not case.probe.done()
    case.tiers[1].release()
    assert case.probe.done()
    assert case.probe.n_found == 8


def test_the_expected_time_is_that_of_the_tier_that_takes_longest() -> None:
    case = Case(3, 8)
    for tier, load_s in zip(case.tiers, (2.0, 3.0), strict=True):
        tier.memory.load_s_per_page = load_s
    assert [case.probe.expected_load_s(n_pages) for n_pages in (0, 1, 3, 4, 5, 8)] == [0, 2, 6, 6, 6, 15]


# ---- loading ----


def test_each_share_is_loaded_from_its_tier_at_the_same_time() -> None:
    case = Case(2, 8, slow=(1,))
    case.tiers[1].release()
    for tier in case.tiers:
        tier.hold()
    loads = case.load(8, batch_pages=4)
    assert case.loaded == [[(0, 2)], [(2, 4), (6, 2)]]
    assert [end for end, _ in loads] == [2, 6, 8]
    for tier in case.tiers:
        tier.release()
    assert all(load.done() for _, load in loads)
    assert [load.n_good for _, load in loads] == [2, 4, 2]
    assert case.n_right() == 8


def test_a_part_of_the_run_is_loaded_from_those_who_have_it() -> None:
    case = Case(3, 8, slow=(1,))
    case.tiers[1].release()
    loads = case.load(3, first=2)
    assert case.loaded == [[(2, 1)], [(3, 2)]]
    assert [end for end, _ in loads] == [1, 3]


def test_what_a_tier_does_not_bring_is_asked_of_the_next() -> None:
    case = Case(6, 4, 8, slow=(1, 2))
    case.tiers[0].memory.delete(KEYS[2 * 32 : 3 * 32])
    for tier in case.tiers[1:]:
        tier.release()
        tier.hold()
    ((end, load),) = case.load(6)
    assert end == 6
    assert not load.done()
    assert case.loaded == [[(0, 6)], [(2, 4)], []]
    case.tiers[1].release()
    assert not load.done(), "the second brings the third and the fourth page"
    assert case.loaded == [[(0, 6)], [(2, 4)], [(4, 2)]]
    case.tiers[2].release()
    assert load.done()
    assert load.n_good == 6
    assert case.n_right() == 6


def test_a_tier_that_fails_is_replaced_by_the_next() -> None:
    case = Case(8, 8)
    case.tiers[0].fail_next(1)
    ((_, load),) = case.load(8)
    assert load.done()
    assert load.n_good == 8
    assert case.n_right() == 8


def test_a_batch_that_nobody_brings_whole_ends_where_it_ends() -> None:
    case = Case(8, 5)
    case.tiers[0].memory.delete(KEYS[3 * 32 : 4 * 32])
    ((_, load),) = case.load(8)
    assert load.done()
    assert load.n_good == 5
    assert case.n_right() == 5


def test_no_other_is_asked_for_what_is_not_wanted_any_more() -> None:
    case = Case(8, 8, slow=(0,))
    case.tiers[0].release()
    case.tiers[0].hold()
    case.tiers[0].miss_next(1)
    ((_, load),) = case.load(8)
    load.ask_no_other()
    assert not load.done(), "its slots are still being written"
    case.tiers[0].release()
    assert load.done()
    assert load.n_good == 0
    assert case.loaded[1] == []


@given(st.data())
def test_whatever_tiers_have_lose_and_answer_the_head_is_right_and_every_slot_is_let_go(data: st.DataObject) -> None:
    n_tiers = data.draw(st.integers(1, 3))
    case = Case(*(data.draw(st.integers(0, N_PAGES)) for _ in range(n_tiers)), slow=tuple(range(n_tiers)))

    def answer() -> None:
        asked = [tier for tier in case.tiers if tier.n_held]
        tier = data.draw(st.sampled_from(asked))
        tier.fail_next(int(data.draw(st.integers(0, 5)) == 0))
        tier.release(1)

    while not case.probe.done():
        answer()
    n_found = case.probe.n_found
    best = max(tier.memory.exists(KEYS).result() for tier in case.tiers)
    assert n_found <= best
    for tier in case.tiers:
        for key in data.draw(st.lists(st.sampled_from(split(KEYS)), max_size=2)):
            tier.memory.delete(key)
    loads = case.load(n_found, batch_pages=data.draw(st.integers(1, 4)))
    assert [end for end, _ in loads] == sorted({end for end, _ in loads}), "parts are in path order"
    assert (loads[-1][0] if loads else 0) == n_found, "and leave nothing out"
    while [load for _, load in loads if not load.done()]:  # each is looked at
        answer()
    start = 0
    for end, load in loads:
        good = range(start, start + load.n_good)
        assert all(case.slab[page].tobytes() == split(KEYS)[page][::-1] for page in good)
        start = end
    assert not any(tier.n_held for tier in case.tiers), "a tier is still at slots of a load that is done"


# ---- the contract of a tier, kept by several together ----


class SeveralTiers(Tier):
    """The first pages of a path are stored in the first tier, and all of them in the second; both are read as one."""

    def __init__(self, tiers: list[Tier]) -> None:
        self._tiers = tiers

    @property
    def name(self) -> str:
        return "several"

    def _probe(self, keys: bytes) -> Probe:
        return Probe(self._tiers, keys, clock=Clock(), patience_s=PATIENCE_S)

    def exists(self, keys: bytes) -> Future[int]:
        probe = self._probe(keys)
        assert probe.done()
        return done(probe.n_found)

    def load(self, batch: Batch) -> Future[int]:
        probe = self._probe(batch.keys)
        n_good = 0
        for end, load in probe.load(batch.part(0, probe.n_found), 0, batch_pages=3):
            assert load.done()
            n_good += load.n_good
            if n_good < end:
                break
        return done(n_good)

    def store(self, batch: Batch) -> Future[int]:
        self._tiers[0].store(batch.part(0, len(batch) // 2))
        return self._tiers[1].store(batch)

    def touch(self, key: bytes) -> None:
        for tier in self._tiers:
            tier.touch(key)

    def delete(self, keys: bytes) -> Future[int]:
        self._tiers[0].delete(keys)
        return self._tiers[1].delete(keys)

    def clear(self) -> Future[int]:
        self._tiers[0].clear()
        return self._tiers[1].clear()

    def expected_load_s(self, n_pages: int) -> float:
        return 0.0

    def capacity(self) -> Capacity:
        return self._tiers[1].capacity()

    def health(self) -> Health:
        return self._tiers[1].health()

    def stats(self) -> Mapping[str, int]:
        return self._tiers[1].stats()

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()


class TestSeveralTiers(TierContract):
    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return SeveralTiers([MemoryTier(slab, limit_pages), MemoryTier(slab, limit_pages)])


def test_two_tiers_read_as_one_bring_a_path_in_pieces() -> None:
    slab = np.random.default_rng(7).integers(0, 256, (64, 4096), dtype=np.uint8)
    first, second = MemoryTier(slab, 64), MemoryTier(slab, 64)
    several = SeveralTiers([first, second])
    several.store(batch(8, "a")).result()
    second.delete(chain(8, "a")[0][:64])
    assert several.load(batch(8, "a", first_slot=20)).result() == 8
    assert (first.stats()["loaded"], second.stats()["loaded"]) == (4, 4)
    assert np.array_equal(slab[20:28], slab[:8])


# ---- answers together ----


def test_a_total_is_known_when_all_of_it_is() -> None:
    late: Future[int] = Future()
    whole = total([done(2), late, done(3)])
    assert not whole.done()
    late.set_result(5)
    assert whole.result() == 10


def test_an_error_is_kept_until_all_have_ended_and_not_lost() -> None:
    failed: Future[int] = Future()
    late: Future[int] = Future()
    whole = total([failed, late])
    failed.set_exception(RuntimeError("a bug"))
    assert not whole.done()
    late.set_result(1)
    with pytest.raises(RuntimeError, match="a bug"):
        answer_of(whole)
