"""Fetches and spills by example: what moves between host memory and a tier that answers when it is told to."""

from __future__ import annotations

import pytest

from hicache import TierError, Verdict, spills
from hicache.engine import MAX_OVERDUE, UNKNOWN
from hicache.fetches import N_REPORTED, PATIENCE_SHARE
from hicache.spills import Spills
from radix import HBM, HOST, State
from tests.hicache.rig import TIMEOUT_S, Rig, waits
from tests.support.keys import path_keys
from tests.support.tiers import MemoryTier, split


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ---- down ----


def test_what_lands_in_host_memory_is_stored_below(rig: Rig) -> None:
    keys = path_keys("abcde")
    rig.write_back(keys)
    assert rig.memory.exists(keys).result() == 5
    rig.agree()
    assert rig.spills.spilled == 5
    assert not rig.engine.is_pending


def test_slots_stay_leased_until_the_tier_has_read_them() -> None:
    rig = Rig(n_slots=4)
    rig.tier.hold()
    keys = path_keys("a")
    rig.write_back(keys)
    for path in ("b", "c", "d", "e", "f"):
        rig.engine.tick()
        rig.write_back(path_keys(path))
    assert rig.holds(keys) == 1, "the oldest page is still being read"
    rig.tier.release()
    rig.agree()
    assert rig.memory.exists(keys).result() == 1
    for path in ("g", "h", "i", "j"):
        rig.engine.tick()
        rig.write_back(path_keys(path))
    assert rig.holds(keys) == 0


def test_only_what_is_new_below_is_given_to_the_tier(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.write_back(keys[:64])
    rig.agree()
    rig.write_back(keys[64:], keys[32:64])
    rig.agree()
    assert rig.memory.stats()["stored"] == 4
    assert rig.spills.spilled == 4


def spills_of(rig: Rig, tier: int = 0) -> Spills:
    assert rig.engine.below is not None
    return rig.engine.below.spills[tier]


def test_what_has_no_room_goes_when_there_is_some() -> None:
    rig = Rig(n_slots=16)  # of which four may be on their way down
    rig.tier.hold()
    keys = path_keys("abcdefghijk")
    rig.write_back(keys)
    assert (spills_of(rig).n_pages, rig.spills.skipped) == (4, 0)
    rig.tier.release()
    rig.settle()
    assert rig.memory.exists(keys).result() == 11
    assert (rig.spills.spilled, rig.spills.skipped) == (11, 0)


def test_what_has_left_host_memory_before_there_is_room_is_skipped() -> None:
    rig = Rig(n_slots=16)
    rig.tier.hold()
    keys = path_keys("abcdef")
    rig.write_back(keys)
    rig.engine.hbm_evicted(keys)
    rig.agree()
    rig.write_back(path_keys([("other", number) for number in range(12)]))
    assert rig.spills.skipped == 0
    rig.tier.release()
    rig.settle()
    assert rig.memory.exists(keys).result() == 4
    assert rig.spills.skipped == 2


def test_so_many_offers_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spills, "MAX_WAITING", 2)
    rig = Rig(n_slots=16)
    rig.tier.hold()
    for path in ("abcd", "ef", "gh", "ij"):
        rig.write_back(path_keys(path))
        rig.engine.tick()
    assert rig.spills.skipped == 2
    rig.tier.release()
    rig.settle()
    assert [rig.memory.exists(path_keys(path)).result() for path in ("abcd", "ef", "gh", "ij")] == [4, 2, 2, 0]


def test_a_tier_that_has_refused_pages_is_not_offered_what_waits() -> None:
    """It is full, perhaps: the rest would only go with the next offer of its path."""
    rig = Rig(n_slots=16)
    rig.tier.hold()
    rig.write_back(path_keys("abcdef"))
    rig.tier.fail_next(1)
    rig.tier.release()
    rig.settle()
    assert rig.spills.failed == 2
    assert rig.spills.skipped == 2


def test_nothing_waits_after_a_flush() -> None:
    rig = Rig(n_slots=16)
    rig.tier.hold()
    rig.write_back(path_keys("abcdef"))
    rig.engine.reset()
    rig.tier.release()
    rig.settle()
    rig.engine.check_invariants()
    assert (rig.memory.exists(path_keys("abcdef")).result(), rig.spills.skipped) == (4, 0)


def test_what_the_tier_did_not_take_is_offered_again(rig: Rig) -> None:
    keys = path_keys("abc")
    rig.tier.fail_next(1)
    rig.write_back(keys[:64])
    rig.agree()
    assert (rig.spills.failed, rig.memory.exists(keys).result()) == (2, 0)
    rig.write_back(keys[64:], keys[32:64])
    rig.agree()
    assert rig.memory.exists(keys).result() == 3


def test_pages_of_a_tainted_cache_are_not_stored_below(rig: Rig) -> None:
    keys = path_keys("ab")
    offload = rig.engine.begin_offload(keys)
    assert offload is not None
    rig.engine.taint()
    rig.engine.finish_offload(offload, landed=True)
    assert rig.memory.exists(keys).result() == 0


# ---- up ----


def test_a_request_waits_for_its_pages_and_finds_them(rig: Rig) -> None:
    keys = path_keys("abcde")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys + path_keys("abcdex")[-32:], None)
    assert waits(ticket)
    assert not rig.engine.admit(ticket)
    rig.agree()
    assert waits(ticket), "the pages are on their way"
    rig.agree()
    assert not waits(ticket)
    assert rig.holds(keys) == 5
    assert ticket.fetched == (0, 5)
    assert rig.engine.stats.fetched == 5


def test_what_nobody_has_is_not_waited_for(rig: Rig) -> None:
    ticket = rig.engine.open_ticket(path_keys("abc"), None)
    rig.agree()
    assert rig.engine.admit(ticket)
    assert ticket.fetched == (0, 0)


def test_only_what_host_memory_lacks_is_fetched(rig: Rig) -> None:
    keys = path_keys("abcdef")
    rig.store_below_only(keys)
    rig.write_back(keys[: 2 * 32])
    n_loaded = rig.memory.stats()["loaded"]
    ticket = rig.engine.open_ticket(keys, None)
    rig.agree()
    rig.agree()
    assert ticket.fetched == (2, 6)
    assert rig.memory.stats()["loaded"] - n_loaded == 4
    assert rig.holds(keys) == 6


def test_fetched_pages_stay_while_their_request_waits(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.agree()
    rig.agree()
    for path in ("ijklmnop", "qrstuvwx"):
        rig.engine.tick()
        rig.write_back(path_keys(path))
    assert rig.holds(keys) == 4
    rig.engine.close_ticket(ticket)


def test_one_fetch_serves_all_that_wait_for_it(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.tier.hold()
    tickets = [rig.engine.open_ticket(keys, None) for _ in range(20)]
    for _ in range(30):
        rig.tier.release(rig.tier.n_held)
        rig.agree()
    assert not any(waits(ticket) for ticket in tickets)
    assert rig.memory.stats()["loaded"] == 4
    assert rig.engine.stats.fetched == 4
    assert rig.holds(keys) == 4


def test_a_late_request_waits_for_the_pages_that_another_is_fetching(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()  # it has started to load
    late = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert waits(late)
    rig.tier.release()
    rig.agree()
    assert not waits(late)
    assert rig.memory.stats()["loaded"] == 4


def test_a_page_that_does_not_come_ends_the_fetch_there(rig: Rig) -> None:
    keys = path_keys("abcdef")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.memory.delete(split(keys)[3])  # between the probe and the load, as a damaged page
    rig.agree()
    rig.agree()
    assert not waits(ticket)
    assert rig.holds(keys) == 3
    assert (rig.engine.stats.fetched, rig.engine.stats.fetch_missed) == (3, 3)
    assert rig.engine.host.n_free == 32 - 3


def test_a_tier_that_fails_costs_a_miss(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    for n_failing in (1, 2):
        ticket = rig.engine.open_ticket(keys, None)
        rig.tier.fail_next(n_failing)
        rig.agree()
        rig.agree()
        assert not waits(ticket)
        rig.engine.close_ticket(ticket)
        rig.engine.reset()
    assert rig.engine.host.n_free == 32


def test_a_deadline_lets_the_request_go_with_what_has_come(rig: Rig) -> None:
    keys = path_keys("abcdef")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()
    rig.tier.release(2)
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    assert not waits(ticket)
    assert rig.engine.stats.tickets_expired == 1
    assert ticket.fetched == (0, 4)
    assert rig.holds(keys) == 4
    assert (rig.engine.stats.fetched, rig.engine.stats.fetch_missed) == (4, 2)
    assert rig.engine.host.n_free == 32 - 6, "the disk may still write to two slots"
    rig.engine.close_ticket(ticket)
    rig.write_back(keys)
    assert rig.holds(keys) == 6, "what was computed is kept, in other slots"
    rig.tier.release()
    rig.agree()
    assert rig.holds(keys) == 6
    assert rig.engine.host.n_free == 32 - 6


def test_a_load_that_hangs_is_given_up_even_if_nobody_waits(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()
    rig.engine.close_ticket(ticket)
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    late = rig.engine.open_ticket(keys, None)
    rig.memory.clear()
    rig.tier.hold()
    rig.write_back(keys)
    assert rig.holds(keys) == 4, "its pages are not waited for, nor in the way"
    rig.engine.close_ticket(late)


def test_a_probe_that_is_never_answered_ends_with_its_request(rig: Rig) -> None:
    rig.tier.hold()
    ticket = rig.engine.open_ticket(path_keys("ab"), None)
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    assert not waits(ticket)
    rig.engine.close_ticket(ticket)
    assert not rig.engine.is_pending


def test_loads_that_hang_keep_half_of_host_memory_at_most_and_nobody_for_ever() -> None:
    rig = Rig(n_slots=16)
    paths = [path_keys(letter * 4) for letter in "abcdefgh"]
    for keys in paths:
        rig.store_below_only(keys)
    tickets = [rig.engine.open_ticket(keys, None) for keys in paths]
    rig.tier.hold()
    rig.agree()
    assert rig.engine.index.count(HOST, State.INCOMING) == 8
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    assert not any(waits(ticket) for ticket in tickets)
    rig.agree()  # the next in line have started, and found that nobody may be asked
    assert rig.engine.index.count(HOST, State.INCOMING) == 0
    assert rig.tier.n_held == 4
    assert rig.engine.host.n_free == 8
    rig.write_back(path_keys("xyz"))
    assert rig.holds(path_keys("xyz")) == 3


def test_more_fetches_than_can_be_reported_take_their_turn() -> None:
    rig = Rig(n_slots=200)
    paths = [path_keys(first + second) for first in "abcdef" for second in "ghij"]
    assert len(paths) > 2 * N_REPORTED
    for keys in paths:
        rig.store_below_only(keys)
    tickets = [rig.engine.open_ticket(keys, None) for keys in paths]
    for _ in range(2 * len(paths)):
        rig.agree()
    assert not any(waits(ticket) for ticket in tickets)
    assert all(rig.holds(keys) == 2 for keys in paths)


def test_a_path_of_which_hbm_has_the_head_comes_whole_or_not_at_all(rig: Rig) -> None:
    """Host memory is closed under prefixes, so pages below a head that only HBM has need that head too."""
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.engine.skip_offload(keys[:64])  # in HBM, and not in host memory
    ticket = rig.engine.open_ticket(keys[64:], keys[32:64])
    rig.agree()
    rig.agree()
    assert rig.holds(keys) == 4
    assert ticket.fetched == (2, 4), "the others were in HBM"
    rig.engine.reset()
    rig.memory.delete(split(keys)[2])
    rig.engine.skip_offload(keys[:64])
    ticket = rig.engine.open_ticket(keys[64:], keys[32:64])
    rig.agree()
    assert not waits(ticket)
    assert rig.engine.index.count(HBM, State.RESIDENT) == 2
    assert rig.holds(keys) == 0, "what only HBM needs is not worth a fetch"


# ---- load or compute ----


def test_a_disk_that_is_slower_than_the_prefill_is_not_asked() -> None:
    rig = Rig(fetch_only_if_faster=True)
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.memory.load_s_per_page = 1.0
    fetched = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert waits(fetched), "nothing is known of the prefill yet"
    rig.agree()
    rig.engine.close_ticket(fetched)
    rig.engine.reset()
    rig.engine.prefill_speed.observe([(0, 4)], 3.9)
    declined = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert not waits(declined)
    assert rig.engine.stats.fetches_declined == 1
    rig.engine.close_ticket(declined)
    rig.memory.load_s_per_page = 0.9
    accepted = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert waits(accepted)


def test_a_rank_whose_disk_is_slow_speaks_for_all() -> None:
    rig = Rig(fetch_only_if_faster=True)
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.engine.prefill_speed.observe([(0, 4)], 0.1)
    rig.engine.open_ticket(keys, None)
    fast = rig.engine.report(decides=True)
    rig.memory.load_s_per_page = 1.0
    slow = rig.engine.report(decides=False)
    assert slow[:2] == [UNKNOWN, UNKNOWN]
    assert len(fast) == len(slow)
    rig.engine.follow([min(one, other) for one, other in zip(fast, slow, strict=True)])
    assert not rig.engine.is_pending, "nothing is loaded"


def test_a_fetch_without_room_is_not_overtaken_by_smaller_ones() -> None:
    rig = Rig(n_slots=16)
    small, big = [path_keys(letter) for letter in "ijklmn"], path_keys("abcdefgh")
    for keys in (*small, big[:128], big):
        rig.write_back(keys)
        rig.agree()
        rig.agree()
    rig.engine.reset()
    rig.tier.hold()
    tickets = [rig.engine.open_ticket(keys, None) for keys in (small[0], big, *small[1:])]
    rig.tier.release(len(tickets))
    rig.agree()
    assert rig.engine.index.count(HOST, State.INCOMING) == 1, "the big one needs all that may be on its way up"
    rig.tier.release(1)
    rig.agree()
    assert rig.engine.index.count(HOST, State.INCOMING) == 8


def test_fetches_without_room_are_not_in_the_way_of_those_of_which_the_tier_has_nothing() -> None:
    rig = Rig(n_slots=32)
    paths = [path_keys(first + second + "abc") for first in "abcdef" for second in "ghi"]
    for keys in paths:
        rig.store_below_only(keys)
    for keys in paths:
        rig.engine.open_ticket(keys, None)
    new = rig.engine.open_ticket(path_keys("zzz"), None)
    rig.tier.hold()
    for _ in range(4):
        rig.agree()
    assert not waits(new)


def test_a_page_that_the_tier_has_dropped_does_not_keep_those_below_it_out(rig: Rig) -> None:
    """It stays hot in host memory, so nothing offers it again by itself."""
    keys = path_keys("abcdef")
    rig.write_back(keys[:64])
    rig.agree()
    rig.memory.clear()
    for page in range(2, 6):
        rig.tier.fail_next(1 if page == 2 else 0)  # as a tier answers for a page whose parent it lacks
        rig.write_back(keys[page * 32 : (page + 1) * 32], keys[(page - 1) * 32 : page * 32])
        rig.agree()
    assert rig.memory.exists(keys).result() == 6


def test_sixty_four_requests_for_the_same_pages_all_wait_for_them() -> None:
    """Leases of the same page count once, or most of them would not have theirs, and go."""
    rig = Rig(n_slots=64, max_leased_share=0.5)
    keys = path_keys("abcdefghijkl")
    rig.store_below_only(keys)
    tickets = [rig.engine.open_ticket(keys, None) for _ in range(64)]
    rig.tier.hold()
    for _ in range(20):
        rig.agree()
        rig.tier.release(rig.tier.n_held - 6 if rig.tier.n_held > 6 else 0)
    assert all(waits(ticket) for ticket in tickets)
    rig.tier.release()
    for _ in range(20):
        rig.agree()
    assert not any(waits(ticket) for ticket in tickets)
    assert rig.engine.stats.tickets_unleased == 0
    assert rig.holds(keys) == 12


def test_who_can_have_no_leases_waits_for_those_before_and_then_finds_all() -> None:
    """Eight requests whose pages host memory has no room for together. None loses what was loaded for it."""
    rig = Rig(n_slots=32, max_leased_share=0.5)
    paths = [path_keys([f"{name}{page}" for page in range(8)]) for name in "abcdefgh"]
    for keys in paths:
        rig.write_back(keys)
        rig.settle()
    queue = {rig.engine.open_ticket(keys, None): keys for keys in paths}
    while queue:
        _agree_for_long(rig)
        ready = [ticket for ticket in queue if not waits(ticket)]
        assert len(ready) == min(2, len(queue)), "as many as can have leases"
        for ticket in ready:
            assert len(ticket.rows) == 8
            assert rig.holds(queue[ticket]) == 8
        rig.engine.close_ticket(ready[0])
        del queue[ready[0]]
    assert rig.engine.stats.tickets_unleased == rig.engine.stats.tickets_expired == 0


def test_who_waits_in_the_line_is_not_let_go_while_others_are_admitted(rig_of_two: tuple[Rig, list[bytes]]) -> None:
    rig, (first, second, third) = rig_of_two
    ready, waiting = rig.engine.open_ticket(first, None), rig.engine.open_ticket(second, None)
    for _ in range(MAX_OVERDUE - 1):
        _let_time_pass(rig)
    assert waits(waiting)
    rig.engine.close_ticket(rig.engine.open_ticket(third, None))
    for _ in range(MAX_OVERDUE - 1):
        _let_time_pass(rig)
    assert waits(waiting), "something has ended since"
    for _ in range(2):
        _let_time_pass(rig)
    assert not waits(waiting), "nothing has, for a minute"
    assert rig.engine.stats.tickets_expired == 1
    for ticket in (ready, waiting):
        rig.engine.close_ticket(ticket)
    rig.settle()


def test_who_comes_later_does_not_take_the_leases_that_another_waits_for(rig_of_two: tuple[Rig, list[bytes]]) -> None:
    rig, (first, second, _) = rig_of_two
    ready, waiting = rig.engine.open_ticket(first, None), rig.engine.open_ticket(second, None)
    rig.agree()
    later = rig.engine.open_ticket(first, None)
    rig.engine.close_ticket(ready)
    _agree_for_long(rig)
    assert not waits(waiting)
    assert len(waiting.rows) == 8
    assert waits(later)
    rig.engine.close_ticket(waiting)
    _agree_for_long(rig)
    assert not waits(later)
    assert len(later.rows) == 8, "it was behind, and has them now"
    rig.engine.close_ticket(later)


def test_a_path_that_is_longer_than_all_may_lease_is_loaded_when_nobody_else_has_leases() -> None:
    rig = Rig(n_slots=32, max_leased_share=0.25)
    short, long = path_keys("abcdefgh"), path_keys([str(page) for page in range(12)])
    for keys in (short, long):
        rig.store_below_only(keys)
    small = rig.engine.open_ticket(short, None)
    _agree_for_long(rig)
    large = rig.engine.open_ticket(long, None)
    _agree_for_long(rig)
    assert (waits(small), waits(large)) == (False, True)
    rig.engine.close_ticket(small)
    _agree_for_long(rig)
    assert not waits(large)
    assert rig.holds(long) == 12
    assert rig.engine.stats.tickets_unleased == 1
    rig.engine.close_ticket(large)


def test_a_request_that_waits_for_no_pages_does_not_wait_in_the_line() -> None:
    rig = Rig(n_slots=24, max_leased_share=8 / 24, ticket_timeout_s=0.0)
    first, second = path_keys("abcdefgh"), path_keys("ijklmnop")
    for keys in (first, second):
        rig.write_back(keys)
        rig.settle()
    tickets = [rig.engine.open_ticket(keys, None) for keys in (first, second)]
    assert [waits(ticket) for ticket in tickets] == [False, True]
    rig.settle()
    assert [waits(ticket) for ticket in tickets] == [False, False]
    for ticket in tickets:
        rig.engine.close_ticket(ticket)


@pytest.fixture
def rig_of_two() -> tuple[Rig, list[bytes]]:
    """Three paths of eight pages that a tier has, and leases for one of them at a time."""
    rig = Rig(n_slots=24, max_leased_share=8 / 24)
    paths = [path_keys([f"{name}{page}" for page in range(8)]) for name in "abc"]
    for keys in paths:
        rig.write_back(keys)
        rig.settle()
    return rig, paths


def _let_time_pass(rig: Rig) -> None:
    rig.clock.now_s += TIMEOUT_S
    _agree_for_long(rig)


def _agree_for_long(rig: Rig) -> None:
    """Until nothing changes any more, though requests may still wait for others."""
    for _ in range(20):
        rig.agree()


def test_a_path_that_hbm_holds_whole_is_used_below_as_well(rig: Rig) -> None:
    keys = path_keys("ab")
    rig.write_back(keys)
    rig.engine.open_ticket(b"", keys[32:])
    assert rig.memory.touched == [keys[32:]]


# ---- resets ----


def test_a_reset_does_not_wait_for_the_disk_and_gives_no_slot_away_that_it_may_write(rig: Rig) -> None:
    keys = path_keys("abcdef")
    rig.store_below_only(keys)
    rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()
    rig.write_back(path_keys("xy"))
    rig.engine.reset()
    rig.engine.check_invariants()
    assert rig.engine.host.n_free == 32 - 6 - 2
    rig.write_back(path_keys("klmnopqr"))
    assert rig.holds(path_keys("klmnopqr")) == 8
    rig.tier.release()
    assert rig.holds(path_keys("klmnopqr")) == 8
    rig.agree()
    assert rig.engine.host.n_free == 32 - 8
    assert rig.engine.stats.fetched == 0, "what was dropped has not landed"


def test_a_slot_that_is_read_and_written_lingers_until_both_have_ended(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.memory.delete(split(keys)[0])
    rig.write_back(keys[:32])
    rig.engine.open_ticket(keys, None)
    rig.memory.delete(split(keys)[0])
    rig.agree()
    rig.tier.hold()
    rig.engine.clear_below()  # so that all of the path is offered again
    offload = rig.engine.begin_offload(path_keys("abcde")[4 * 32 :], keys[3 * 32 :])
    assert offload is not None
    rig.engine.finish_offload(offload, landed=True)
    rig.engine.reset()
    rig.engine.check_invariants()
    rig.tier.release()
    rig.agree()
    assert rig.engine.host.n_free == 32


def test_another_tier_takes_over_while_the_old_one_still_writes(rig: Rig) -> None:
    keys = path_keys("ab")
    rig.store_below_only(keys)
    rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()
    rig.engine.reset()
    fresh = MemoryTier(rig.slab, 1000)
    rig.engine.replace_tiers([fresh])
    rig.tier.release()
    rig.write_back(keys)
    rig.agree()
    assert fresh.exists(keys).result() == 2
    assert rig.engine.host.n_free == 30


def test_ranks_that_disagree_end_what_is_under_way_by_themselves(rig: Rig) -> None:
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert rig.engine.stand_down()
    assert not waits(ticket)
    assert not rig.engine.is_pending
    rig.engine.reset()
    assert not rig.engine.tainted
    assert rig.engine.host.n_free == 32


def test_a_disagreement_while_the_disk_hangs_taints_for_good(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicache.engine.STAND_DOWN_S", 0.0)
    keys = path_keys("abcd")
    rig.store_below_only(keys)
    rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.agree()
    assert not rig.engine.stand_down()
    rig.engine.retire()
    rig.engine.check_invariants()
    assert not rig.engine.is_pending
    rig.engine.reset()
    assert rig.engine.tainted
    assert rig.engine.open_ticket(keys, None).verdict is Verdict.GO
    rig.tier.release()
    rig.engine.check_invariants()


def test_an_emptied_tier_is_given_pages_again(rig: Rig) -> None:
    keys = path_keys("abc")
    rig.write_back(keys[:64])
    rig.agree()
    cleared = rig.engine.clear_below()
    assert cleared is not None
    assert cleared.result() == 2
    rig.write_back(keys[64:], keys[32:64])
    rig.agree()
    assert rig.memory.exists(keys).result() == 3


# ---- several tiers ----


def two(**kwargs: int | bool) -> Rig:
    """Two tiers, of which what is computed goes into neither."""
    return Rig(writes=("back", "back"), **kwargs)  # type: ignore[arg-type]


def test_pages_of_two_tiers_come_together() -> None:
    rig = two()
    keys = path_keys("abcdefgh")
    rig.put(0, keys[: 3 * 32])
    rig.put(1, keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.agree()
    rig.agree()
    assert not waits(ticket)
    assert ticket.fetched == (0, 8)
    assert rig.holds(keys) == 8
    assert [memory.stats()["loaded"] for memory in rig.memories] == [3, 5]


def test_what_the_faster_tier_has_lost_comes_from_the_slower_one() -> None:
    rig = two(batch_pages=8)
    keys = path_keys("abcdef")
    rig.put(0, keys)
    rig.put(1, keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.memory.delete(split(keys)[2])  # between the probe and the load, as a damaged page
    rig.settle()
    assert not waits(ticket)
    assert rig.holds(keys) == 6
    assert rig.engine.stats.fetch_missed == 0
    assert [memory.stats()["loaded"] for memory in rig.memories] == [2, 4]


@pytest.mark.parametrize("n_failing", [1, 2])
def test_a_faster_tier_that_fails_does_not_keep_what_a_slower_one_has(n_failing: int) -> None:
    rig = two()
    keys = path_keys("abcd")
    rig.put(0, keys[:64])
    rig.put(1, keys)
    rig.tier.fail_next(n_failing)
    rig.engine.open_ticket(keys, None)
    rig.settle()
    assert rig.holds(keys) == 4


def test_a_slower_tier_that_does_not_answer_does_not_keep_what_a_faster_one_has() -> None:
    rig = two()
    keys = path_keys("abcd")
    rig.put(0, keys[:64])
    rig.put(1, keys)
    rig.tiers[1].hold()
    ticket = rig.engine.open_ticket(keys, None)
    rig.agree()
    assert waits(ticket), "it may have the rest"
    rig.clock.now_s += TIMEOUT_S * PATIENCE_SHARE
    rig.agree()
    rig.agree()
    assert not waits(ticket)
    assert rig.engine.stats.tickets_expired == 0
    assert rig.holds(keys) == 2


def test_a_slower_tier_that_hangs_keeps_its_own_pages_only() -> None:
    rig = two()
    keys = path_keys("abcdef")
    rig.put(0, keys[:64])
    rig.put(1, keys)
    ticket = rig.engine.open_ticket(keys, None)
    rig.tiers[1].hold()
    rig.agree()
    rig.agree()
    assert (ticket.fetched, waits(ticket)) == ((0, 2), True)
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    assert not waits(ticket)
    assert rig.holds(keys) == 2
    assert rig.engine.host.n_free == 32 - 6, "the tier that hangs may still write to four slots"
    rig.tiers[1].release()
    rig.agree()
    assert rig.engine.host.n_free == 32 - 2


def test_a_tier_that_hangs_is_not_in_the_way_of_what_others_load() -> None:
    """Whatever it was loading when it began to hang, and however long that takes."""
    rig = Rig(n_slots=64, writes=("back", "back"))
    hung = [path_keys(letter * 2) for letter in "abcdefghij"]
    late, other = path_keys("mno"), path_keys("xyz")
    for keys in hung:
        rig.put(0, keys)
    tickets = [rig.engine.open_ticket(keys, None) for keys in hung]
    rig.tier.hold()
    rig.agree()
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    rig.agree()
    assert not any(waits(ticket) for ticket in tickets)
    assert rig.engine.host.n_free == 64 - 2 * N_REPORTED
    rig.put(0, late)
    rig.put(1, other)
    n_held = rig.tier.n_held
    for keys in (late, other):
        rig.engine.open_ticket(keys, None)
    for _ in range(3):
        rig.agree()
    assert rig.holds(other) == 3
    assert rig.tier.n_held == n_held, "it is asked for nothing while it keeps slots"
    rig.tier.release()
    rig.agree()
    assert rig.engine.host.n_free == 64 - 3
    rig.engine.open_ticket(late, None)
    rig.settle()
    assert rig.holds(late) == 3


def test_no_other_tier_is_asked_for_pages_that_were_given_up() -> None:
    rig = two(batch_pages=8)
    keys = path_keys("abcd")
    rig.put(0, keys)
    rig.put(1, keys)
    rig.engine.open_ticket(keys, None)
    rig.tier.hold()
    rig.tier.miss_next(1)
    rig.agree()
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    rig.tier.release()
    rig.agree()
    assert rig.memories[1].stats()["loaded"] == 0
    assert rig.engine.host.n_free == 32


def test_a_tier_that_hangs_does_not_hold_up_the_spills_of_another() -> None:
    rig = Rig(n_slots=64, writes=("through", "through"))
    rig.tier.hold()
    for path in ("ab", "cd", "ef", "gh", "ij", "kl"):
        rig.write_back(path_keys(path))
        rig.agree()
    assert rig.n_stored(path_keys("ab")) == rig.n_stored(path_keys("kl")) == [0, 2]
    assert spills_of(rig).n_pages == 8, "an eighth of host memory may be on its way to each of two"
    assert spills_of(rig, 1).n_pages == 0
    rig.tier.release()
    rig.settle()
    assert rig.n_stored(path_keys("kl")) == [2, 2]


def test_only_the_part_that_is_worth_it_is_loaded() -> None:
    rig = two(fetch_only_if_faster=True)
    keys = path_keys("abcdefgh")
    rig.put(0, keys[: 5 * 32])
    rig.put(1, keys)
    rig.memories[1].load_s_per_page = 1.0
    rig.engine.prefill_speed.observe([(0, 8)], 0.8)
    rig.engine.open_ticket(keys, None)
    rig.settle()
    assert rig.holds(keys) == 5
    assert rig.engine.stats.fetches_declined == 1
    rig.engine.reset()
    rig.memories[1].load_s_per_page = 0.2
    rig.engine.open_ticket(keys, None)
    rig.settle()
    assert rig.holds(keys) == 8, "both load at the same time"
    rig.engine.reset()
    rig.memory.load_s_per_page = 1.0
    rig.engine.open_ticket(keys, None)
    rig.settle()
    assert rig.holds(keys) == 0


def test_every_tier_hears_of_the_deepest_page_in_use_that_it_has() -> None:
    rig = Rig(writes=("through", "back"))
    keys = path_keys("abc")
    rig.write_back(keys[:64])
    rig.engine.begin_offload(keys[64:], keys[32:64])
    rig.engine.open_ticket(b"", keys[64:])
    assert [memory.touched for memory in rig.memories] == [[keys[32:64]], [keys[64:]]], "or may have"


def test_tiers_are_emptied_and_replaced_together() -> None:
    rig = Rig(writes=("through", "through"))
    keys = path_keys("abc")
    rig.write_back(keys[:64])
    rig.settle()
    cleared = rig.engine.clear_below()
    assert cleared is not None
    assert cleared.result() == 4
    rig.write_back(keys[64:], keys[32:64])
    rig.settle()
    assert rig.n_stored(keys) == [3, 3]
    fresh = [MemoryTier(rig.slab, 1000) for _ in rig.tiers]
    rig.engine.reset()
    rig.engine.replace_tiers(fresh)
    rig.write_back(keys)
    rig.settle()
    assert [memory.exists(keys).result() for memory in fresh] == [3, 3]


def test_a_tier_that_cannot_be_emptied_is_told_and_the_other_is_empty() -> None:
    rig = Rig(writes=("through", "through"))
    rig.write_back(path_keys("ab"))
    rig.settle()
    rig.tier.fail_next(1)
    cleared = rig.engine.clear_below()
    assert cleared is not None
    with pytest.raises(TierError, match="injected"):
        cleared.result()
    assert rig.n_stored(path_keys("ab")) == [2, 0]


def test_a_slot_that_several_tiers_read_lingers_until_all_have_ended() -> None:
    rig = Rig(writes=("through", "through"))
    for tier in rig.tiers:
        tier.hold()
    rig.write_back(path_keys("ab"))
    rig.engine.reset()
    rig.engine.check_invariants()
    assert rig.engine.host.n_free == 30
    rig.tiers[1].release()
    rig.agree()
    assert rig.engine.host.n_free == 30
    rig.tier.release()
    rig.agree()
    assert rig.engine.host.n_free == 32


def test_ranks_that_disagree_wait_for_every_tier_and_ask_no_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicache.engine.STAND_DOWN_S", 0.0)
    rig = two()
    keys = path_keys("abcd")
    rig.put(0, keys[:64])
    rig.put(1, keys)
    rig.engine.open_ticket(keys, None)
    for tier in rig.tiers:
        tier.hold()
    rig.tier.miss_next(1)
    rig.agree()
    rig.tier.release()
    assert not rig.engine.stand_down()
    assert rig.tiers[1].n_held == 1
    rig.tiers[1].release()
    assert rig.engine.stand_down()
    rig.engine.reset()
    assert rig.engine.host.n_free == 32
