"""Pages on their way down: what host memory has is stored in one tier below, in the background.

A spill leases its pages until the tier has ended with them, because their bytes are read straight from their slots. So
what is pending is bounded: the server never waits for a disk. What an offer has beyond the bound is offered again when
there is room, as far as host memory still has it then; if not, or if too many such offers wait, it is skipped and
counted.

Of each page in host memory it is remembered whether the tier has been given it. That is a hint, which the tier's own
evictions make stale; the tier knows best, and answers for what it has without writing it again.

Nothing is lost by a skip but time. A page is stored only below a parent that is stored, so each offer begins at the
first page of its path that is not known to be below; what was skipped goes with the next offer of its path. When a
spill fails, nothing of its path is taken to be below any more: the tier may have dropped the parent.

Spills end in their order. A rank reports how the first of them have ended on it, and the least of all ranks counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hicache.fetches import NO_ROWS
from hicache.host import HostTier, Slots
from hicache.stats import SpillStats
from hicache.tier import Batch, Tier, answer_of, batches, true_prefix
from radix import HOST, KEY_NBYTES, RESIDENT, Index, Rows

MAX_WAITING = 256
"""Offers of which a part waits for room."""

N_REPORTED = 8
"""So many can end in one iteration, however they end."""

UNDER_WAY, FAILED, STORED = range(3)
"""How a spill is, in a report: the worse, the less."""


@dataclass(frozen=True, slots=True)
class _Rest:
    """Of an offer: the last page of its path, how many pages had no room, and how many had failed by then."""

    key: bytes
    n_pages: int
    n_failed: int


@dataclass(slots=True, eq=False)
class _Spill:
    rows: Rows
    slots: Slots
    future: Future[int]
    is_detached: bool = False

    @property
    def state(self) -> int:
        if not self.future.done():
            return UNDER_WAY
        return STORED if answer_of(self.future) == len(self.slots) else FAILED


class Spills:
    """See the module's text. One thread, that of the engine.

    max_pages: how many slots may be on their way down at a time. batch_pages: the most that one call of the tier takes.
    tenant_of: whose path begins with a page (`quotas.Tenants`).
    """

    def __init__(
        self,
        tier: Tier,
        index: Index,
        host: HostTier,
        *,
        max_pages: int,
        batch_pages: int,
        tenant_of: Callable[[bytes], str],
    ) -> None:
        self.tier = tier
        self.stats = SpillStats()
        self._index = index
        self._host = host
        self._given = host.new_flags()
        host.given.append(self._given)
        self._max_pages = max(1, max_pages)
        self._batch_pages = batch_pages
        self._tenant_of = tenant_of
        self._line: deque[_Spill] = deque()
        self._n_pages = 0
        self._waiting: deque[_Rest] = deque()
        """Empty when the line is."""

    def __len__(self) -> int:
        return len(self._line)

    def given(self, rows: Rows) -> NDArray[np.bool_]:
        """bool[n]: whether the tier has been given these pages, as far as is remembered."""
        return self._given.of(rows)

    def mark_given(self, rows: Rows) -> None:
        """These pages have come from this tier."""
        self._given.put(rows, True)

    def deepest_given(self, path: Rows) -> bytes | None:
        """Of a path from the root: the key of the last page down to which the tier has been given all. None: none."""
        n_given = true_prefix(self._given.of(path))
        return self._index.keys_of(path[n_given - 1 : n_given]) if n_given else None

    @property
    def n_pages(self) -> int:
        """How many pages are on their way."""
        return self._n_pages

    @property
    def n_room(self) -> int:
        """How many pages may be added to those on their way."""
        return self._max_pages - self._n_pages

    def offer(self, row: int) -> None:
        """The path to this page is in host memory: store what of it is not below yet, as far as there is room."""
        path = self._index.path(row)
        path = path[: true_prefix(self._index.states(path, HOST) == RESIDENT)]
        first = true_prefix(self._given.of(path))
        rows = path[first:]
        if not len(rows):
            return
        room = min(len(rows), self.n_room)
        if room < len(rows):
            self._let_wait(_Rest(self._index.keys_of(rows[-1:]), len(rows) - room, self.stats.failed))
        for spill in self._store(rows[:room], path[:first]) if room else ():
            self._line.append(spill)

    def _let_wait(self, rest: _Rest) -> None:
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(rest)
        else:
            self.stats.skipped += rest.n_pages

    def _offer_again(self) -> None:
        """What waits for room, as far as there is some now. A tier that has refused something since is not pressed."""
        while self._waiting and self.n_room > 0:
            rest = self._waiting.popleft()
            row = self._index.row_of(rest.key)
            is_there = row is not None and bool((self._index.states(np.array([row], np.int32), HOST) == RESIDENT).all())
            if row is not None and is_there and self.stats.failed == rest.n_failed:
                self.offer(row)
            else:
                self.stats.skipped += rest.n_pages

    def _store(self, rows: Rows, above: Rows) -> Iterator[_Spill]:
        self._index.lease(rows)
        self._n_pages += len(rows)
        self._given.put(rows, True)
        keys = self._index.keys_of(rows)
        parent = self._index.keys_of(above[-1:]) or None
        first_key = self._index.keys_of(above[:1]) or keys[:KEY_NBYTES]
        run = Batch.below(parent, keys, self._host.slots(rows), len(above), self._tenant_of(first_key))
        start = 0
        for end, batch in batches(run, self._batch_pages):
            yield _Spill(rows[start:end], batch.slots, self.tier.store(batch))
            start = end

    # ---- what ranks agree on ----

    def report(self) -> list[int]:
        """How the first `N_REPORTED` spills are on this rank, as so many numbers. Never blocks."""
        states = [spill.state for spill in islice(self._line, N_REPORTED)]
        return states + [UNDER_WAY] * (N_REPORTED - len(states))

    def follow(self, agreed: Sequence[int]) -> None:
        """Act on the minima over all ranks of their reports: whatever has ended, up to the first that has not."""
        for state in agreed:
            if state == UNDER_WAY:
                break
            self._end(is_stored=state == STORED)
        self._offer_again()

    def futures(self) -> list[Future[int]]:
        """Of the stores that are under way."""
        return [spill.future for spill in self._line]

    def settle(self) -> bool:
        """End by this rank's own knowledge what the tier has ended. Returns whether that is everything."""
        while self._line and self._line[0].state != UNDER_WAY:
            self._end(is_stored=self._line[0].state == STORED)
        return not self._line

    def _end(self, *, is_stored: bool) -> None:
        spill = self._line.popleft()
        self._n_pages -= len(spill.slots)
        if is_stored:
            self.stats.spilled += len(spill.slots)
        else:
            self.stats.failed += len(spill.slots)
        if spill.is_detached:
            self._host.end_lingering(spill.slots)
            return
        if is_stored:
            self._index.set_backed(spill.rows, True)
        else:
            self._given.put(self._index.path(int(spill.rows[-1])), False)
        self._index.release(spill.rows)

    # ---- life ----

    def forget(self) -> None:
        """The tier has been emptied."""
        self._given.clear()

    def detach(self) -> Slots:
        """The pages of all spills are dropped. Returns the slots that the tier may still read; they stay theirs."""
        self._waiting.clear()
        for spill in self._line:
            if not spill.is_detached:
                self._index.release(spill.rows)
                spill.is_detached = True
        return np.concatenate([NO_ROWS, *(spill.slots for spill in self._line)])

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken."""
        assert self._line or not self._waiting, f"{len(self._waiting)} offers wait for room, and nothing is under way"
        n_pages = sum(len(spill.slots) for spill in self._line)
        assert n_pages == self._n_pages, f"{n_pages} pages are being spilled, counted {self._n_pages}"
