"""The I/O threads of a tier and their queue: reads before writes, and writes on half of the threads at most.

A write that has waited for long goes first, on one thread, so that reads without end do not keep stores from being
written.

A piece of work has two halves: `run` moves bytes and may block for as long as the store likes; `finish` keeps books and
does not. Work that is withdrawn before a thread has taken it is finished without being run.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from hicache.logs import get_logger

logger = get_logger(__name__)

_FORGET_AT_S: Final = 4.0
"""The speed is that of the last few seconds in which the store was read."""

_STALE_S: Final = 60.0
"""A speed that was measured so long ago says nothing: whoever never asks a slow store would never learn that it is
fast again."""


_PATIENCE_S: Final = 0.5
"""So long a write waits while there are reads, and no other write is under way."""


class Work(ABC):
    """Some slots to be read or written. `error` says why they were not, `withdrawn` that nobody tried."""

    is_read: bool
    is_urgent = False
    """Goes before others of its kind."""
    nbytes: int
    """Of payload. 0: a question, or book-keeping, by which no speed is measured."""
    moved_nbytes: int | None = None
    """How much of it `run` has moved; None: all."""
    error: Exception | None = None
    withdrawn: bool = False
    submitted_at_s: float = 0.0

    @abstractmethod
    def run(self) -> None:
        """On an I/O thread, without any lock. May raise."""

    @abstractmethod
    def finish(self) -> None:
        """After `run`, or instead of it. Never blocks."""


class Speed:
    """Bytes a second, over the time in which at least one piece of work was under way."""

    def __init__(self) -> None:
        self._n_busy = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._nbytes = 0

    def begin(self, now_s: float) -> None:
        self._count(now_s)
        self._n_busy += 1

    def fail(self, now_s: float) -> None:
        """Nothing came of it, perhaps after a long time: what was measured says nothing of what will be."""
        self.end(now_s, 0)
        self._busy_s, self._nbytes = 0.0, 0

    def end(self, now_s: float, nbytes: int) -> None:
        self._count(now_s)
        self._n_busy -= 1
        self._nbytes += nbytes
        if self._busy_s > _FORGET_AT_S:
            self._busy_s /= 2
            self._nbytes //= 2

    def _count(self, now_s: float) -> None:
        if self._n_busy:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s

    def time_s(self, nbytes: int, now_s: float) -> float:
        """How long that much takes; 0.0 if nothing has been measured lately."""
        is_stale = not self._n_busy and now_s - self._since_s > _STALE_S
        return nbytes * self._busy_s / self._nbytes if self._nbytes and not is_stale else 0.0


class Workers:
    """Daemon threads, so a store that hangs does not keep the interpreter alive. Any thread may call any method.

    tier: its name, for the threads' names and the log. Raises RuntimeError if the system gives no more threads.
    """

    def __init__(self, tier: str, n_threads: int, clock: Callable[[], float]) -> None:
        self._tier = tier
        self.n_crashes = 0
        self._clock = clock
        self._max_writing = max(1, n_threads // 2)
        self._n_writing = 0
        self._reads: deque[Work] = deque()
        self._writes: deque[Work] = deque()
        self._under_way: dict[Work, float] = {}
        self._stopped = False
        self._speed = Speed()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"sgl-lmcache-{tier}-{i}", daemon=True) for i in range(n_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            raise

    def submit(self, work: Sequence[Work]) -> None:
        """Queue these, of one kind and urgency. Finished at once after `stop`."""
        with self._changed:
            stopped = self._stopped
            if not stopped and work:
                now_s = self._clock()
                for piece in work:
                    piece.submitted_at_s = now_s
                queue = self._reads if work[0].is_read else self._writes
                if work[0].is_urgent:
                    queue.extendleft(reversed(work))
                else:
                    queue.extend(work)
                self._changed.notify(len(work))
        if stopped:
            self._withdraw(work)

    def withdraw(self, *, reads: bool = True, writes: bool = True) -> None:
        """Finish what no thread has taken yet, without running it."""
        with self._changed:
            queues = [queue for queue, wanted in ((self._reads, reads), (self._writes, writes)) if wanted]
            withdrawn = [work for queue in queues for work in queue]
            for queue in queues:
                queue.clear()
        self._withdraw(withdrawn)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A bug in here goes into the log and no further."""
        try:
            yield
        except Exception:
            self.n_crashes += 1
            logger.exception("sgl_lmcache: an I/O thread of the %s tier met a bug", self._tier)

    @property
    def n_queued(self) -> tuple[int, int]:
        """Pieces of work that wait for a thread: reads, writes."""
        return len(self._reads), len(self._writes)

    def oldest_s(self) -> float:
        """For how long the oldest piece of work under way has been so; 0.0 if there is none."""
        with self._changed:
            return self._clock() - min(self._under_way.values()) if self._under_way else 0.0

    def expected_read_s(self, nbytes: int) -> float:
        """How long a read of so much would take, behind the reads that are queued or under way."""
        with self._changed:
            ahead = sum(work.nbytes for work in self._reads) + sum(w.nbytes for w in self._under_way if w.is_read)
            return self._speed.time_s(ahead + nbytes, self._clock())

    def stop(self, timeout_s: float) -> bool:
        """Withdraw what is queued, wait for what is under way; returns False if that did not end in time."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.withdraw()
        with self._changed:
            is_quiet = self._changed.wait_for(lambda: not self._under_way, timeout_s)
        if is_quiet:
            for thread in self._threads:
                thread.join()
        return is_quiet

    def _serve(self) -> None:
        while (work := self._take()) is not None:
            with self.guarded():
                self._run(work)

    def _run(self, work: Work) -> None:
        try:
            work.run()
        except OSError as error:
            work.error = error
        except Exception as error:
            self.n_crashes += 1
            logger.exception("sgl_lmcache: an I/O thread of the %s tier met a bug", self._tier)
            work.error = error
        try:
            work.finish()
        finally:
            self._ended(work)

    def _take(self) -> Work | None:
        """The next piece of work, or None when there will be none."""
        with self._changed:
            while not self._stopped:
                may_write = self._writes and self._n_writing < self._max_writing
                if self._reads and not (may_write and self._is_starved()):
                    return self._begin(self._reads.popleft())
                if may_write:
                    return self._begin(self._writes.popleft())
                self._changed.wait()
        return None

    def _is_starved(self) -> bool:
        return self._n_writing == 0 and self._clock() - self._writes[0].submitted_at_s > _PATIENCE_S

    def _begin(self, work: Work) -> Work:
        now_s = self._clock()
        self._under_way[work] = now_s
        if work.is_read and work.nbytes:
            self._speed.begin(now_s)
        self._n_writing += not work.is_read
        return work

    def _ended(self, work: Work) -> None:
        with self._changed:
            del self._under_way[work]
            if work.is_read and work.nbytes:
                self._measure(work)
            if not work.is_read:
                self._n_writing -= 1
                if self._writes:
                    self._changed.notify()
            if not self._under_way:
                self._changed.notify_all()

    def _measure(self, work: Work) -> None:
        if work.error is not None:
            self._speed.fail(self._clock())
        else:
            self._speed.end(self._clock(), work.nbytes if work.moved_nbytes is None else work.moved_nbytes)

    def _withdraw(self, withdrawn: Sequence[Work]) -> None:
        for work in withdrawn:
            work.withdrawn = True
            with self.guarded():
                work.finish()
