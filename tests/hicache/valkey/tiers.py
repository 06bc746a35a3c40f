"""What the tests of the Valkey tier share: a tier over a slab of random pages, and what a page is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.valkey import Endpoint, ValkeyTier
from hicache.values import names
from tests.hicache.tier_contract import N_SLOTS, PAGE_NBYTES

NAMESPACE = "0123456789abcdef" * 2
Slab = npt.NDArray[np.uint8]


@dataclass
class Rig:
    """A tier and its slab."""

    tier: ValkeyTier
    slab: Slab


def random_slab(n_slots: int = N_SLOTS, slot_nbytes: int = PAGE_NBYTES) -> Slab:
    return np.random.default_rng(7).integers(0, 256, (n_slots, slot_nbytes), dtype=np.uint8)


def open_tier(endpoint: Endpoint, slab: Slab, **options: Any) -> ValkeyTier:
    settings: dict[str, Any] = {"namespace": NAMESPACE, "page_nbytes": slab.shape[1], "ttl_s": 600}
    return ValkeyTier(endpoint, slab=slab, **(settings | options))


@contextmanager
def rig(endpoint: Endpoint, slab: Slab | None = None, **options: Any) -> Iterator[Rig]:
    slab = random_slab() if slab is None else slab
    tier = open_tier(endpoint, slab, **options)
    try:
        yield Rig(tier, slab)
    finally:
        tier.close()


def page_names(keys: bytes) -> list[bytes]:
    return [name.encode() for name in names(NAMESPACE, keys)]
