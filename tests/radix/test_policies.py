"""Every policy against its model, at random and on all there is of the small, and what holds for any of them."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from radix import HOST, KEY_NBYTES, POLICIES, State, StillHeld
from sgl_lmcache.simulate.bound import clairvoyant_hits
from tests.radix.playing import Tier
from tests.radix.policy_models import MODELS, LruModel
from tests.simulate.traces import blocks

MAX_DEPTH = 5
PATHS = st.text("ab", min_size=1, max_size=MAX_DEPTH)
ALL_PATHS = ["".join(path) for depth in range(MAX_DEPTH, 0, -1) for path in product("ab", repeat=depth)]
"""The deepest first."""
N_TOKENS = st.sampled_from([0, 1, 20, 300, 5000])


def may_go(tier: Tier, group: int) -> list[str]:
    """The paths whose last pages could leave, one after the other."""
    columns, now = tier.index._columns, tier.index.now
    states = {path: tier.index.states(tier.rows(path)[-1:], HOST)[0] for path in known_paths(tier)}
    free: list[str] = []
    for path, state in states.items():
        row = tier.rows(path)[-1]
        is_kept = columns.leases[row] or columns.last_use[row] == now or columns.group[row] != group
        children = [child for child in (path + "a", path + "b") if states.get(child, State.ABSENT) != State.ABSENT]
        if state == State.RESIDENT and not is_kept and all(child in free for child in children):
            free.append(path)
    return free


def known_paths(tier: Tier) -> list[str]:
    return [path for path in ALL_PATHS if len(tier.rows(path)) == len(path)]


class PolicyMachine(RuleBasedStateMachine):
    """What a server may do to one tier, in any order.

    Each eviction is compared with what may go, and page by page with a model. A policy's model has one group; without a
    model there are two, and paths that begin with "b" are of the second.
    """

    policy: str
    model: type[LruModel] | None

    @initialize(n_slots=st.integers(2, 12))
    def start(self, n_slots: int) -> None:
        self.tier = Tier(self.policy, n_slots, model=self.model, n_groups=1 if self.model else 2)
        if self.model is None:
            self.tier.index.assign(self.tier.keys("b")[0], 1)

    def group(self, path: str) -> int:
        return int(self.model is None and path.startswith("b"))

    @rule(path=PATHS, n_tokens=N_TOKENS, is_passing=st.booleans())
    def request(self, path: str, n_tokens: int, is_passing: bool) -> None:
        self.tier.request(path, n_tokens, group=self.group(path), is_passing=is_passing)

    @rule(paths=st.lists(PATHS, min_size=10, max_size=60))
    def requests(self, paths: list[str]) -> None:
        for path in paths:
            self.tier.request(path, group=self.group(path))

    @rule(path=PATHS)
    def begin(self, path: str) -> None:
        """A request that goes on while others come and go."""
        self.tier.tick()
        self.tier.ask(path)
        self.tier.lease(path)
        self.tier.admit(path, group=self.group(path))

    @precondition(lambda self: self.tier.leased)
    @rule(n_tokens=N_TOKENS, data=st.data())
    def end(self, n_tokens: int, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.tier.leased))
        self.tier.answer(path, n_tokens)
        self.tier.release(path)

    @precondition(lambda self: self.tier.leased)
    @rule(more=st.text("ab", min_size=1, max_size=2), data=st.data())
    def go_on(self, more: str, data: st.DataObject) -> None:
        """The pages of an answer arrive, for which nobody has asked."""
        path = (data.draw(st.sampled_from(self.tier.leased)) + more)[:MAX_DEPTH]
        self.tier.lease(path)
        self.tier.admit(path, group=self.group(path))
        self.tier.release(path)

    @rule(path=PATHS)
    def page_begins_to_arrive(self, path: str) -> None:
        self.tier.begin(path)

    @precondition(lambda self: self.tier.arriving)
    @rule(has_come=st.booleans(), data=st.data())
    def page_has_arrived(self, has_come: bool, data: st.DataObject) -> None:
        self.tier.end(data.draw(st.sampled_from(self.tier.arriving)), has_come=has_come)

    @rule(path=PATHS)
    def look_up(self, path: str) -> None:
        self.tier.look_up(path)

    @rule(path=PATHS)
    def use(self, path: str) -> None:
        self.tier.use(path)

    @rule(path=PATHS, is_backed=st.booleans())
    def back(self, path: str, is_backed: bool) -> None:
        self.tier.back(path, is_backed)

    @rule(path=PATHS)
    def drop(self, path: str) -> None:
        self.tier.drop(path)

    @rule(n=st.integers(0, 6), group=st.integers(0, 1))
    def evict(self, n: int, group: int) -> None:
        """As many go as were asked for or may go; each is one that may, once, after all that is below it."""
        group = group if self.model is None else 0
        free = may_go(self.tier, group)
        victims = self.tier.evict(n, group=group)
        paths = [path for key in victims for path in free if self.tier.keys(path)[-1] == key]
        assert len(paths) == len(victims) == min(n, len(free))
        assert len(set(paths)) == len(paths)
        for n_gone, path in enumerate(paths):
            assert {path + "a", path + "b"} & set(free) <= set(paths[:n_gone])

    @rule()
    def tick(self) -> None:
        self.tier.tick()

    @precondition(lambda self: self.tier.n_slots % 4 == 0)
    @rule()
    def clear(self) -> None:
        self.tier.clear()

    @invariant()
    def slots_are_conserved(self) -> None:
        if hasattr(self, "tier"):
            index = self.tier.index
            index.check_invariants()
            n_here = index.count(HOST, State.RESIDENT) + index.count(HOST, State.INCOMING)
            assert len(self.tier.free) + n_here == self.tier.n_slots

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.tick()
            for group in range(self.tier.index.n_groups):
                self.evict(self.tier.n_slots, group)
            self.slots_are_conserved()


MACHINE = settings(max_examples=25, stateful_step_count=40)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_does_what_its_model_does(policy: str) -> None:
    machine = type("Machine", (PolicyMachine,), {"policy": policy, "model": MODELS[policy]})
    run_state_machine_as_test(machine, settings=MACHINE)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_takes_what_may_go_of_the_group_and_nothing_else(policy: str) -> None:
    machine = type("Machine", (PolicyMachine,), {"policy": policy, "model": None})
    run_state_machine_as_test(machine, settings=MACHINE)


def test_every_policy_has_a_model() -> None:
    assert MODELS.keys() == POLICIES.keys()


# ---- all there is of the small ----

REQUESTS = ("ab", "ac", "acd", "b")
LONGEST = dict.fromkeys(POLICIES, 5) | {"gittins": 4}
"""Of `gittins`, an index takes 2 ms to make."""


@cache
def bound(paths: tuple[str, ...], n_slots: int) -> int:
    ids = [[path[: n + 1] for n in range(len(path))] for path in paths]
    return int(clairvoyant_hits(blocks(*ids), n_slots).sum())


@pytest.mark.parametrize("n_slots", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_short_sequence_goes_as_in_the_model_and_none_beats_the_bound(policy: str, n_slots: int) -> None:
    for paths in product(REQUESTS, repeat=LONGEST[policy]):
        tier = Tier(policy, n_slots, model=MODELS[policy], capacity=16)
        n_hits = 0
        for n, path in enumerate(paths):
            n_hits += tier.request(path)
            assert n_hits <= bound(paths[: n + 1], n_slots), paths[: n + 1]


# ---- what decisions depend on ----

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["request"] * 6 + ["look_up", "use", "back", "drop", "evict", "tick"]),
        PATHS,
        st.integers(0, 5),
    ),
    min_size=30,
    max_size=90,
)
Events = list[tuple[str, str, int]]


def renamed(path: str) -> list[bytes]:
    """Keys that have nothing to do with those of `page_keys`."""
    return [hashlib.blake2b(path[: n + 1].encode(), digest_size=KEY_NBYTES).digest() for n in range(len(path))]


def play(tier: Tier, events: Events, *, asks_for_the_order: bool = False) -> list[str]:
    """Returns the paths of the victims."""
    for name, path, n in events:
        if name == "evict":
            tier.evict(n)
        elif name == "tick":
            tier.tick()
        elif name == "back":
            tier.back(path, n < 4)
        elif name == "request":
            tier.request(path, 2**n)
        else:
            getattr(tier, name)(path)
        if asks_for_the_order:
            order = tier.index.eviction_order(n).tolist()
            assert len(set(order)) == len(order)
            assert tier.index.eviction_order(n).tolist() == order
    path_of = {tier.keys(path)[-1]: path for path in ALL_PATHS}
    return [path_of[key] for key in tier.evicted]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(events=EVENTS, n_slots=st.integers(2, 12))
def test_the_same_calls_have_the_same_victims_whatever_keys_are_and_whoever_looks(
    policy: str, events: Events, n_slots: int
) -> None:
    victims = play(Tier(policy, n_slots), events)
    assert play(Tier(policy, n_slots), events) == victims
    assert play(Tier(policy, n_slots, keys=renamed), events) == victims
    assert play(Tier(policy, n_slots), events, asks_for_the_order=True) == victims


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(events=EVENTS, n_slots=st.integers(2, 12), n_more=st.integers(0, 100))
def test_what_is_still_to_come_changes_nothing(policy: str, events: Events, n_slots: int, n_more: int) -> None:
    whole = Tier(policy, n_slots)
    whole_victims = play(whole, events)
    half_victims = play(Tier(policy, n_slots), events[:n_more])
    assert whole_victims[: len(half_victims)] == half_victims


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_can_be_supplied_before_the_first_page_and_not_after(policy: str) -> None:
    events = [("request", path, 2) for path in (*ALL_PATHS, *ALL_PATHS)]
    reserved = Tier(policy, 9)
    reserved.index.reserve(64)
    assert play(reserved, events) == play(Tier(policy, 9), events)
    reserved.index.check_invariants()
    with pytest.raises(StillHeld):
        reserved.index.reserve(64)
