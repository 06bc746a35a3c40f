"""What dies in the crash tests: a process that stores, loads and evicts without end, and tells what it has done.

Run as a program it is a nursery: for each line `<directory> <seed>` on its standard input it forks a child that works
there, says `born <pid>`, and, when the child has died, `dead`. A child says, one line each:

    wrote <slot> ...                      these file slots have been written, and nobody knows it yet
    begin <deleted slots>|<slot>:<key> ...    a transaction of the map is about to begin
    end                                   it is committed
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from hicache import Batch
from hicache.ssd import SsdTier, keeper, limit_for, opening
from hicache.ssd.map import Int64Array, Map, PageRows
from radix import KEY_NBYTES
from tests.hicache.ssd.stores import SLOT_NBYTES, Slab, make_slab, open_tier, part
from tests.hicache.tier_contract import chain
from tests.support.tiers import split
from transfer.files import System

N_SLOTS = 48
N_PATHS = 10
PATH_PAGES = 8
QUOTAS = {"tenant 0": 12, "tenant 1": 16}
"""Pages of a store of `N_SLOTS`. A third tenant has none."""


def path_batch(number: int, first_slot: int) -> Batch:
    """A path; each has a trunk in common with its neighbour."""
    trunk, trunk_parents = chain(PATH_PAGES // 2, f"trunk {number // 2}")
    keys, parents = chain_below(trunk, PATH_PAGES // 2, f"path {number}")
    slots = np.arange(first_slot, first_slot + PATH_PAGES, dtype=np.int32)
    return Batch(trunk + keys, trunk_parents + parents, tenant_of(number), slots, depth=0)


def tenant_of(number: int) -> str:
    """Whose a path is."""
    return f"tenant {number // 2 % 3}"


def open_store(path: Path, slab: Slab, *, server: str, system: System | None = None) -> SsdTier:
    """With `QUOTAS`."""
    limit_nbytes = limit_for(N_SLOTS, 1, SLOT_NBYTES)
    quotas = {tenant: -(-n_pages * limit_nbytes // N_SLOTS) for tenant, n_pages in QUOTAS.items()}
    return open_tier(path, slab, n_slots=N_SLOTS, quotas=quotas, server=server, system=system)


def chain_below(trunk: bytes, n_pages: int, seed: str) -> tuple[bytes, bytes]:
    keys = split(chain(n_pages, seed)[0])
    return b"".join(keys), b"".join([trunk[-KEY_NBYTES:], *keys[:-1]])


def content(key: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a page are made from its key."""
    return np.frombuffer(key * (SLOT_NBYTES // KEY_NBYTES), np.uint8)


def tell(*words: object) -> None:
    """In one write, so that no line is cut."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class TellingSystem(System):
    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nbytes = super().pwritev(fd, buffers, offset)
        segment = int(os.readlink(f"/proc/self/fd/{fd}").rpartition(".")[2])
        segment_slots = os.fstat(fd).st_size // SLOT_NBYTES
        first = segment * segment_slots + offset // SLOT_NBYTES
        tell("wrote", *range(first, first + nbytes // SLOT_NBYTES))
        return nbytes


class TellingMap(Map):
    def apply(self, deleted: Int64Array, saved: PageRows, touched: tuple[Int64Array, Int64Array], clock: int) -> None:
        pairs = (f"{slot}:{key.hex()}" for slot, key in zip(saved.slots.tolist(), split(saved.keys), strict=True))
        tell("begin", " ".join(map(str, deleted.tolist())) + "|" + " ".join(pairs))
        super().apply(deleted, saved, touched, clock)
        tell("end")


def work(path: Path, seed: int) -> None:
    """Until killed."""
    rng = random.Random(seed)
    slab = make_slab()
    with patch.object(keeper, "ROUND_S", 0.01), patch.object(opening, "Map", TellingMap):
        tier = open_store(path, slab, system=TellingSystem(), server=f"server {os.getpid()}")
        while True:
            step(tier, slab, rng)


def step(tier: SsdTier, slab: Slab, rng: random.Random) -> None:
    """Some stores at once, each of one path, and a load or a deletion."""
    futures = []
    for at in range(rng.randint(1, 3)):
        batch = path_batch(rng.randrange(N_PATHS), first_slot=16 * at)
        for slot, key in zip(batch.slots, split(batch.keys), strict=True):
            slab[slot] = content(key)
        futures.append(tier.store(batch))
        if rng.random() < 0.3:
            futures.append(tier.store(part(batch, 0, rng.randint(1, PATH_PAGES))))
    for future in futures:
        future.result()
    wanted = path_batch(rng.randrange(N_PATHS), first_slot=100)
    if rng.random() < 0.2:
        tier.delete(wanted.keys[-KEY_NBYTES * rng.randint(1, 4) :]).result()
    else:
        n_loaded = tier.load(wanted).result()
        assert all((slab[100 + i] == content(key)).all() for i, key in enumerate(split(wanted.keys)[:n_loaded]))


def nursery() -> None:
    for line in sys.stdin:
        path, seed = line.split()
        pid = os.fork()
        if not pid:
            work(Path(path), int(seed))
        tell("born", pid)
        os.waitpid(pid, 0)
        tell("dead")


if __name__ == "__main__":
    nursery()
