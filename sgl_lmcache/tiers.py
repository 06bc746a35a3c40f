"""The tiers below host memory that the configuration names, opened for one rank and one namespace.

A tier holds the pages of one namespace. New weights start another, so a server may open a tier more than once: at its
start, where whatever is wrong stops it, and later (`late_tier`), where it must not.

To add a kind of tier: a struct in `config`, and here a function that opens it, with its case in `_open`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hicache import Tier
from hicache.mooncake import Geometry, MooncakeTier, ProcessError, UnusableError
from hicache.ssd import SsdTier, StoreError
from hicache.valkey import CertificateError, ClientMissingError, ValkeyTier
from sgl_lmcache.config import Config, LowerTier
from sgl_lmcache.config import MooncakeTier as MooncakeConfig
from sgl_lmcache.config import SsdTier as SsdConfig
from sgl_lmcache.config import ValkeyTier as ValkeyConfig
from sgl_lmcache.errors import RefusedError, StartError
from sgl_lmcache.late_tier import LateTier
from sgl_lmcache.mooncake import explain_unusable, pool_of
from sgl_lmcache.namespace import Namespace
from sgl_lmcache.valkey import endpoint_of, warn_of_plain_text

NextTiers = Callable[[Namespace, Sequence[Tier]], Sequence[Tier]]
"""What goes on for a new namespace in the place of tiers, each of which it closes. Neither blocks nor raises."""


@dataclass(frozen=True, slots=True)
class TierOpener:
    """One lower tier of the configuration. write: the name of its write policy."""

    write: str
    open: Callable[[Namespace], Tier]
    """Opens it for a namespace. Blocks; raises `StartError`."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place on its node. `slab`: uint8[n_slots, slot_nbytes]; a page is the head of a slot. `slab_fd`: the
    memfd that it is mapped from."""

    rank: int
    n_ranks: int
    """Of the server on this node, data-parallel replicas included."""
    slab: NDArray[np.uint8]
    slab_fd: int
    page_nbytes: int


def tier_openers(config: Config, place: Place) -> tuple[TierOpener, ...]:
    """One for each tier below host memory, fastest first. Touches nothing yet."""
    return tuple(TierOpener(tier.write, partial(_open, config, tier, place)) for tier in config.lower)


def _open(config: Config, tier: LowerTier, place: Place, namespace: Namespace) -> Tier:
    match tier:
        case SsdConfig():
            return _open_ssd(config, tier, place, namespace)
        case ValkeyConfig():
            return _open_valkey(tier, place, namespace)
        case MooncakeConfig():
            return _open_mooncake(tier, place, namespace)


def _check_identity(namespace: Namespace, tier: str) -> None:
    """What is kept under a name must be found by that model only."""
    if not namespace.is_persistent:
        raise RefusedError(
            "the weights have no identity (--load-format, or a --model-path that is not on this machine), so what "
            f"{tier} tier kept of them could be taken for another model's; load the weights from files, or remove "
            f"{tier} tier"
        )


def _open_ssd(config: Config, ssd: SsdConfig, place: Place, namespace: Namespace) -> Tier:
    _check_identity(namespace, "an ssd")
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
            quotas={tenant: quota.of(ssd.capacity) for tenant, quota in ssd.quotas.items()},
            endurance_nbytes=ssd.endurance,
        )
    except StoreError as error:
        raise StartError(f"sgl_lmcache: {error}.") from error


def _open_valkey(tier: ValkeyConfig, place: Place, namespace: Namespace) -> Tier:
    _check_identity(namespace, "a valkey")
    endpoint = endpoint_of(tier)
    try:
        opened = ValkeyTier(
            endpoint,
            namespace=namespace.digest,
            page_nbytes=place.page_nbytes,
            slab=place.slab,
            ttl_s=int(tier.ttl),
            n_connections=tier.connections,
        )
    except ClientMissingError as error:
        raise StartError(
            f"sgl_lmcache: the client of the valkey tier is not installed ({error}); "
            'pip install "sgl-lmcache[valkey]", or remove the tier.'
        ) from error
    except CertificateError as error:
        raise StartError(f"sgl_lmcache: the valkey tier's {error}; name PEM files that belong together.") from error
    if place.rank == 0:
        warn_of_plain_text(endpoint)
    return opened


def _open_mooncake(tier: MooncakeConfig, place: Place, namespace: Namespace) -> Tier:
    _check_identity(namespace, "a mooncake")
    n_slots, slot_nbytes = place.slab.shape
    try:
        return MooncakeTier(
            pool_of(tier, place.n_ranks),
            Geometry(n_slots, slot_nbytes, place.page_nbytes, namespace.digest),
            place.slab_fd,
        )
    except UnusableError as error:
        raise StartError(f"sgl_lmcache: {explain_unusable(str(error))}, or remove the mooncake tier.") from error
    except ProcessError as error:
        raise StartError(
            f"sgl_lmcache: the mooncake tier {error}; see docs/mooncake.md, or remove the tier."
        ) from error


def next_tiers(openers: Sequence[TierOpener], namespace: Namespace, before: Sequence[Tier]) -> Sequence[Tier]:
    """A `NextTiers`, but for its first argument."""
    return [
        LateTier(tier.name, partial(opener.open, namespace), tier) for opener, tier in zip(openers, before, strict=True)
    ]


def _server_token() -> str:
    """The same for all ranks of one server on this node: SGLang starts them from one process."""
    parent = os.getppid()
    try:
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(parent)
    started_at = fields[19]  # proc(5): the 22nd field, in clock ticks since boot
    return f"{parent}-{started_at}"
