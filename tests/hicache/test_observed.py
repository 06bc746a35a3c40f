"""What is observed by a clock: how pages live, what tiers bring and how fast. Nothing of it decides."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hicache import Distribution, HostTier, Movement, Observed, Stats
from radix import Index
from tests.hicache.rig import Rig, waits
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.tiers import MemoryTier


@given(
    st.lists(st.lists(st.floats(0, 200), max_size=20), max_size=5),
    st.lists(st.integers(1, 150), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_a_distribution_counts_each_value_where_it_belongs(batches: list[list[float]], bounds: list[int]) -> None:
    distribution = Distribution(bounds)
    for batch in batches:
        distribution.add(np.array(batch, np.float64))
    values = [value for batch in batches for value in batch]
    assert np.isclose(distribution.total, sum(values))
    for position, bound in enumerate(bounds):
        assert distribution.counts[: position + 1].sum() == sum(value <= bound for value in values)
    assert distribution.counts.sum() == len(values)


class Slots:
    """A host tier of three slots, and its clock."""

    def __init__(self) -> None:
        self.clock, self.observed, self.index = Clock(), Observed(), Index(16)
        self.host = HostTier(self.index, 3, Stats(), self.observed, self.clock)

    def land(self, path: str) -> None:
        self.host.land(self.host.admit(self.index.insert(path_keys(path))))
        self.index.tick()


def test_a_slot_forgets_the_times_of_the_page_before() -> None:
    slots = Slots()
    slots.land("abc")
    slots.clock.now_s = 50.0
    slots.land("xyz")
    assert slots.observed.age_s.total == 3 * 50.0
    slots.clock.now_s = 60.0
    slots.host.asked(slots.index.match(path_keys("xyz")))
    assert slots.observed.reuse_gap_s.total == 3 * 10.0
    slots.clock.now_s = 100.0
    slots.land("pqr")
    assert slots.observed.age_s.total == 3 * (50.0 + 50.0)
    assert slots.observed.idle_s.total == 3 * (50.0 + 40.0)


def test_nothing_is_asked_for() -> None:
    slots = Slots()
    slots.host.asked(slots.index.match(path_keys("abc")))
    assert slots.observed.reuse_gap_s.counts.sum() == 0


def test_a_fetch_is_timed_from_its_first_load_to_the_end_of_its_last() -> None:
    """In batches of two pages, one after the other; the probe and the wait before them do not count."""
    rig = Rig(clock=Clock())
    rig.put(0, path_keys("abcde"))
    rig.tier.hold()
    ticket = rig.engine.open_ticket(path_keys("abcde"), None)
    rig.clock.now_s = 1.0
    rig.tier.release(1)
    rig.agree()
    rig.clock.now_s = 1.5
    rig.tier.release(2)
    rig.agree()
    rig.clock.now_s = 3.0
    rig.tier.release()
    rig.clock.now_s = 4.0
    rig.settle()
    assert not waits(ticket)
    assert list(rig.engine.observed.movements) == [Movement("faulty memory", 5, 2.0)]
    assert ticket.fetch is not None
    assert list(ticket.fetch.origins(0, 5)) == [("faulty memory", 2), ("faulty memory", 2), ("faulty memory", 1)]
    assert list(ticket.fetch.origins(1, 3)) == [("faulty memory", 1), ("faulty memory", 1)]


class NamedTier(MemoryTier):
    """Called otherwise."""

    named = ""

    @property
    def name(self) -> str:
        return self.named


def test_what_several_tiers_bring_is_told_apart() -> None:
    rig = Rig(writes=("through", "through"), batch_pages=8)
    for position, name in enumerate(("near", "far")):
        tier = NamedTier(rig.slab, 1000)
        tier.named = name
        rig.memories[position] = rig.tiers[position].inner = tier
    rig.put(0, path_keys("abc"))
    rig.put(1, path_keys("abcdef"))
    ticket = rig.engine.open_ticket(path_keys("abcdef"), None)
    rig.settle()
    assert [(one.tier, one.n_pages) for one in rig.engine.observed.movements] == [("faulty near", 3), ("faulty far", 3)]
    assert ticket.fetch is not None
    assert list(ticket.fetch.origins(2, 4)) == [("faulty near", 1), ("faulty far", 1)]


def decisions(rig: Rig) -> dict[str, int]:
    observed = rig.engine.observed
    return {
        "absent": observed.fetches_absent,
        "loaded": observed.fetches_loaded,
        "shortened": observed.fetches_shortened,
        "recomputed": observed.fetches_recomputed,
    }


def test_what_was_decided_of_what_the_tiers_have() -> None:
    rig = Rig(fetch_only_if_faster=True, writes=("through", "through"))
    rig.engine.prefill_speed.observe([(0, 10)], 1.0)
    rig.put(0, path_keys("ab"))
    rig.put(1, path_keys("abcd"))
    rig.engine.open_ticket(path_keys("xyz"), None)
    rig.settle()
    assert decisions(rig) == {"absent": 1, "loaded": 0, "shortened": 0, "recomputed": 0}
    rig.memories[1].load_s_per_page = 1.0
    rig.engine.open_ticket(path_keys("abcd"), None)
    rig.settle()
    assert decisions(rig) == {"absent": 1, "loaded": 0, "shortened": 1, "recomputed": 0}
    rig.engine.reset()
    rig.memories[0].load_s_per_page = 1.0
    rig.engine.open_ticket(path_keys("abcd"), None)
    rig.settle()
    assert decisions(rig) == {"absent": 1, "loaded": 0, "shortened": 1, "recomputed": 1}
    rig.memories[0].load_s_per_page = rig.memories[1].load_s_per_page = 0.0
    rig.engine.open_ticket(path_keys("abcd"), None)
    rig.settle()
    assert decisions(rig) == {"absent": 1, "loaded": 1, "shortened": 1, "recomputed": 1}


def test_a_fetch_that_is_given_up_is_no_movement() -> None:
    rig = Rig(clock=Clock())
    rig.put(0, path_keys("ab"))
    rig.tier.hold()
    rig.engine.open_ticket(path_keys("ab"), None)
    rig.tier.release(1)
    rig.agree()
    rig.clock.now_s = 100.0
    rig.agree()
    rig.tier.release()
    rig.settle()
    assert not rig.engine.observed.movements
