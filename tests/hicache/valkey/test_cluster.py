"""A cluster: pages on all of its nodes, slots that move, and a node that is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hicache import TierError
from tests.hicache.tier_contract import batch, chain
from tests.hicache.valkey.tiers import Rig, page_names, rig
from tests.support.processes import wait_for
from tests.support.valkey import StoreServer, cluster

N_PAGES = 30


@pytest.fixture
def on(nodes: list[StoreServer]) -> Iterator[Rig]:
    with rig(nodes[0].endpoint(is_cluster=True)) as made:
        yield made


def n_keys(nodes: Sequence[StoreServer]) -> list[int]:
    counts = []
    for node in nodes:
        client = node.client()
        counts.append(int(str(client("DBSIZE"))))
        client.close()
    return counts


def slot_of(name: bytes) -> int:
    from valkey.crc import key_slot

    return int(key_slot(name))


def node_ids(nodes: Sequence[StoreServer]) -> list[str]:
    ids = []
    for node in nodes:
        client = node.client()
        found = client("CLUSTER", "MYID")
        ids.append(found.decode() if isinstance(found, bytes) else str(found))
        client.close()
    return ids


def owner(nodes: Sequence[StoreServer], slot: int) -> int:
    return next(i for i in range(3) if 16384 * i // 3 <= slot < 16384 * (i + 1) // 3)


def test_a_path_is_spread_over_all_nodes(nodes: list[StoreServer], on: Rig) -> None:
    assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
    counts = n_keys(nodes)
    assert sum(counts) == N_PAGES
    assert min(counts) > 0
    assert on.tier.load(batch(N_PAGES, "a", first_slot=N_PAGES)).result() == N_PAGES
    assert np.array_equal(on.slab[N_PAGES : 2 * N_PAGES], on.slab[:N_PAGES])
    assert on.tier.stats()["redirections"] == 0


def migrate(nodes: Sequence[StoreServer], name: bytes, source: int, target: int, *, finish: bool) -> None:
    """Move the slot of one key, and the key with it; without `finish` the slot stays on its way."""
    slot, ids = slot_of(name), node_ids(nodes)
    clients = [node.client() for node in nodes]
    clients[target]("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    clients[source]("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    clients[source]("MIGRATE", "127.0.0.1", nodes[target].port, name, 0, 5000)
    if finish:
        for client in (clients[target], clients[source], *clients):
            client("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
    for client in clients:
        client.close()


@pytest.mark.parametrize("finish", [True, False], ids=["moved", "asked"])
def test_a_slot_that_moves_takes_its_page_along(own_cluster: list[StoreServer], finish: bool) -> None:
    with rig(own_cluster[0].endpoint(is_cluster=True)) as on:
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
        name = page_names(chain(N_PAGES, "a")[0])[7]
        source = owner(own_cluster, slot_of(name))
        migrate(own_cluster, name, source, (source + 1) % 3, finish=finish)
        assert on.tier.exists(chain(N_PAGES, "a")[0]).result() == N_PAGES
        assert on.tier.load(batch(N_PAGES, "a", first_slot=N_PAGES)).result() == N_PAGES
        assert np.array_equal(on.slab[N_PAGES : 2 * N_PAGES], on.slab[:N_PAGES])
        assert on.tier.stats()["redirections"] == (1 if finish else 2), (
            "after a slot has moved, it is asked for where it is"
        )
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
        assert on.tier.stats()["read_errors"] == on.tier.stats()["write_errors"] == 0


def test_a_node_that_is_lost_costs_its_pages_and_comes_back(own_cluster: list[StoreServer]) -> None:
    """Without replicas a cluster that lacks slots refuses all, or (as here) only those that it lacks."""
    for node in own_cluster:
        client = node.client()
        client("CONFIG", "SET", "cluster-require-full-coverage", "no")
        client.close()
    keys = chain(N_PAGES, "a")[0]
    with rig(own_cluster[0].endpoint(is_cluster=True, timeout_s=0.5, connect_timeout_s=0.5)) as on:
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
        lost = owner(own_cluster, slot_of(page_names(keys)[5]))
        lost = lost if lost else 1  # the first node is the one that is configured, and asked where the slots are
        n_left = next(i for i, name in enumerate(page_names(keys)) if owner(own_cluster, slot_of(name)) == lost)
        own_cluster[lost].kill()

        def prefix() -> int:
            try:
                return on.tier.exists(keys).result()
            except TierError:
                return -1

        wait_for("the others serve what they have", lambda: prefix() == n_left or None, 20)
        assert on.tier.load(batch(N_PAGES, "a", first_slot=N_PAGES)).result() == n_left
        assert on.tier.health().available
        assert on.tier.stats()["n_nodes_out"] == 1
        own_cluster[lost].start()
        wait_for("it is asked again", lambda: on.tier.stats()["n_nodes_out"] == (prefix() and 0) or None, 30)


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[list[StoreServer]]:
    with cluster(tmp_path / "cluster", 3) as nodes:
        yield list(nodes)
