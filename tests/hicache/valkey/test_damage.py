"""Values that are not what was stored under their name: none is ever served, and every sound one still is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import pytest

from hicache.values import FORMAT_VERSION, HEADER_NBYTES
from tests.hicache.tier_contract import PAGE_NBYTES, batch, chain
from tests.hicache.valkey.tiers import Rig, page_names, rig
from tests.support.valkey import Client, StoreServer

N_PATHS = 550
N_PAGES = 3
N_DAMAGED = 500


@pytest.fixture
def on(server: StoreServer) -> Iterator[Rig]:
    with rig(server.endpoint()) as made:
        yield made


@pytest.fixture
def client(server: StoreServer) -> Iterator[Client]:
    client = server.client()
    yield client
    client.close()


def value_of(client: Client, name: bytes) -> bytes:
    value = client("GET", name)
    assert isinstance(value, bytes)
    return value


def flip_a_bit(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    value = bytearray(value_of(client, name))
    at = rng.randrange(HEADER_NBYTES + PAGE_NBYTES)
    while 8 <= at < 10:  # another version is another case
        at = rng.randrange(HEADER_NBYTES + PAGE_NBYTES)
    value[at] ^= 1 << rng.randrange(8)
    client("SET", name, bytes(value))


def zero_a_block(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    value = bytearray(value_of(client, name))
    at = HEADER_NBYTES + 512 * rng.randrange(PAGE_NBYTES // 512)
    value[at : at + 512] = bytes(512)
    client("SET", name, bytes(value))


def cut(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    client("SET", name, value_of(client, name)[: rng.randrange(HEADER_NBYTES + PAGE_NBYTES)])


def lengthen(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    client("APPEND", name, bytes(rng.randrange(1, 200_000)))


def put_another_page(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    client("SET", name, value_of(client, other))


def put_something_foreign(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    client("SET", name, rng.choice([b"", b"0", b"$-1\r\n", rng.randbytes(HEADER_NBYTES + PAGE_NBYTES)]))


def put_another_type(rng: Random, client: Client, name: bytes, other: bytes) -> None:
    client("DEL", name)
    client(*rng.choice([("LPUSH", name, "x"), ("HSET", name, "a", "b"), ("SADD", name, "x"), ("ZADD", name, 1, "x")]))


DAMAGES: tuple[Callable[[Random, Client, bytes, bytes], None], ...] = (
    flip_a_bit,
    zero_a_block,
    cut,
    lengthen,
    put_another_page,
    put_something_foreign,
    put_another_type,
)


def test_of_500_damaged_values_none_is_served_and_every_sound_one_is(client: Client, on: Rig) -> None:
    rng = Random(5)
    first_slots = {}
    for path in range(N_PATHS):
        first_slots[path] = N_PAGES * (path % 10)
        assert on.tier.store(batch(N_PAGES, f"{path}", first_slot=first_slots[path])).result() == N_PAGES
    damaged = {}
    for path in rng.sample(range(N_PATHS), N_DAMAGED):
        names = page_names(chain(N_PAGES, f"{path}")[0])
        damaged[path] = rng.randrange(N_PAGES)
        name, other = names[damaged[path]], names[damaged[path] - 1]
        while True:
            before = client("DUMP", name)
            rng.choice(DAMAGES)(rng, client, name, other)
            if client("DUMP", name) != before:
                break

    for path in range(N_PATHS):
        into = slice(40, 40 + N_PAGES)
        n_loaded = on.tier.load(batch(N_PAGES, f"{path}", first_slot=40)).result()
        assert n_loaded == damaged.get(path, N_PAGES)
        stored = on.slab[first_slots[path] : first_slots[path] + N_PAGES]
        assert np.array_equal(on.slab[into][:n_loaded], stored[:n_loaded])
    assert on.tier.stats()["corrupt"] == N_DAMAGED
    assert on.tier.stats()["read_errors"] == 0
    assert on.tier.stats()["crashes"] == 0

    for path, at in damaged.items():
        assert on.tier.exists(chain(N_PAGES, f"{path}")[0]).result() == at, "it has been deleted"
        assert on.tier.store(batch(N_PAGES, f"{path}", first_slot=first_slots[path])).result() == N_PAGES
        assert on.tier.load(batch(N_PAGES, f"{path}", first_slot=40)).result() == N_PAGES, "and can be stored again"
    assert on.tier.stats()["corrupt"] == N_DAMAGED


def test_a_page_of_another_version_is_a_miss_and_stays_for_those_who_read_it(client: Client, on: Rig) -> None:
    on.tier.store(batch(3, "a")).result()
    name = page_names(chain(3, "a")[0])[1]
    value = bytearray(value_of(client, name))
    value[8:10] = (FORMAT_VERSION + 1).to_bytes(2, "little")
    client("SET", name, bytes(value))
    assert on.tier.load(batch(3, "a", first_slot=9)).result() == 1
    assert on.tier.stats()["other_version"] == 1
    assert on.tier.stats()["corrupt"] == 0
    assert client("EXISTS", name) == 1


def test_a_page_under_the_name_of_another_namespace_is_damaged(server: StoreServer, client: Client, on: Rig) -> None:
    """The checksum is bound to the name, so a copy from elsewhere does not pass."""
    on.tier.store(batch(1, "a")).result()
    (name,) = page_names(chain(1, "a")[0])
    elsewhere = "f" * 32
    with rig(server.endpoint(), namespace=elsewhere) as other:
        client("SET", b"sgl-lmcache:" + elsewhere.encode() + b":" + name.rpartition(b":")[2], value_of(client, name))
        assert other.tier.exists(chain(1, "a")[0]).result() == 1
        assert other.tier.load(batch(1, "a", first_slot=9)).result() == 0
        assert other.tier.stats()["corrupt"] == 1
