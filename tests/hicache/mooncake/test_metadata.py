"""How nodes find each other and their master: each way that the configuration knows, with real servers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sgl_lmcache.config import MooncakeTier
from sgl_lmcache.mooncake_master import flags
from tests.hicache.mooncake.test_faults import comes_back, load, store
from tests.hicache.mooncake.tiers import rig
from tests.support.mooncake import ADDRESS, Master, master
from tests.support.processes import free_port, wait_for

LEADER_TIMEOUT_S = 60.0

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed (Debian: etcd-server)")


@contextmanager
def etcd(folder: Path) -> Iterator[str]:
    """A real etcd on loopback. Yields its address."""
    client, peer = (f"http://{ADDRESS}:{free_port()}" for _ in range(2))
    command = ["etcd", "--data-dir", str(folder), "--listen-client-urls", client, "--advertise-client-urls", client]
    command += [
        "--listen-peer-urls",
        peer,
        "--initial-advertise-peer-urls",
        peer,
        "--initial-cluster",
        f"default={peer}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield client.removeprefix("http://")
    finally:
        process.kill()
        process.wait()


def shares(first: Master, metadata: str, address: str) -> None:
    """What one node stores another loads, and the other way round."""
    pool = first.pool(metadata=metadata, master=address)
    with rig(pool) as here, rig(pool) as there:
        assert store(here, "a") == 4
        assert load(there, "a") == 4
        assert store(there, "b") == 4
        assert load(here, "b") == 4


def test_nodes_that_ask_each_other(shared_master: Master) -> None:
    shares(shared_master, "P2PHANDSHAKE", f"{ADDRESS}:{shared_master.port}")


def test_metadata_over_http(tmp_path: Path) -> None:
    port = free_port()
    with master(
        tmp_path / "master", "--enable_http_metadata_server=true", f"--http_metadata_server_port={port}"
    ) as own:
        shares(own, f"http://{ADDRESS}:{port}/metadata", f"{ADDRESS}:{own.port}")


@needs_etcd
def test_metadata_in_etcd(shared_master: Master, tmp_path: Path) -> None:
    with etcd(tmp_path / "etcd") as address:
        shares(shared_master, f"etcd://{address}", f"{ADDRESS}:{shared_master.port}")


@needs_etcd
def test_of_several_masters_another_leads_when_one_is_killed(tmp_path: Path) -> None:
    """With an empty pool, which the nodes join again by themselves."""
    with ExitStack() as stack:
        address = stack.enter_context(etcd(tmp_path / "etcd"))
        tier = MooncakeTier(master=f"etcd://{address}")

        def another(name: str) -> Master:
            port, metrics_port = free_port(), free_port()
            options = flags(tier, address=f"{ADDRESS}:{port}", metrics_port=metrics_port)
            return stack.enter_context(
                master(tmp_path / name, *options, port=port, metrics_port=metrics_port, waits=False)
            )

        first = another("first")
        wait_for("the first leads", first.accepts, LEADER_TIMEOUT_S)
        another("second")
        with rig(first.pool(master=tier.master)) as here, rig(first.pool(master=tier.master)) as there:
            assert store(here, "a") == 4
            assert load(there, "a") == 4
            first.kill()
            comes_back(here, "b")
            wait_for("the other node is there, too", lambda: load(there, "b") == 4 or None, LEADER_TIMEOUT_S)
            assert load(there, "a") == 0
