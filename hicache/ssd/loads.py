"""Loads: file slots to slab slots, verified page by page."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from hicache.checksum import checksum, seeds
from hicache.ssd.pages import Read
from hicache.ssd.volume import READ_NBYTES, Volume
from hicache.tier import Batch, TierError
from hicache.workers import Work
from radix import KEY_NBYTES


def ask_load(volume: Volume, batch: Batch, future: Future[int]) -> None:
    """Have an I/O thread `start_load`. Some ten microseconds."""
    volume.workers.submit([_Starting(volume, batch, future)])


class _Starting(Work):
    """A load that has been asked for."""

    is_read = True
    nbytes = 0

    def __init__(self, volume: Volume, batch: Batch, future: Future[int]) -> None:
        self._volume = volume
        self._batch = batch
        self._future = future

    def run(self) -> None:
        start_load(self._volume, self._batch, self._future)

    def finish(self) -> None:
        if self.withdrawn:
            self._future.set_result(0)


def start_load(volume: Volume, batch: Batch, future: Future[int]) -> None:
    """Read what is resident of the batch; the future tells when and how far. Any thread; does not block."""
    with volume.lock:
        read = volume.pages.begin_read(batch.keys)
    if len(read):
        volume.workers.submit(_Loading(volume, batch, read, future).pieces())
    else:
        future.set_result(0)


class _Loading:
    """One load under way. The future is done when the last piece has ended, so that nobody writes to the slab then."""

    def __init__(self, volume: Volume, batch: Batch, read: Read, future: Future[int]) -> None:
        self.volume = volume
        self.read = read
        self.slab_slots = batch.slots[: len(read)]
        self.seeds = seeds(batch.keys[: KEY_NBYTES * len(read)], volume.seed)
        self._future = future
        self._damaged = np.zeros(len(read), np.bool_)
        self._n_tried = len(read)
        self._n_left = 0
        self._error: Exception | None = None

    def pieces(self) -> list[_ReadPiece]:
        pieces = [_ReadPiece(self, first, end) for first, end in self.volume.pieces(len(self.read), READ_NBYTES)]
        self._n_left = len(pieces)
        return pieces

    def ended(self, piece: _ReadPiece) -> None:
        with self.volume.lock:
            if piece.error or piece.withdrawn:
                self._error = self._error or piece.error
                self._n_tried = min(self._n_tried, piece.first)
            else:
                self._damaged[piece.first : piece.end] = piece.damaged
                self.volume.counters.read_nbytes += piece.nbytes
            self._n_left -= 1
            n_good = None if self._n_left else self._settle()
        if piece.error:
            self.volume.read_failed(piece.error)
        if n_good is not None:
            self._answer(n_good)

    def _settle(self) -> int:
        counters = self.volume.counters
        counters.corrupt += self.volume.pages.end_read(self.read, self._damaged)
        n_good = int(self._damaged.argmax()) if self._damaged.any() else len(self.read)
        n_good = min(n_good, self._n_tried)
        counters.loaded += n_good if self._error is None else 0
        return n_good

    def _answer(self, n_good: int) -> None:
        if self._error is None:
            self._future.set_result(n_good)
        else:
            self._future.set_exception(TierError(f"{self.volume.spec.folder.path} could not be read: {self._error}"))


class _ReadPiece(Work):
    is_read = True

    def __init__(self, loading: _Loading, first: int, end: int) -> None:
        self._loading = loading
        self.first = first
        self.end = end
        self.nbytes = (end - first) * loading.volume.geometry.slot_nbytes
        self.damaged = np.ones(end - first, np.bool_)

    def run(self) -> None:
        loading, span = self._loading, slice(self.first, self.end)
        slab_slots = loading.slab_slots[span]
        complete = loading.volume.read(loading.read.slots[span], slab_slots)
        expected = zip(
            slab_slots.tolist(), loading.seeds[span].tolist(), loading.read.checksums[span].tolist(), strict=True
        )
        good = [checksum(loading.volume.payload(slot), seed) == wanted for slot, seed, wanted in expected]
        self.damaged = ~(complete & np.array(good))

    def finish(self) -> None:
        self._loading.ended(self)
