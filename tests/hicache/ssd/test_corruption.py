"""A thousand random corruptions: none is ever served, all else still is, and each is counted once.

The corruptions are done while the store is closed. What the store then may serve follows from the bytes that lie there:
a page is good if the map names it and its slot holds its bytes.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import numpy as np

from hicache.ssd import SsdTier
from tests.hicache.ssd.crash_child import content
from tests.hicache.ssd.stores import PAGE_NBYTES, SLOT_NBYTES, Slab, make_slab, open_tier, pages, part, settle
from tests.support.tiers import split

N_PATHS = 12
PATH_PAGES = 16
N_PAGES = N_PATHS * PATH_PAGES
N_SLOTS = 200
PATHS = [pages(PATH_PAGES, f"path {number}") for number in range(N_PATHS)]
KEYS = [key for path in PATHS for key in split(path.keys)]


class Store:
    """A store of all paths, on disk. Harm goes over it in rounds; what is lost is stored again after each."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.rng = random.Random(seed)
        self.slab: Slab = make_slab(N_PAGES + 1)
        for slot, key in enumerate(KEYS):
            self.slab[slot] = content(key)
        tier = self.open()
        self.store_all(tier)
        tier.close()

    def open(self) -> SsdTier:
        return open_tier(self.path, self.slab, n_slots=N_SLOTS)

    def store_all(self, tier: SsdTier) -> None:
        for number, path in enumerate(PATHS):
            first = number * PATH_PAGES
            whole = part(path, 0, PATH_PAGES, first_slot=first)
            assert tier.store(whole).result() == PATH_PAGES
        settle(tier)

    # ---- what lies on the disk ----

    @property
    def folder(self) -> Path:
        (folder,) = self.path.glob("*/r0of1-*")
        return folder

    @property
    def segments(self) -> list[Path]:
        return [self.folder / f"data.{i}" for i in range(len(list(self.folder.glob("data.*"))))]

    def named(self) -> dict[bytes, int]:
        """The slot of each page that the map names."""
        with sqlite3.connect(self.folder / "map.db") as db:
            rows = db.execute("SELECT key, slot FROM pages").fetchall()
        db.close()
        return dict(rows)

    def slot_bytes(self) -> Slab:
        """All slots, one after another."""
        raw = [np.fromfile(segment, np.uint8) for segment in self.segments]
        size = max(len(part) for part in raw)
        whole = np.zeros((len(raw), size), np.uint8)
        for row, part_ in zip(whole, raw, strict=True):
            row[: len(part_)] = part_
        return whole.reshape(-1, SLOT_NBYTES)

    def good(self) -> set[bytes]:
        """Named pages whose slots hold their bytes."""
        lying = self.slot_bytes()[:, :PAGE_NBYTES]
        return {key for key, slot in self.named().items() if (lying[slot] == content(key)[:PAGE_NBYTES]).all()}

    # ---- harm ----

    def harm_data(self, n_times: int) -> None:
        """So many random corruptions of the slots, and at times a file that is cut."""
        lying = self.slot_bytes()
        n_cut = self.rng.choices([0, 1], [2, 1])[0]
        for _ in range(n_times - n_cut):
            self.harm_slots(lying)
        for segment, data in zip(self.segments, np.split(lying, len(self.segments)), strict=True):
            data.tofile(segment)
        for segment in self.rng.sample(self.segments, n_cut):
            os.truncate(segment, segment.stat().st_size - self.rng.randrange(3 * SLOT_NBYTES))

    def harm_slots(self, lying: Slab) -> None:
        """Change all slots, as one array, in one place."""
        kind = self.rng.choices(["flip", "zero", "swap", "copy"], [2, 1, 1, 1])[0]
        a, b = self.rng.randrange(N_PAGES), self.rng.randrange(N_PAGES)
        at = self.rng.randrange(SLOT_NBYTES)
        if kind == "flip":
            lying[a, at] ^= 1 << self.rng.randrange(8)
        elif kind == "zero":
            lying[a, at // 512 * 512 :] = 0
        elif kind == "swap":
            lying[[a, b]] = lying[[b, a]]
        else:
            lying[a] = lying[b]

    def harm_map(self) -> None:
        """One random corruption of the map's file."""
        path = self.folder / "map.db"
        raw = bytearray(path.read_bytes())
        at = self.rng.randrange(len(raw))
        kind = self.rng.choice(["flip", "zero", "garbage", "truncate"])
        if kind == "flip":
            raw[at] ^= 1 << self.rng.randrange(8)
        elif kind == "truncate":
            raw = raw[:at]
        else:
            page = slice(at // 4096 * 4096, at // 4096 * 4096 + 4096)
            raw[page] = bytes(4096) if kind == "zero" else self.rng.randbytes(4096)
        path.write_bytes(raw)

    # ---- what is served ----

    def serve(self, tier: SsdTier) -> tuple[set[bytes], int]:
        """Ask for every page by itself. Returns those that came, and how many were promised and did not."""
        served: set[bytes] = set()
        n_broken = 0
        for path in PATHS:
            for at in range(PATH_PAGES):
                one = part(path, at, at + 1, first_slot=N_PAGES)
                n_promised = tier.exists(one.keys).result()
                self.slab[N_PAGES] = 0
                n_loaded = tier.load(one).result()
                assert n_loaded <= n_promised
                n_broken += n_promised - n_loaded
                if n_loaded:
                    assert np.array_equal(self.slab[N_PAGES, :PAGE_NBYTES], content(one.keys)[:PAGE_NBYTES])
                    served.add(one.keys)
        return served, n_broken

    def end_round(self, tier: SsdTier) -> None:
        """The store is whole again, and as it should be."""
        self.store_all(tier)
        tier.check_invariants()
        assert tier.stats()["crashes"] == 0
        assert tier.health().available
        tier.close()
        assert self.good() == set(KEYS)


def test_900_corruptions_of_data(tmp_path: Path) -> None:
    store = Store(tmp_path, seed=1)
    for _ in range(30):
        store.harm_data(30)
        n_named, good = len(store.named()), store.good()
        assert len(good) < n_named
        tier = store.open()
        served, n_broken = store.serve(tier)
        assert served == good
        assert tier.stats()["corrupt"] == n_broken == n_named - len(good)
        assert store.serve(tier) == (good, 0), "a damaged page is dropped when it is found"
        store.end_round(tier)


def test_20_maps_of_another_time(tmp_path: Path) -> None:
    """As after a power cut that took the last commits: rows name slots that hold other pages now."""
    store = Store(tmp_path, seed=2)
    for _ in range(20):
        shutil.copy(store.folder / "map.db", tmp_path / "old")
        tier = store.open()
        settle(tier)
        for number in store.rng.sample(range(N_PATHS), 5):
            tier.delete(PATHS[number].keys[32 * store.rng.randrange(PATH_PAGES) :]).result()
        settle(tier)
        numbers = store.rng.sample(range(N_PATHS), N_PATHS)
        for number in numbers:
            tier.store(part(PATHS[number], 0, PATH_PAGES, first_slot=number * PATH_PAGES)).result()
        tier.close()
        shutil.copy(tmp_path / "old", store.folder / "map.db")
        good = store.good()
        tier = store.open()
        served, n_broken = store.serve(tier)
        assert served == good
        assert tier.stats()["corrupt"] == n_broken == N_PAGES - len(good)
        store.end_round(tier)


def test_70_corruptions_of_the_map(tmp_path: Path) -> None:
    """Which rows are left is SQLite's to say; those that can still be read by themselves must be served."""
    store = Store(tmp_path / "store", seed=3)
    shutil.copytree(store.path, tmp_path / "whole")
    whole = rows_by_slot(store.folder / "map.db")
    n_salvaged = 0
    for _ in range(70):
        shutil.rmtree(store.path)
        shutil.copytree(tmp_path / "whole", store.path)
        store.harm_map()
        left = rows_by_slot(store.folder / "map.db")
        same = {row[1]: row[2] for slot, row in left.items() if whole.get(slot) == row}
        tier = store.open()
        settle(tier)
        served, n_broken = store.serve(tier)
        assert {key for key in same if is_reached(key, same)} <= served
        assert tier.stats()["corrupt"] == n_broken
        n_salvaged += tier.stats()["map_salvaged"]
        store.store_all(tier)
        tier.check_invariants()
        assert tier.stats()["crashes"] == 0
        assert tier.health().available
        tier.close()
        tier = store.open()
        settle(tier)
        assert all(tier.exists(path.keys).result() == PATH_PAGES for path in PATHS)
        tier.close()
    assert n_salvaged >= 5, "some were damaged so that SQLite noticed, and not beyond opening"


def test_10_lost_maps(tmp_path: Path) -> None:
    """The data files are free space then."""
    store = Store(tmp_path, seed=4)
    for _ in range(10):
        for name in store.rng.sample(["map.db", "map.db-wal"], store.rng.randint(1, 2)):
            (store.folder / name).unlink(missing_ok=True)
        is_lost = not (store.folder / "map.db").exists()
        n_segments = len(store.segments)
        tier = store.open()
        served, n_broken = store.serve(tier)
        assert served == (set() if is_lost else set(KEYS))
        assert n_broken == tier.stats()["corrupt"] == 0
        assert len(store.segments) == n_segments
        store.end_round(tier)


def rows_by_slot(path: Path) -> dict[int, tuple[int, bytes, bytes, int, int, int]]:
    """Every row that SQLite can read by itself: slot, key, parent, checksum, depth, last use."""
    rows = {}
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    for slot in range(N_SLOTS):
        try:
            wanted = "SELECT slot, key, parent, checksum, depth, last_use FROM pages WHERE slot = ?"
            row = db.execute(wanted, (slot,)).fetchone()
        except sqlite3.Error:
            continue
        if row is not None:
            rows[slot] = row
    db.close()
    return rows


def is_reached(key: bytes, parents: dict[bytes, bytes]) -> bool:
    while key in parents:
        key = parents[key]
    return key == bytes(32)
