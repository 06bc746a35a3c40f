"""The index: for every page of KV, on which tiers it is, who claims it, and who goes first when room is needed.

A page's key is a chained digest: equal keys mean equal whole prefixes, and a key has one parent for ever. So a run of
pages is one blob of keys, a page is one row, and a row found by its key is in the right place in the tree. Callers hold
rows, as int32 arrays; a row stays theirs while something holds it (residency on any tier, a child, or a lease), and
afterwards its number may name another page.

The index decides and keeps books; it moves no bytes. A change of state is applied to all rows it is given or, with an
exception, to none, so whoever copies can act between `begin` and `commit` and always knows what the index thinks.

It belongs to one thread, SGLang's scheduler thread: there is no lock, nothing blocks, and time is the number of ticks.
So ranks that make the same calls hold the same pages and evict the same victims.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix import history, kernels
from radix.audit import audit
from radix.columns import NONE, ROOT, Columns, Rows, allocate
from radix.errors import IllegalTransition, IndexFull, NotLeased, StillHeld
from radix.policies import make_policy
from radix.policy import Asked, Policy, Setting
from radix.residency import ABORT, BEGIN, COMMIT, DROP, HOST, MAX_TIERS, PUT, RESIDENT, State, Transition

Slots = NDArray[np.int32]

KEY_NBYTES: Final = 32
HOST_BY_LRU: Final[Mapping[int, str]] = MappingProxyType({HOST: "lru"})
MAX_GROUPS: Final = 64

MEMORY: Final = 4
MIN_MEMORY: Final = 1 << 16
"""Keys of what was asked for are remembered for so many times the pages expected, and so many more. Policies learn from
pages that have left: a small tier needs a memory longer than itself."""

MAX_ASSIGNED: Final = 1 << 16
"""First pages whose group is remembered, whether they have a row or not. The one assigned first is forgotten first."""
_NO_ROWS: Final[Rows] = np.empty(0, np.int32)


@dataclass(frozen=True)
class Evicted:
    """What left a tier, in the order of eviction. Keys, not rows: a row may already be free."""

    keys: bytes
    """32 bytes a page."""
    slots: Slots
    """int32[n], free again, of the host tier; empty for others. The caller's to keep."""


class Index:
    """A radix index of up to `capacity` pages over `n_tiers` tiers.

    policies: by tier, the name of the eviction policy (`radix.policies`). Tiers without one cannot be evicted from.
    n_groups: whose pages are told apart, up to `MAX_GROUPS`. A page belongs to one group for good, that of the first
    page of its path, and eviction takes pages of one group.
    n_pages: how many pages the tiers with a policy are expected to hold; None: as many as there are rows.
    page_tokens: tokens a page, for policies that ask what a page costs to compute.
    Raises ValueError for a policy that does not exist.

    Rows that are returned are fresh int32[n] arrays, root side first. Rows that are given have to be C-contiguous int32
    (else TypeError). A change of state, a lease or its release raises ValueError for a row that is not in use.
    """

    def __init__(
        self,
        capacity: int,
        *,
        n_tiers: int = MAX_TIERS,
        policies: Mapping[int, str] = HOST_BY_LRU,
        n_groups: int = 1,
        n_pages: int | None = None,
        page_tokens: int = 16,
    ) -> None:
        if not 0 < capacity < 2**30:
            raise ValueError(f"capacity is 1 to 2**30 - 1 pages, not {capacity}")
        if not HOST < n_tiers <= MAX_TIERS:
            raise ValueError(f"there are 2 to {MAX_TIERS} tiers, not {n_tiers}")
        if not 0 < n_groups <= MAX_GROUPS:
            raise ValueError(f"there are 1 to {MAX_GROUPS} groups, not {n_groups}")
        self.capacity = capacity
        self.n_tiers = n_tiers
        self.n_groups = n_groups
        self.now = 0
        for tier in policies:
            self._check_tier(tier)
        self._columns: Columns = allocate(capacity, n_tiers, n_groups)
        n_pages = n_pages or capacity
        self._history = history.allocate(MEMORY * n_pages + MIN_MEMORY)
        self._n_asked = 0
        self._group_of: dict[bytes, int] = {}
        self._policies: dict[int, Policy] = {
            tier: make_policy(name, self._columns, Setting(tier, n_pages, page_tokens, self._history))
            for tier, name in policies.items()
        }

    def reserve(self, n_rows: int) -> None:
        """Have the operating system supply the memory of the first `n_rows` rows now, while the index is empty.

        Otherwise their first uses pay for it: milliseconds for each 2 MiB, where memory is virtual.
        """
        if len(self):
            raise StillHeld(f"{len(self)} rows are in use")
        by_row: tuple[NDArray[np.generic], ...] = self._columns[: Columns._fields.index("table")]
        for column in by_row:
            column[:n_rows] = 0
        self._columns.table[:] = 0
        for policy in self._policies.values():
            policy.reserve(n_rows)

    # ---- the tree ----

    def match(self, keys: bytes) -> Rows:
        """The rows of the longest prefix of `keys` of which every page has a row. The run may start at any depth."""
        blob = _blob(keys)
        out = np.empty(len(blob), np.int32)
        return out[: kernels.match(self._columns, blob, out)]

    def assign(self, first_key: bytes, group: int) -> None:
        """A path that begins with this page belongs to a group: so will its pages, from the next that get a row on."""
        if group:
            self._group_of[first_key] = group
            if len(self._group_of) > MAX_ASSIGNED:
                del self._group_of[next(iter(self._group_of))]

    def insert(self, keys: bytes, parent: int = ROOT) -> Rows:
        """A row for each page of a run below the row `parent`; those that are missing are made, as used now.

        Nothing holds a new row until the caller gives it a residency or a lease; `forget` those that get none.
        Raises IndexFull; ValueError if the blob is not whole keys, if `parent` is not in use, or if a key is known
        below another parent (so the keys do not chain).
        """
        blob = _blob(keys)
        out = np.empty(len(blob), np.int32)
        group = self._group_of.get(keys[:KEY_NBYTES], 0) if self._group_of and parent == ROOT else 0
        n_new = kernels.insert(self._columns, blob, parent, group, self.now, out)
        if n_new == kernels.FULL:
            raise IndexFull(f"{self.capacity - len(self)} rows are free, and more of these {len(blob)} pages are new")
        if n_new == kernels.NOT_BELOW:
            raise ValueError(f"these keys are not a run below row {parent}")
        return out

    def insert_pages(self, keys: bytes, parents: bytes) -> Rows:
        """A row for each of these pages, in any order that has parents first, each below its own parent.

        parents: as many keys; 32 zero bytes stand for the root. The row is -1 for a page whose parent is neither known
        nor before it in the run, and for one that is known below another parent. For the rest as `insert`.
        Raises IndexFull, with nothing changed, if fewer rows are free than these pages lack; ValueError if the blobs
        are not whole keys, or not equally many.
        """
        blob, above = _blob(keys), _blob(parents)
        if len(blob) != len(above):
            raise ValueError(f"{len(blob)} pages have as many parents, not {len(above)}")
        out = np.empty(len(blob), np.int32)
        if kernels.insert_pages(self._columns, blob, above, self.now, out) == kernels.FULL:
            raise IndexFull(f"{self.capacity - len(self)} rows are free, and more of these {len(blob)} pages are new")
        return out

    def forget(self, rows: Rows) -> None:
        """Free those of `rows` that nothing holds, and the parents that only they held."""
        kernels.reap(self._columns, rows)

    def row_of(self, key: bytes) -> int | None:
        """The row of one page, by its 32-byte key."""
        rows = self.match(key)
        return int(rows[0]) if len(rows) else None

    def path(self, row: int) -> Rows:
        """The rows from the root to `row`, both ends included."""
        self._check_in_use(row)
        out = np.empty(int(self._columns.depth[row]) + 1, np.int32)
        kernels.path(self._columns, row, out)
        return out

    def keys_of(self, rows: Rows) -> bytes:
        """32 bytes a row."""
        return self._columns.key.take(rows, axis=0).tobytes()

    def parents(self, rows: Rows) -> Rows:
        """int32[n]: the row above each of these, `ROOT` above first pages."""
        return self._columns.parent.take(rows)

    def depths(self, rows: Rows) -> NDArray[np.int32]:
        """int32[n]: how many pages lie above each of these."""
        return self._columns.depth.take(rows)

    # ---- residency ----

    def states(self, rows: Rows, tier: int) -> NDArray[np.uint8]:
        """uint8[n]: the `State` of each page on the tier."""
        self._check_tier(tier)
        return (self._columns.residency.take(rows) >> np.uint8(2 * tier)) & np.uint8(3)

    def resident_prefix(self, rows: Rows, *tiers: int) -> int:
        """How many pages at the head of `rows` are RESIDENT on the tier; of several tiers, each page on any of them."""
        missing = np.ones(len(rows), np.bool_)
        for tier in tiers:
            missing &= self.states(rows, tier) != RESIDENT
        return int(missing.argmax()) if missing.any() else len(rows)

    def count(self, tier: int, state: int) -> int:
        """How many pages are in a state on a tier. Kept, not counted."""
        self._check_tier(tier)
        return int(self._columns.counts[tier, state])

    def slots(self, rows: Rows) -> Slots:
        """int32[n]: the host slots of these pages, which are INCOMING or RESIDENT there; -1 for others."""
        return self._columns.slot.take(rows)

    def begin(self, rows: Rows, tier: int, slots: Slots | None = None) -> None:
        """ABSENT -> INCOMING. The host tier, and only it, takes a slot for each page: int32[n], which are copied."""
        if (slots is not None) != (tier == HOST):
            raise ValueError("the host tier takes slots, and no other does")
        if slots is not None and (slots.shape != rows.shape or (slots < 0).any()):
            raise ValueError(f"{len(rows)} pages take as many slots, numbered from 0")
        self._transition(BEGIN, rows, tier)
        if slots is not None:
            self._columns.slot[rows] = slots

    def commit(self, rows: Rows, tier: int, *, is_passing: bool = False) -> None:
        """INCOMING -> RESIDENT.

        is_passing: they come from a tier below, for one request. Those of them that nobody had asked for before, as
        far as is remembered, are the first to go: a scan of what lies below does not flush the tier.
        """
        self._transition(COMMIT, rows, tier)
        self._admit(rows, tier)
        if is_passing and tier in self._policies:
            places = history.places_of(self._history, self._columns.key.take(rows, axis=0))
            passing = rows[(places < 0) | (self._history.n_times[places] < 2)]
            if len(passing):
                self._policies[tier].passing(passing)

    def put(self, rows: Rows, tier: int) -> None:
        """ABSENT or RESIDENT -> RESIDENT, for tiers that keep their own slots; ValueError for the host tier."""
        if tier == HOST:
            raise ValueError("pages enter host memory by begin and commit, which give them slots")
        new = rows
        if tier in self._policies:
            new = rows[self.states(rows, tier) != RESIDENT]
        self._transition(PUT, rows, tier)
        self._admit(new, tier)

    def abort(self, rows: Rows, tier: int) -> Slots:
        """INCOMING -> ABSENT. Returns the slots that are free again, as int32[n]; empty for tiers other than the host.

        Rows that nothing holds any more are freed, and so are the parents that only they held; also by `drop`.
        """
        self._transition(ABORT, rows, tier)
        return self._left(rows, tier)

    def drop(self, rows: Rows, tier: int) -> Slots:
        """RESIDENT -> ABSENT; returns as `abort`. Leases do not prevent it, they keep the rows.

        Children that are on the tier stay there: they are below a hole, where `resident_prefix` ends, until evicted.
        """
        self._transition(DROP, rows, tier)
        return self._left(rows, tier)

    def _admit(self, rows: Rows, tier: int) -> None:
        policy = self._policies.get(tier)
        if policy is not None and len(rows):
            policy.admitted(rows)

    def _left(self, rows: Rows, tier: int) -> Slots:
        policy = self._policies.get(tier)
        if policy is not None and len(rows):
            policy.removed(rows)
        slots = _NO_ROWS
        if tier == HOST:
            slots = self.slots(rows)
            self._columns.slot[rows] = NONE
        kernels.reap(self._columns, rows)
        return slots

    def _transition(self, transition: Transition, rows: Rows, tier: int) -> None:
        self._check_tier(tier)
        before = np.empty(len(rows), np.uint8)
        n_done = kernels.transition(self._columns, rows, tier, transition.source_bits, int(transition.target), before)
        if n_done < len(rows):
            row = int(rows[n_done])
            self._check_in_use(row)
            state = State(self.states(rows[n_done : n_done + 1], tier)[0])
            raise IllegalTransition(
                f"{transition.name} of row {row} on tier {tier}: it is {state.name}, or named twice"
            )

    # ---- claims and recency ----

    def lease(self, rows: Rows) -> None:
        """One more lease on each row, two if it is named twice: neither evicted nor reused until all are released."""
        n_done = kernels.add_leases(self._columns, rows, 1)
        if n_done < len(rows):
            self._check_in_use(int(rows[n_done]))

    def release(self, rows: Rows) -> None:
        """One lease less on each row; rows that nothing holds any more are freed. Raises NotLeased below zero."""
        n_done = kernels.add_leases(self._columns, rows, -1)
        if n_done < len(rows):
            self._check_in_use(int(rows[n_done]))
            raise NotLeased(f"row {rows[n_done]} has no more leases to release")
        kernels.reap(self._columns, rows)

    def tick(self) -> None:
        """A new pass of the scheduler begins: what was used in the last one may be evicted again."""
        self.now += 1

    def touch(self, rows: Rows) -> None:
        """These pages, in path order, are used now. They become the most recent, the deepest of them the least so."""
        self._columns.last_use[rows] = self.now
        if len(rows):
            for policy in self._policies.values():
                policy.touched(rows)

    def asked(self, keys: bytes) -> None:
        """A request asks for the path `keys`, from the root. Told once a request: it is what policies count."""
        blob = _blob(keys)
        if not len(blob):
            return
        self._n_asked += len(blob)
        places, is_known = np.empty(len(blob), np.int64), np.empty(len(blob), np.uint8)
        history.note(self._history, blob, self._n_asked, places, is_known)
        asked = Asked(self.match(keys), places, is_known)
        for policy in self._policies.values():
            policy.asked(asked)

    def used(self, rows: Rows) -> None:
        """A request uses these pages, in path order: as `asked`, where not more of it is known than these."""
        if len(rows):
            for policy in self._policies.values():
                policy.used(rows)

    def answered(self, row: int, n_tokens: int) -> None:
        """A request whose prompt's last page is `row` has ended, with an answer of so many tokens."""
        rows = self.path(row)
        for policy in self._policies.values():
            policy.answered(rows, n_tokens)

    def set_backed(self, rows: Rows, is_backed: bool) -> None:
        """Whether copies of these pages are believed to be on a tier below host memory."""
        self._columns.backed[rows] = is_backed
        if len(rows):
            for policy in self._policies.values():
                policy.backed(rows)

    def touch_path(self, row: int) -> None:
        """`touch` the whole path from the root to `row`."""
        self.touch(self.path(row))

    def evict(self, n: int, tier: int = HOST, *, group: int = 0) -> Evicted:
        """Take up to n pages of a group off the tier (RESIDENT -> ABSENT), leaf first, in the order of its policy.

        Never a page with a lease, with a child on the tier or on its way there, or used in this pass: SGLang evicts
        between its look-up and its load. Fewer than n only if no more may go. Raises ValueError if the tier has no
        policy.
        """
        policy = self._policy(tier)
        rows = policy.victims(min(n, self.held(tier, group)), self.now, group)
        keys = self.keys_of(rows)
        return Evicted(keys, self.drop(rows, tier))

    def eviction_order(self, n: int, tier: int = HOST, *, group: int = 0) -> Rows:
        """The first n RESIDENT pages of a group in line for eviction, whether they may go now or not.

        Pages that were found to have children on the tier are not in line. Raises ValueError if the tier has no policy.
        """
        return self._policy(tier).order(min(n, self.held(tier, group)), group)

    def chance_of_reuse(self, row: int, tier: int = HOST) -> float:
        """From 0 to 1: how likely a page on the tier is to be asked for again; 0 if its policy has no idea."""
        return self._policy(tier).chance_of_reuse(row)

    def held(self, tier: int, group: int) -> int:
        """How many pages of a group are on the tier, or on their way there. Kept, not counted."""
        self._check_tier(tier)
        return int(self._columns.held[group, tier])

    def groups(self, rows: Rows) -> NDArray[np.uint8]:
        """uint8[n]: whose pages these are."""
        return self._columns.group.take(rows)

    def _policy(self, tier: int) -> Policy:
        policy = self._policies.get(tier)
        if policy is None:
            raise ValueError(f"tier {tier} has no eviction policy")
        return policy

    # ---- the whole ----

    def __len__(self) -> int:
        """Rows in use."""
        return int(self._columns.tally[kernels.N_ROWS])

    @property
    def nbytes(self) -> int:
        """Of all columns, touched or not: address space, of which the operating system supplies what is used."""
        policies = sum(policy.nbytes for policy in self._policies.values())
        return self._columns.nbytes + self._history.nbytes + policies

    def clear(self) -> None:
        """Drop all pages: all rows and slots are free. Raises StillHeld if any is leased or INCOMING.

        The clock goes on, and so does what is remembered of keys and what policies have learned.
        """
        n_leases = int(self._columns.tally[kernels.N_LEASES])
        n_incoming = int(self._columns.counts[:, State.INCOMING].sum())
        if n_leases or n_incoming:
            raise StillHeld(f"{n_leases} leases and {n_incoming} incoming pages are open")
        self._columns = allocate(self.capacity, self.n_tiers, self.n_groups)
        for policy in self._policies.values():
            policy.restart(self._columns)

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything: for tests and debugging."""
        audit(self._columns, self._policies)

    def _check_tier(self, tier: int) -> None:
        if not 0 <= tier < self.n_tiers:
            raise ValueError(f"tier {tier} is not one of {self.n_tiers}")

    def _check_in_use(self, row: int) -> None:
        columns = self._columns
        if not 0 <= row < columns.tally[kernels.N_TOUCHED] or columns.parent[row] < ROOT:
            raise ValueError(f"row {row} is not in use")


def _blob(keys: bytes) -> NDArray[np.uint64]:
    """uint64[n, 4], a view of `keys`."""
    if len(keys) % KEY_NBYTES:
        raise ValueError(f"{len(keys)} bytes are not whole keys of {KEY_NBYTES}")
    return np.frombuffer(keys, np.uint64).reshape(-1, 4)
