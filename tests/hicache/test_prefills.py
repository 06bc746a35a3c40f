"""Who computes, who waits, and that nobody waits for somebody who waits, or for ever."""

from __future__ import annotations

from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache import prefills
from hicache.prefills import MIN_SHARED_PAGES, Prefill, Prefills
from radix import HBM, HOST, KEY_NBYTES, ROOT, Index
from tests.support.keys import path_keys

MACHINE_MIN_SHARED = 3


class Rig:
    """Prefills over an index in which a test says what is published."""

    def __init__(self) -> None:
        self.index = Index(4096)
        self.prefills = Prefills(self.index)

    def publish(self, keys: bytes, n_pages: int) -> None:
        """These pages are in HBM now."""
        if n_pages:
            self.index.put(self.index.insert(keys[: n_pages * KEY_NBYTES], ROOT), HBM)

    def vanish(self, keys: bytes, n_kept: int) -> None:
        """HBM has evicted all but the first pages."""
        rows = self.index.match(keys)[n_kept:]
        self.index.drop(rows, HBM)

    def next_pass(self) -> None:
        self.index.tick()

    def lead(self, keys: bytes) -> Prefill:
        """A prefill that is admitted and launched."""
        prefill = Prefill(keys)
        assert self.prefills.enter(prefill)
        self.prefills.launch(prefill)
        return prefill


@pytest.fixture
def rig() -> Rig:
    return Rig()


def document(n_pages: int, *more: object) -> bytes:
    return path_keys([*range(n_pages), *more])


def test_the_first_leads_and_those_who_lack_the_same_wait_until_it_is_published(rig: Rig) -> None:
    keys = document(40)
    rig.lead(keys)
    follower = Prefill(keys)
    for n_published in (0, 10, 39):
        rig.publish(keys, n_published)
        rig.next_pass()
        assert not rig.prefills.enter(follower), f"{n_published} of 40 pages"
    rig.publish(keys, 40)
    rig.next_pass()
    assert rig.prefills.enter(follower)


def test_a_follower_of_a_part_goes_when_that_part_is_there(rig: Rig) -> None:
    leader, follower = document(60, "other"), document(30, "own", "question")
    rig.lead(leader)
    waiting = Prefill(follower)
    assert not rig.prefills.enter(waiting)
    rig.publish(leader, 29)
    rig.next_pass()
    assert not rig.prefills.enter(waiting)
    rig.publish(leader, 30)
    rig.next_pass()
    assert rig.prefills.enter(waiting), "the leader computes on, but nothing that both lack"


def test_sixteen_questions_over_one_document_are_computed_side_by_side_once_it_is_there(rig: Rig) -> None:
    rig.lead(document(40, "first"))
    waiting = [Prefill(document(40, f"question {i}", i)) for i in range(15)]
    assert not any(rig.prefills.enter(prefill) for prefill in waiting)
    rig.publish(document(40, "first"), 40)
    rig.next_pass()
    assert all(rig.prefills.enter(prefill) for prefill in waiting)


@pytest.mark.parametrize(("n_shared", "waits"), [(MIN_SHARED_PAGES - 1, False), (MIN_SHARED_PAGES, True)])
def test_little_is_computed_again(rig: Rig, n_shared: int, waits: bool) -> None:
    rig.lead(document(n_shared, "one"))
    assert rig.prefills.enter(Prefill(document(n_shared, "another", "text"))) is not waits


def test_all_that_a_request_lacks_is_waited_for_however_little_it_is(rig: Rig) -> None:
    rig.lead(document(3))
    assert not rig.prefills.enter(Prefill(document(2)))
    assert rig.prefills.enter(Prefill(document(2, "and one more")))


def test_what_is_shared_is_counted_from_what_is_lacking(rig: Rig) -> None:
    """Pages that are there already are no reason to wait."""
    leader = document(60, "one")
    rig.publish(leader, 50)
    rig.lead(leader)
    assert rig.prefills.enter(Prefill(document(60, "another", "text"))), "10 pages are shared and lacking"
    assert not rig.prefills.enter(Prefill(document(60)))


def test_two_leaders_that_share_a_little_are_both_followed(rig: Rig) -> None:
    """A cold system prompt, and then two documents that many ask about."""
    system = range(MIN_SHARED_PAGES - 1)
    rig.lead(path_keys([*system, *"first document, " * 3]))
    second = path_keys([*system, *"second document " * 3])
    rig.lead(second)
    assert not rig.prefills.enter(Prefill(second))


def test_pages_in_host_memory_are_not_lacking(rig: Rig) -> None:
    keys = document(40)
    rows = rig.index.insert(keys, ROOT)
    rig.index.begin(rows, HOST, rows.copy())
    rig.index.commit(rows, HOST)
    first, second = Prefill(keys), Prefill(keys)
    assert rig.prefills.enter(first)
    rig.prefills.launch(first)
    assert rig.prefills.enter(second), "nobody computes what can be restored"


@pytest.mark.parametrize("n_published", [0, 17])
def test_when_a_leader_ends_early_the_first_to_ask_takes_over(rig: Rig, n_published: int) -> None:
    keys = document(40)
    leader = rig.lead(keys)
    second, third = Prefill(keys), Prefill(keys)
    assert not rig.prefills.enter(second)
    assert not rig.prefills.enter(third)
    rig.publish(keys, n_published)
    rig.prefills.end(leader)  # aborted, failed or retracted
    rig.next_pass()
    assert rig.prefills.enter(second)
    assert not rig.prefills.enter(third), "and leads those who are left"


def test_who_was_let_in_without_being_launched_leads_for_that_pass_only(rig: Rig) -> None:
    keys = document(40)
    unlucky, second = Prefill(keys), Prefill(keys)
    assert rig.prefills.enter(unlucky)
    assert not rig.prefills.enter(second), "in this pass it may still be launched"
    rig.next_pass()
    assert rig.prefills.enter(second), "nobody waits for a request that is itself waiting"
    assert not rig.prefills.enter(unlucky)


def test_who_asks_twice_in_a_pass_gets_the_same_answer(rig: Rig) -> None:
    keys = document(40)
    leader, follower = Prefill(keys), Prefill(keys)
    assert rig.prefills.enter(leader)
    assert not rig.prefills.enter(follower)
    assert rig.prefills.enter(leader)
    assert not rig.prefills.enter(follower)


def test_a_refused_leader_is_not_waited_for_again_and_others_are(rig: Rig) -> None:
    keys = document(40)
    leader = rig.lead(keys)
    impatient = Prefill(keys)
    assert not rig.prefills.enter(impatient)
    rig.prefills.refuse(impatient)
    rig.next_pass()
    assert rig.prefills.enter(impatient)
    rig.prefills.end(leader)
    rig.next_pass()
    rig.lead(keys)
    assert not rig.prefills.enter(impatient), "this is another leader"


def test_a_leader_whose_pages_leave_hbm_again_does_not_hold_its_followers(rig: Rig) -> None:
    keys = document(40)
    rig.lead(keys)
    follower = Prefill(keys)
    assert not rig.prefills.enter(follower)
    rig.publish(keys, 40)
    rig.next_pass()
    assert rig.prefills.enter(Prefill(document(1)))  # a pass in which the leader is seen to be through
    rig.vanish(keys, 0)
    rig.next_pass()
    assert rig.prefills.enter(follower), "it computes them itself"


def test_after_a_reset_nobody_leads(rig: Rig) -> None:
    keys = document(40)
    rig.lead(keys)
    rig.prefills.clear()
    assert rig.prefills.enter(Prefill(keys))


def test_a_request_that_lacks_nothing_whole_neither_leads_nor_waits(rig: Rig) -> None:
    rig.lead(document(4))
    assert rig.prefills.enter(Prefill(b""))
    assert rig.prefills.enter(Prefill(b""))


class PrefillsMachine(RuleBasedStateMachine):
    """Against a plain model of a queue: paths are strings, and what is published is a set of prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.min_shared = mock.patch.object(prefills, "MIN_SHARED_PAGES", MACHINE_MIN_SHARED)
        self.min_shared.start()
        self.rig = Rig()
        self.waiting: list[tuple[str, Prefill]] = []
        self.running: list[tuple[str, int, Prefill]] = []
        """With how many pages at the head of its path have been seen published since it runs, by whomever."""
        self.published: set[str] = set()

    def n_there(self, path: str) -> int:
        """How many pages at the head of the path are published."""
        return next((n for n in range(len(path)) if path[: n + 1] not in self.published), len(path))

    @rule(path=st.text("ab", min_size=1, max_size=6))
    def arrive(self, path: str) -> None:
        self.waiting.append((path, Prefill(path_keys(path))))

    @rule(n_admitted=st.integers(0, 3))
    def schedule(self, n_admitted: int) -> None:
        """One pass: everybody asks, in order; the first n who are let in are launched, the others found no room."""
        self.rig.next_pass()
        self.running = [(path, max(seen, self.n_there(path)), prefill) for path, seen, prefill in self.running]
        let_in = [(path, prefill) for path, prefill in self.waiting if self.rig.prefills.enter(prefill)]
        assert let_in or self.running or not self.waiting, "everybody waits, and nobody runs"
        for path, prefill in let_in[:n_admitted]:
            self.waiting.remove((path, prefill))
            self.rig.prefills.launch(prefill)
            self.nobody_computes_this_already(path)
            self.running.append((path, self.n_there(path), prefill))

    @precondition(lambda self: self.running)
    @rule(data=st.integers(0, 9), n_pages=st.integers(1, 6))
    def publish_a_chunk(self, data: int, n_pages: int) -> None:
        i = data % len(self.running)
        path, first, prefill = self.running[i]
        end = min(len(path), max(first, self.n_there(path)) + n_pages)
        self.rig.publish(path_keys(path), end)
        self.published.update(path[: n + 1] for n in range(end))
        self.running[i] = (path, end, prefill)

    @precondition(lambda self: self.running)
    @rule(data=st.integers(0, 9))
    def end(self, data: int) -> None:
        """Finished, aborted or retracted, with all, some or none of its pages published."""
        _, _, prefill = self.running.pop(data % len(self.running))
        self.rig.prefills.end(prefill)

    @precondition(lambda self: self.waiting)
    @rule(data=st.integers(0, 9))
    def abort_waiting(self, data: int) -> None:
        _, prefill = self.waiting.pop(data % len(self.waiting))
        self.rig.prefills.end(prefill)

    @precondition(lambda self: self.waiting)
    @rule(data=st.integers(0, 9))
    def hbm_evicts(self, data: int) -> None:
        """The leaves of one path, as far as no other needs them."""
        path, _ = self.waiting[data % len(self.waiting)]
        n_there = self.n_there(path)
        leaf = path[:n_there]
        if n_there and not any(other != leaf and other.startswith(leaf) for other in self.published):
            self.rig.vanish(path_keys(leaf), n_there - 1)
            self.published.remove(leaf)

    def nobody_computes_this_already(self, path: str) -> None:
        """But for a few pages, and for those that were published while the other ran, and have been lost since."""
        lacking = self.n_there(path)
        for other, seen, _ in self.running:
            n_common = sum(path[: n + 1] == other[: n + 1] for n in range(min(len(path), len(other))))
            if seen <= lacking < n_common:
                assert n_common - lacking < MACHINE_MIN_SHARED, f"{path} and {other} are computed side by side"
                assert n_common < len(path), f"{path} is all computed by {other}"

    @invariant()
    def nobody_waits_for_who_does_not_run(self) -> None:
        live = {id(prefill) for _, _, prefill in self.running}
        for path, prefill in self.waiting:
            leader = prefill.leader
            if leader is not None and leader.running:
                assert id(leader) in live, f"{path} waits for a prefill that has ended"

    def teardown(self) -> None:
        """Leaders go on or end, and everybody is let in within as many passes as there are requests."""
        for _ in range(len(self.waiting)):
            for _, _, prefill in self.running:
                self.rig.prefills.end(prefill)
            self.running.clear()
            self.schedule(1)
        self.min_shared.stop()
        assert not self.waiting


TestPrefillsMachine = PrefillsMachine.TestCase
TestPrefillsMachine.settings = settings(max_examples=200, stateful_step_count=40)
