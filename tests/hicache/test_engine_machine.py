"""The engine against a plain model: real bytes in a dictionary for HBM, a list for the slab, copies that end late.

The model never asks the engine where a page is. It writes each offered page's content into the slot it was told to,
when the copy ends, and it checks that every page the engine promises has the right content in its slot from the
promise to the end of the restore, whatever happened in between.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from hicache import Engine, Offload, Restore, Ticket, Verdict
from radix import HOST, Index, State
from tests.support.keys import path_keys
from tests.support.tiers import split

# Few distinct pages and short paths, so that prefixes are shared, split and evicted all the time.
PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=7).map("".join)
N_SLOTS = 9


class EngineMachine(RuleBasedStateMachine):
    offloads = Bundle("offloads")
    restores = Bundle("restores")
    tickets = Bundle("tickets")

    @initialize(n_slots=st.integers(1, N_SLOTS), share=st.sampled_from([0.0, 0.5, 1.0]))
    def start(self, n_slots: int, share: float) -> None:
        self.now_s = 0.0
        self.engine = Engine(Index(64), n_slots, clock=lambda: self.now_s, ticket_timeout_s=2.0, max_leased_share=share)
        self.n_slots = n_slots
        self.slab: list[bytes | None] = [None] * n_slots
        self.landed: set[bytes] = set()
        self.n_open = 0
        self.promised: bytes = b""

    @rule(target=offloads, path=PATHS, n_parent=st.integers(0, 6))
    def begin_offload(self, path: str, n_parent: int) -> object:
        keys = path_keys(path)
        n_parent = min(n_parent, len(path) - 1)
        parent = keys[32 * (n_parent - 1) : 32 * n_parent] if n_parent else None
        if not self.engine.holds(parent):
            n_parent, parent = 0, None
        keys = keys[32 * n_parent :]
        offload = self.engine.begin_offload(keys, parent)
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
            self.slab[slot] = key
        self.engine.finish_offload(plan, landed=landed)
        self.n_open -= 1
        if landed:
            self.landed.update(keys)

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

    @rule(restore=consumes(restores), copied=st.booleans())
    def finish_restore(self, restore: tuple[Restore, list[bytes]], copied: bool) -> None:
        plan, keys = restore
        assert [self.slab[slot] for slot in plan.slots] == keys, "a leased slot was given away"
        self.engine.finish_restore(plan, copied=copied)
        self.n_open -= 1

    @rule(target=tickets, path=PATHS, n_parent=st.integers(0, 6))
    def open_ticket(self, path: str, n_parent: int) -> object:
        keys = path_keys(path)
        n_parent = min(n_parent, len(path))
        parent = keys[32 * (n_parent - 1) : 32 * n_parent] if n_parent else None
        return self.engine.open_ticket(keys[32 * n_parent :], parent)

    @rule(ticket=consumes(tickets))
    def close_ticket(self, ticket: Ticket) -> None:
        self.engine.expire(*self.engine.n_overdue())
        self.engine.poll_tickets()
        if self.n_open == 0:
            assert ticket.verdict is Verdict.GO
        self.engine.close_ticket(ticket)

    @rule(path=PATHS, n_kept=st.integers(0, 6))
    def hbm_evicts(self, path: str, n_kept: int) -> None:
        self.engine.hbm_evicted(path_keys(path)[32 * n_kept :])

    @rule(path=PATHS)
    def hbm_used(self, path: str) -> None:
        self.engine.hbm_used(path_keys(path)[-32:])

    @rule()
    def tick(self) -> None:
        self.engine.tick()
        self.now_s += 1.0
        self.promised = b""

    @invariant()
    def slots_are_conserved_and_hold_what_the_index_says(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_invariants()
        index = self.engine.index
        for key in self.landed:
            row = index.row_of(key)
            if row is None:
                continue
            rows = index.path(row)[-1:]
            if index.states(rows, HOST)[0] == State.RESIDENT:
                assert self.slab[index.slots(rows)[0]] == key

    def teardown(self) -> None:
        if hasattr(self, "engine") and self.n_open == 0:
            self.engine.reset()
            assert self.engine.host.n_free == self.n_slots


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
