"""What the tests of the Mooncake tier share: a tier over a slab of random pages, and what a page is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.mooncake import Geometry, MooncakeTier, Pool
from hicache.values import names
from tests.hicache.tier_contract import N_SLOTS, PAGE_NBYTES
from tests.support.processes import wait_for
from transfer.slab import Slab

NAMESPACE = "0123456789abcdef" * 2
JOIN_TIMEOUT_S = 60.0
Pages = npt.NDArray[np.uint8]


@dataclass
class Rig:
    """A tier and its slab."""

    tier: MooncakeTier
    slab: Pages
    memory: Slab


def random_slab(n_slots: int = N_SLOTS, slot_nbytes: int = PAGE_NBYTES) -> Slab:
    memory = Slab(n_slots, slot_nbytes)
    memory.array[:] = np.random.default_rng(7).integers(0, 256, memory.array.shape, dtype=np.uint8)
    return memory


def open_tier(pool: Pool, memory: Slab, *, namespace: str = NAMESPACE, **options: Any) -> MooncakeTier:
    geometry = Geometry(memory.n_slots, memory.slot_nbytes, memory.slot_nbytes, namespace)
    return MooncakeTier(pool, geometry, memory.fd, **options)


def join(tier: MooncakeTier) -> MooncakeTier:
    """Wait until it has joined the pool."""
    wait_for("the pool is joined", lambda: tier.health().available or None, JOIN_TIMEOUT_S)
    return tier


@contextmanager
def rig(pool: Pool, memory: Slab | None = None, *, joined: bool = True, **options: Any) -> Iterator[Rig]:
    memory = memory or random_slab()
    tier = open_tier(pool, memory, **options)
    try:
        yield Rig(join(tier) if joined else tier, memory.array, memory)
    finally:
        tier.close()
        memory.close()


def page_names(keys: bytes) -> list[str]:
    return names(NAMESPACE, keys)
