"""The SSD tier: pages in preallocated files below one directory, there again after a restart.

Whoever owns the engine calls the tier; I/O threads move the bytes (`workers.py`), one keeper thread writes the map
(`keeper.py`), and the books that all of them go by are `pages.py`. The caller is never made to wait for the disk: it
takes the volume's lock for some ten microseconds, and is told the rest by a future.

A disk that fails or hangs, or a directory that is deleted, costs hits and nothing else: the tier says so once,
answers that it has nothing, and tries again from time to time.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from hicache.logs import CHANGE, get_logger
from hicache.quotas import Share
from hicache.ssd.directory import store_folder
from hicache.ssd.fill import look_up
from hicache.ssd.keeper import Keeper
from hicache.ssd.loads import ask_load, start_load
from hicache.ssd.locks import StoreError
from hicache.ssd.map import Identity
from hicache.ssd.opening import open_store
from hicache.ssd.sizes import FIXED_NBYTES, MAP_SLOT_NBYTES
from hicache.ssd.stores import Stores
from hicache.ssd.volume import Spec, Volume
from hicache.tier import Batch, Capacity, Health, Tier, answered, pending
from hicache.workers import Workers
from radix import KEY_NBYTES, POLICIES
from radix.departures import Remembered
from transfer.files import System

logger = get_logger(__name__)

N_THREADS: Final = 8
_DELETE_NBYTES: Final = 64 * KEY_NBYTES
"""Keys that are deleted in one hold of the lock."""


class SsdTier(Tier):
    """One rank's store. Made by `open`."""

    def __init__(self, volume: Volume, *, max_queued_nbytes: int, hang_after_s: float, close_timeout_s: float) -> None:
        """`volume` is the tier's from now on."""
        wanted = threading.Event()
        self._volume = volume
        self._stores = Stores(volume, max_queued_nbytes, wanted.set)
        self._keeper = Keeper(volume, self._stores, wanted)
        self._hang_after_s = hang_after_s
        self._close_timeout_s = close_timeout_s
        self._hangs = False
        self._closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        namespace: str,
        member: tuple[int, int],
        page_nbytes: int,
        slab: NDArray[np.uint8],
        limit_nbytes: int,
        server: str,
        eviction: str = "lru",
        quotas: Mapping[str, int] = MappingProxyType({}),
        endurance_nbytes: int | None = None,
        max_queued_nbytes: int = 256 << 20,
        hang_after_s: float = 5.0,
        close_timeout_s: float = 5.0,
        system: System | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open the store of one rank, or make it. Blocks for some milliseconds, whatever the store holds; for longer
        where the cap has become smaller, while the map forgets what no longer fits.

        path: the directory, of all ranks of one server on this node.
        namespace: hex digits; other bytes behind equal keys have another.
        member: (rank, ranks) among those that share the directory and its cap.
        slab: uint8[n_slab_slots, slot_nbytes], aligned to 4096 bytes; a page is the first `page_nbytes` of a slot.
        limit_nbytes: what all members together may occupy, maps and logs included. Each gets an equal share.
        server: names the server: the same on all its ranks, and on no other server.
        eviction: a policy of `radix`.
        quotas: by tenant's cache salt: how many bytes of `limit_nbytes` its pages may take, on all members together.
            The same part of its slots has a tenant on each.
        endurance_nbytes: what all members together may write in any 24 hours; each has an equal share. None: no limit.
        max_queued_nbytes: of stores that wait. hang_after_s: I/O that is older means that the disk hangs.
        system, clock: for tests.

        Raises StoreError, which says what would be right; ValueError for an unknown policy or a strange namespace;
        QuotaError for quotas that are more together than there is.
        """
        if eviction not in POLICIES:
            raise ValueError(f"unknown eviction policy {eviction!r}; there are: {', '.join(sorted(POLICIES))}")
        spec = Spec(
            path=path,
            folder=store_folder(path, namespace, member, slab.shape[1]),
            identity=Identity(namespace, page_nbytes, slab.shape[1]),
            slab=slab,
            limit_nbytes=limit_nbytes,
            server=server,
            eviction=eviction,
            system=system or System(),
            quotas=quotas,
            endurance_nbytes=None if endurance_nbytes is None else endurance_nbytes // member[1],
        )
        try:
            with ExitStack() as undo:
                opened = open_store(spec)
                undo.callback(opened.close)
                workers = Workers("ssd", N_THREADS, clock)
                undo.callback(workers.stop, close_timeout_s)
                tier = cls(
                    Volume(replace(spec, device=os.stat(path).st_dev), opened, workers, clock),
                    max_queued_nbytes=max_queued_nbytes,
                    hang_after_s=hang_after_s,
                    close_timeout_s=close_timeout_s,
                )
                undo.pop_all()
                return tier
        except (OSError, sqlite3.Error, RuntimeError, MemoryError) as error:
            raise StoreError(f"{spec.folder.path} cannot be opened: {error}") from error

    @property
    def name(self) -> str:
        return "ssd"

    # ---- pages ----

    def exists(self, keys: bytes) -> Future[int]:
        volume = self._volume
        if self._refuses_reads():
            return answered(0)
        with volume.lock:
            n_found, is_filling = volume.pages.n_found(keys), volume.is_filling
        if not is_filling or n_found * KEY_NBYTES == len(keys):
            return answered(n_found)

        future = pending()

        def answer() -> None:
            look_up(volume, keys, prefix=True)
            with volume.lock:
                n_found = volume.pages.n_found(keys)
            future.set_result(n_found)

        self._keeper.call(answer, future)
        return future

    def load(self, batch: Batch) -> Future[int]:
        volume = self._volume
        if self._refuses_reads():
            return answered(0)
        future = pending()
        with volume.lock:
            must_look = volume.is_filling and volume.pages.n_found(batch.keys) < len(batch)
        if not must_look:
            ask_load(volume, batch, future)
            return future

        def start() -> None:
            look_up(volume, batch.keys, prefix=True)
            start_load(volume, batch, future)

        self._keeper.call(start, future)
        return future

    def store(self, batch: Batch) -> Future[int]:
        if self._closed or self._is_hung() or self._volume.writes.is_open:
            return answered(0)
        future = pending()
        self._stores.ask(batch, future)
        return future

    def touch(self, key: bytes) -> None:
        with self._volume.lock:
            self._volume.pages.touch(key)

    def delete(self, keys: bytes) -> Future[int]:
        if self._closed:
            return answered(0)
        future = pending()

        def answer() -> None:
            look_up(self._volume, keys, prefix=False)
            future.set_result(self._delete(keys))

        if self._volume.is_filling:
            self._keeper.call(answer, future)
        else:
            future.set_result(self._delete(keys))
        return future

    def _delete(self, keys: bytes) -> int:
        n_deleted = 0
        for at in range(0, len(keys), _DELETE_NBYTES):
            with self._volume.lock:
                n = self._volume.pages.delete(keys[at : at + _DELETE_NBYTES])
                self._volume.counters.deleted += n
            n_deleted += n
        return n_deleted

    def clear(self) -> Future[int]:
        if self._closed:
            return answered(0)
        future = pending()
        self._keeper.call(lambda: future.set_result(self._keeper.clear()), future, after_fill=True)
        return future

    def flush(self) -> Future[int]:
        """Done when the map names all that is stored now, so that a crash loses none of it. Answers 0."""
        if self._closed:
            return answered(0)
        future = pending()
        self._keeper.call(lambda: future.set_result(self._keeper.flush()), future, after_fill=True)
        return future

    def departed(self, keys: bytes) -> Remembered | None:
        """Since the store was opened."""
        with self._volume.lock:
            return self._volume.pages.departures.find(keys)

    # ---- quotas ----

    def set_quotas(self, quotas: Mapping[str, int]) -> None:
        """What is above a quota then leaves soon after, some hundred pages at a time."""
        with self._volume.lock:
            self._volume.quotas.update(quotas)
        self._keeper.wake()

    @property
    def quotas(self) -> Mapping[str, int]:
        with self._volume.lock:
            return self._volume.quotas.tenants

    def shares(self) -> Sequence[Share]:
        with self._volume.lock:
            return self._volume.quotas.shares(self._volume.pages.n_held)

    # ---- what it is like ----

    def expected_load_s(self, n_pages: int) -> float:
        return self._volume.workers.expected_read_s(n_pages * self._volume.geometry.slot_nbytes)

    def capacity(self) -> Capacity:
        """What the pages take, the fixed part for the log included; segments are allocated ahead of it."""
        geometry = self._volume.geometry
        slot_nbytes = geometry.slot_nbytes + MAP_SLOT_NBYTES
        used = FIXED_NBYTES + self._volume.pages.n_resident * slot_nbytes
        return Capacity(used, FIXED_NBYTES + geometry.n_slots * slot_nbytes)

    def health(self) -> Health:
        if self._closed:
            return Health(False, "closed")
        if self._is_hung():
            return Health(False, f"the disk of {self._volume.spec.path} does not answer")
        return Health(not self._volume.ails, self._volume.ails)

    def stats(self) -> Mapping[str, int]:
        """The fields of `Counters`, and what is true now.

        n_pages: resident. n_slots: of the existing segments. n_bad_slots: those of them that the disk refuses, which
        are left out until the store is opened again. n_reads_queued, n_writes_queued: pieces that wait for an
        I/O thread. n_stores_waiting: batches that wait for room. queued_nbytes: of stores not written yet.
        is_filling: 1 while the map is being read after the start.
        """
        volume = self._volume
        n_reads, n_writes = volume.workers.n_queued
        with volume.lock:
            counts = asdict(volume.counters)
            pages = volume.pages
            counts |= {"n_pages": pages.n_resident, "n_slots": pages.n_live, "n_bad_slots": pages.n_bad}
        return counts | {
            "crashes": volume.workers.n_crashes + self._keeper.n_crashes,
            "n_reads_queued": n_reads,
            "n_writes_queued": n_writes,
            "n_stores_waiting": self._stores.n_waiting,
            "queued_nbytes": self._stores.queued_nbytes,
            "is_filling": int(volume.is_filling),
        }

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything; for tests, when nothing is under way."""
        with self._volume.lock:
            self._volume.pages.check_invariants()
            assert self._volume.files.n_slots >= self._volume.pages.n_live, "the files have fewer slots than the books"

    # ---- the end ----

    def close(self) -> None:
        """Withdraw what is queued, wait for what is under way, commit the map, release the locks.

        With a hanging disk it gives up after the timeout and says so; its threads may then still be at the slots of
        futures that are not done, and its locks end with the process.
        """
        if self._closed:
            return
        self._closed = True
        deadline_s = time.monotonic() + self._close_timeout_s
        self._stores.withdraw()
        quiet = self._volume.workers.stop(self._close_timeout_s)
        quiet &= self._keeper.stop(max(0.0, deadline_s - time.monotonic()))
        self._stores.withdraw()
        if quiet:
            closing = threading.Thread(target=self._close_store, name="sgl-lmcache-ssd-close", daemon=True)
            try:
                closing.start()
            except RuntimeError:  # there are no new threads when the interpreter ends
                self._close_store()
            else:
                closing.join(max(0.0, deadline_s - time.monotonic()))
                quiet = not closing.is_alive()
        if not quiet:
            store = self._volume.spec.folder.path
            logger.error("sgl_lmcache: the disk does not answer: %s is left as it is", store)

    def _close_store(self) -> None:
        try:
            self._volume.opened.close()
        except (OSError, sqlite3.Error) as error:
            store = self._volume.spec.folder.path
            logger.error("sgl_lmcache: %s could not be closed in order: %s", store, error)

    # ---- failures ----

    def _refuses_reads(self) -> bool:
        return self._closed or self._is_hung() or self._volume.reads.is_open

    def _is_hung(self) -> bool:
        """Whether I/O is under way for too long. The first to notice says so, and withdraws what waits behind it."""
        workers = self._volume.workers
        hangs = max(workers.oldest_s(), self._keeper.busy_s()) > self._hang_after_s
        if hangs == self._hangs:
            return hangs
        self._hangs = hangs
        path = self._volume.spec.path
        if hangs:
            logger.error("sgl_lmcache: the disk of %s does not answer; going on without it", path, extra=CHANGE)
            workers.withdraw()
            self._stores.withdraw()
        else:
            logger.warning("sgl_lmcache: the disk of %s answers again", path, extra=CHANGE)
        return hangs
