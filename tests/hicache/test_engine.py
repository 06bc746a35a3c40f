import pytest

from hicache import UNKNOWN, Engine, Offload, Ticket, Verdict
from hicache.engine import FOLLOW_TIMEOUT_S
from radix import HBM, HOST, Index, State
from tests.support.clock import Clock
from tests.support.keys import path_keys


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_engine(n_slots: int, clock: Clock, *, max_leased_share: float = 1.0) -> Engine:
    return Engine(Index(1024), n_slots, clock=clock, ticket_timeout_s=5.0, max_leased_share=max_leased_share)


def poll(engine: Engine, ticket: Ticket) -> Verdict:
    """What one rank alone decides about a ticket."""
    engine.follow(engine.report(decides=True))
    return ticket.verdict


def store(engine: Engine, keys: bytes, parent: bytes | None = None) -> int:
    """Offload and land; how many pages were copied."""
    offload = engine.begin_offload(keys, parent)
    if offload is None:
        return 0
    engine.finish_offload(offload, landed=True)
    return len(offload.rows)


def test_what_was_written_back_can_be_restored(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcd")
    assert engine.lookup(keys) == 0
    offload = engine.begin_offload(keys)
    assert offload is not None
    assert list(offload.positions) == [0, 1, 2, 3]
    assert engine.lookup(keys) == 0, "pages on their way are not promised"
    engine.finish_offload(offload, landed=True)
    assert engine.lookup(keys) == 4
    restore = engine.begin_restore(keys)
    assert restore is not None
    assert list(restore.slots) == list(offload.slots)
    engine.finish_restore(restore, copied=True)
    engine.check_invariants()
    assert engine.stats.restored == 4


def test_pages_already_held_are_not_copied_again(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcdef")
    assert store(engine, keys[: 4 * 32]) == 4
    offload = engine.begin_offload(keys)
    assert offload is not None
    assert list(offload.positions) == [4, 5]
    assert engine.begin_offload(keys) is None, "in flight counts as held"
    engine.finish_offload(offload, landed=True)
    assert engine.stats.deduplicated == 4 + 6


def test_a_page_below_a_parent_that_host_memory_lacks_is_not_admitted_until_its_path_is_offered(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcd")
    parent = keys[32:64]
    assert not engine.holds(parent)
    assert engine.begin_offload(keys[64:], parent) is None
    assert store(engine, keys) == 4
    assert engine.holds(parent)
    assert engine.lookup(keys) == 4


def test_a_failed_copy_gives_its_slots_back_and_promises_nothing(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    offload = engine.begin_offload(keys)
    assert offload is not None
    engine.finish_offload(offload, landed=False)
    assert engine.lookup(keys) == 0
    assert engine.host.n_free == 4
    assert store(engine, keys) == 4
    engine.check_invariants()


def test_eviction_makes_room_leaf_first_and_least_recent_first(clock: Clock) -> None:
    engine = make_engine(4, clock)
    old, new = path_keys("ab"), path_keys("cd")
    store(engine, old)
    engine.tick()
    store(engine, new)
    engine.tick()
    assert store(engine, path_keys("e")) == 1
    assert engine.lookup(old) == 1, "the leaf of the older path went, its parent stayed"
    assert engine.lookup(new) == 2
    assert engine.stats.evicted == 1


def test_what_was_looked_up_in_this_tick_is_not_evicted_in_it(clock: Clock) -> None:
    engine = make_engine(2, clock)
    keys = path_keys("ab")
    store(engine, keys)
    engine.tick()
    assert engine.lookup(keys) == 2
    assert store(engine, path_keys("xy")) == 0
    assert engine.stats.skipped_full == 2
    restore = engine.begin_restore(keys)
    assert restore is not None
    engine.tick()
    assert store(engine, path_keys("xy")) == 0, "a restore under way holds its slots"
    engine.finish_restore(restore, copied=True)
    engine.tick()
    assert store(engine, path_keys("xy")) == 2


def test_a_run_too_long_for_host_memory_keeps_its_head(clock: Clock) -> None:
    engine = make_engine(3, clock)
    keys = path_keys("abcdef")
    assert store(engine, keys) == 3
    assert engine.lookup(keys) == 3
    engine.check_invariants()


def test_begin_restore_refuses_what_has_gone(clock: Clock) -> None:
    engine = make_engine(2, clock)
    keys = path_keys("ab")
    assert engine.begin_restore(keys) is None
    store(engine, keys)
    assert engine.begin_restore(path_keys("abc")) is None
    engine.check_invariants()


def test_hbm_use_keeps_host_copies_recent(clock: Clock) -> None:
    engine = make_engine(4, clock)
    hot, cold = path_keys("ab"), path_keys("cd")
    store(engine, hot)
    engine.tick()
    store(engine, cold)
    engine.tick()
    engine.hbm_used(hot[-32:])
    engine.tick()
    store(engine, path_keys("ef"))
    assert engine.lookup(hot) == 2
    assert engine.lookup(cold) == 0


def test_hbm_mirror_follows(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    store(engine, keys)
    assert engine.index.count(HBM, State.RESIDENT) == 4
    engine.hbm_evicted(keys[64:])
    assert engine.index.count(HBM, State.RESIDENT) == 2
    engine.hbm_evicted(keys[:64])
    assert engine.index.count(HBM, State.RESIDENT) == 0
    assert engine.index.count(HOST, State.RESIDENT) == 4
    engine.check_invariants()


def test_pages_that_were_not_copied_are_still_known_to_be_in_hbm(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    engine.skip_offload(keys)
    assert engine.index.count(HBM, State.RESIDENT) == 4
    assert engine.stats.skipped_pressure == 4
    engine.hbm_evicted(keys)
    assert len(engine.index) == 0


def test_a_full_index_skips_and_serves(clock: Clock) -> None:
    engine = Engine(Index(4), 4, clock=clock)
    store(engine, path_keys("abcd"))
    assert store(engine, path_keys("wxyz")) == 0
    assert engine.stats.skipped_full == 4
    assert engine.lookup(path_keys("abcd")) == 4
    engine.check_invariants()


# ---- tickets ----


def test_a_ticket_goes_at_once_when_nothing_is_on_its_way(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    store(engine, keys)
    ticket = engine.open_ticket(keys, None)
    assert poll(engine, ticket) is Verdict.GO
    engine.close_ticket(ticket)
    engine.check_invariants()


def test_a_ticket_waits_for_pages_on_their_way_and_goes_when_they_land(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    offload = engine.begin_offload(keys)
    assert offload is not None
    ticket = engine.open_ticket(keys, None)
    assert poll(engine, ticket) is Verdict.GO, "HBM has all of them"
    engine.close_ticket(ticket)
    engine.hbm_evicted(keys)
    ticket = engine.open_ticket(keys, None)
    assert poll(engine, ticket) is Verdict.WAIT
    engine.finish_offload(offload, landed=True)
    assert poll(engine, ticket) is Verdict.GO
    assert engine.lookup(keys) == 4


def test_a_ticket_goes_when_what_it_waits_for_fails(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    offload = engine.begin_offload(keys)
    assert offload is not None
    engine.hbm_evicted(keys)
    ticket = engine.open_ticket(keys, None)
    assert poll(engine, ticket) is Verdict.WAIT
    engine.finish_offload(offload, landed=False)
    assert poll(engine, ticket) is Verdict.GO
    engine.close_ticket(ticket)
    engine.check_invariants()
    assert engine.host.n_free == 4


def test_a_ticket_goes_at_its_deadline_and_not_before(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    offload = engine.begin_offload(keys)
    assert offload is not None
    engine.hbm_evicted(keys)
    ticket = engine.open_ticket(keys, None)
    clock.now_s = 4.999
    assert poll(engine, ticket) is Verdict.WAIT
    clock.now_s = 5.0
    assert poll(engine, ticket) is Verdict.GO
    assert engine.stats.tickets_expired == 1
    engine.finish_offload(offload, landed=True)
    assert poll(engine, ticket) is Verdict.GO


def test_a_ticket_keeps_its_whole_path_also_the_pages_that_are_in_hbm(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    store(engine, keys)
    # HBM holds "ab"; the request asks for what lies behind it.
    ticket = engine.open_ticket(keys[64:], keys[32:64])
    engine.tick()
    assert store(engine, path_keys("wxyz")) == 0
    engine.close_ticket(ticket)
    engine.tick()
    assert store(engine, path_keys("wxyz")) == 4
    assert engine.lookup(keys) == 0


def test_tickets_may_pin_only_their_share(clock: Clock) -> None:
    engine = make_engine(8, clock, max_leased_share=0.5)
    first, second = path_keys("abcd"), path_keys("efgh")
    store(engine, first)
    store(engine, second)
    tickets = [engine.open_ticket(first, None), engine.open_ticket(second, None)]
    assert engine.stats.tickets_unleased == 1
    engine.tick()
    assert store(engine, path_keys("wxyz")) == 4, "the second path was free to go"
    assert engine.lookup(first) == 4
    for ticket in tickets:
        assert poll(engine, ticket) is Verdict.GO
        engine.close_ticket(ticket)
    engine.check_invariants()


def test_reset_drops_everything_and_closes_tickets(clock: Clock) -> None:
    engine = make_engine(4, clock)
    keys = path_keys("abcd")
    store(engine, keys)
    engine.open_ticket(keys, None)
    engine.reset()
    engine.check_invariants()
    assert engine.host.n_free == 4
    assert engine.lookup(keys) == 0
    assert store(engine, keys) == 4


def test_reset_with_a_copy_under_way_is_our_bug(clock: Clock) -> None:
    engine = make_engine(4, clock)
    assert engine.begin_offload(path_keys("ab")) is not None
    with pytest.raises(AssertionError, match="1 copies have begun"):
        engine.reset()


# ---- what ranks agree on ----


def incoming(engine: Engine, path: str) -> tuple[bytes, Offload]:
    """A path whose pages have left HBM while they are on their way into host memory."""
    keys = path_keys(path)
    offload = engine.begin_offload(keys)
    assert offload is not None
    engine.hbm_evicted(keys)
    return keys, offload


def test_a_deadline_passes_when_the_ranks_have_agreed_and_not_by_the_clock(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys, _ = incoming(engine, "ab")
    ticket = engine.open_ticket(keys, None)
    assert engine.n_waiting == 1
    clock.now_s = 5.0
    assert engine.report(decides=True) == [1, 0, UNKNOWN]
    engine.poll_tickets()
    assert not engine.admit(ticket), "another rank's clock may say otherwise"
    engine.follow([1, 0, UNKNOWN])
    assert engine.n_waiting == 0
    assert engine.admit(ticket)
    assert engine.stats.tickets_expired == 1


def test_expiry_is_in_the_order_of_arrival(clock: Clock) -> None:
    engine = make_engine(8, clock)
    first = engine.open_ticket(incoming(engine, "ab")[0], None)
    second = engine.open_ticket(incoming(engine, "cd")[0], None)
    engine.follow([1, 0, UNKNOWN])
    assert (first.verdict, second.verdict) == (Verdict.GO, Verdict.WAIT)


def test_a_follower_waits_until_its_leader_ends(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcd")
    leader, follower = engine.open_ticket(keys, None), engine.open_ticket(keys, None)
    assert engine.admit(leader)
    prefill = engine.launch(leader)
    for _ in range(2):
        engine.tick()
        assert not engine.admit(follower)
    assert engine.n_waiting == 1
    assert engine.stats.followers == 1, "it is one wait, however often it asks"
    engine.end_prefill(prefill)
    assert engine.admit(follower)
    assert engine.n_waiting == 0


def test_a_follower_whose_time_is_up_computes(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcd")
    leader, follower = engine.open_ticket(keys, None), engine.open_ticket(keys, None)
    assert engine.admit(leader)
    engine.launch(leader)
    assert not engine.admit(follower)
    clock.now_s = FOLLOW_TIMEOUT_S
    assert engine.report(decides=True) == [0, 1, UNKNOWN]
    engine.follow([0, 1, UNKNOWN])
    assert engine.admit(follower)
    assert engine.stats.followers_expired == 1


def test_a_closed_ticket_leads_and_waits_no_more(clock: Clock) -> None:
    engine = make_engine(8, clock)
    keys = path_keys("abcd")
    leader, follower, third = (engine.open_ticket(keys, None) for _ in range(3))
    assert engine.admit(leader)
    assert not engine.admit(follower)
    engine.close_ticket(follower)
    assert engine.n_waiting == 0
    engine.close_ticket(leader)
    assert engine.admit(third)


def test_a_tainted_engine_promises_and_keeps_nothing_and_makes_nobody_wait(clock: Clock) -> None:
    engine = make_engine(16, clock)
    kept, (arriving, offload) = path_keys("abcd"), incoming(engine, "ef")
    store(engine, kept)
    assert engine.lookup(kept) == 4
    tickets = [engine.open_ticket(keys, None) for keys in (arriving, path_keys("xyz"), path_keys("xyz"))]
    assert [engine.admit(ticket) for ticket in tickets] == [False, True, False]
    engine.taint()
    assert engine.lookup(kept) == 0
    assert engine.begin_restore(kept) is None, "what was promised in this tick is not kept either"
    assert engine.begin_offload(path_keys("gh")) is None
    assert engine.stats.skipped_tainted == 2
    assert engine.index.count(HBM, State.RESIDENT) == 6, "HBM is still followed"
    assert engine.n_waiting == 0
    assert all(engine.admit(ticket) for ticket in tickets)
    assert len(engine.open_ticket(kept, None).rows) == 0
    engine.finish_offload(offload, landed=True)
    assert engine.lookup(arriving) == 0, "it was on its way when the taint came"
    engine.reset()
    assert not engine.tainted
    assert store(engine, kept) == 4
    assert engine.lookup(kept) == 4


def test_equal_calls_give_equal_digests_and_other_decisions_other_ones(clock: Clock) -> None:
    first, second = make_engine(8, clock), make_engine(8, clock)
    for engine in (first, second):
        store(engine, path_keys("abcd"))
        engine.lookup(path_keys("ab"))
    assert first.digest == second.digest != 0
    first.lookup(path_keys("ab"))
    second.lookup(path_keys("abc"))
    assert first.digest != second.digest


def test_a_write_back_that_only_one_rank_has_is_in_the_digest(clock: Clock) -> None:
    first, second = make_engine(8, clock), make_engine(8, clock)
    store(first, path_keys("ab"))
    second.skip_offload(path_keys("ab"))
    assert first.digest != second.digest


def test_a_reset_starts_the_digest_anew(clock: Clock) -> None:
    engine = make_engine(8, clock)
    store(engine, path_keys("ab"))
    engine.reset()
    assert engine.digest == 0
