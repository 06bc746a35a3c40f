"""A lower tier without a store: it knows which pages it has, and what moving them would take.

Which pages it holds, and who goes first, is decided by a private `radix.Index` with the tier's own policy, as the SSD
tier does it: pages are stored below a parent that is here, a load makes its pages the last to go, and what is in use in
one call does not make room for it.

Every call is answered at once. What it would have taken is kept as simulated seconds: a tier reads one batch after the
other, and writes beside that one after the other; `read_until_s` says when the reads that were asked for are over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import numpy as np

from hicache import Batch, Capacity, Health, Tier
from hicache.ssd.endurance import Endurance, pages_nbytes
from hicache.tier import ROOT_KEY, answered
from radix import HOST, KEY_NBYTES, ROOT, Index, IndexFull, Rows, State
from sgl_lmcache.simulate.machine import TierModel
from transfer.slots import SlotAllocator

SPARE_ROWS = 4096
"""Of the index: for pages that a batch brings, before others have left."""


@dataclass(slots=True)
class TierCounters:
    """In pages."""

    read: int = 0
    written: int = 0
    evicted: int = 0
    skipped: int = 0
    """There was no room for them, or they may not be written now."""


class SimulatedTier(Tier):
    """See the module's text. One thread.

    name: its type in the configuration. n_pages: how many it has room for, 1 or more. eviction: a policy of `radix`.
    clock: seconds of the trace. endurance_nbytes: the most that may be written in 24 hours of it.
    """

    def __init__(
        self,
        name: str,
        n_pages: int,
        *,
        page_nbytes: int,
        eviction: str,
        model: TierModel,
        clock: Callable[[], float],
        endurance_nbytes: int | None = None,
    ) -> None:
        self._name = name
        self._n_pages = n_pages
        self._page_nbytes = page_nbytes
        self._model = model
        self._clock = clock
        self._index = Index(2 * n_pages + SPARE_ROWS, n_tiers=2, policies={HOST: eviction})
        self._free = SlotAllocator(n_pages)
        self._endurance = None if endurance_nbytes is None else Endurance(endurance_nbytes, clock)
        self.counters = TierCounters()
        self.read_until_s = 0.0
        self._written_until_s = 0.0

    @property
    def name(self) -> str:
        return self._name

    def exists(self, keys: bytes) -> Future[int]:
        return answered(len(self._found(keys)))

    def load(self, batch: Batch) -> Future[int]:
        rows = self._found(batch.keys)
        if len(rows):
            self._use(rows)
            self._index.used(rows)
            self.counters.read += len(rows)
            started_s = max(self._clock(), self.read_until_s)
            self.read_until_s = started_s + self._moving_s(len(rows), self._model.read)
        return answered(len(rows))

    def store(self, batch: Batch) -> Future[int]:
        parent = self._parent(batch.parents[:KEY_NBYTES])
        if parent is None:
            return answered(0)
        try:
            rows = self._index.insert(batch.keys, parent)
        except IndexFull:
            self.counters.skipped += len(batch)
            return answered(0)
        self._index.lease(rows)
        self._use(rows if parent == ROOT else np.concatenate([np.array([parent], np.int32), rows]))
        n_skipped = self._admit(rows[self._index.states(rows, HOST) == State.ABSENT])
        n_stored = self._index.resident_prefix(rows, HOST)
        self._index.release(rows)
        self.counters.skipped += n_skipped
        return answered(n_stored)

    def _admit(self, rows: Rows) -> int:
        """Give these pages slots, as far as they may be written and others can leave. Returns how many got none."""
        n_allowed = len(rows)
        if self._endurance is not None:
            n_allowed = self._endurance.allowed_pages(n_allowed, self._page_nbytes)
        shortfall = n_allowed - self._free.n_free
        if shortfall > 0:
            evicted = self._index.evict(shortfall, HOST)
            self._free.give(evicted.slots)
            self.counters.evicted += len(evicted.slots)
        admitted = rows[: min(n_allowed, self._free.n_free)]
        if len(admitted):
            if self._endurance is not None:
                self._endurance.pay(pages_nbytes(len(admitted), self._page_nbytes))
            self._index.begin(admitted, HOST, self._free.take(len(admitted)))
            self._index.commit(admitted, HOST)
            self.counters.written += len(admitted)
            started_s = max(self._clock(), self._written_until_s)
            self._written_until_s = started_s + self._moving_s(len(admitted), self._model.write)
        return len(rows) - len(admitted)

    def touch(self, key: bytes) -> None:
        row = self._index.row_of(key)
        if row is not None:
            path = self._index.path(row)
            self._use(path)
            self._index.used(path)

    def delete(self, keys: bytes) -> Future[int]:
        n_deleted = 0
        for at in range(0, len(keys), KEY_NBYTES):
            rows = self._found(keys[at : at + KEY_NBYTES])
            self._free.give(self._index.drop(rows, HOST))
            n_deleted += len(rows)
        return answered(n_deleted)

    def clear(self) -> Future[int]:
        n_cleared = self._index.count(HOST, State.RESIDENT)
        self._index.clear()
        self._free = SlotAllocator(self._n_pages)
        return answered(n_cleared)

    def expected_load_s(self, n_pages: int) -> float:
        if not self.counters.read:  # as a real one, which has measured nothing yet
            return 0.0
        queued_s = max(0.0, self.read_until_s - self._clock())
        return queued_s + self._moving_s(n_pages, self._model.read)

    def capacity(self) -> Capacity:
        n_used = self._index.count(HOST, State.RESIDENT)
        return Capacity(n_used * self._page_nbytes, self._n_pages * self._page_nbytes)

    def health(self) -> Health:
        return Health(available=True, reason="")

    def stats(self) -> Mapping[str, int]:
        return asdict(self.counters)

    def close(self) -> None:
        pass

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything: for tests."""
        self._index.check_invariants()
        self._free.check_invariants()
        total = self._free.n_free + self._index.count(HOST, State.RESIDENT)
        assert total == self._n_pages, f"{self._name}: {total} pages are free or resident, of {self._n_pages}"

    def _found(self, keys: bytes) -> Rows:
        """The resident pages at the head of `keys`."""
        rows = self._index.match(keys)
        return rows[: self._index.resident_prefix(rows, HOST)]

    def _parent(self, key: bytes) -> int | None:
        """The row of a page that is here, or the root; None: it is not here."""
        if key == ROOT_KEY:
            return ROOT
        rows = self._found(key)
        return int(rows[0]) if len(rows) else None

    def _use(self, rows: Rows) -> None:
        """These pages of one path are in use, and stay in this call."""
        self._index.tick()
        self._index.touch(rows)

    def _moving_s(self, n_pages: int, nbytes_per_s: float) -> float:
        return self._model.latency + n_pages * self._page_nbytes / nbytes_per_s
