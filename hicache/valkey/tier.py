"""The Valkey tier: a store that many servers share, so that what one has computed the others load.

Whoever owns the engine calls the tier, and is told by a future; I/O threads talk to the store, each on a connection of
its own (`calls.py`). A page is a key (`values.py`), with a time to live that begins anew whenever the page is stored or
loaded. The tier keeps no books: the store alone knows what it has, and evicts as it is configured to.

A store that fails, hangs or refuses costs hits and nothing else: the tier says so once, answers that it has nothing,
and tries again from time to time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.checksum import namespace_seed
from hicache.logs import get_logger
from hicache.tier import Batch, Capacity, Health, Tier, answered, pending
from hicache.valkey.calls import Delete, Exists, Load, NodeCall, Shared, Store
from hicache.valkey.nodes import Endpoint, Node, Nodes, describe
from hicache.valkey.rights import RefusedError, check_rights
from hicache.workers import Work, Workers
from radix import KEY_NBYTES

logger = get_logger(__name__)

_HANGS_AFTER: Final = 3.0
"""Work that is under way for so many times what it may take hangs: in the resolver of names, say."""


class ValkeyTier(Tier):
    """One rank's view of the store. Making it does not connect; what is wrong with the store is told soon after.

    namespace: hex digits; other bytes behind equal keys have another.
    page_nbytes, slab: uint8[n_slots, slot_nbytes]; a page is the first `page_nbytes` of a slot.
    ttl_s: how long the store keeps a page that nobody stores or loads again, in whole seconds.
    n_connections: so many threads, each with one connection to a node at a time; half of them store at most.
    max_queued_nbytes: of stores that have not ended. clock: monotonic seconds.

    Raises `ClientMissingError` if the client library is not installed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        namespace: str,
        page_nbytes: int,
        slab: NDArray[np.uint8],
        ttl_s: int,
        n_connections: int = 4,
        max_queued_nbytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        nodes = Nodes(endpoint, clock)
        self._shared = Shared(
            nodes=nodes,
            workers=Workers("valkey", n_connections, clock),
            namespace=namespace,
            seed=namespace_seed(namespace),
            memory=slab.reshape(-1).data,
            slot_nbytes=slab.shape[1],
            page_nbytes=page_nbytes,
            ttl_s=ttl_s,
        )
        self._max_queued_nbytes = max_queued_nbytes
        self._call_s = endpoint.connect_timeout_s + endpoint.timeout_s
        self._closed = False
        self._told_clear = False
        self._try(nodes.home)

    @property
    def name(self) -> str:
        return "valkey"

    # ---- pages ----

    def exists(self, keys: bytes) -> Future[int]:
        if self._is_out():
            return answered(0)
        return self._start(lambda future: Exists(self._shared, keys, len(keys) // KEY_NBYTES, future))

    def load(self, batch: Batch) -> Future[int]:
        if self._is_out():
            return answered(0)
        return self._start(lambda future: Load(self._shared, batch, future))

    def store(self, batch: Batch) -> Future[int]:
        if self._is_out():
            return answered(0)
        shared = self._shared
        with shared.lock:
            room = max(0, self._max_queued_nbytes - shared.queued_nbytes) // shared.page_nbytes
            n_pages = min(len(batch), room)
            shared.queued_nbytes += n_pages * shared.page_nbytes
            shared.counters.skipped_pressure += len(batch) - n_pages
        if not n_pages:
            return answered(0)
        return self._start(lambda future: Store(shared, batch.part(0, n_pages), future))

    def touch(self, key: bytes) -> None:
        """Does nothing: the store renews a page's time when it is loaded, and knows of no others above it."""

    def delete(self, keys: bytes) -> Future[int]:
        if self._is_out():
            return answered(0)
        return self._start(lambda future: Delete(self._shared, keys, len(keys) // KEY_NBYTES, future))

    def clear(self) -> Future[int]:
        """Forgets nothing and answers 0: the pages are other servers' too, and to find them all would take a scan."""
        if not self._told_clear:
            self._told_clear = True
            logger.warning(
                "sgl_lmcache: the pages in %s are shared, so clearing this server's cache leaves them there; another "
                "`namespace:` leaves them behind, and they expire by their ttl",
                self._shared.nodes.endpoint,
            )
        return answered(0)

    def _start(self, make: Callable[[Future[int]], NodeCall]) -> Future[int]:
        future = pending()
        make(future).start()
        return future

    # ---- what it is like ----

    def expected_load_s(self, n_pages: int) -> float:
        return self._shared.workers.expected_read_s(n_pages * self._shared.page_nbytes)

    def capacity(self) -> Capacity:
        """Unknown: the store is shared, and has a limit of its own."""
        return Capacity(0, 0)

    def health(self) -> Health:
        if self._closed:
            return Health(False, "closed")
        if self._is_hung():
            return Health(False, f"{self._shared.nodes.endpoint} hangs")
        nodes = self._shared.nodes.all()
        self._try_due(nodes)
        reasons = [node.reads.reason for node in nodes if node.reads.is_open]
        if len(reasons) == len(nodes):
            return Health(False, reasons[0])
        if self._lacks_map():
            return Health(False, self._shared.nodes.map.reason)
        return Health(True, next(iter([*reasons, *(node.writes.reason for node in nodes if node.writes.is_open)]), ""))

    def stats(self) -> Mapping[str, int]:
        """The fields of `Counters`, and what is true now.

        n_reads_queued, n_writes_queued: pieces of work that wait for a connection. queued_nbytes: of stores that have
        not ended. n_nodes: that are known. n_nodes_out: of those that nobody asks now.
        """
        shared = self._shared
        n_reads, n_writes = shared.workers.n_queued
        nodes = shared.nodes.all()
        with shared.lock:
            counts = asdict(shared.counters) | {"queued_nbytes": shared.queued_nbytes}
        return counts | {
            "crashes": shared.workers.n_crashes,
            "n_reads_queued": n_reads,
            "n_writes_queued": n_writes,
            "n_nodes": len(nodes),
            "n_nodes_out": sum(node.reads.is_open for node in nodes),
        }

    # ---- the end ----

    def close(self) -> None:
        """Withdraw what is queued, wait for what is under way as long as a call may take, then end it."""
        if self._closed:
            return
        self._closed = True
        is_quiet = self._shared.workers.stop(self._call_s)
        if not is_quiet:
            self._shared.nodes.interrupt()
            is_quiet = self._shared.workers.stop(self._call_s)
        if not is_quiet:
            logger.error("sgl_lmcache: %s does not answer: its connections are left", self._shared.nodes.endpoint)
        self._shared.nodes.close()

    # ---- failures ----

    def _is_out(self) -> bool:
        """Whether nobody can be asked. Has those tried whose time has come."""
        if self._closed or self._is_hung():
            return True
        nodes = self._shared.nodes.all()
        self._try_due(nodes)
        return all(node.reads.is_open for node in nodes) or self._lacks_map()

    def _lacks_map(self) -> bool:
        """Whether a cluster has not told where its slots are, and is not to be asked yet."""
        nodes = self._shared.nodes
        return nodes.is_unknown and nodes.map.is_open and not nodes.map.is_due

    def _is_hung(self) -> bool:
        return self._shared.workers.oldest_s() > _HANGS_AFTER * self._call_s

    def _try_due(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node.reads.is_due and not node.is_on_trial:
                self._try(node)

    def _try(self, node: Node) -> None:
        node.is_on_trial = True
        self._shared.workers.submit([_Trial(self._shared, node)])


class _Trial(Work):
    """Whether a node serves: at the start, and after it has failed."""

    is_read = True
    is_urgent = True
    nbytes = 0

    def __init__(self, shared: Shared, node: Node) -> None:
        self._shared = shared
        self._node = node

    def run(self) -> None:
        check_rights(self._shared.nodes, self._node, self._shared.namespace)

    def finish(self) -> None:
        node = self._node
        if isinstance(self.error, RefusedError) and self.error.is_of_writing:
            self._close(node)
            node.failed(node.writes, str(self.error))
        elif self.error is not None:
            node.disconnect()
            node.failed(node.reads, describe(self.error))
        elif not self.withdrawn:
            self._close(node)
            node.served()
        node.is_on_trial = False

    def _close(self, node: Node) -> None:
        if node.reads.is_open:
            self._shared.nodes.mark_stale()
            node.reads.close()
