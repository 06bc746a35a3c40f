from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.valkey import StoreServer, cluster, store_server


@pytest.fixture(scope="package")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def server(shared_server: StoreServer) -> StoreServer:
    """A server that has nothing."""
    client = shared_server.client()
    client("FLUSHALL")
    client.close()
    return shared_server


@pytest.fixture(scope="package")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    with cluster(tmp_path_factory.mktemp("cluster"), 3) as nodes:
        yield list(nodes)


@pytest.fixture
def nodes(shared_cluster: list[StoreServer]) -> list[StoreServer]:
    """The three nodes of a cluster that has nothing."""
    for node in shared_cluster:
        client = node.client()
        client("FLUSHALL")
        client.close()
    return shared_cluster


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[StoreServer]:
    """A server to be killed and stopped."""
    with store_server(tmp_path / "valkey") as server:
        yield server
