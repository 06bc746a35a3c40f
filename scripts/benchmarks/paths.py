"""What the benchmarks of tiers share: paths of random pages, a store on disk to open, and how the engine uses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hicache.ssd import SsdTier, limit_for
from hicache.tier import Batch
from radix import KEY_NBYTES
from transfer.slab import Slab

BATCH_NBYTES = 32 << 20
SWITCH_INTERVAL_S = 2e-4
"""As sgl_lmcache/factory.py has them."""

NAMESPACE = "0123456789abcdef0123456789abcdef"
BLOCK_NBYTES = 4096


def open_tier(folder: Path, slab: Slab, page_nbytes: int, n_slots: int) -> SsdTier:
    """A store in `folder` that may have `n_slots`, and takes any number of them in one go."""
    return SsdTier.open(
        folder,
        namespace=NAMESPACE,
        member=(0, 1),
        page_nbytes=page_nbytes,
        slab=slab.array,
        limit_nbytes=limit_for(n_slots, 1, slab.slot_nbytes),
        server="benchmark",
        max_queued_nbytes=2 * n_slots * slab.slot_nbytes,
    )


def random_slab(n_slots: int, page_nbytes: int) -> Slab:
    slab = Slab(n_slots, -(-page_nbytes // BLOCK_NBYTES) * BLOCK_NBYTES)
    random = np.random.default_rng(0)
    for slot in slab.array:
        slot[:] = np.frombuffer(random.bytes(slab.slot_nbytes), np.uint8)
    return slab


def path_keys(number: int, n_pages: int) -> bytes:
    """The keys of a path of random pages: the same for the same number."""
    return np.random.default_rng([1, number]).bytes(KEY_NBYTES * n_pages)


def path(number: int, slots: np.ndarray) -> Batch:
    """A path from the root, one page for each of these slots of the slab."""
    return Batch.below(None, path_keys(number, len(slots)), slots.astype(np.int32), 0)
