"""A cluster: pages on all of its nodes, slots that move, and a node that is lost."""

from __future__ import annotations

import re
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


def redirections(on: Rig) -> int:
    """Of one look-up."""
    before = on.tier.stats()["redirections"]
    assert on.tier.exists(chain(N_PAGES, "a")[0]).result() == N_PAGES
    return on.tier.stats()["redirections"] - before


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
        assert on.tier.stats()["redirections"] == 2
        if finish:
            wait_for("it is asked for where it is", lambda: redirections(on) == 0 or None, 20)
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


def test_a_target_that_hangs_is_given_up_and_not_the_node_that_sent_us_there(own_cluster: list[StoreServer]) -> None:
    with rig(own_cluster[0].endpoint(is_cluster=True, timeout_s=0.3, connect_timeout_s=0.3)) as on:
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
        names = page_names(chain(N_PAGES, "a")[0])
        at = next(i for i, name in enumerate(names) if i >= 3 and owner(own_cluster, slot_of(name)) == 0)
        migrate(own_cluster, names[at], 0, 1, finish=False)
        own_cluster[1].freeze()
        before = next(i for i, name in enumerate(names) if i == at or owner(own_cluster, slot_of(name)) == 1)
        wait_for("the others are read", lambda: found(on) == before or None, 20)
        assert on.tier.stats()["n_nodes_out"] == 1
        own_cluster[1].thaw()
        wait_for("all are", lambda: found(on) == N_PAGES or None, 30)


def test_a_slot_that_nobody_serves_costs_its_own_pages_only(own_cluster: list[StoreServer]) -> None:
    for node in own_cluster:
        client = node.client()
        client("CONFIG", "SET", "cluster-require-full-coverage", "no")
        client.close()
    names = page_names(chain(N_PAGES, "a")[0])
    with rig(own_cluster[0].endpoint(is_cluster=True)) as on:
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES
        for node in own_cluster:
            client = node.client()
            client("CLUSTER", "DELSLOTS", slot_of(names[6]))
            client.close()
        wait_for("the hole is seen", lambda: found(on) == 6 or None, 20)
        for _ in range(20):
            assert on.tier.load(batch(N_PAGES, "a", first_slot=N_PAGES)).result() == 6
        assert on.tier.stats()["n_nodes_out"] == 0


def test_a_node_that_has_left_is_not_asked_for_the_map(own_cluster: list[StoreServer]) -> None:
    with rig(own_cluster[0].endpoint(is_cluster=True)) as on:
        assert on.tier.store(batch(4, "a")).result() == 4
        ids, clients = node_ids(own_cluster), [node.client() for node in own_cluster]
        clients[0]("FLUSHALL")
        clients[0]("CLUSTER", "RESET", "HARD")
        for client in clients[1:]:
            client("CLUSTER", "FORGET", ids[0])
        clients[1]("CLUSTER", "ADDSLOTSRANGE", 0, 16384 // 3 - 1)
        for client in clients:
            client.close()
        wait_for("the others take all", lambda: stores(on) == N_PAGES or None, 40)
        assert on.tier.load(batch(N_PAGES, "b", first_slot=N_PAGES)).result() == N_PAGES


def test_a_missing_right_to_the_map_is_no_storm(
    own_cluster: list[StoreServer], caplog: pytest.LogCaptureFixture
) -> None:
    for node in own_cluster:
        client = node.client()
        client("ACL", "SETUSER", "kv", "on", ">secret", "~sgl-lmcache:*", "+@all", "-cluster")
        client.close()
    endpoint = own_cluster[0].endpoint(is_cluster=True, username="kv", password="secret")
    with rig(endpoint) as on:
        wait_for("it is told", lambda: "refuses CLUSTER SLOTS" in caplog.text or None, 10)
        client = own_cluster[0].client()
        client("CONFIG", "RESETSTAT")
        for _ in range(200):
            assert found(on) <= 0
        stats = str(client("INFO", "stats"))
        client.close()
        assert not on.tier.health().available
        counted = re.search(r"total_commands_processed\D+(\d+)", stats)
        assert counted is not None
        assert int(counted[1]) < 40, "nobody asks while it is refused"


def found(on: Rig) -> int:
    try:
        return on.tier.exists(chain(N_PAGES, "a")[0]).result()
    except TierError:
        return -1


def stores(on: Rig) -> int:
    try:
        return on.tier.store(batch(N_PAGES, "b")).result()
    except TierError:
        return -1
