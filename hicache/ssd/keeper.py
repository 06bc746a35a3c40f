"""The keeper: the one background thread that writes the map, and does whatever else has to wait for the disk in order.

It goes round and round: jobs that others gave it; a slice of the fill after a start; then a commit of what has changed,
new segments, and the stores that waited for either; every few seconds a look whether the files are still there; and,
while the disk is given up, a trial of it from time to time.
"""

from __future__ import annotations

import errno
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np

from hicache.logs import CHANGE, get_logger
from hicache.ssd.fill import FREE_SLICE, SLICE, Fill, rebuild_map
from hicache.ssd.locks import StoreError
from hicache.ssd.map import NO_SLOTS, TRANSACTION_ROWS, is_damage
from hicache.ssd.opening import grow, open_store
from hicache.ssd.pages import Changes
from hicache.ssd.room import keep_quotas
from hicache.ssd.stores import Stores
from hicache.ssd.volume import Opened, Spec, Volume
from hicache.tier import TierError

logger = get_logger(__name__)

ROUND_S: Final = 0.2
"""Commits are at most so far apart, so a crash loses at most what was stored in this time."""

TOUCH_S: Final = 30.0
"""When pages were last used is written so often, or hits would wear the disk. A crash loses it of this time."""

WATCH_S: Final = 2.0
GROW_AGAIN_S: Final = 30.0

GROWTH_S: Final = 10.0
"""Stores wait so long for a new segment. Where its bytes are written one by one, it takes seconds on a healthy disk."""

FILL_PAUSE_S: Final = 5e-5
"""After each step of the fill, so that whoever waits for the interpreter's lock gets it. Steps give it up too, but take
it back before another thread has been woken."""

Job = tuple[Callable[[], None], "Future[int]"]


class Keeper:
    """Serves one volume until it is stopped. wanted: set by whoever has something to do for it.

    Other threads may call `call`, `wake`, `busy_s` and `stop`, and read `n_crashes`.
    """

    def __init__(self, volume: Volume, stores: Stores, wanted: threading.Event) -> None:
        self.n_crashes = 0
        self._volume = volume
        self._stores = stores
        self._wanted = wanted
        self._fill: Iterator[None] | None = Fill(volume).steps()
        self._jobs: deque[Job] = deque()
        self._late_jobs: deque[Job] = deque()
        self._stopping = False
        self._watched_at_s = volume.clock() - WATCH_S
        self._touched_at_s = volume.clock()
        self._busy_since_s: float | None = None
        self._is_new_map = False
        self._growth: _Growth | None = None
        self._told_no_room = False
        self._told_buffered = False
        self._thread = threading.Thread(target=self._serve, name="sgl-lmcache-ssd-keeper", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], None], future: Future[int], *, after_fill: bool = False) -> None:
        """Do this soon. It settles the future; if it raises what disks raise, that is done here, with TierError."""
        (self._late_jobs if after_fill else self._jobs).append((work, future))
        self._wanted.set()

    def wake(self) -> None:
        """There is something to do."""
        self._wanted.set()

    def busy_s(self) -> float:
        """For how long the keeper has been at the disk."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._volume.clock() - since_s

    def stop(self, timeout_s: float) -> bool:
        """Commit what is left, and end. Returns False if that took too long; it goes on then. Blocks."""
        self._stopping = True
        self._wanted.set()
        deadline_s = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        has_grown = self._growth is None or self._growth.ended(max(0.0, deadline_s - time.monotonic()))
        return has_grown and not self._thread.is_alive()

    # ---- the thread ----

    def _serve(self) -> None:
        while not self._stopping:
            pause_s = ROUND_S
            try:
                pause_s = self._round()
            except Exception:
                self.n_crashes += 1
                logger.exception("sgl_lmcache: the keeper of the SSD tier met a bug")
            self._wanted.wait(pause_s)
            self._wanted.clear()
        try:
            self._finish()
        except Exception:
            self.n_crashes += 1
            logger.exception("sgl_lmcache: the keeper of the SSD tier met a bug at its end")

    def _round(self) -> float:
        """Returns how long to wait for the next."""
        volume = self._volume
        self._run(self._jobs)
        if volume.reads.is_due or volume.writes.is_due:
            self._try_again()
        if volume.writes.is_open:
            self._stores.withdraw()
            return ROUND_S
        self._watch()
        if self._fill is not None:
            self._fill_on(self._fill)
            return FILL_PAUSE_S
        self._run(self._late_jobs)
        self._keep_up()
        return ROUND_S

    def _finish(self) -> None:
        for jobs in (self._jobs, self._late_jobs):
            while jobs:
                jobs.popleft()[1].set_result(0)
        if not self._volume.is_filling and not self._volume.writes.is_open:
            self._commit_all(at_end=True)

    @contextmanager
    def _at_disk(self) -> Iterator[None]:
        self._busy_since_s = self._volume.clock()
        try:
            yield
        finally:
            self._busy_since_s = None

    def _run(self, jobs: deque[Job]) -> None:
        while jobs:
            work, future = jobs.popleft()
            try:
                with self._at_disk():
                    work()
            except (OSError, sqlite3.Error) as error:
                self._volume.map_failed(error)
                future.set_exception(TierError(f"the map of {self._volume.spec.folder.path} failed: {error}"))
            except Exception as error:
                if not future.done():
                    future.set_exception(TierError(f"the SSD tier met a bug, which is in the log: {error!r}"))
                raise

    def _fill_on(self, fill: Iterator[None]) -> None:
        try:
            with self._at_disk():
                next(fill)
        except StopIteration:
            self._fill = None
            if self._volume.is_filling:
                self._volume.map_failed(RuntimeError("reading it was broken off"))
        except (OSError, sqlite3.Error) as error:
            self._fill = None
            self._volume.map_failed(error)

    # ---- commits ----

    def _keep_up(self) -> None:
        """Commit, grow and start what waits, until nothing of it makes room for more."""
        volume = self._volume
        while not volume.writes.is_open:
            if volume.wants_growth or self._growth is not None:
                self._grow()
            self._keep_quotas()
            self._commit_all()
            self._stores.resume()
            wants_growth = volume.wants_growth and self._growth is None
            if not (wants_growth or (self._stores.n_waiting and volume.pages.n_dying)):
                break

    def _keep_quotas(self) -> None:
        """A quota that has become smaller holds from the next commit on."""
        for _ in keep_quotas(self._volume, SLICE):
            pass

    def flush(self) -> int:
        """Commit all that is resident now. A job, for after the fill."""
        self._commit_all()
        return 0

    def _commit_all(self, *, at_end: bool = False) -> None:
        now_s = self._volume.clock()
        touched = at_end or now_s - self._touched_at_s >= TOUCH_S
        if touched:
            self._touched_at_s = now_s
        while self._commit(touched):
            pass

    def _commit(self, touched: bool) -> bool:
        """One transaction, with last uses only if `touched`. Returns whether there may be more to commit."""
        volume = self._volume
        with volume.lock:
            changes = volume.pages.changes(TRANSACTION_ROWS, touched=touched and volume.allows_touches)
            volume.pay_touches(changes.touched[0])
        if not len(changes):
            return False
        try:
            with self._at_disk():
                self._write(changes)
        except (OSError, sqlite3.Error) as error:
            with volume.lock:
                volume.pages.uncommitted(changes)
            return self._commit_failed(error)
        self._is_new_map = False
        with volume.lock:
            volume.pages.committed(changes.deleted)
        return True

    def _write(self, changes: Changes) -> None:
        """In this order: the bytes are safe, then the map names them."""
        volume = self._volume
        volume.check_in_place()
        volume.files.sync(np.unique(changes.saved.slots // volume.geometry.segment_slots).tolist())
        volume.map.apply(changes.deleted, changes.saved, changes.touched, changes.clock)

    def _commit_failed(self, error: Exception) -> bool:
        volume = self._volume
        if isinstance(error, OSError):
            gone = error.errno == errno.ESTALE
            (volume.went_away if gone else volume.write_failed)(error)
            return False
        if self._is_new_map or not (isinstance(error, sqlite3.Error) and is_damage(error)):
            volume.map_failed(error)
            return False
        try:
            with self._at_disk():
                self._rebuild()
        except (OSError, sqlite3.Error) as worse:
            volume.map_failed(worse)
            return False
        return True

    def clear(self) -> int:
        """Forget all pages; returns how many there were. A job, for after the fill. Raises sqlite3.Error."""
        volume, n_deleted = self._volume, 0
        for first in range(0, volume.pages.n_live, SLICE):
            with volume.lock:
                n_deleted += volume.pages.delete_slots(first, first + SLICE)
        taken = list(self._take_all_changes())
        try:
            volume.map.delete_all()
        except sqlite3.Error:
            for changes in reversed(taken):
                with volume.lock:
                    volume.pages.uncommitted(changes)
            raise
        for changes in taken:
            with volume.lock:
                volume.pages.committed(changes.deleted)
                volume.pages.uncommitted(replace(changes, deleted=NO_SLOTS))  # what was stored meanwhile
        with volume.lock:
            volume.counters.deleted += n_deleted
        return n_deleted

    def _take_all_changes(self) -> Iterator[Changes]:
        """Some thousand at a time, as the lock is held for each."""
        while True:
            with self._volume.lock:
                changes = self._volume.pages.changes(FREE_SLICE)
            if not len(changes):
                return
            yield changes

    # ---- room ----

    def _grow(self) -> None:
        """Another segment; where there is no room for one, the tier goes on with those it has.

        The disk may take long over it. Meanwhile the keeper goes its rounds; stores wait for a while, and then make do
        with slots of pages that leave.
        """
        volume, growth = self._volume, self._growth
        volume.wants_growth = False
        if growth is None:
            growth = self._growth = _Growth(volume)
        is_late = volume.clock() - growth.began_at_s > GROWTH_S
        if not growth.ended(0.0 if is_late else ROUND_S):
            if is_late:
                self._stay_small(math.inf, "making room takes the disk long")
            return
        self._growth = None
        if isinstance(growth.error, OSError):
            with volume.lock:
                volume.counters.write_errors += 1
            self._stay_small(volume.clock() + GROW_AGAIN_S, str(growth.error))
        elif growth.error:
            raise growth.error
        elif not growth.grew:
            self._stay_small(volume.clock() + GROW_AGAIN_S, "the directory's capacity is used up")
        else:
            self._told_no_room = False
            volume.grow_again_at_s = 0.0
            if volume.files.is_last_written:
                with volume.lock:
                    volume.pay(volume.geometry.segment_nbytes)
            for end in range(volume.pages.n_live, volume.files.n_slots, FREE_SLICE):
                with volume.lock:
                    volume.pages.add_slots(min(end + FREE_SLICE, volume.files.n_slots))
            volume.wants_growth = False

    def _stay_small(self, grow_again_at_s: float, reason: str) -> None:
        self._volume.grow_again_at_s = grow_again_at_s
        if not self._told_no_room:
            self._told_no_room = True
            store, n_slots = self._volume.spec.folder.path, self._volume.files.n_slots
            logger.warning("sgl_lmcache: %s stays at %s slots: %s", store, f"{n_slots:,}", reason)

    # ---- the disk's health ----

    def _watch(self) -> None:
        if self._volume.clock() - self._watched_at_s < WATCH_S:
            return
        self._watched_at_s = self._volume.clock()
        if self._volume.endurance is not None:
            self._volume.endurance.tell(str(self._volume.spec.path), self._volume.counters.skipped_endurance)
        if not (self._volume.files.is_direct or self._told_buffered):
            self._told_buffered = True
            path = self._volume.spec.path
            logger.warning("sgl_lmcache: the file system of %s has no direct I/O: the page cache is used", path)
        try:
            with self._at_disk():
                self._volume.check_in_place()
        except OSError as error:
            self._volume.went_away(error)

    def _try_again(self) -> None:
        volume = self._volume
        due = [breaker for breaker in (volume.reads, volume.writes) if breaker.is_due]
        try:
            with self._at_disk():
                self._put_right()
                if volume.reads in due:
                    volume.try_reads()
                if volume.writes in due:
                    volume.try_writes()
                    if volume.map.is_damaged and not volume.is_filling:
                        self._rebuild()
                if volume.is_filling:
                    self._fill = Fill(volume).steps()
        except (OSError, sqlite3.Error, StoreError):
            for breaker in due:
                breaker.failed()
            return
        for breaker in due:
            breaker.close()
        logger.warning("sgl_lmcache: the store %s is back", volume.spec.folder.path, extra=CHANGE)

    def _put_right(self) -> None:
        """Replace what is gone or broken: the whole store by an empty one, the map by a new one."""
        volume = self._volume
        if not volume.is_in_place():
            if self._growth is not None and not self._growth.ended(0.0):
                raise OSError("a segment of it is still being made")
            self._growth, volume.grow_again_at_s = None, 0.0
            if not volume.release():
                raise OSError("something of it is still being read or written")
            volume.renew(open_store(volume.spec))
        elif not volume.map.is_open or (volume.map.is_damaged and not volume.is_filling):
            self._rebuild()

    def _rebuild(self) -> None:
        """Raises sqlite3.Error, OSError. Within `_at_disk`: each step by itself may hang, not all of them together."""
        for _ in rebuild_map(self._volume):
            self._busy_since_s = self._volume.clock()
        self._is_new_map = True


class _Growth:
    """One more segment, made on a thread of its own. error: why it was not; grew: False too if the cap forbids it."""

    def __init__(self, volume: Volume) -> None:
        self.began_at_s = volume.clock()
        self.grew = False
        self.error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(volume.spec, volume.opened), name="sgl-lmcache-ssd-growth", daemon=True
        )
        self._thread.start()

    def ended(self, timeout_s: float) -> bool:
        """Blocks for so long at most."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self, spec: Spec, opened: Opened) -> None:
        try:
            self.grew = grow(spec, opened)
        except Exception as error:  # noqa: BLE001 - the keeper raises it
            self.error = error
