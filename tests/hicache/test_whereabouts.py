"""Where pages are, and what became of those that are nowhere."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hicache import BELOW, Fate, Whereabouts
from radix import HBM, HOST, KEY_NBYTES
from radix.departures import CAPACITY, CLEARED, FLUSH, NOT_KNOWN, QUOTA, WEIGHTS, Departures, Remembered
from radix.windows import ELSEWHERE, MOVED, NO_WINDOW, SAME, UNSEEN
from tests.hicache.rig import Rig
from tests.support.keys import path_keys
from tests.support.tiers import MemoryTier

HBM_BIT, HOST_BIT, SSD_BIT = 1 << HBM, 1 << HOST, 1 << BELOW


def chain(name: object, n_pages: int) -> bytes:
    return path_keys([(name, page) for page in range(n_pages)])


def look(rig: Rig, keys: bytes, *windows: int) -> Whereabouts:
    said = np.full(len(keys) // KEY_NBYTES, NO_WINDOW, np.uint8)
    said[: len(windows)] = windows
    return rig.engine.inquire(keys).look(rig.engine.index, rig.engine.host.departures, said)


def fates(found: Whereabouts) -> list[Fate]:
    return [Fate(int(fate)) for fate in found.fate]


def test_a_page_on_several_tiers() -> None:
    rig = Rig()
    keys = chain("a", 3)
    rig.write_back(keys)
    rig.settle()
    assert look(rig, keys + chain("b", 1)).on.tolist() == [HBM_BIT | HOST_BIT | SSD_BIT] * 3 + [0]
    rig.engine.hbm_evicted(keys[KEY_NBYTES:])
    found = look(rig, keys)
    assert found.on.tolist() == [HBM_BIT | HOST_BIT | SSD_BIT] + [HOST_BIT | SSD_BIT] * 2


def test_what_windows_say_counts_where_a_page_is_not_known_by_its_name() -> None:
    rig = Rig(writes=())
    known = chain("a", 2)
    rig.write_back(known)
    keys = known + chain("b", 6)
    found = look(rig, keys, MOVED, MOVED, NO_WINDOW, UNSEEN, MOVED, NO_WINDOW, ELSEWHERE, SAME)
    assert fates(found)[2:] == [
        *(Fate.NEVER_SEEN, Fate.NEVER_SEEN),
        *(Fate.MOVED, Fate.MOVED, Fate.OTHER_NAMESPACE, Fate.FORGOTTEN),
    ], "a page without a window is taken for the one before it, the first for the next"
    assert found.is_known_by_name.tolist() == [True] * 2 + [False] * 5 + [True]
    assert fates(look(rig, chain("c", 2))) == [Fate.NEVER_SEEN] * 2


def test_evicted_from_host_memory_and_from_hbm_after_it() -> None:
    rig = Rig(n_slots=4, writes=())
    keys = chain("a", 3)
    rig.write_back(keys)
    rig.agree()
    rig.clock.now_s += 10
    rig.write_back(chain("b", 3))
    assert look(rig, keys).on.tolist() == [HBM_BIT | HOST_BIT, HBM_BIT, HBM_BIT]
    rig.engine.hbm_evicted(keys[2 * KEY_NBYTES :])
    rig.clock.now_s += 5
    rig.engine.hbm_evicted(keys)
    found = look(rig, keys)
    assert found.on.tolist() == [HOST_BIT, 0, 0]
    assert fates(found)[1:] == [Fate.LEFT] * 2
    assert found.tier.tolist()[1:] == [HBM] * 2
    assert found.reason.tolist()[1:] == [CAPACITY] * 2
    assert found.at_s[1] - found.at_s[2] == 5


def test_evicted_for_a_quota() -> None:
    rig = Rig(n_slots=8, writes=())
    rig.engine.set_quota("salt", 4)
    keys = chain("a", 4)
    ticket = rig.engine.open_ticket(keys, None, tenant="salt")
    rig.write_back(keys)
    rig.engine.close_ticket(ticket)
    rig.engine.hbm_evicted(keys)
    rig.agree()
    rig.engine.set_quota("salt", 1)
    found = look(rig, keys)
    assert found.on.tolist() == [HOST_BIT, 0, 0, 0]
    assert (found.tier.tolist()[1:], found.reason.tolist()[1:]) == ([HOST] * 3, [QUOTA] * 3)


def test_flushes_and_new_weights() -> None:
    rig = Rig(writes=())
    flushed, old = chain("a", 2), chain("b", 2)
    rig.write_back(flushed)
    rig.engine.reset()
    rig.clock.now_s += 1
    rig.write_back(old)
    rig.engine.taint()
    rig.engine.reset()
    assert [look(rig, keys).reason.tolist() for keys in (flushed, old)] == [[FLUSH] * 2, [WEIGHTS] * 2]
    assert fates(look(rig, flushed)) == [Fate.LEFT] * 2


def test_a_page_on_its_way() -> None:
    rig = Rig(writes=())
    keys = chain("a", 2)
    offload = rig.engine.begin_offload(keys)
    assert offload is not None
    rig.engine.hbm_evicted(keys)
    assert fates(look(rig, keys)) == [Fate.ARRIVING] * 2
    rig.engine.finish_offload(offload, landed=True)
    assert look(rig, keys).on.tolist() == [HOST_BIT] * 2


# ---- tiers below ----


def spilled_and_evicted(rig: Rig, keys: bytes) -> None:
    """Given to the tier, and then out of HBM and host memory."""
    rig.write_back(keys)
    rig.settle()
    rig.engine.hbm_evicted(keys)
    rig.agree()
    other = chain("others", rig.n_slots)
    rig.write_back(other)
    rig.settle()


def test_a_tier_that_was_given_a_page_and_is_down_or_has_lost_it() -> None:
    rig = Rig()
    keys = chain("a", 4)
    spilled_and_evicted(rig, keys)
    assert look(rig, keys).on.tolist() == [SSD_BIT] * 4
    rig.memory.forget_all_but(2)
    found = look(rig, keys)
    assert found.on.tolist() == [SSD_BIT] * 2 + [0] * 2
    assert fates(found)[2:] == [Fate.LEFT, Fate.BEHIND], "of the last page the tier has not said anything"
    assert (found.tier[2], found.reason[2]) == (BELOW, NOT_KNOWN)
    assert np.isnan(found.at_s[2])
    rig.memory.closed = True
    inquiry = rig.engine.inquire(keys)
    assert inquiry.down == ["faulty memory"]
    found = look(rig, keys)
    assert fates(found) == [Fate.DOWN] * 4
    assert found.tier.tolist() == [BELOW] * 4


def test_a_tier_that_answers_late() -> None:
    rig = Rig()
    keys = chain("a", 4)
    spilled_and_evicted(rig, keys)
    rig.tier.hold()
    inquiry = rig.engine.inquire(keys)
    windows = np.full(4, NO_WINDOW, np.uint8)
    assert inquiry.waiting == ["faulty memory"]
    found = inquiry.look(rig.engine.index, rig.engine.host.departures, windows)
    assert fates(found) == [Fate.NOT_ANSWERED] * 4
    rig.tier.release()
    assert inquiry.waiting == []
    found = inquiry.look(rig.engine.index, rig.engine.host.departures, windows)
    assert found.on.tolist() == [SSD_BIT] * 4


def test_a_tier_is_asked_from_the_first_page_on_that_host_memory_lacks() -> None:
    """It lacks the first page, which host memory has: a request would find all, and so does who looks."""
    rig = Rig()
    keys = chain("a", 6)
    rig.store_below_only(keys)
    rig.write_back(keys[: 2 * KEY_NBYTES])
    rig.settle()
    del rig.memory.pages[keys[:KEY_NBYTES]]
    both = HBM_BIT | HOST_BIT
    assert look(rig, keys).on.tolist() == [both] * 2 + [SSD_BIT] * 4
    ticket = rig.engine.open_ticket(keys, None)
    rig.settle()
    assert all(on & HOST_BIT for on in look(rig, keys).on.tolist())
    rig.engine.close_ticket(ticket)


def test_a_tier_that_fails_has_not_answered() -> None:
    rig = Rig()
    keys = chain("a", 4)
    spilled_and_evicted(rig, keys)
    rig.tier.fail_next(2)
    inquiry = rig.engine.inquire(keys)
    found = inquiry.look(rig.engine.index, rig.engine.host.departures, np.full(4, NO_WINDOW, np.uint8))
    assert inquiry.waiting == []
    assert (found.on.tolist(), fates(found)) == ([0] * 4, [Fate.NOT_ANSWERED] * 4)


def test_tiers_that_are_emptied_or_replaced_were_given_nothing() -> None:
    for is_emptied in (True, False):
        rig = Rig()
        spilled_and_evicted(rig, chain("a", 4))
        if is_emptied:
            rig.engine.clear_below()
        else:
            rig.engine.replace_tiers(rig.tiers)
        rig.memory.closed = True
        assert look(rig, chain("a", 4)).tier.tolist() == [HOST] * 4


class _Remembering(MemoryTier):
    """Says what it remembers."""

    departures = Departures(100)

    def departed(self, keys: bytes) -> Remembered:
        return self.departures.find(keys)


def test_what_a_tier_remembers_itself_counts_if_it_is_the_latest() -> None:
    rig = Rig()
    keys = chain("a", 2)
    spilled_and_evicted(rig, keys)
    remembering = _Remembering(rig.slab, 100)
    rig.tier.inner = remembering
    rig.tier.departed = remembering.departed  # type: ignore[method-assign]
    remembering.departures.left(keys[:KEY_NBYTES], HOST, CLEARED, rig.clock() + 1)
    remembering.departures.left(keys[KEY_NBYTES:], HOST, CLEARED, -1.0)
    found = look(rig, keys)
    assert (found.tier.tolist(), found.reason.tolist()) == ([BELOW] * 2, [CLEARED, NOT_KNOWN])


# ---- in any order ----


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["write", "hbm", "flush", "iterate"]), st.integers(0, 5)), max_size=30))
def test_looking_changes_nothing_and_nothing_that_was_here_is_never_seen(steps: list[tuple[str, int]]) -> None:
    rig, seen = Rig(n_slots=6), set[int]()
    paths = [chain(number, 3) for number in range(6)]
    for what, number in steps:
        match what:
            case "write":
                rig.write_back(paths[number])
                seen.add(number)
            case "hbm":
                rig.engine.hbm_evicted(paths[number])
            case "flush":
                rig.settle()
                rig.engine.reset()
            case "iterate":
                rig.agree()
        digest, stats = rig.engine.digest, str(rig.engine.stats)
        order = rig.engine.index.eviction_order(100).tolist()
        for known, keys in enumerate(paths):
            _check(look(rig, keys), known in seen)
        assert (rig.engine.digest, str(rig.engine.stats)) == (digest, stats)
        assert rig.engine.index.eviction_order(100).tolist() == order
        rig.engine.check_invariants()


def _check(found: Whereabouts, was_here: bool) -> None:
    missing: NDArray[np.bool_] = found.on == 0
    if was_here:
        assert (found.fate[missing] >= Fate.FORGOTTEN).all()
    else:
        assert missing.all()
        assert (found.fate == Fate.NEVER_SEEN).all()


def test_a_prompt_of_less_than_a_page() -> None:
    assert look(Rig(), b"").on.tolist() == []
