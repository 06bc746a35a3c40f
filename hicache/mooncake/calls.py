"""Calls of the Mooncake tier under way: look-ups, loads, stores and deletions, in pieces for the client process."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hicache.breaker import Breaker
from hicache.calls import ABSENT, CORRUPT, FAILED, FULL, GOOD, NEW, OTHER_VERSION, Call
from hicache.logs import CHANGE, get_logger
from hicache.mooncake import messages
from hicache.mooncake.counters import Counters
from hicache.mooncake.messages import MAX_KEYS, Geometry, Pool, Reply
from hicache.mooncake.process import JOIN_TIMEOUT_S, ClientProcess, ProcessError
from hicache.tier import Batch, TierError
from hicache.workers import Work, Workers
from radix import KEY_NBYTES

logger = get_logger(__name__)


class PoolError(OSError):
    """The pool as a whole did not answer: the sentence says how."""


@dataclass(slots=True, eq=False)
class Shared:
    """What all calls of one tier have in common.

    reads: opens when the master does not answer, or the client process has ended. writes: when a node of the pool did
    not take what it was to take. process: None if it has ended.
    """

    pool: Pool
    geometry: Geometry
    workers: Workers
    reads: Breaker
    writes: Breaker
    piece_pages: int
    process: ClientProcess | None
    is_joined: bool = False
    """Whether `process` has joined the pool: before, it can be asked for nothing."""
    counters: Counters = field(default_factory=Counters)
    lock: threading.Lock = field(default_factory=threading.Lock)
    queued_nbytes: int = 0
    """Of stores that have not ended."""
    is_closed: bool = False
    is_on_trial: bool = False
    told: set[Breaker] = field(default_factory=set)
    """Those of which the log has been told that they are open."""

    def ask(self, message: messages.Call, timeout_s: float | None = None) -> Reply:
        """Blocks, for timeout_s at most, or as long as a call may take. Raises ProcessError or PoolError."""
        process = self.process
        if process is None:
            raise ProcessError("has lost its client process")
        reply = process.call(message, timeout_s)
        for line in reply.news:
            logger.warning("sgl_lmcache: %s: %s", self.pool, line)
        if reply.error:
            raise PoolError(reply.error)
        return reply

    def lost(self, process: ClientProcess | None) -> None:
        """It has ended."""
        with self.lock:
            if process is self.process:
                self.process, self.is_joined = None, False
        if process is not None:
            process.release()

    def failed(self, breaker: Breaker, what: str) -> None:
        """Ask for nothing of that kind for a while. What follows the first failure is not told."""
        if breaker.is_due:
            breaker.failed()
        else:
            breaker.trip(what)  # which does nothing if another call has met the same before
        with self.lock:
            is_news = breaker not in self.told
            self.told.add(breaker)
        if is_news:
            logger.warning(
                "sgl_lmcache: %s %s; going on without it, and trying again now and then", self.pool, what, extra=CHANGE
            )

    def served(self, breaker: Breaker) -> None:
        if breaker.is_open:
            breaker.close()
        with self.lock:
            is_news = breaker in self.told
            self.told.discard(breaker)
        if is_news:
            logger.warning("sgl_lmcache: %s is used again", self.pool, extra=CHANGE)


class PoolCall(Call):
    """Pages `keys`, in even pieces of at most `piece_pages`. `future` ends with TierError if the pool failed."""

    is_urgent = False
    payload_nbytes = 0
    """Of a page that is moved; 0: the call only asks."""

    def __init__(self, shared: Shared, keys: bytes, piece_pages: int, future: Future[int]) -> None:
        n_pages = len(keys) // KEY_NBYTES
        super().__init__(n_pages, shared.lock, future)
        self.shared = shared
        self._keys = keys
        even = math.ceil(n_pages / max(1, math.ceil(n_pages / piece_pages)))
        self._ranges = [range(at, min(at + even, n_pages)) for at in range(0, n_pages, max(1, even))]

    def start(self) -> None:
        self.begin(self.shared.workers, [_Piece(self, positions) for positions in self._ranges])

    @abstractmethod
    def message(self, positions: range) -> messages.Call:
        """What the client process is asked to do with these pages."""

    def keys(self, positions: range) -> bytes:
        return self._keys[positions.start * KEY_NBYTES : positions.stop * KEY_NBYTES]

    def explain(self, error: Exception) -> TierError:
        return TierError(f"{self.shared.pool} {error}")


class _Question(PoolCall):
    """Nothing is moved, so a piece may have many pages."""

    def __init__(self, shared: Shared, keys: bytes, future: Future[int]) -> None:
        super().__init__(shared, keys, MAX_KEYS, future)


class Exists(_Question):
    is_urgent = True

    def message(self, positions: range) -> messages.Call:
        return messages.Exists(self.keys(positions))

    def count(self, n_head: int) -> int:
        return n_head


class Delete(_Question):
    is_read = False

    def message(self, positions: range) -> messages.Call:
        return messages.Delete(self.keys(positions))

    def count(self, n_head: int) -> int:
        n_deleted = int(np.count_nonzero(self.found == GOOD))
        self.shared.counters.deleted += n_deleted
        return n_deleted


class _Move(PoolCall):
    """Pages between the slab and the pool."""

    def __init__(self, shared: Shared, batch: Batch, future: Future[int]) -> None:
        super().__init__(shared, batch.keys, shared.piece_pages, future)
        self.payload_nbytes = shared.geometry.page_nbytes
        self._slots = batch.slots

    def slots(self, positions: range) -> bytes:
        return self._slots[positions.start : positions.stop].tobytes()

    def n(self, *states: int) -> int:
        return int(np.isin(self.found, states).sum())


class Load(_Move):
    def message(self, positions: range) -> messages.Call:
        return messages.Load(self.keys(positions), self.slots(positions))

    def count(self, n_head: int) -> int:
        counters = self.shared.counters
        counters.loaded += n_head
        counters.missed += ABSENT in self.found[self.n_known : self.n_known + 1]
        counters.corrupt += self.n(CORRUPT)
        counters.other_version += self.n(OTHER_VERSION)
        counters.unread += self.n(FAILED)
        counters.read_errors += FAILED in self.found
        counters.read_nbytes += self.n(GOOD) * self.payload_nbytes
        return n_head


class Store(_Move):
    is_read = False

    def message(self, positions: range) -> messages.Call:
        return messages.Store(self.keys(positions), self.slots(positions))

    def count(self, n_head: int) -> int:
        shared, counters = self.shared, self.shared.counters
        n_new = self.n(NEW)
        counters.stored += n_new
        counters.deduplicated += self.n(GOOD)
        counters.skipped_full += self.n(FULL)
        counters.write_errors += FAILED in self.found
        counters.written_nbytes += n_new * self.payload_nbytes
        shared.queued_nbytes -= len(self.found) * self.payload_nbytes
        return n_head


class _Piece(Work):
    """Some pages of a call that follow each other."""

    def __init__(self, call: PoolCall, positions: range) -> None:
        self._call = call
        self._positions = positions
        self._process: ClientProcess | None = None
        self.is_read = call.is_read
        self.is_urgent = call.is_urgent
        self.nbytes = len(positions) * call.payload_nbytes

    def run(self) -> None:
        call, shared, positions = self._call, self._call.shared, self._positions
        self.moved_nbytes = 0
        if (
            not shared.is_joined
            or shared.reads.is_open
            or (not self.is_read and shared.writes.is_open and not shared.writes.is_due)
        ):
            return
        if isinstance(call, Load) and call.n_known < positions.start:
            return
        self._process = shared.process
        found = np.frombuffer(shared.ask(call.message(positions)).found, np.int8)
        call.found[positions.start : positions.stop] = found
        self.moved_nbytes = int(np.count_nonzero(found == GOOD)) * call.payload_nbytes
        if isinstance(call, Store):
            self._judge_store(found)

    def _judge_store(self, found: NDArray[np.int8]) -> None:
        shared = self._call.shared
        if FAILED in found:
            shared.failed(shared.writes, "did not take pages: one of its nodes does not answer")
        elif NEW in found:
            shared.served(shared.writes)

    def finish(self) -> None:
        call = self._call
        try:
            if self.error is not None:
                self._failed(self.error)
        finally:
            call.piece_ended(self._positions, self.error)

    def _failed(self, error: Exception) -> None:
        shared = self._call.shared
        with shared.lock:
            if self.is_read:
                shared.counters.read_errors += 1
            else:
                shared.counters.write_errors += 1
        if isinstance(error, ProcessError):
            shared.lost(self._process)
        shared.failed(shared.reads, str(error))


class Trial(Work):
    """Join the pool at the start; later, see whether it answers again, on a new client process if there is none."""

    is_read = True
    is_urgent = True
    nbytes = 0

    def __init__(self, shared: Shared, start_process: Callable[[], ClientProcess]) -> None:
        self._shared = shared
        self._start_process = start_process

    def run(self) -> None:
        shared = self._shared
        if shared.process is None:
            process = self._start_process()
            with shared.lock:
                shared.process = process
                shared.counters.restarts += 1
            if shared.is_closed:
                shared.lost(process)
                return
        shared.ask(messages.Connect(), JOIN_TIMEOUT_S)
        shared.is_joined = True

    def finish(self) -> None:
        shared = self._shared
        if self.error is not None:
            if isinstance(self.error, ProcessError):
                shared.lost(shared.process)
            shared.failed(shared.reads, str(self.error))
        elif not self.withdrawn:
            shared.served(shared.reads)
        shared.is_on_trial = False
