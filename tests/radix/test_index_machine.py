"""The index against the model of `model.py`, operation by operation, with few distinct pages and little room.

What is compared after each step: every page's states, slot and path, the counts, and the index's own invariants. The
order of eviction is compared whenever something is evicted, and to the last page at the end of every run.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radix import HOST, ROOT, IllegalTransition, Index, IndexFull, NotLeased, Rows, State, StillHeld
from tests.radix.model import LEGAL, N_TIERS, Model, page_keys

PATHS = st.text("ab", min_size=1, max_size=6)
SPANS = st.tuples(st.integers(0, 5), st.integers(1, 6))
TIERS = st.sampled_from([0, HOST, HOST, 2, 2, 3])
POLICY_TIERS = (HOST, 2)


class IndexMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(4, 24), n_homes=st.sampled_from([1, 3, 2**64]))
    def start(self, capacity: int, n_homes: int) -> None:
        self.index = Index(capacity, policies=dict.fromkeys(POLICY_TIERS, "lru"))
        self.model = Model(capacity, POLICY_TIERS)
        self.n_homes = n_homes
        self.next_slot = 0

    def span(self, path: str, span: tuple[int, int]) -> tuple[Rows, list[bytes]]:
        """Rows and keys of a part of the known prefix of a path."""
        keys = self.model.known_prefix(page_keys(path, self.n_homes))
        rows = self.index.match(b"".join(page_keys(path, self.n_homes)))
        assert self.index.keys_of(rows) == b"".join(keys)
        part = slice(span[0], span[0] + span[1])
        return rows[part], keys[part]

    @rule(path=PATHS, n_parent=st.integers(0, 5), holder=st.sampled_from(["put", "begin", "lease", "forget", "none"]))
    def insert(self, path: str, n_parent: int, holder: str) -> None:
        keys = page_keys(path, self.n_homes)
        n_parent = min(n_parent, len(self.model.known_prefix(keys)), len(keys) - 1)
        parent = keys[n_parent - 1] if n_parent else None
        parent_row = ROOT if parent is None else self.index.row_of(parent)
        assert parent_row is not None
        run = keys[n_parent:]
        if not self.model.insert(run, parent):
            with pytest.raises(IndexFull):
                self.index.insert(b"".join(run), parent_row)
            return
        rows = self.index.insert(b"".join(run), parent_row)
        assert self.index.path(int(rows[-1]))[n_parent:].tolist() == rows.tolist()
        if holder == "lease":
            self.index.lease(rows)
            self.model.lease(run)
        elif holder == "forget":
            self.index.forget(rows)
            self.model.forget(run)
        elif holder != "none":
            self.apply(holder, rows, run, 0)

    @rule(name=st.sampled_from(sorted(LEGAL)), path=PATHS, span=SPANS, tier=TIERS, backwards=st.booleans())
    def change(self, name: str, path: str, span: tuple[int, int], tier: int, backwards: bool) -> None:
        rows, keys = self.span(path, span)
        if backwards:
            rows, keys = np.ascontiguousarray(rows[::-1]), keys[::-1]
        if not (name == "put" and tier == HOST):
            self.apply(name, rows, keys, tier)

    @rule(name=st.sampled_from(sorted(LEGAL)), path=PATHS, tier=TIERS)
    def change_twice_in_one_call(self, name: str, path: str, tier: int) -> None:
        rows, keys = self.span(path, (0, 2))
        if not (name == "put" and tier == HOST):
            self.apply(name, np.concatenate((rows, rows[:1])), keys + keys[:1], tier)

    def apply(self, name: str, rows: Rows, keys: list[bytes], tier: int) -> None:
        method = getattr(self.index, name)
        slots = None
        if name == "begin" and tier == HOST:
            slots = list(range(self.next_slot, self.next_slot + len(rows)))
            self.next_slot += len(rows)
        try:
            freed = self.model.change(name, keys, tier, slots)
        except IllegalTransition:
            with pytest.raises(IllegalTransition):
                method(rows, tier, *([] if slots is None else [np.array(slots, np.int32)]))
            return
        found = method(rows, tier, *([] if slots is None else [np.array(slots, np.int32)]))
        if name in ("abort", "drop"):
            assert found.tolist() == freed

    @rule(path=PATHS, tier=st.sampled_from(POLICY_TIERS))
    def store(self, path: str, tier: int) -> None:
        """The common case, so that the tiers with a policy are full of pages: whatever is known of a path arrives."""
        rows, keys = self.span(path, (0, 6))
        absent = self.index.states(rows, tier) == State.ABSENT
        new = [key for key, is_new in zip(keys, absent, strict=True) if is_new]
        if tier == HOST:
            self.apply("begin", rows[absent], new, tier)
            self.apply("commit", rows[absent], new, tier)
        else:
            self.apply("put", rows, keys, tier)

    @rule(path=PATHS, span=SPANS)
    def lease(self, path: str, span: tuple[int, int]) -> None:
        rows, keys = self.span(path, span)
        self.index.lease(rows)
        self.model.lease(keys)

    @rule(path=PATHS, span=SPANS, twice=st.booleans())
    def release(self, path: str, span: tuple[int, int], twice: bool) -> None:
        rows, keys = self.span(path, span)
        if twice:
            rows, keys = np.concatenate((rows, rows)), keys + keys
        try:
            self.model.release(keys)
        except NotLeased:
            with pytest.raises(NotLeased):
                self.index.release(rows)
        else:
            self.index.release(rows)

    @rule(path=PATHS, span=SPANS)
    def touch(self, path: str, span: tuple[int, int]) -> None:
        rows, keys = self.span(path, span)
        self.index.touch(rows)
        self.model.touch(keys)

    @rule(path=PATHS)
    def touch_path(self, path: str) -> None:
        rows, keys = self.span(path, (0, 6))
        if len(rows):
            self.index.touch_path(int(rows[-1]))
            self.model.touch(keys)

    @rule()
    def tick(self) -> None:
        self.index.tick()
        self.model.now += 1

    @rule(n=st.integers(0, 5), tier=st.sampled_from(POLICY_TIERS))
    def evict(self, n: int, tier: int) -> None:
        keys, slots = self.model.evict(n, tier)
        evicted = self.index.evict(n, tier)
        assert evicted.keys == b"".join(keys)
        assert evicted.slots.tolist() == slots

    @rule()
    @precondition(lambda self: self.index.capacity % 3 == 0)
    def clear(self) -> None:
        pages = self.model.pages.values()
        if any(page.leases or State.INCOMING in page.states for page in pages):
            with pytest.raises(StillHeld):
                self.index.clear()
        else:
            self.index.clear()
            now = self.model.now
            self.model = Model(self.index.capacity, POLICY_TIERS)
            self.model.now = now

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.index.check_invariants()
        assert len(self.index) == len(self.model.pages)
        rows = []
        for key in self.model.pages:
            row = self.index.row_of(key)
            assert row is not None
            rows.append(row)
            path = self.model.path(key)
            assert self.index.keys_of(self.index.path(row)) == b"".join(path)
            in_order = [self.model.pages[above].states[HOST] is State.RESIDENT for above in path] + [False]
            assert self.index.resident_prefix(self.index.path(row), HOST) == in_order.index(False)
        at = np.array(rows, np.int32)
        assert self.index.slots(at).tolist() == [page.slot for page in self.model.pages.values()]
        for tier in range(N_TIERS):
            expected = [page.states[tier] for page in self.model.pages.values()]
            assert self.index.states(at, tier).tolist() == expected
            for state in State:
                assert self.index.count(tier, state) == expected.count(state)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.tick()
            for tier in POLICY_TIERS:
                self.evict(self.index.capacity, tier)
            self.agrees_with_the_model()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=40)
