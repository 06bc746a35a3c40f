"""The books of a store, in memory: which page is in which file slot, who reads or writes it, and who goes first.

Tier and map both follow from them. A slot is, at any moment, exactly one of

    free       to be given to a page
    incoming   given to a page whose bytes are being written; not visible
    resident   holds a page, which can be found and read
    dying      held a page that has left; another may have it when its deletion is in the map, and nobody reads it
    bad        the disk refuses it; not given away any more

and `free + incoming + resident + dying + bad == slots of the existing segments`. Residency, leases and the order of
eviction are those of a private `radix.Index`, with the file slots as the slots of its host tier.

What the map has still to learn is kept as flags a slot, not as a list of events: a commit takes what is true at that
moment, so events cannot overtake each other.

All of this is numpy and dictionary work of microseconds, and none of it blocks. Who calls it holds the volume's lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hicache.quotas import NOBODY, OTHERS, Quotas
from hicache.ssd.map import NO_SLOTS, Int64Array, PageRows
from hicache.ssd.owners import Owners
from hicache.tier import ROOT_KEY
from radix import HOST, KEY_NBYTES, MAX_GROUPS, ROOT, Index, IndexFull, Rows, State
from radix.departures import CAPACITY, CLEARED, DAMAGED, QUOTA, Departures
from transfer.slots import SlotAllocator

Slots = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Pages that are being read: leased, and their slots kept. One array a column, in path order."""

    rows: Rows
    slots: Slots
    checksums: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What a commit takes to the map."""

    deleted: Int64Array
    saved: PageRows
    touched: tuple[Int64Array, Int64Array]
    """Slots, and when they were last used."""
    clock: int

    def __len__(self) -> int:
        return len(self.deleted) + len(self.saved) + len(self.touched[0])


class _Marks:
    """Marked slots: a flag each, and a queue, so that taking a few needs no look at all flags."""

    def __init__(self, n_slots: int) -> None:
        self.flags = np.zeros(n_slots, np.bool_)
        self._queue: deque[Int64Array] = deque()

    def mark(self, slots: NDArray[np.integer]) -> None:
        new = slots[~self.flags[slots]].astype(np.int64)
        if len(new):
            self.flags[new] = True
            self._queue.append(new)

    def unmark(self, slots: NDArray[np.integer]) -> None:
        """They stay in the queue, and are passed over there."""
        self.flags[slots] = False

    def take(self, limit: int) -> Int64Array:
        """At most so many of those that were marked first, ascending. They are marked no more."""
        taken: list[Int64Array] = []
        while self._queue and limit > 0:
            slots = self._queue.popleft()
            slots = slots[self.flags[slots]]
            if len(slots) > limit:
                self._queue.appendleft(slots[limit:])
                slots = slots[:limit]
            self.flags[slots] = False
            taken.append(slots)
            limit -= len(slots)
        return np.sort(np.concatenate(taken)) if taken else NO_SLOTS

    def check_invariants(self) -> None:
        queued = np.unique(np.concatenate([NO_SLOTS, *self._queue]))
        assert np.isin(np.flatnonzero(self.flags), queued).all(), "a slot is marked and not in the queue"


class Pages:
    """n_slots: as many as may ever exist; none does before `begin_fill` or `add_slots`. eviction: a policy of `radix`.

    quotas: tell which tenant is which group; the volume's, and changed by it.
    n_expected: of so many the memory is supplied by the constructor, so that no fill pays for it under the lock.
    time_s: monotonic seconds, for what is remembered of pages that have left.
    """

    def __init__(
        self,
        n_slots: int,
        eviction: str,
        quotas: Quotas,
        n_expected: int = 0,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n_slots = n_slots
        self.n_live = 0
        self.n_dying = 0
        self.n_bad = 0
        self.clock = 1
        capacity = min(2 * n_slots + 4096, 2**30 - 1)
        self.index = Index(capacity, n_tiers=2, policies={HOST: eviction}, n_groups=MAX_GROUPS)
        self._owners = Owners(self.index, quotas, n_slots)
        self._time_s = time_s
        self.departures = Departures(n_slots)
        self._free = SlotAllocator(n_slots)
        self._free.take(n_slots)
        self._row = np.full(n_slots, -1, np.int32)
        self._checksum = np.zeros(n_slots, np.uint64)
        self._last_use = np.zeros(n_slots, np.int64)
        self._n_readers = np.zeros(n_slots, np.int32)
        self._unsaved = _Marks(n_slots)
        self._touched = _Marks(n_slots)
        self._condemned = np.zeros(n_slots, np.bool_)
        self._lingering = np.zeros(n_slots, np.bool_)
        self._refused = np.zeros(n_slots, np.bool_)
        self._dying: deque[Slots] = deque()
        self._left: NDArray[np.bool_] | None = None
        """While a fill runs: slots whose pages have left since it began, and those it has freed."""
        if n_expected:
            self.index.reserve(n_expected)
            flags = (self._unsaved.flags, self._touched.flags)
            for column in (self._checksum, self._last_use, self._n_readers, *flags):
                column[:] = 0

    @property
    def n_free(self) -> int:
        return self._free.n_free

    @property
    def n_resident(self) -> int:
        return self.index.count(HOST, State.RESIDENT)

    def n_held(self, group: int) -> int:
        """How many pages of a group are resident or incoming."""
        return self.index.held(HOST, group)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being read or written."""
        return not self._n_readers.any() and self.index.count(HOST, State.INCOMING) == 0

    # ---- finding and reading ----

    def n_found(self, keys: bytes) -> int:
        """How many pages at the head of `keys` are resident."""
        return self.index.resident_prefix(self.index.match(keys), HOST)

    def begin_read(self, keys: bytes) -> Read:
        """Claim the resident pages at the head of `keys`, and make them the last to go."""
        rows = self.index.match(keys)
        rows = rows[: self.index.resident_prefix(rows, HOST)]
        self._use(rows)
        self.index.used(rows)
        self.index.lease(rows)
        slots = self.index.slots(rows)
        self._n_readers[slots] += 1
        return Read(rows, slots, self._checksum.take(slots))

    def end_read(self, read: Read, damaged: NDArray[np.bool_]) -> int:
        """Release a claim. Pages found damaged leave. Returns how many did, that no other reader had found before."""
        self._n_readers[read.slots] -= 1
        ended = read.slots[self._lingering[read.slots] & (self._n_readers[read.slots] == 0)]
        self._lingering[ended] = False
        self._give(ended)
        n_left = 0
        if damaged.any():
            rows, slots = read.rows[damaged], read.slots[damaged]
            still = (self.index.states(rows, HOST) == State.RESIDENT) & (self.index.slots(rows) == slots)
            n_left = self._leave(rows[still], DAMAGED)
        self.index.release(read.rows)
        return n_left

    def touch(self, key: bytes) -> None:
        """This page and all above it become the last to go: as much work as the path is long."""
        rows = self.index.match(key)
        if len(rows):
            path = self.index.path(int(rows[0]))
            self._use(path)
            self.index.used(path)

    def _use(self, rows: Rows) -> None:
        """These pages of one path are in use. Those above them stay too: no page goes before the pages below it."""
        if not len(rows):
            return
        self._tick()
        self.index.touch(rows)
        slots = self.index.slots(rows)
        slots = slots[slots >= 0]
        self._last_use[slots] = self.clock
        self._touched.mark(slots)

    def _tick(self) -> None:
        self.clock += 1
        self.index.tick()

    def let_pass(self) -> None:
        """What was used last may leave too."""
        self._tick()

    # ---- writing ----

    def hold(self, keys: bytes, parent: bytes, tenant: bytes = NOBODY) -> Rows | None:
        """Lease a row for each page of a run, in use now; None if its parent is not here, or if there are no rows left.

        The parent, which may be incoming, is in use too, so that it does not make room for the run. `let_go` the rows
        when they have been stored, or not.

        tenant: the digest of the tenant whose path it is (`owners`).
        """
        above = ROOT
        if parent == ROOT_KEY:
            self._owners.expect(keys[:KEY_NBYTES], tenant)
        else:
            found = self.index.match(parent)
            if not len(found) or self.index.states(found, HOST)[0] == State.ABSENT:
                return None
            above = int(found[0])
        try:
            rows = self.index.insert(keys, above)
        except (IndexFull, ValueError):
            return None
        self.index.lease(rows)
        self._use(rows if above == ROOT else np.concatenate([np.array([above], np.int32), rows]))
        return rows

    def group_of(self, rows: Rows) -> int:
        """Of the pages of one path."""
        return int(self.index.groups(rows[:1])[0]) if len(rows) else OTHERS

    def learn_owner(self, rows: Rows, tenant: bytes) -> Slots:
        """These pages are on a path of this tenant. Returns the slot whose row the map has to be told again, if any."""
        slots = self._owners.learn(rows, tenant)
        self._unsaved.mark(slots)
        return slots

    def let_go(self, rows: Rows) -> None:
        if len(rows):
            self.index.release(rows)

    def states(self, rows: Rows) -> NDArray[np.uint8]:
        return self.index.states(rows, HOST)

    def evict(self, n: int, group: int = OTHERS, *, for_quota: bool = False) -> int:
        """Let up to n pages of a group leave, by the policy: never what is leased, nor what was used last.

        for_quota: as in `quotas.Books`. Returns how many have left.
        """
        evicted = self.index.evict(n, HOST, group=group)
        self.departures.left(evicted.keys, HOST, QUOTA if for_quota else CAPACITY, self._time_s())
        self._forget(evicted.slots)
        return len(evicted.slots)

    def begin_write(self, rows: Rows, tenant: bytes = NOBODY) -> Slots:
        """Give slots to these absent pages, no more than are free; ascending, so that neighbours go in one write."""
        taken = self._free.take(len(rows))
        assert taken is not None, f"{len(rows)} slots were asked for, {self.n_free} are free"
        slots = np.sort(taken)
        self.index.begin(rows, HOST, slots)
        self._row[slots] = rows
        self._owners.put(rows, slots, tenant)
        return slots

    def end_write(self, rows: Rows, checksums: NDArray[np.uint64]) -> int:
        """The bytes of these incoming pages are in their slots. Returns how many are kept: deleted ones are not."""
        slots = self.index.slots(rows)
        condemned = self._condemned[slots]
        self._condemned[slots] = False
        kept, slots = rows[~condemned], slots[~condemned]
        self._checksum[slots] = checksums[~condemned]
        self._last_use[slots] = self.clock
        self._unsaved.mark(slots)
        self.index.commit(kept, HOST)
        if len(kept) < len(rows):
            self.abort_write(rows[condemned])
        return len(kept)

    def abort_write(self, rows: Rows) -> None:
        """The bytes of these incoming pages are not in their slots, or not wanted."""
        slots = self.index.abort(rows, HOST)
        self._row[slots] = -1
        self._touched.unmark(slots)
        self._condemned[slots] = False
        self._give(slots)

    # ---- leaving ----

    def spoil(self, slots: Slots) -> None:
        """The disk refuses these slots, which are being read or written: their pages leave, and none follows them."""
        self._refused[slots] = True
        rows = self._row[slots]
        rows = rows[rows >= 0]
        self._leave(rows[self.states(rows) == State.RESIDENT], DAMAGED)

    def delete(self, keys: bytes) -> int:
        """Let these pages leave, in any order. Returns how many were resident. One being written will not be kept."""
        n_left, at = 0, 0
        while at < len(keys):
            rows = self.index.match(keys[at:])
            n_left += self._leave_or_condemn(rows)
            at += KEY_NBYTES * max(1, len(rows))
        return n_left

    def delete_slots(self, first: int, end: int) -> int:
        """The same for all pages in the slots first .. end."""
        rows = self._row[first:end]
        return self._leave_or_condemn(rows[rows >= 0])

    def _leave_or_condemn(self, rows: Rows) -> int:
        states = self.index.states(rows, HOST)
        self._condemned[self.index.slots(rows[states == State.INCOMING])] = True
        return self._leave(rows[states == State.RESIDENT], CLEARED)

    def _leave(self, rows: Rows, reason: int) -> int:
        if len(rows):
            self.departures.left(self.index.keys_of(rows), HOST, reason, self._time_s())
        self._forget(self.index.drop(rows, HOST))
        return len(rows)

    def _forget(self, slots: Slots) -> None:
        self._row[slots] = -1
        self._unsaved.unmark(slots)
        self._touched.unmark(slots)
        if self._left is not None:
            self._left[slots] = True
        if len(slots):
            self._dying.append(slots)
            self.n_dying += len(slots)

    def _give(self, slots: Slots) -> None:
        refused = self._refused[slots]
        self.n_bad += int(np.count_nonzero(refused))
        self._free.give(np.sort(slots[~refused]))

    # ---- what the map is told ----

    def changes(self, limit: int, *, touched: bool = True) -> Changes:
        """Take at most `limit` changes that the map does not know. Answer with `committed` or `uncommitted`.

        touched: also when pages were last used, that the map knows.
        """
        deleted = self._take_dying(limit)
        saved = self._unsaved.take(limit - len(deleted))
        self._touched.unmark(saved)
        used = self._touched.take(limit - len(deleted) - len(saved)) if touched else NO_SLOTS
        return Changes(deleted, self._rows_of(saved), (used, self._last_use[used]), self.clock)

    def committed(self, deleted: Int64Array) -> None:
        """The map does not name these slots any more, which `changes` said were to be deleted."""
        self.n_dying -= len(deleted)
        slots = deleted.astype(np.int32)
        read = self._n_readers[slots] > 0
        self._lingering[slots[read]] = True
        self._give(slots[~read])

    def uncommitted(self, changes: Changes) -> None:
        """The map has learnt nothing."""
        if len(changes.deleted):
            self._dying.appendleft(changes.deleted.astype(np.int32))
        for slots, marks in ((changes.saved.slots, self._unsaved), (changes.touched[0], self._touched)):
            marks.mark(slots[self._row[slots] >= 0])

    def named(self, first: int, end: int) -> PageRows:
        """What the map should name in the slots first .. end by now: all that is resident and need not be saved."""
        slots = first + np.flatnonzero((self._row[first:end] >= 0) & ~self._unsaved.flags[first:end])
        return self._rows_of(slots[self.index.states(self._row[slots], HOST) == State.RESIDENT])

    def _take_dying(self, limit: int) -> Int64Array:
        taken: list[Slots] = []
        n_taken = 0
        while self._dying and n_taken < limit:
            slots = self._dying.popleft()
            taken.append(slots[: limit - n_taken])
            if len(slots) > limit - n_taken:
                self._dying.appendleft(slots[limit - n_taken :])
            n_taken += len(taken[-1])
        return np.concatenate(taken).astype(np.int64) if taken else NO_SLOTS

    def _rows_of(self, slots: Int64Array) -> PageRows:
        rows = self._row[slots]
        above = self.index.parents(rows)
        parents = np.frombuffer(self.index.keys_of(np.maximum(above, 0)), np.uint64).reshape(-1, 4).copy()
        parents[above == ROOT] = 0
        return PageRows(
            slots,
            self.index.keys_of(rows),
            parents.tobytes(),
            self.index.depths(rows).astype(np.int64),
            self._checksum[slots],
            self._last_use[slots],
            self._owners.of(slots, above),
        )

    # ---- slots come into being ----

    def add_slots(self, n_live: int) -> None:
        """The slots up to `n_live` exist now, and the new ones are free."""
        self._give(np.arange(self.n_live, n_live, dtype=np.int32))
        self.n_live = n_live

    def begin_fill(self, n_live: int, clock: int) -> None:
        """The slots up to `n_live` exist, and what they hold is still to be read from the map: none is free.

        May begin anew, if a fill broke off.
        """
        self.n_live = n_live
        self.clock = max(self.clock, clock)
        if self._left is None:
            self._left = np.zeros(self.n_slots, np.bool_)

    def adopt(self, found: PageRows) -> Int64Array:
        """Pages that the map names, parents before children, are resident. Returns the slots whose rows are wrong.

        Those that are known, or have left since the fill began, are passed over. Wrong is a page whose parent is not
        here, or that claims another's slot or is said to be in two.
        """
        assert self._left is not None, "nothing is being filled"
        slots = found.slots
        fresh = ~self._left[slots] & (self._row[slots] < 0)
        self._owners.insert_first_pages(found)
        rows = self.index.insert_pages(found.keys, found.parents)
        absent = self.index.states(np.maximum(rows, 0), HOST) == State.ABSENT
        first = np.zeros(len(rows), np.bool_)
        first[np.unique(rows, return_index=True)[1]] = True
        good = fresh & first & absent & (rows >= 0)
        admitted, at = rows[good], slots[good]
        self.index.begin(admitted, HOST, at.astype(np.int32))
        self.index.commit(admitted, HOST)
        self._row[at] = admitted
        self._checksum[at] = found.checksums[good]
        self._last_use[at] = found.last_uses[good]
        self._owners.adopt(found, good)
        self.index.forget(rows[~good & (rows >= 0)])
        wrong: Int64Array = slots[fresh & ~good]
        return wrong

    def free_unused(self, first: int, end: int) -> None:
        """All that the map names is here: the other slots of first .. end are free."""
        assert self._left is not None, "nothing is being filled"
        unused = (first + np.flatnonzero((self._row[first:end] < 0) & ~self._left[first:end])).astype(np.int32)
        self._left[unused] = True
        self._give(unused)

    def end_fill(self) -> None:
        self._left = None

    def make_newest(self, slots: Int64Array, used_before: int) -> None:
        """Pages in these slots become the last to go, the last of them last of all, unless used at a later time.

        When they were last used stays as it was.
        """
        rows = self._row[slots[self._last_use[slots] < used_before]]
        self.index.touch(np.ascontiguousarray(rows[rows >= 0][::-1]))
        self.index.tick()

    def used_since(self, clock: int) -> Int64Array:
        """The slots of pages used at `clock` or later, the first used first, of equal last use the deepest first.

        The scan may run without the lock: what is used meanwhile may be missing.
        """
        slots = np.flatnonzero((self._row >= 0) & (self._last_use >= clock))
        depths = self.index.depths(self._row[slots])
        order: Int64Array = np.lexsort((-depths, self._last_use[slots]))
        return slots[order]

    # ---- the whole ----

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything: for tests."""
        self.index.check_invariants()
        self._free.check_invariants()
        n_incoming = self.index.count(HOST, State.INCOMING)
        n_lingering = int(np.count_nonzero(self._lingering))
        total = self.n_free + n_incoming + self.n_resident + self.n_dying + n_lingering + self.n_bad
        assert total == self.n_live, (
            f"slots are not conserved: {self.n_free} free + {n_incoming} incoming + {self.n_resident} resident + "
            f"{self.n_dying + n_lingering} dying + {self.n_bad} bad is {total}, the segments have {self.n_live}"
        )
        assert self.n_bad <= np.count_nonzero(self._refused), "a slot is bad and the disk has not refused it"
        used = np.flatnonzero(self._row >= 0)
        assert np.array_equal(self.index.slots(self._row[used]), used), "a slot's row has another slot"
        assert len(used) == n_incoming + self.n_resident, "a page with a slot is not that slot's"
        for marks, name in ((self._unsaved, "unsaved"), (self._touched, "touched")):
            assert (self._row[marks.flags] >= 0).all(), f"a slot is {name} and holds no page"
            marks.check_invariants()
        assert (self._n_readers >= 0).all(), "a slot has fewer than no readers"
