"""Stores: slab slots to file slots, and the queue of those that wait for a thread or for room.

Whoever asks only joins the queue; an I/O thread looks into the books and starts what it can. A batch starts if free
slots are there for all of its new pages. Otherwise pages leave, or a segment is added, and the batch waits until the
keeper has written that down, with all later ones behind it, so that parents go before their children. What waits or is
being written is bounded in bytes; beyond it a store takes less, and answers so.

A page is written once: a batch that has pages which another is just writing waits for that write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from threading import Lock
from typing import Final

import numpy as np

from hicache.checksum import checksum, seeds
from hicache.ssd.pages import Slots
from hicache.ssd.volume import WRITE_NBYTES, Volume
from hicache.tier import Batch, TierError
from hicache.workers import Work
from radix import KEY_NBYTES, Rows, State

_NO_ROWS: Rows = np.empty(0, np.int32)

_MAX_BEHIND: Final = 256
"""So many waiting batches are looked at to tell how much room will be wanted."""

_MAX_EVICTED: Final = 4096
"""Pages that leave at once for those behind the first: a millisecond or two."""


class Storing:
    """One batch on its way: the first `n_pages` of it, which are `nbytes`."""

    def __init__(self, batch: Batch, n_pages: int, nbytes: int, future: Future[int]) -> None:
        self.n_skipped = len(batch) - n_pages
        self.keys = batch.keys[: KEY_NBYTES * n_pages]
        self.parent = batch.parents[:KEY_NBYTES]
        self.slab_slots = batch.slots[:n_pages]
        self.nbytes = nbytes
        self.rows = _NO_ROWS
        self.n_left = 0
        self.n_stored = 0
        self.error: Exception | None = None
        self._future = future

    def answer(self, store: str) -> None:
        """Never under a lock: whoever waits for the future may be called by this."""
        if self.error is None:
            self._future.set_result(self.n_stored)
        else:
            self._future.set_exception(TierError(f"{store} could not be written: {self.error}"))


class Stores:
    """All stores of one volume. wake: makes the keeper look for work; called without a lock."""

    def __init__(self, volume: Volume, max_queued_nbytes: int, wake: Callable[[], None]) -> None:
        self._volume = volume
        self._max_queued_nbytes = max_queued_nbytes
        self._queued_nbytes = 0
        self._queue_lock = Lock()
        self._wake = wake
        self._waiting: deque[Storing] = deque()
        self._writing: dict[int, _WritePiece] = {}

    @property
    def queued_nbytes(self) -> int:
        """Bytes that wait for room or for the disk, or are being written."""
        return self._queued_nbytes

    @property
    def slot_nbytes(self) -> int:
        return self._volume.geometry.slot_nbytes

    @property
    def n_waiting(self) -> int:
        """Batches that wait for room."""
        return len(self._waiting)

    def ask(self, batch: Batch, future: Future[int]) -> None:
        """Let the batch join the queue, as far as there is room in it; if there is none, it is answered now.

        Some ten microseconds.
        """
        slot_nbytes = self.slot_nbytes
        with self._queue_lock:
            n_pages = min(len(batch), max(0, self._max_queued_nbytes - self._queued_nbytes) // slot_nbytes)
            if n_pages:
                storing = Storing(batch, n_pages, n_pages * slot_nbytes, future)
                self._queued_nbytes += storing.nbytes
                self._waiting.append(storing)
        if n_pages:
            self._volume.workers.submit([_Starting(self)])
            return
        with self._volume.lock:
            self._volume.counters.skipped_pressure += len(batch)
        future.set_result(0)

    def resume(self) -> None:
        """Start what waits, as far as there is room. On an I/O thread or the keeper's."""
        while True:
            with self._volume.lock:
                if not self._waiting or self._volume.is_filling:
                    return
                storing = self._waiting[0]
                pieces = self._start(storing)
                if pieces is not None:
                    self._waiting.popleft()
                    self._volume.counters.skipped_pressure += storing.n_skipped
                is_settled = not storing.n_left  # under this lock: a write that it joins may end right after it
            if pieces is None:
                self._wake()
                return
            self._volume.workers.submit(pieces)
            if is_settled:
                self._answer([storing])

    def withdraw(self) -> None:
        """Answer those that wait: nothing of them is stored."""
        with self._volume.lock:
            withdrawn = [self._waiting.popleft() for _ in range(len(self._waiting))]
        for storing in withdrawn:
            self._leave_queue(storing)
        self._answer(withdrawn)

    def _leave_queue(self, storing: Storing) -> None:
        with self._queue_lock:
            self._queued_nbytes -= storing.nbytes

    def _answer(self, ended: list[Storing]) -> None:
        """Each once, without a lock. One that fails, which is a bug, costs no other its answer."""
        store = str(self._volume.spec.folder.path)
        for storing in ended:
            with self._volume.workers.guarded():
                storing.answer(store)

    # ---- under the lock ----

    def _start(self, storing: Storing) -> list[_WritePiece] | None:
        """Claim rows and slots for a batch. Returns what is to be written; None if it has to wait for room."""
        pages, counters = self._volume.pages, self._volume.counters
        rows = pages.hold(storing.keys, storing.parent) if len(storing.slab_slots) else _NO_ROWS
        if rows is None:
            counters.orphans += len(storing.slab_slots)
            rows = _NO_ROWS
        states = pages.states(rows)
        absent = np.flatnonzero(states == State.ABSENT)
        if len(absent) > pages.n_free and self._makes_room(len(absent) - pages.n_free):
            pages.let_go(rows)
            return None
        n_taken = int(absent[pages.n_free]) if len(absent) > pages.n_free else len(rows)
        absent = absent[: pages.n_free]
        counters.skipped_full += len(rows) - n_taken
        counters.deduplicated += n_taken - len(absent)
        pages.let_go(rows[n_taken:])
        storing.rows = rows[:n_taken]
        self._join(storing, storing.rows[states[:n_taken] == State.INCOMING])
        pieces = self._pieces(storing, absent)
        storing.n_left += len(pieces)
        if not storing.n_left:
            self._settle(storing)
        return pieces

    def _makes_room(self, n_short: int) -> bool:
        """Whether waiting will bring slots: a new segment, or pages that leave now or have left."""
        pages = self._volume.pages
        if self._volume.may_grow:
            self._volume.wants_growth = True
            return True
        if pages.n_dying:
            return True
        with self._queue_lock:  # the first is the one that is short
            n_behind = sum(len(storing.slab_slots) for storing in islice(self._waiting, 1, _MAX_BEHIND))
        n_evicted = pages.evict(max(n_short, min(n_short + n_behind, pages.n_live // 8, _MAX_EVICTED)))
        self._volume.counters.evicted += n_evicted
        return n_evicted > 0

    def _join(self, storing: Storing, incoming: Rows) -> None:
        """Wait for the pieces that are writing these pages already."""
        pieces = {self._writing[row] for row in incoming.tolist()}
        for piece in pieces:
            piece.waiters.append(storing)
        storing.n_left += len(pieces)

    def _pieces(self, storing: Storing, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[_WritePiece]:
        rows = storing.rows[positions]
        file_slots = self._volume.pages.begin_write(rows)
        slab_slots = storing.slab_slots[positions]
        page_seeds = seeds(storing.keys, self._volume.seed)[positions]
        pieces = []
        for first, end in self._volume.pieces(len(rows), WRITE_NBYTES):
            span = slice(first, end)
            piece = _WritePiece(self, rows[span], file_slots[span], slab_slots[span], page_seeds[span].tolist())
            piece.waiters.append(storing)
            self._writing.update(dict.fromkeys(piece.rows.tolist(), piece))
            pieces.append(piece)
        return pieces

    def _settle(self, storing: Storing) -> None:
        states = self._volume.pages.states(storing.rows)
        missing = states != State.RESIDENT
        storing.n_stored = int(missing.argmax()) if missing.any() else len(states)
        self._volume.pages.let_go(storing.rows)
        self._leave_queue(storing)

    # ---- on an I/O thread ----

    def write(self, piece: _WritePiece) -> None:
        """Blocks. Raises OSError if the disk fails."""
        sums = zip(piece.slab_slots.tolist(), piece.seeds, strict=True)
        piece.checksums = np.array([checksum(self._volume.payload(slot), seed) for slot, seed in sums], np.uint64)
        piece.written = self._volume.write(piece.file_slots, piece.slab_slots)

    def ended(self, piece: _WritePiece) -> None:
        with self._volume.lock:
            pages, counters, written = self._volume.pages, self._volume.counters, piece.written
            if not written.all():
                pages.abort_write(piece.rows[~written])
            if written.any():
                counters.stored += pages.end_write(piece.rows[written], piece.checksums[written])
                counters.written_nbytes += int(np.count_nonzero(written)) * self.slot_nbytes
            for row in piece.rows.tolist():
                del self._writing[row]
            ended = []
            for storing in piece.waiters:
                storing.n_left -= 1
                storing.error = storing.error or piece.error
                if not storing.n_left:
                    self._settle(storing)
                    ended.append(storing)
        if piece.error:
            self._volume.write_failed(piece.error)
        self._answer(ended)


class _Starting(Work):
    """Somebody has joined the queue."""

    is_read = False
    nbytes = 0

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def run(self) -> None:
        self._stores.resume()

    def finish(self) -> None:
        """What has not been started waits on: for the keeper, or to be withdrawn."""


class _WritePiece(Work):
    """Some pages of a batch. waiters: the batches that have them, the one that brought them first."""

    is_read = False

    def __init__(self, stores: Stores, rows: Rows, file_slots: Slots, slab_slots: Slots, page_seeds: list[int]) -> None:
        self._stores = stores
        self.rows = rows
        self.file_slots = file_slots
        self.slab_slots = slab_slots
        self.seeds = page_seeds
        self.nbytes = len(rows) * stores.slot_nbytes
        self.checksums = np.zeros(len(rows), np.uint64)
        self.written = np.zeros(len(rows), np.bool_)
        self.waiters: list[Storing] = []

    def run(self) -> None:
        self._stores.write(self)

    def finish(self) -> None:
        self._stores.ended(self)
