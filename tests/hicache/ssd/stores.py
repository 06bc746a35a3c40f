"""What the tests of the SSD tier share: an aligned slab, a tier to open, batches, and waiting for other threads."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hicache import Batch
from hicache.ssd import SsdTier, limit_for
from tests.hicache.tier_contract import chain

NAMESPACE = "0123456789abcdef0123456789abcdef"
PAGE_NBYTES = 4000
SLOT_NBYTES = 4096
N_SLAB_SLOTS = 256

Slab = npt.NDArray[np.uint8]


def make_slab(n_slots: int = N_SLAB_SLOTS, slot_nbytes: int = SLOT_NBYTES, seed: int = 7) -> Slab:
    """Aligned, as direct I/O wants it, and full of random bytes."""
    memory = mmap.mmap(-1, n_slots * slot_nbytes)
    slab = np.frombuffer(memory, np.uint8).reshape(n_slots, slot_nbytes)
    slab[:] = np.random.default_rng(seed).integers(0, 256, slab.shape, dtype=np.uint8)
    return slab


def open_tier(path: Path, slab: Slab, *, n_slots: int = 64, n_members: int = 1, **options: object) -> SsdTier:
    arguments: dict[str, object] = {
        "namespace": NAMESPACE,
        "member": (0, n_members),
        "page_nbytes": PAGE_NBYTES,
        "slab": slab,
        "limit_nbytes": limit_for(n_slots, n_members, SLOT_NBYTES),
        "server": "server a",
    }
    return SsdTier.open(path, **(arguments | options))  # type: ignore[arg-type]


def pages(n_pages: int, seed: str, first_slot: int = 0) -> Batch:
    """A path of n pages, from the root, in neighbouring slots of the slab."""
    keys, parents = chain(n_pages, seed)
    return Batch(keys, parents, "", np.arange(first_slot, first_slot + n_pages, dtype=np.int32), depth=0)


def part(batch: Batch, first: int, end: int, first_slot: int | None = None) -> Batch:
    """Pages first .. end of a batch."""
    slots = batch.slots[first:end]
    if first_slot is not None:
        slots = np.arange(first_slot, first_slot + end - first, dtype=np.int32)
    span = slice(32 * first, 32 * end)
    return Batch(batch.keys[span], batch.parents[span], "", slots, depth=batch.depth + first)


def settle(tier: SsdTier) -> None:
    """All that was asked before is in the map, and the keeper has gone its round."""
    tier.flush().result(timeout=30)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Look again and again. For what only another thread can bring about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        threading.Event().wait(0.002)
