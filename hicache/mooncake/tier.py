"""The Mooncake tier: a pool of memory that many nodes make up, for all servers that name the same master.

Whoever owns the engine calls the tier, and is told by a future; I/O threads hand the calls to the rank's client process
(`process.py`, `client.py`), which moves the bytes between the slab and the pool. A page is an object of the pool
(`hicache.values`), found by its name alone. The tier keeps no books: the pool's master knows what there is, and evicts
as it is configured to.

A pool that fails, hangs or refuses costs hits and nothing else: the tier says so once, answers that it has nothing, and
tries again from time to time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Final

from hicache.breaker import Breaker
from hicache.logs import get_logger
from hicache.mooncake.calls import Delete, Exists, Load, PoolCall, Shared, Store, Trial
from hicache.mooncake.messages import Geometry, Pool
from hicache.mooncake.process import ClientProcess, piece_pages
from hicache.tier import Batch, Capacity, Health, Tier, answered, pending
from hicache.workers import Workers

logger = get_logger(__name__)

N_CONNECTIONS: Final = 4
"""To the client process, each with a thread, half of which store at most: one call moves pages, and another is
verified, or waits for its turn."""

_HANGS_AFTER: Final = 2.0
"""Work that is under way for so many times what a node may take to answer hangs: nothing more is asked meanwhile."""


class MooncakeTier(Tier):
    """One rank's view of the pool. Making it starts the rank's client process, which joins the pool soon after.

    slab_fd: the memfd of the slab, of `geometry.n_slots` slots; it may be closed afterwards by whoever made it only
    when the tier is closed. max_queued_nbytes: of stores that have not ended. clock: monotonic seconds.

    Blocks for a second or two. Raises UnusableError if Mooncake's client cannot be used on this machine, and
    ProcessError if its process cannot be started.
    """

    def __init__(
        self,
        pool: Pool,
        geometry: Geometry,
        slab_fd: int,
        *,
        max_queued_nbytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start_process = partial(ClientProcess, pool, geometry, slab_fd, N_CONNECTIONS)
        process = self._start_process()
        self._shared = Shared(
            pool=pool,
            geometry=geometry,
            workers=Workers("mooncake", N_CONNECTIONS, clock),
            reads=Breaker(clock),
            writes=Breaker(clock),
            piece_pages=piece_pages(pool.timeout_s),
            process=process,
        )
        self._max_queued_nbytes = max_queued_nbytes
        self._told_clear = False
        self._try()

    @property
    def name(self) -> str:
        return "mooncake"

    # ---- pages ----

    def exists(self, keys: bytes) -> Future[int]:
        return self._start(lambda future: Exists(self._shared, keys, future))

    def load(self, batch: Batch) -> Future[int]:
        return self._start(lambda future: Load(self._shared, batch, future))

    def store(self, batch: Batch) -> Future[int]:
        if self._is_out():
            return answered(0)
        shared, page_nbytes = self._shared, self._shared.geometry.page_nbytes
        with shared.lock:
            n_pages = min(len(batch), max(0, self._max_queued_nbytes - shared.queued_nbytes) // page_nbytes)
            shared.queued_nbytes += n_pages * page_nbytes
            shared.counters.skipped_pressure += len(batch) - n_pages
        if not n_pages:
            return answered(0)
        future = pending()
        Store(shared, batch.part(0, n_pages), future).start()
        return future

    def touch(self, key: bytes) -> None:
        """Does nothing: the master renews a page's lease when it is looked up or loaded, and knows of no others."""

    def delete(self, keys: bytes) -> Future[int]:
        return self._start(lambda future: Delete(self._shared, keys, future))

    def clear(self) -> Future[int]:
        """Forgets nothing and answers 0: the pages are other servers' too."""
        if not self._told_clear:
            self._told_clear = True
            logger.warning(
                "sgl_lmcache: the pages in %s are shared, so clearing this server's cache leaves them there; another "
                "`namespace:` leaves them behind, and the master evicts them",
                self._shared.pool,
            )
        return answered(0)

    def _start(self, make: Callable[[Future[int]], PoolCall]) -> Future[int]:
        if self._is_out():
            return answered(0)
        future = pending()
        make(future).start()
        return future

    # ---- what it is like ----

    def expected_load_s(self, n_pages: int) -> float:
        return self._shared.workers.expected_read_s(n_pages * self._shared.geometry.page_nbytes)

    def capacity(self) -> Capacity:
        """Unknown: the pool is shared, and what this rank adds to it is not only for itself."""
        return Capacity(0, 0)

    def health(self) -> Health:
        shared = self._shared
        if shared.is_closed:
            return Health(False, "closed")
        self._try_if_due()
        if shared.reads.is_open:
            return Health(False, f"{shared.pool} {shared.reads.reason}")
        if not shared.is_joined:
            return Health(False, f"{shared.pool} has not been joined yet")
        if self._is_hung():
            return Health(False, f"{shared.pool} hangs")
        return Health(True, f"{shared.pool} {shared.writes.reason}" if shared.writes.is_open else "")

    def stats(self) -> Mapping[str, int]:
        """The fields of `Counters`, and what is true now.

        n_reads_queued, n_writes_queued: pieces of work that wait for a thread. queued_nbytes: of stores that have not
        ended. segment_nbytes: what this rank adds to the pool while it has joined it.
        """
        shared = self._shared
        n_reads, n_writes = shared.workers.n_queued
        with shared.lock:
            counts = asdict(shared.counters) | {"queued_nbytes": shared.queued_nbytes}
        return counts | {
            "crashes": shared.workers.n_crashes,
            "n_reads_queued": n_reads,
            "n_writes_queued": n_writes,
            "segment_nbytes": shared.pool.segment_nbytes if shared.is_joined else 0,
        }

    # ---- the end ----

    def close(self) -> None:
        """Withdraw what is queued, wait for what is under way as long as it may take, and leave the pool."""
        shared = self._shared
        if shared.is_closed:
            return
        shared.is_closed = True
        wait_s = 1.0 + _HANGS_AFTER * shared.pool.timeout_s
        is_quiet = shared.workers.stop(wait_s)
        if not is_quiet and shared.process is not None:
            shared.process.kill()
            is_quiet = shared.workers.stop(wait_s)
        if not is_quiet:
            logger.error("sgl_lmcache: %s: its client process is still being started, and is left", shared.pool)
        elif shared.process is not None:
            shared.process.leave()

    # ---- failures ----

    def _is_out(self) -> bool:
        """Whether nobody can be asked. Has the pool tried if the time has come."""
        if self._shared.is_closed:
            return True
        self._try_if_due()
        return self._shared.reads.is_open or not self._shared.is_joined or self._is_hung()

    def _is_hung(self) -> bool:
        return self._shared.workers.oldest_s() > _HANGS_AFTER * self._shared.pool.timeout_s

    def _try_if_due(self) -> None:
        """Also if the process has ended just when it had joined, which has closed the breaker."""
        reads = self._shared.reads
        if (reads.is_due if reads.is_open else not self._shared.is_joined) and not self._shared.is_on_trial:
            self._try()

    def _try(self) -> None:
        self._shared.is_on_trial = True
        self._shared.workers.submit([Trial(self._shared, self._start_process)])
