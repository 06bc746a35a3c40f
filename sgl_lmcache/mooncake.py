"""From the configuration of a Mooncake tier to the pool that it names, and what to install where it cannot be used."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sgl_lmcache.config import MASTER_PORT, MooncakeTier, split_address
from sgl_lmcache.errors import StartError

if TYPE_CHECKING:
    from hicache.mooncake import Pool

LEAST_SEGMENT_NBYTES: Final = 16 << 20
"""Mooncake refuses to add less."""

_SYSTEM_LIBRARIES: Final = {"libibverbs": "libibverbs1", "librdmacm": "librdmacm1", "libnuma": "libnuma1"}
"""What both wheels link to, and Debian's package of it."""


def pool_of(tier: MooncakeTier, n_ranks: int) -> Pool:
    """The pool, and one rank's share of what the server adds to it. Raises `StartError`."""
    from hicache.mooncake import Pool  # not for the doctor, which would load more than it needs

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


def why_unusable() -> str:
    """Why Mooncake's client cannot be used with this Python, and what to install; empty if it can. Without a full stop.

    Asked of a process of its own: the client is not to be loaded into this one. Blocks for a second or so.
    """
    tried = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return ""
    return explain_unusable((tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1])


@dataclass(frozen=True, slots=True)
class PoolReading:
    """What the doctor sees of a pool. refusal: why no server would start; trouble: why it would start without it."""

    master: str
    address: str = ""
    refusal: str = ""
    trouble: str = ""


def read_pool(tier: MooncakeTier) -> PoolReading:
    """Whether the client can be used, and the master be reached. Adds nothing to the pool. Blocks for some seconds."""
    refusal = why_unusable()
    if refusal or tier.master.startswith("etcd://"):  # which of several masters leads only the client can ask
        return PoolReading(tier.master, refusal=refusal)
    address = split_address(tier.master, MASTER_PORT)
    assert address is not None
    try:
        with socket.create_connection(address, float(tier.timeout)) as connection:
            own = tier.address or str(connection.getsockname()[0])
    except OSError as error:
        why = error.strerror or "no answer in time"
        return PoolReading(tier.master, trouble=f"no master answers at {address[0]}:{address[1]} ({why})")
    return PoolReading(tier.master, own)


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
