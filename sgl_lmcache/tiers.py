"""The tiers below host memory that the configuration names, opened for one rank and one namespace.

A tier holds the pages of one namespace. New weights start another, so a server may open a tier more than once: at its
start, where whatever is wrong stops it, and later (`late_tier`), where it must not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hicache import Tier
from hicache.ssd import SsdTier, StoreError
from sgl_lmcache.config import Config
from sgl_lmcache.config import SsdTier as SsdConfig
from sgl_lmcache.errors import RefusedError, StartError
from sgl_lmcache.late_tier import LateTier
from sgl_lmcache.namespace import Namespace

OpenTier = Callable[[Namespace], Tier]
"""Opens a tier for a namespace. Blocks; raises `StartError`."""

NextTier = Callable[[Namespace, Tier], Tier]
"""What goes on for a new namespace in the place of a tier, which it closes. Neither blocks nor raises."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place on its node. `slab`: uint8[n_slots, slot_nbytes]; a page is the head of a slot."""

    rank: int
    n_ranks: int
    """Of the server on this node, data-parallel replicas included."""
    slab: NDArray[np.uint8]
    page_nbytes: int


def tier_opener(config: Config, place: Place) -> OpenTier | None:
    """What opens the tier below host memory for a namespace, raising `StartError`. None: none is configured."""
    ssd = config.ssd
    if ssd is None:
        return None
    return lambda namespace: _open_ssd(config, ssd, place, namespace)


def _open_ssd(config: Config, ssd: SsdConfig, place: Place, namespace: Namespace) -> Tier:
    if not namespace.is_persistent:
        raise RefusedError(
            "the weights have no identity (--load-format, or a --model-path that is not on this machine), so what an "
            "ssd tier kept of them could be taken for another model's; load the weights from files, or remove the ssd "
            "tier"
        )
    try:
        return SsdTier.open(
            Path(ssd.path),
            namespace=namespace.digest,
            member=(place.rank, place.n_ranks),
            page_nbytes=place.page_nbytes,
            slab=place.slab,
            limit_nbytes=ssd.capacity,
            server=_server_token(),
            eviction=config.eviction_of(ssd),
        )
    except StoreError as error:
        raise StartError(f"sgl_lmcache: {error}.") from error


def next_tier(open_tier: OpenTier, namespace: Namespace, before: Tier) -> Tier:
    """A `NextTier`, but for its first argument."""
    return LateTier(before.name, lambda: open_tier(namespace), before)


def _server_token() -> str:
    """The same for all ranks of one server on this node: SGLang starts them from one process."""
    parent = os.getppid()
    try:
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(parent)
    started_at = fields[19]  # proc(5): the 22nd field, in clock ticks since boot
    return f"{parent}-{started_at}"
