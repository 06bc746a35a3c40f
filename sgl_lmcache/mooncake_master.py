"""`sgl-lmcache mooncake-master`: start the master of a Mooncake Store, as the configuration of its servers says.

A master holds no KV. It knows which node has which page, and decides what is evicted. Mooncake's wheel brings it as a
program of its own, and this process becomes that program: a signal meets the master, and its exit code is this
command's. One file serves both sides, so no server looks for its master where it is not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from sgl_lmcache.config import MASTER_PORT, VARIABLE, MooncakeTier, split_address
from sgl_lmcache.config_file import load, path_in
from sgl_lmcache.errors import StartError
from sgl_lmcache.quantities import Seconds

PROGRAM = "mooncake_master"
METRICS_PORT = 9003
"""Where a master answers over HTTP: `/metrics`, `/health`."""

_MAX_SOFT_PIN = Seconds(86400.0)
"""A master that is told nothing refuses to store what is to be pinned for longer."""

_ETCD = "etcd://"
_HTTP = "http://"


def run(config: Path | None, *, address: str | None, metrics_port: int, print_only: bool) -> int:
    """Become the master, or print its command. `config` None: the file that the environment names. Raises
    `StartError`."""
    tier = load(config or path_in(os.environ)).mooncake
    if tier is None:
        raise StartError(
            f"No Mooncake tier is configured; name a configuration that has one in {VARIABLE} or --config."
        )
    command = [find_program(), *flags(tier, address=address, metrics_port=metrics_port)]
    if print_only:
        print(shlex.join(command))
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)


def find_program() -> str:
    """Beside the Python that runs, where its wheel puts it, or else on the PATH. Raises `StartError`."""
    program = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    if program is None:
        raise StartError(
            f"The program {PROGRAM} is not installed; install sgl-lmcache[mooncake] on a machine with CUDA, "
            "sgl-lmcache[mooncake-cpu] on one without."
        )
    return program


def flags(tier: MooncakeTier, *, address: str | None = None, metrics_port: int = METRICS_PORT) -> list[str]:
    """What the master is told. `address`: `host[:port]` of this machine; None: it listens on all. Raises
    `StartError`."""
    host, port = _listens_at(tier, address)
    listens_at = [f"--rpc_address={host}"] if host else []
    listens_at += [f"--rpc_port={port}", f"--metrics_port={metrics_port}"]
    listens_at += [f"--metrics_host={host}"] if host else []
    evicts = [
        f"--default_kv_lease_ttl={_milliseconds(tier.lease)}",
        f"--eviction_high_watermark_ratio={tier.eviction_high_watermark_ratio}",
        f"--eviction_ratio={tier.eviction_ratio}",
    ]
    if tier.soft_pin is not None and tier.soft_pin > _MAX_SOFT_PIN:
        evicts.append(f"--max_kv_soft_pin_ttl={_milliseconds(tier.soft_pin)}")
    return [*listens_at, *_metadata(tier, host), *_availability(tier), *evicts, "--logtostderr=true"]


def _listens_at(tier: MooncakeTier, address: str | None) -> tuple[str | None, int]:
    """Host and port. One of several masters has its own, and the configuration says nothing of it."""
    own = split_address(address, MASTER_PORT) if address is not None else None
    if address is not None and own is None:
        raise StartError(f'--address is "{address}"; write the address of this machine as HOST or HOST:PORT.')
    if tier.master.startswith(_ETCD):
        if own is None:
            raise StartError(
                f"The masters in {tier.master} need an address each; give this one's, as the nodes reach it, with "
                "--address."
            )
        return own
    named = split_address(tier.master, MASTER_PORT)
    assert named is not None
    if own is not None and ":" in str(address) and own[1] != named[1]:
        raise StartError(f"--address names port {own[1]} and the configuration port {named[1]}; leave the port out.")
    return own[0] if own is not None else None, named[1]


def _metadata(tier: MooncakeTier, host: str | None) -> list[str]:
    """Whether nodes ask the master for each other, and where it answers then."""
    if not tier.metadata.startswith(_HTTP):
        return ["--enable_http_metadata_server=false"]
    port = tier.metadata.removeprefix(_HTTP).partition("/")[0].rpartition(":")[2]
    return [
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_host={host or '0.0.0.0'}",
        f"--http_metadata_server_port={port}",
    ]


def _availability(tier: MooncakeTier) -> list[str]:
    if not tier.master.startswith(_ETCD):
        return []
    return ["--enable_ha=true", f"--etcd_endpoints={tier.master.removeprefix(_ETCD)}"]


def _milliseconds(duration: Seconds) -> int:
    return max(1, round(duration * 1000))
