"""The engine against a plain model: real bytes in a slab, copies that end late, tiers that answer late or never.

The model never asks the engine where a page is. A page's bytes are its key. It writes each offered page into the slot
it was told to, when the copy ends; the tiers read and write the same slab when the machine lets them, each at its own
time, and what they have kept is compared as well. And it checks that every page the engine promises has the right bytes
in its slot from the promise to the end of the restore, whatever happened in between.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from hicache import WRITE_POLICIES, Batch, Engine, LowerTier, Offload, PinError, QuotaError, Restore, Ticket, Verdict
from radix import HOST, POLICIES, Index, State
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.tiers import FaultyTier, MemoryTier, split

# Few distinct pages and short paths, so that prefixes are shared, split and evicted all the time.
ALL_PATHS = ["a", "ab", "aba", "abab", "ababc", "abac", "abc", "abca", "abcabca", "b", "ba", "bac", "bacb"]
PATHS = st.sampled_from(ALL_PATHS)


OWNER = {key: path[0] for path in ALL_PATHS for key in split(path_keys(path))}
"""Whose each page is."""


class NamedTier(FaultyTier):
    """Is told with each batch whose it is, once that can be known: `named` are the tenants of whom it can be."""

    def __init__(self, inner: MemoryTier, named: set[str]) -> None:
        super().__init__(inner)
        self._named = named

    def load(self, batch: Batch) -> Future[int]:
        self._check(batch)
        return super().load(batch)

    def store(self, batch: Batch) -> Future[int]:
        self._check(batch)
        return super().store(batch)

    def _check(self, batch: Batch) -> None:
        owner = OWNER[batch.keys[:32]]
        assert batch.tenant == (owner if owner in self._named else ""), "a batch names another tenant"


class EngineMachine(RuleBasedStateMachine):
    offloads = Bundle("offloads")
    restores = Bundle("restores")
    tickets = Bundle("tickets")

    @initialize(
        n_slots=st.sampled_from([1, 2, 3, 5, 9, 16]),
        share=st.sampled_from([0.0, 0.5, 1.0]),
        below=st.lists(
            st.tuples(st.sampled_from([0, 4, 1000, 1000, 1000]), st.sampled_from(list(WRITE_POLICIES))), max_size=2
        ),
        batch_pages=st.integers(1, 3),
        eviction=st.sampled_from(sorted(POLICIES)),
        quota_below=st.sampled_from(["", "a", "b"]),
    )
    def start(
        self,
        n_slots: int,
        share: float,
        below: list[tuple[int, str]],
        batch_pages: int,
        eviction: str,
        quota_below: str,
    ) -> None:
        """below: how many pages each tier keeps, and its write policy. quota_below: who has a quota there."""
        self.clock = Clock()
        self.n_slots = n_slots
        self.slab = np.zeros((n_slots, 32), dtype=np.uint8)
        self.has_quota: set[str] = set(quota_below)
        self.named: set[str] = set()
        """Those of `has_quota` whose requests have said so since."""
        self.tiers = [NamedTier(MemoryTier(self.slab, n_pages), self.named) for n_pages, _ in below]
        for tier in self.tiers:
            tier.hold()
        self.engine = Engine(
            Index(64, policies={HOST: eviction}, n_groups=3, n_pages=n_slots),
            n_slots,
            clock=self.clock,
            ticket_timeout_s=2.0,
            max_leased_share=share,
            tiers=[LowerTier(tier, write) for tier, (_, write) in zip(self.tiers, below, strict=True)],
            batch_pages=batch_pages,
            tenants=quota_below,
        )
        self.landed: set[bytes] = set()
        self.n_open = 0
        self.promised: bytes = b""
        self.most_held: dict[str, int] = {}
        """By tenant with a quota: it, or what it held when it got it, until it holds less."""

    @rule(tenant=st.sampled_from("ab"), n_pages=st.integers(0, 9))
    def set_quota(self, tenant: str, n_pages: int) -> None:
        try:
            self.engine.set_quota(tenant, n_pages)
        except QuotaError:
            return
        self.most_held[tenant] = max(n_pages, self.held(tenant))
        self.has_quota.add(tenant)

    def held(self, tenant: str) -> int:
        return self.engine.index.held(HOST, self.engine.host.quotas.group_of(tenant))

    @rule(path=PATHS, ttl_s=st.sampled_from([1.0, 100.0]))
    def pin(self, path: str, ttl_s: float) -> None:
        with contextlib.suppress(PinError):
            self.engine.pin(path_keys(path), ttl_s)

    @rule(path=PATHS)
    def unpin(self, path: str) -> None:
        self.engine.unpin(path_keys(path))

    @rule(target=offloads, path=PATHS, n_parent=st.integers(0, 6))
    def begin_offload(self, path: str, n_parent: int) -> object:
        keys = path_keys(path)
        n_parent = min(n_parent, len(path) - 1)
        parent = keys[32 * (n_parent - 1) : 32 * n_parent] if n_parent else None
        if not self.engine.holds(parent):
            n_parent, parent = 0, None
        keys = keys[32 * n_parent :]
        others = {tenant: self.held(tenant) for tenant in self.most_held if tenant != path[0]}
        offload = self.engine.begin_offload(keys, parent)
        assert others == {tenant: self.held(tenant) for tenant in others}, "a tenant paid for another"
        self.promised = b""
        if offload is None:
            return multiple()
        assert len(set(offload.slots.tolist())) == len(offload.slots)
        self.n_open += 1
        return [offload, [split(keys)[position] for position in offload.positions]]

    @rule(offload=consumes(offloads), landed=st.booleans())
    def finish_offload(self, offload: tuple[Offload, list[bytes]], landed: bool) -> None:
        plan, keys = offload
        for slot, key in zip(plan.slots, keys, strict=True):
            self.slab[slot] = np.frombuffer(key, np.uint8)
        self.engine.finish_offload(plan, landed=landed)
        self.n_open -= 1
        if landed:
            self.landed.update(keys)

    @rule(path=PATHS)
    def write_through(self, path: str) -> None:
        """Down to the tiers, in one go."""
        keys = path_keys(path)
        offload = self.engine.begin_offload(keys)
        self.promised = b""
        if offload is not None:
            self.n_open += 1
            self.finish_offload((offload, [split(keys)[position] for position in offload.positions]), landed=True)
            self.everything_below_ends()

    @rule()
    def everything_below_ends(self) -> None:
        for _ in range(3):
            for tier in self.tiers:
                tier.release(tier.n_held)
            self.agree()

    @rule(path=PATHS)
    def lookup(self, path: str) -> None:
        keys = path_keys(path)
        n_pages = self.engine.lookup(keys)
        assert n_pages <= len(path)
        assert self.landed.issuperset(split(keys[: 32 * n_pages]))
        self.promised = keys[: 32 * n_pages]

    @rule(target=restores)
    def begin_restore_what_was_promised_in_this_tick(self) -> object:
        keys, self.promised = self.promised, b""
        if not keys:
            return multiple()
        restore = self.engine.begin_restore(keys)
        assert restore is not None, "a promise must hold until the next tick"
        self.n_open += 1
        return [restore, split(keys)]

    @rule(target=restores, path=PATHS)
    def lookup_and_begin_restore(self, path: str) -> object:
        self.lookup(path)
        return self.begin_restore_what_was_promised_in_this_tick()

    @rule(restore=consumes(restores), copied=st.booleans())
    def finish_restore(self, restore: tuple[Restore, list[bytes]], copied: bool) -> None:
        plan, keys = restore
        assert [self.slab[slot].tobytes() for slot in plan.slots] == keys, "a leased slot was given away"
        self.engine.finish_restore(plan, copied=copied)
        self.n_open -= 1

    @rule(target=tickets, path=PATHS, n_parent=st.integers(0, 6))
    def open_ticket(self, path: str, n_parent: int) -> object:
        keys = path_keys(path)
        n_parent = min(n_parent, len(path))
        parent = keys[32 * (n_parent - 1) : 32 * n_parent] if n_parent else None
        if path[0] in self.has_quota and (parent is None or self.engine.index.row_of(parent) is not None):
            self.named.add(path[0])
        return [self.engine.open_ticket(keys[32 * n_parent :], parent, tenant=path[0]), keys]

    @rule(ticket=consumes(tickets))
    def close_ticket(self, ticket: tuple[Ticket, bytes]) -> None:
        opened, keys = ticket
        self.agree()
        if self.n_open == 0 and not opened.is_fetching and self.engine.below is None:
            assert opened.verdict is Verdict.GO
        if opened in self.engine._tickets:
            self._check_what_was_fetched(opened, keys)
            self.engine.close_ticket(opened)

    def _check_what_was_fetched(self, ticket: Ticket, keys: bytes) -> None:
        """While its ticket is open and holds leases, what has come for it stays."""
        start, end = ticket.fetched
        if ticket.verdict is Verdict.GO and end > start and len(ticket.rows) >= end and not self.engine.tainted:
            rows = self.engine.index.match(keys)[:end]
            assert (self.engine.index.states(rows, HOST) != State.ABSENT).all()

    @rule()
    def agree(self) -> None:
        """One rank's agreement with itself, as the cache makes it once an iteration."""
        self.engine.follow(self.engine.report(decides=True))

    @rule(position=st.integers(0, 1), n_calls=st.integers(1, 8), n_failing=st.sampled_from([0, 0, 0, 0, 1]))
    def a_tier_answers(self, position: int, n_calls: int, n_failing: int) -> None:
        for tier in self.tiers[position : position + 1]:
            tier.fail_next(n_failing)
            tier.release(min(n_calls, tier.n_held))

    @rule(position=st.integers(0, 1), path=PATHS)
    def a_tier_forgets(self, position: int, path: str) -> None:
        for tier in self.tiers[position : position + 1]:
            tier.inner.delete(path_keys(path)[-32:])

    @rule(ticket=tickets)
    def launch(self, ticket: tuple[Ticket, bytes]) -> None:
        opened, _ = ticket
        if opened in self.engine._tickets and opened.verdict is Verdict.GO:
            self.engine.end_prefill(self.engine.launch(opened), n_answer_tokens=len(path_keys("a")))

    @rule(path=PATHS, n_kept=st.integers(0, 6))
    def hbm_evicts(self, path: str, n_kept: int) -> None:
        self.engine.hbm_evicted(path_keys(path)[32 * n_kept :])

    @rule(path=PATHS)
    def hbm_used(self, path: str) -> None:
        self.engine.hbm_used(path_keys(path)[-32:])

    @rule()
    def tick(self) -> None:
        self.engine.tick()
        self.clock.now_s += 1.0
        self.promised = b""

    @rule(what=st.sampled_from(["nothing", "nothing", "nothing", "taint", "reset", "reset"]))
    def taint_or_reset_while_the_tier_still_reads_and_writes(self, what: str) -> None:
        if what == "taint":
            self.engine.taint()
            self.promised = b""
        if what == "reset" and self.n_open == 0:
            self.engine.reset()
            self.promised = b""

    @rule(target=tickets, path=PATHS, n_steps=st.integers(0, 3), fails=st.sampled_from([False, False, True]))
    def everything_leaves_and_somebody_asks_for_it(self, path: str, n_steps: int, fails: bool) -> object:
        self.hbm_evicts("abcabca", 0)
        self.hbm_evicts("bacb", 0)
        if self.n_open == 0:
            self.engine.reset()
            self.promised = b""
        ticket = self.open_ticket(path, 0)
        for number in range(n_steps):
            for tier in self.tiers:
                tier.fail_next(int(fails and number == 1))
                tier.release(min(tier.n_held, 1))
            self.agree()
        return ticket

    @invariant()
    def slots_are_conserved_and_hold_what_the_index_says(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_invariants()
        for tenant, most in self.most_held.items():
            assert self.held(tenant) <= most, "a tenant is over its quota"
            group = self.engine.host.quotas.group_of(tenant)
            self.most_held[tenant] = max(self.engine.host.quotas.limit(group), self.held(tenant))
        index = self.engine.index
        for key in self.landed:
            row = index.row_of(key)
            if row is None:
                continue
            rows = index.path(row)[-1:]
            if index.states(rows, HOST)[0] == State.RESIDENT:
                assert self.slab[index.slots(rows)[0]].tobytes() == key
        for tier in self.tiers:
            assert isinstance(tier.inner, MemoryTier)
            assert all(page == key for key, page in tier.inner.pages.items()), "a tier read a slot of another page"

    def teardown(self) -> None:
        if hasattr(self, "engine") and self.n_open == 0:
            self.engine.reset()
            self.engine.close()
            assert self.engine.host.n_free == self.n_slots


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=300, stateful_step_count=60)
