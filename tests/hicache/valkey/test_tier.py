"""The Valkey tier on a real Valkey: the contract of tiers, and what it keeps there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hicache import Batch, Tier
from tests.hicache.tier_contract import PAGE_NBYTES, TierContract, batch, chain
from tests.hicache.valkey.tiers import NAMESPACE, Rig, open_tier, page_names, random_slab, rig
from tests.support.processes import wait_for
from tests.support.valkey import StoreServer, redis_binary, store_server


class TestValkeyTier(TierContract):
    is_shared = True

    @pytest.fixture(autouse=True)
    def _store(self, server: StoreServer) -> None:
        self.server = server

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return open_tier(self.server.endpoint(), slab)


class TestOnACluster(TierContract):
    is_shared = True

    @pytest.fixture(autouse=True)
    def _store(self, nodes: list[StoreServer]) -> None:
        self.server = nodes[0]

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return open_tier(self.server.endpoint(is_cluster=True), slab)


@pytest.mark.skipif(redis_binary() is None, reason="redis-server is not installed (apt-get install redis-server)")
class TestOnRedis(TierContract):
    is_shared = True

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> Iterator[None]:
        with store_server(tmp_path / "redis", binary=redis_binary()) as server:
            self.server = server
            yield

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return open_tier(self.server.endpoint(), slab)


@pytest.fixture
def on(server: StoreServer) -> Iterator[Rig]:
    with rig(server.endpoint()) as made:
        yield made


def test_a_page_is_one_key_with_a_time_to_live_and_a_name_without_braces(server: StoreServer, on: Rig) -> None:
    keys, _ = chain(3, "a")
    on.tier.store(batch(3, "a")).result()
    client = server.client()
    assert [name for name in client.keys() if not name.endswith(b":probe")] == sorted(page_names(keys))  # noqa: SIM118
    for name, page in zip(page_names(keys), on.slab[:3], strict=True):
        assert name.startswith(b"sgl-lmcache:" + NAMESPACE.encode() + b":")
        assert b"{" not in name
        value = client("GET", name)
        assert isinstance(value, bytes)
        assert value[32:] == page.tobytes()
        assert 590 <= int(str(client("TTL", name))) <= 600
    client.close()


@pytest.mark.parametrize("use", ["load", "store"])
def test_a_page_that_is_used_lives_on(server: StoreServer, on: Rig, use: str) -> None:
    on.tier.store(batch(2, "a")).result()
    client = server.client()
    names = page_names(chain(2, "a")[0])
    for name in names:
        client("EXPIRE", name, 5)
    used = on.tier.load(batch(2, "a", first_slot=9)) if use == "load" else on.tier.store(batch(2, "a"))
    assert used.result() == 2
    assert all(int(str(client("TTL", name))) > 590 for name in names)
    client.close()


def test_what_is_there_already_is_not_sent_again(server: StoreServer, on: Rig) -> None:
    on.tier.store(batch(4, "a")).result()
    with rig(server.endpoint()) as other:
        assert other.tier.store(batch(6, "a")).result() == 6
        assert other.tier.stats()["stored"] == 2
        assert other.tier.stats()["deduplicated"] == 4
        assert other.tier.stats()["written_nbytes"] == 2 * PAGE_NBYTES


def test_what_one_server_has_stored_another_loads(server: StoreServer, on: Rig) -> None:
    on.tier.store(batch(8, "a")).result()
    with rig(server.endpoint(), np.zeros_like(on.slab)) as other:
        assert other.tier.exists(chain(8, "a")[0]).result() == 8
        assert other.tier.load(batch(8, "a", first_slot=3)).result() == 8
        assert np.array_equal(other.slab[3:11], on.slab[:8])


def test_another_namespace_finds_nothing(server: StoreServer, on: Rig) -> None:
    on.tier.store(batch(4, "a")).result()
    with rig(server.endpoint(), namespace="f" * 32) as other:
        assert other.tier.exists(chain(4, "a")[0]).result() == 0
        assert other.tier.load(batch(4, "a")).result() == 0


def test_pages_may_be_shorter_than_their_slots(server: StoreServer) -> None:
    slab = random_slab(slot_nbytes=8192)
    with rig(server.endpoint(), slab, page_nbytes=5000) as made:
        before = slab.copy()
        assert made.tier.store(batch(3, "a")).result() == 3
        assert made.tier.load(batch(3, "a", first_slot=10)).result() == 3
        assert np.array_equal(slab[10:13, :5000], before[:3, :5000])
        assert np.array_equal(slab[10:13, 5000:], before[10:13, 5000:]), "what lies behind a page is nobody's"


def test_large_pages_in_many_pieces_on_many_connections(server: StoreServer) -> None:
    slab = random_slab(64, 393216)
    with rig(server.endpoint(), slab) as made:
        assert made.tier.store(batch(30, "a")).result() == 30
        futures = [made.tier.load(batch(30, "a", first_slot=31)), made.tier.exists(chain(40, "a")[0])]
        assert [future.result() for future in futures] == [30, 30]
        assert np.array_equal(slab[31:61], slab[:30])
        assert made.tier.stats()["read_nbytes"] == 30 * 393216
        assert made.tier.stats()["crashes"] == 0


def test_many_pages_are_looked_up_at_once(server: StoreServer, on: Rig) -> None:
    client = server.client()
    keys, _ = chain(2048, "long")
    for name in page_names(keys)[:1900]:
        client("SET", name, b"x")
    client("CONFIG", "RESETSTAT")
    assert on.tier.exists(keys).result() == 1900
    info = str(client("INFO", "commandstats"))
    assert "2048" in info, "each page is asked for once"
    client.close()


def test_an_answer_ends_at_the_first_page_that_was_evicted(server: StoreServer, on: Rig) -> None:
    on.tier.store(batch(8, "a")).result()
    client = server.client()
    keys, _ = chain(8, "a")
    client("DEL", page_names(keys)[3])
    assert on.tier.exists(keys).result() == 3
    assert on.tier.load(batch(8, "a", first_slot=20)).result() == 3
    assert np.array_equal(on.slab[20:23], on.slab[:3])
    assert on.tier.stats()["missed"] == 1
    client.close()


def test_a_queue_that_is_full_takes_less(server: StoreServer) -> None:
    with rig(server.endpoint(), max_queued_nbytes=3 * PAGE_NBYTES) as made:
        assert made.tier.store(batch(5, "a")).result() == 3
        assert made.tier.stats()["skipped_pressure"] == 2
        wait_for("the queue is empty", lambda: made.tier.stats()["queued_nbytes"] == 0 or None, 10)
        assert made.tier.store(batch(3, "b")).result() == 3


def test_clearing_one_server_leaves_the_pages_of_all(
    server: StoreServer, on: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    on.tier.store(batch(4, "a")).result()
    assert on.tier.clear().result() == 0
    assert on.tier.exists(chain(4, "a")[0]).result() == 4
    assert "are shared" in caplog.text


def test_a_run_below_a_parent_that_is_not_there_is_stored_and_not_reached(server: StoreServer, on: Rig) -> None:
    keys, parents = chain(4, "a")
    assert on.tier.store(Batch(keys[64:], parents[64:], "", np.arange(2, dtype=np.int32), depth=2)).result() == 2
    assert on.tier.exists(keys).result() == 0
    assert on.tier.store(Batch(keys[:64], parents[:64], "", np.arange(2, 4, dtype=np.int32), depth=0)).result() == 2
    assert on.tier.exists(keys).result() == 4
