"""From the configuration of a Mooncake tier to the pool that it names, and what to install where it cannot be used."""

from __future__ import annotations

import re
from typing import Final

from hicache.mooncake import Pool
from sgl_lmcache.config import MASTER_PORT, MooncakeTier, split_address
from sgl_lmcache.errors import StartError

LEAST_SEGMENT_NBYTES: Final = 16 << 20
"""Mooncake refuses to add less."""

_SYSTEM_LIBRARIES: Final = {"libibverbs": "libibverbs1", "librdmacm": "librdmacm1", "libnuma": "libnuma1"}
"""What both wheels link to, and Debian's package of it."""


def pool_of(tier: MooncakeTier, n_ranks: int) -> Pool:
    """The pool, and one rank's share of what the server adds to it. Raises `StartError`."""
    segment_nbytes = tier.segment // n_ranks
    if 0 < segment_nbytes < LEAST_SEGMENT_NBYTES:
        raise StartError(
            f"sgl_lmcache: segment of the mooncake tier is {tier.segment}, {segment_nbytes:,} bytes for each of "
            f"{n_ranks} ranks, and Mooncake takes no less than 16MiB of each; give it more, or 0 to add nothing."
        )
    address = split_address(tier.master, MASTER_PORT)
    return Pool(
        master=tier.master if address is None else f"{address[0]}:{address[1]}",
        metadata=tier.metadata,
        address=tier.address,
        protocol=tier.protocol,
        devices=tier.devices,
        segment_nbytes=segment_nbytes,
        replicas=tier.replicas,
        soft_pin_s=None if tier.soft_pin is None else float(tier.soft_pin),
        timeout_s=float(tier.timeout),
    )


def explain_unusable(error: str) -> str:
    """What to install, for what Python said when it tried to import Mooncake's client. Without a full stop."""
    if "No module named" in error:
        return (
            f'the client of the mooncake tier is not installed ({error}); pip install "sgl-lmcache[mooncake]" where '
            'there is CUDA, or "sgl-lmcache[mooncake-cpu]" where there is none'
        )
    if re.search(r"libcuda|libnv", error):
        return (
            f"the installed package mooncake-transfer-engine is for CUDA, which is not here ({error}); pip uninstall "
            'it and pip install "sgl-lmcache[mooncake-cpu]"'
        )
    missing = [package for library, package in _SYSTEM_LIBRARIES.items() if library in error]
    if missing:
        return (
            f"the client of the mooncake tier needs a system library that is not here ({error}); install it (Debian: "
            f"apt-get install {' '.join(_SYSTEM_LIBRARIES.values())})"
        )
    return f"the client of the mooncake tier cannot be used here ({error}); install it anew"
