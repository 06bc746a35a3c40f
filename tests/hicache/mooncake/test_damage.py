"""Objects that are not what the tier has stored: a miss, counted, and removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from hicache.values import FORMAT_VERSION, HEADER_NBYTES
from tests.hicache.mooncake.test_faults import exists, load, store
from tests.hicache.mooncake.tiers import Rig, page_names, rig
from tests.hicache.tier_contract import PAGE_NBYTES, batch, chain
from tests.support.mooncake import Master
from tests.support.tiers import split

N_PAGES = 8

_PUTTER = """
import json, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", sys.argv[1]) == 0
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["what"] == "get":
        answer = store.get(order["name"]).hex()
    else:
        store.remove(order["name"], True)
        answer = store.put(order["name"], bytes.fromhex(order["value"]))
    print(json.dumps(answer), flush=True)
"""


class Stranger:
    """Somebody else with access to the pool, by Mooncake's own client, in a process of its own as the tier has it."""

    def __init__(self, master: Master) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PUTTER, master.pool().master],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"MC_TCP_BIND_ADDRESS": "127.0.0.1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, **order: str) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def get(self, name: str) -> bytes:
        return bytes.fromhex(str(self._ask(what="get", name=name)))

    def put(self, name: str, value: bytes) -> None:
        assert self._ask(what="put", name=name, value=value.hex()) == 0

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def stranger(shared_master: Master) -> Iterator[Stranger]:
    somebody = Stranger(shared_master)
    yield somebody
    somebody.end()


@pytest.fixture
def on(shared_master: Master) -> Iterator[Rig]:
    with rig(shared_master.pool()) as opened:
        assert store(opened, "a", N_PAGES) == N_PAGES
        yield opened


def name_of(page: int) -> str:
    return page_names(split(chain(N_PAGES, "a")[0])[page])[0]


def test_an_object_is_a_header_and_the_payload_as_it_is_in_the_slot(on: Rig, stranger: Stranger) -> None:
    value = stranger.get(name_of(3))
    assert len(value) == HEADER_NBYTES + PAGE_NBYTES
    assert value[:8] == b"sglpage\n"
    assert value[HEADER_NBYTES:] == on.slab[3].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),
        lambda value: bytes([value[0] ^ 1]) + value[1:],
        lambda value: value[:24] + bytes(8) + value[32:],
        lambda value: value[:-100],
        lambda value: value + bytes(100),
        lambda _: b"x",
        lambda value: bytes(len(value)),
    ],
    ids=["payload", "magic", "checksum", "cut", "longer", "foreign", "zeros"],
)
def test_a_damaged_object_is_a_miss_and_removed(on: Rig, stranger: Stranger, change) -> None:  # type: ignore[no-untyped-def]
    stranger.put(name_of(3), change(stranger.get(name_of(3))))
    assert exists(on, "a", N_PAGES) == N_PAGES
    assert load(on, "a", N_PAGES) == 3
    assert np.array_equal(on.slab[20:23], on.slab[:3])
    assert on.tier.stats()["corrupt"] == 1
    assert exists(on, "a", N_PAGES) == 3, "it is gone"
    assert on.tier.health().available
    assert load(on, "a", 3) == 3, "who has it is asked as before"
    assert store(on, "a", N_PAGES) == N_PAGES
    assert load(on, "a", N_PAGES) == N_PAGES


def test_the_page_of_another_name_is_a_miss(on: Rig, stranger: Stranger) -> None:
    stranger.put(name_of(3), stranger.get(name_of(4)))
    assert load(on, "a", N_PAGES) == 3
    assert on.tier.stats()["corrupt"] == 1


def test_another_version_of_the_format_is_a_miss_and_left_to_those_who_read_it(on: Rig, stranger: Stranger) -> None:
    value = stranger.get(name_of(3))
    other = value[:8] + (FORMAT_VERSION + 1).to_bytes(2, "little") + value[10:]
    stranger.put(name_of(3), other)
    assert load(on, "a", N_PAGES) == 3
    assert (on.tier.stats()["corrupt"], on.tier.stats()["other_version"]) == (0, 1)
    assert stranger.get(name_of(3)) == other


def test_of_200_damaged_objects_none_is_served_and_every_sound_one_is(on: Rig, stranger: Stranger) -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        page = int(rng.integers(N_PAGES))
        value = bytearray(stranger.get(name_of(page)))
        value[int(rng.integers(len(value)))] ^= 1 << int(rng.integers(8))
        stranger.put(name_of(page), bytes(value))
        on.slab[20 : 20 + N_PAGES] = 0
        n_loaded = load(on, "a", N_PAGES)
        assert n_loaded == page or value[8] != FORMAT_VERSION or value[9]
        assert np.array_equal(on.slab[20 : 20 + n_loaded], on.slab[:n_loaded])
        on.tier.delete(split(chain(N_PAGES, "a")[0])[page]).result()
        assert on.tier.store(batch(N_PAGES, "a")).result() == N_PAGES


def test_another_namespace_never_sees_it(shared_master: Master, on: Rig) -> None:
    with rig(shared_master.pool(), namespace="f" * 32) as other:
        assert exists(other, "a", N_PAGES) == 0
        assert load(other, "a", N_PAGES) == 0
