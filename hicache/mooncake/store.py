"""Pages in a Mooncake Store: what the client process does for its rank, call by call.

Bytes go straight between slab slots and the pool: the slab is registered once, and a page is one object of two buffers,
a header (`hicache.values`) in memory of this process and the payload in its slot. Every page that is loaded is verified
here, and one that is damaged is removed.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hicache.calls import ABSENT, CORRUPT, FAILED, FULL, GOOD, NEW, OTHER_VERSION, UNASKED
from hicache.checksum import checksum, namespace_seed, seeds
from hicache.mooncake.codes import (
    GONE,
    NO_AVAILABLE_HANDLE,
    OBJECT_ALREADY_EXISTS,
    OF_THE_MASTER,
    describe,
)
from hicache.mooncake.messages import Delete, Exists, Geometry, Load, Pool, Reply, Store
from hicache.mooncake.owners import Owners
from hicache.values import HEADER_NBYTES, checksum_in, header, is_other_version, names

LOCAL_BUFFER_NBYTES: Final = 16 << 20
"""Mooncake's own, for calls that we do not make; less is refused."""

NOBODY: Final = f"sgl-lmcache:{'0' * 64}"
"""No object has this name: asking for it shows whether the master answers."""


class MasterError(Exception):
    """The pool as a whole does not answer: the sentence says how."""


class PageStore:
    """The pool, once `connect` has gone well; no other method may be called before. Any thread may call the others.

    slab: all bytes of it, `geometry.n_slots * slot_nbytes`.
    """

    def __init__(self, pool: Pool, geometry: Geometry, slab: mmap.mmap) -> None:
        self._pool = pool
        self._geometry = geometry
        self._seed = namespace_seed(geometry.namespace)
        self._slab = memoryview(slab)
        self._slab_address = _address(slab)
        self._headers = mmap.mmap(-1, geometry.n_slots * HEADER_NBYTES)
        self._headers_address = _address(self._headers)
        self._loading = threading.Lock()
        self._storing = threading.Lock()
        """One transfer of a kind at a time: Mooncake spins while it waits for one, and the cores are not all ours.
        Meanwhile another thread verifies what has come before, or takes the checksums of what goes next."""
        self._n_slow_failures = 0
        """Puts that met a silent node."""
        self._client: Any = None
        self._owners = Owners(time.monotonic, pool.timeout_s)

    # ---- joining and leaving ----

    def connect(self) -> None:
        """Blocks, and keeps this process's other threads, for some seconds if the master cannot be reached.

        Raises MasterError.
        """
        if self._client is None:
            self._client = self._join()
        self._check(self._client.batch_is_exist([NOBODY]))

    def _join(self) -> Any:
        from mooncake.store import MooncakeDistributedStore

        pool, client = self._pool, MooncakeDistributedStore()
        address = pool.address or _address_towards(pool.master)
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", address)  # or it would tell the others the first that it has
        code = client.setup(
            address,
            pool.metadata,
            pool.segment_nbytes,
            LOCAL_BUFFER_NBYTES,
            pool.protocol,
            pool.devices,
            pool.master,
        )
        if code:
            client.close()
            raise MasterError(
                f"cannot be joined as {address} (error {code}): the master or the metadata does not answer, or "
                f"the {pool.protocol} transport cannot be used"
            )
        for memory, start in ((self._slab, self._slab_address), (self._headers, self._headers_address)):
            code = client.register_buffer(start, len(memory))
            if code:
                client.close()
                raise MasterError(f"cannot register host memory with the {pool.protocol} transport (error {code})")
        return client

    def close(self) -> None:
        """Take the segment out of the pool. Blocks for some seconds."""
        if self._client is not None:
            self._client.close()

    # ---- pages ----

    def exists(self, call: Exists) -> Reply:
        """A page on a node that is not asked now is as good as absent."""
        found_names = names(self._geometry.namespace, call.keys)
        if self._owners.all_serve:
            codes = np.array(self._client.batch_is_exist(found_names), np.int32)
            self._check(codes[codes < 0])
            return _reply(np.where(codes == 1, GOOD, ABSENT))
        copies = self._copies_of(found_names)
        may_ask = (copy is not None and self._owners.may_ask(copy.transport_endpoint) for copy in copies)
        return _reply([GOOD if may else ABSENT for may in may_ask])

    def load(self, call: Load) -> Reply:
        slots = np.frombuffer(call.slots, np.int32)
        all_names = names(self._geometry.namespace, call.keys)
        copies = self._copies_of(all_names)
        with self._loading:
            found, news = self._receive(all_names, slots, copies)
        came = np.flatnonzero(found == UNASKED).tolist()
        page_seeds = seeds(call.keys, self._seed)
        found[came] = [self._verify(int(slots[at]), int(page_seeds[at])) for at in came]
        damaged = [all_names[at] for at in np.flatnonzero(found == CORRUPT).tolist()]
        if damaged:
            self._client.batch_remove(damaged, True)
        return _reply(found, news)

    def _receive(
        self, all_names: Sequence[str], slots: NDArray[np.int32], copies: Sequence[Any]
    ) -> tuple[NDArray[np.int8], list[str]]:
        """What has become of each page, UNASKED for one that has come and is to be verified; and what is news."""
        owners = ["" if copy is None else copy.transport_endpoint for copy in copies]
        candidates = {owner for owner in owners if owner and self._owners.may_ask(owner)}
        unreachable = self._owners.unreachable(candidates)
        found = np.full(len(slots), ABSENT, np.int8)
        for at, copy in enumerate(copies):
            if copy is not None and owners[at] in candidates - unreachable:
                found[at] = UNASKED if copy.size == HEADER_NBYTES + self._geometry.page_nbytes else CORRUPT
        asked = np.flatnonzero(found == UNASKED).tolist()
        began_s = time.monotonic()
        failed = self._get(all_names, slots, asked, found)
        if failed and time.monotonic() - began_s < self._pool.timeout_s / 2:
            # Nobody was silent. A connection that was reset is made anew, and then it goes on.
            failed = self._get(all_names, slots, failed, found)
        news = self._failed(unreachable | {owners[at] for at in failed})
        return found, news + self._served({owners[at] for at in asked if found[at] == UNASKED})

    def _get(
        self, all_names: Sequence[str], slots: NDArray[np.int32], asked: Sequence[int], found: NDArray[np.int8]
    ) -> list[int]:
        """Returns which of them did not come though they are there."""
        if not asked:
            return []
        buffers = self._buffers(slots[asked].tolist())
        codes = self._client.batch_get_into_multi_buffers([all_names[at] for at in asked], *buffers)
        self._check(codes)
        found[asked] = [UNASKED if code > 0 else ABSENT if code in GONE else FAILED for code in codes]
        return [at for at in asked if found[at] == FAILED]

    def _verify(self, slot: int, seed: int) -> int:
        at = slot * HEADER_NBYTES
        page_header = self._headers[at : at + HEADER_NBYTES]
        expected = checksum_in(page_header, self._geometry.page_nbytes)
        if expected is not None and expected == checksum(self._payload(slot), seed):
            return GOOD
        return OTHER_VERSION if is_other_version(page_header) else CORRUPT

    def _failed(self, owners: set[str]) -> list[str]:
        return [
            f"node {owner} of the pool does not answer: its pages are misses for a while"
            for owner in self._owners.failed(owners)
        ]

    def _served(self, owners: set[str]) -> list[str]:
        return [f"node {owner} of the pool is used again" for owner in self._owners.served(owners)]

    def store(self, call: Store) -> Reply:
        """What is there stays as it is. An object is seen by others when all of it is in the pool."""
        slots = np.frombuffer(call.slots, np.int32)
        all_names = names(self._geometry.namespace, call.keys)
        known = np.array(self._client.batch_is_exist(all_names), np.int32)
        self._check(known[known < 0])
        found = np.where(known == 1, GOOD, UNASKED).astype(np.int8)
        absent = np.flatnonzero(known != 1).tolist()
        if absent:
            absent_slots = slots[absent].tolist()
            for slot, seed in zip(absent_slots, seeds(call.keys, self._seed)[absent].tolist(), strict=True):
                at, payload = slot * HEADER_NBYTES, self._payload(slot)
                self._headers[at : at + HEADER_NBYTES] = header(len(payload), checksum(payload, seed))
            found[absent] = self._put([all_names[at] for at in absent], absent_slots)
        return _reply(found)

    def _put(self, absent_names: Sequence[str], slots: Sequence[int]) -> list[int]:
        """What has become of each. Nobody waits for a silent node who has waited for it before."""
        n_slow_failures = self._n_slow_failures
        with self._storing:
            if self._n_slow_failures != n_slow_failures:
                return [FAILED] * len(slots)
            began_s = time.monotonic()
            codes = self._client.batch_put_from_multi_buffers(absent_names, *self._buffers(slots), self._placement())
            self._check(codes)
            found = [_STORED.get(code, FAILED) for code in codes]
            if FAILED in found and time.monotonic() - began_s > self._pool.timeout_s / 2:
                self._n_slow_failures += 1
        return found

    def _placement(self) -> Any:
        """On this node, if it has a segment with room: who has computed a page is the likeliest to want it again."""
        from mooncake.store import ReplicateConfig, SoftPinAction

        placement = ReplicateConfig()
        placement.replica_num = self._pool.replicas
        if self._pool.segment_nbytes:
            placement.preferred_segments = [self._client.get_hostname()]
        if self._pool.soft_pin_s is not None:
            placement.soft_pin_action = SoftPinAction.ENABLE
            placement.soft_pin_ttl_ms = round(self._pool.soft_pin_s * 1000)
        return placement

    def delete(self, call: Delete) -> Reply:
        codes = np.array(self._client.batch_remove(names(self._geometry.namespace, call.keys), True), np.int32)
        self._check(codes)
        return _reply(np.where(codes == 0, GOOD, ABSENT))

    # ---- what they share ----

    def _buffers(self, slots: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Addresses and sizes of the two buffers of each page."""
        slot_nbytes, page_nbytes = self._geometry.slot_nbytes, self._geometry.page_nbytes
        addresses = [
            [self._headers_address + slot * HEADER_NBYTES, self._slab_address + slot * slot_nbytes] for slot in slots
        ]
        return addresses, [[HEADER_NBYTES, page_nbytes]] * len(slots)

    def _payload(self, slot: int) -> memoryview:
        start = slot * self._geometry.slot_nbytes
        return self._slab[start : start + self._geometry.page_nbytes]

    def _copies_of(self, page_names: Sequence[str]) -> list[Any]:
        """Where each page would be read from; None: it is nowhere. Raises MasterError."""
        replicas = self._client.batch_get_replica_desc(page_names)
        if not replicas:  # also if the master does not answer
            self._check(self._client.batch_is_exist([NOBODY]))
        return [_first_complete(replicas.get(name, ())) for name in page_names]

    def _check(self, codes: Sequence[int] | NDArray[np.int32]) -> None:
        """Raises MasterError if one of them says that the master did not answer."""
        for code in codes:
            if code in OF_THE_MASTER or code == -1:
                raise MasterError(f"has a master that {describe(int(code))}")


_STORED: Final = {0: NEW, OBJECT_ALREADY_EXISTS: GOOD, NO_AVAILABLE_HANDLE: FULL}


def _first_complete(replicas: Sequence[Any]) -> Any:
    """The copy that Mooncake would read (`size`, `transport_endpoint`), or None."""
    from mooncake.store import ReplicaStatus

    for replica in replicas:
        if replica.status == ReplicaStatus.COMPLETE and replica.is_memory_replica():
            return replica.get_memory_descriptor().buffer_descriptor
    return None


def _reply(found: Sequence[int] | NDArray[Any], news: Sequence[str] = ()) -> Reply:
    return Reply(np.asarray(found, np.int8).tobytes(), news=tuple(news))


def _address_towards(master: str) -> str:
    """This node's address on the way to the master. Raises MasterError."""
    host, _, port = master.removeprefix("etcd://").partition(";")[0].rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise MasterError(f"cannot be joined: there is no way to {host} ({error.strerror})") from error
    if address.startswith("127.") and not host.startswith("127.") and host != "localhost":
        raise MasterError(
            f"cannot be joined: {host} is this machine's own name and leads to {address} here, where no other node "
            "reaches it; give the tier an address"
        )
    return address


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
