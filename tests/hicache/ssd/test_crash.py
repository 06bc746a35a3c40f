"""SIGKILL at any point, 50 times over one store: what the map names is whole, and nothing else is lost or leaked."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from hicache.ssd import limit_for
from hicache.ssd.directory import used_nbytes
from tests.hicache.ssd.crash_child import (
    N_PATHS,
    N_SLOTS,
    PATH_PAGES,
    QUOTAS,
    content,
    open_store,
    path_batch,
    tenant_of,
)
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, settle
from tests.support.tiers import split

N_KILLS = 50
ROOT = Path(__file__).parents[3]
PARENT = {
    key: parent
    for number in range(N_PATHS)
    for key, parent in zip(split(path_batch(number, 0).keys), split(path_batch(number, 0).parents), strict=True)
}


@dataclass
class Told:
    """What the child's lines say: pages by slot as of the last commit, and what was under way."""

    committed: dict[int, bytes] = field(default_factory=dict)
    pending: dict[int, bytes] | None = None
    unnamed: set[int] = field(default_factory=set)
    """Slots that have been written since, and that no commit names."""

    def hear(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if word == "wrote":
            self.unnamed |= {int(slot) for slot in rest.split()}
        elif word == "begin":
            deleted, _, saved = rest.partition("|")
            self.pending = dict(self.committed)
            for slot in deleted.split():
                self.pending.pop(int(slot), None)
            for pair in saved.split():
                slot, _, key = pair.partition(":")
                self.pending[int(slot)] = bytes.fromhex(key)
        elif word == "end":
            assert self.pending is not None
            self.unnamed -= self.pending.keys() - self.committed.keys()
            self.committed, self.pending = self.pending, None


def reachable(pages: dict[int, bytes]) -> set[bytes]:
    """The pages all of whose ancestors are there too: the others are orphans, which an opened store drops."""
    known = set(pages.values())

    def has_path(key: bytes) -> bool:
        return key == bytes(32) or (key in known and has_path(PARENT[key]))

    return {key for key in known if has_path(key)}


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.hicache.ssd.crash_child"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def live_and_die(nursery: subprocess.Popen[str], path: Path, rng: random.Random, told: Told) -> None:
    """A child works until it has said so many lines; some go on until they write after that, or begin a commit."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{path} {rng.randrange(2**32)}\n")
    nursery.stdin.flush()
    pid, n_left, last_word = 0, rng.randint(1, 120), rng.choice(("", "wrote", "begin"))
    killed = False
    for line in nursery.stdout:
        if line.startswith("born"):
            pid = int(line.split()[1])
        elif line.strip() == "dead":
            break
        else:
            told.hear(line)
        n_left -= 1
        if pid and not killed and n_left <= 0 and line.startswith(last_word):
            os.kill(pid, signal.SIGKILL)
            killed = True
    assert killed, "the child died by itself"


def surviving(path: Path) -> dict[int, bytes]:
    """Open the store, check all there is to check, and say which page lies in which slot."""
    slab = make_slab()
    tier = open_store(path, slab, server="the next server")
    assert tier.quotas == QUOTAS
    settle(tier)
    tier.check_invariants()
    assert used_nbytes(path) <= limit_for(N_SLOTS, 1, SLOT_NBYTES)
    found: set[bytes] = set()
    n_held = dict.fromkeys(map(tenant_of, range(N_PATHS)), 0)
    for number in range(N_PATHS):
        batch = path_batch(number, first_slot=100)
        n_found = tier.exists(batch.keys).result()
        assert tier.load(batch).result() == n_found
        for slot, key in zip(batch.slots[:n_found], split(batch.keys), strict=False):
            assert np.array_equal(slab[slot], content(key))
            n_held[tenant_of(number)] += key not in found
            found.add(key)
    assert all(n_held[tenant] <= n_pages for tenant, n_pages in QUOTAS.items())
    stats = tier.stats()
    assert stats["corrupt"] == 0
    assert stats["crashes"] == 0
    assert stats["map_salvaged"] == 0
    assert stats["n_pages"] == len(found)
    with tier._volume.lock:
        rows = tier._volume.pages.index.match
        for tenant in QUOTAS:
            assert tier._volume.pages.n_held(tier._volume.quotas.group_of(tenant)) == n_held[tenant], "whose they are"
        by_slot = {int(tier._volume.pages.index.slots(rows(key))[0]): key for key in found}
    tier.close()
    return by_slot


def test_a_process_killed_at_any_point_loses_only_what_was_not_named(
    tmp_path: Path, nursery: subprocess.Popen[str]
) -> None:
    rng = random.Random(11)
    told = Told()
    n_between = n_within_commit = 0
    for _ in range(N_KILLS):
        live_and_die(nursery, tmp_path, rng, told)
        n_between += bool(told.unnamed)
        n_within_commit += told.pending is not None
        by_slot = surviving(tmp_path)
        states = [told.committed] + ([told.pending] if told.pending is not None else [])
        assert set(by_slot.values()) in [reachable(state) for state in states]
        told = Told(committed=by_slot)
    print(f"{N_KILLS} kills: {n_between} between a write and its commit, {n_within_commit} within a commit")
    assert n_between >= 5
    assert n_within_commit >= 1
    assert PATH_PAGES * N_PATHS > N_SLOTS, "pages were evicted"
