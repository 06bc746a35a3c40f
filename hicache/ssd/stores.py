"""Stores: slab slots to file slots, and the queue of those that wait for a thread or for room.

Whoever asks only joins the queue; an I/O thread looks into the books and starts what it can. Of a batch, as much is
stored as the endurance budget allows now. It starts if free slots are there for all of these pages. Otherwise pages
leave, or a segment is added, and the batch waits until the keeper has written that down, with all later ones behind it,
so that parents go before their children. What waits or is being written is bounded in bytes; beyond it a store takes
less, and answers so.

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
from hicache.quotas import Room, digest_of
from hicache.ssd.pages import Slots
from hicache.ssd.room import MAX_EVICTED, make_room
from hicache.ssd.volume import WRITE_NBYTES, Volume
from hicache.tier import Batch, TierError
from hicache.workers import Work
from radix import KEY_NBYTES, Rows, State

_NO_ROWS: Rows = np.empty(0, np.int32)

_MAX_BEHIND: Final = 256
"""So many waiting batches are looked at to tell how much room will be wanted."""


class Storing:
    """One batch on its way: the first `n_pages` of it, which are `nbytes`."""

    def __init__(self, batch: Batch, n_pages: int, nbytes: int, future: Future[int]) -> None:
        self.n_skipped = len(batch) - n_pages
        self.keys = batch.keys[: KEY_NBYTES * n_pages]
        self.parent = batch.parents[:KEY_NBYTES]
        self.tenant = digest_of(batch.tenant)
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
        rows = pages.hold(storing.keys, storing.parent, storing.tenant) if len(storing.slab_slots) else _NO_ROWS
        if rows is None:
            counters.orphans += len(storing.slab_slots)
            rows = _NO_ROWS
        self._volume.pay_touches(pages.learn_owner(rows, storing.tenant).astype(np.int64))
        states = pages.states(rows)
        absent = np.flatnonzero(states == State.ABSENT)
        n_allowed = self._volume.allowed_pages(len(absent))
        room = self._make_room(pages.group_of(rows), n_allowed)
        n_new = room.n_pages
        if n_new > pages.n_free:
            pages.let_go(rows)
            return None
        n_taken = int(absent[n_new]) if len(absent) > n_new else len(rows)
        absent = absent[:n_new]
        if n_new < room.n_within_quota:
            counters.skipped_full += len(rows) - n_taken
        elif n_new < n_allowed:
            counters.skipped_quota += len(rows) - n_taken
        else:
            counters.skipped_endurance += len(rows) - n_taken
        if n_new:
            self._volume.pay_pages(n_new)
        counters.deduplicated += n_taken - len(absent)
        pages.let_go(rows[n_taken:])
        storing.rows = rows[:n_taken]
        self._join(storing, storing.rows[states[:n_taken] == State.INCOMING])
        pieces = self._pieces(storing, absent)
        storing.n_left += len(pieces)
        if not storing.n_left:
            self._settle(storing)
        return pieces

    def _make_room(self, group: int, n_wanted: int) -> Room:
        """For so many pages of a group. Those that it allows and that have no free slot yet have to wait.

        If pages leave for them, more do for those of the group that wait behind, so that one commit is for all.
        """
        volume, pages = self._volume, self._volume.pages
        n_dying = pages.n_dying
        room = make_room(volume, group, n_wanted)
        if room.n_pages > pages.n_free:
            if volume.may_grow:
                volume.wants_growth = True
            elif pages.n_dying > n_dying:
                n_more = min(self._n_behind(group), pages.n_live // 8, MAX_EVICTED)
                make_room(volume, group, volume.allowed_pages(n_wanted + n_more))
        return room

    def _n_behind(self, group: int) -> int:
        """How many pages of a group wait behind the first batch."""
        quotas = self._volume.quotas
        with self._queue_lock:
            behind = list(islice(self._waiting, 1, _MAX_BEHIND))
        return sum(len(one.slab_slots) for one in behind if quotas.group_of_digest(one.tenant) == group)

    def _join(self, storing: Storing, incoming: Rows) -> None:
        """Wait for the pieces that are writing these pages already."""
        pieces = {self._writing[row] for row in incoming.tolist()}
        for piece in pieces:
            piece.waiters.append(storing)
        storing.n_left += len(pieces)

    def _pieces(self, storing: Storing, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[_WritePiece]:
        rows = storing.rows[positions]
        file_slots = self._volume.pages.begin_write(rows, storing.tenant)
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
