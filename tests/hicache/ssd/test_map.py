"""What the map reads out of its table, whatever lies in there."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache.quotas import DIGEST_NBYTES, NOBODY
from hicache.ssd.map import Identity, Map, PageRows
from radix import KEY_NBYTES
from tests.hicache.tier_contract import chain
from tests.support.tiers import split

IDENTITY = Identity("namespace", 4000, 4096)
N_SLOTS = 40

Value = None | int | float | str | bytes
Row = tuple[Value, Value, Value, Value, Value, Value]
"""Key, parent, depth, checksum, last use, tenant."""

INT64 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.binary(min_size=KEY_NBYTES, max_size=KEY_NBYTES)
ANYTHING: st.SearchStrategy[Value] = st.one_of(
    st.none(),
    INT64,
    st.sampled_from([-1, 0, 2**31 - 1, 2**31]),
    st.floats(allow_nan=False),
    st.sampled_from(["", "12", "x", "a" * KEY_NBYTES, "ä" * (KEY_NBYTES // 2), "a\0b"]),
    st.binary(max_size=2 * KEY_NBYTES),
    NAMES,
)
TENANTS = st.one_of(st.none(), st.binary(min_size=DIGEST_NBYTES, max_size=DIGEST_NBYTES).filter(any))
SOUND = st.tuples(NAMES, NAMES, st.integers(0, 2**31 - 1), INT64, st.integers(0, 2**63 - 1), TENANTS)
ROWS = st.one_of(
    SOUND,
    SOUND,
    st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING),
    st.builds(lambda row, at, value: (*row[:at], value, *row[at + 1 :]), SOUND, st.integers(0, 5), ANYTHING),
)


@settings(max_examples=100)
@given(st.dictionaries(st.integers(-5, N_SLOTS + 5), ROWS), st.integers(0, N_SLOTS), st.integers(0, N_SLOTS))
def test_sound_rows_and_the_slots_of_the_others(rows: dict[int, Row], first: int, end: int) -> None:
    """Against each row looked at in Python. The table has no constraints here, since a damaged file keeps none."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        lying = write(folder, rows)
        found_map = Map(folder, IDENTITY)
        try:
            found, unsound = found_map.between(first, end)
            within = {slot: row for slot, row in lying.items() if first <= slot < end}
            sound = {slot: row for slot, row in within.items() if is_sound(row)}
            assert by_slot(found) == sound
            assert sorted(unsound.tolist()) == sorted(within.keys() - sound.keys())
            assert not found_map.is_damaged
        finally:
            found_map.close()


@settings(max_examples=50)
@given(st.dictionaries(st.integers(0, N_SLOTS), ROWS), st.lists(NAMES, max_size=5), st.randoms(use_true_random=False))
def test_pages_come_in_the_order_asked(rows: dict[int, Row], others: list[bytes], rng: Random) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        sound = [row for row in write(folder, rows).values() if is_sound(row)]
        asked = list(dict.fromkeys([*(key_of(row) for row in sound), *others]))
        rng.shuffle(asked)
        asked = asked[len(sound) // 3 :]
        found_map = Map(folder, IDENTITY)
        try:
            found = by_slot(found_map.pages(b"".join(asked)))
            keys = [key_of(row) for row in found.values()]
            assert keys == [key for key in asked if key in map(key_of, sound)]
            assert all(row in sound for row in found.values())
        finally:
            found_map.close()


def test_a_slice_makes_few_objects_for_the_garbage_collector(tmp_path: Path) -> None:
    """A tuple a row would start a collection of the whole heap from time to time, which every thread waits for."""
    n_rows = 256
    keys, parents = chain(n_rows, "path")
    numbers = np.arange(n_rows)
    rows = PageRows(numbers, keys, parents, numbers, numbers.astype(np.uint64), numbers, NOBODY * n_rows)
    no_slots = np.empty(0, np.int64)
    found_map = Map(tmp_path, IDENTITY)
    found_map.apply(no_slots, rows, (no_slots, no_slots), clock=1)
    gc.collect()
    gc.disable()
    try:
        n_before = gc.get_count()[0]
        found, _ = found_map.between(0, n_rows)
        n_made = gc.get_count()[0] - n_before
    finally:
        gc.enable()
        found_map.close()
    assert len(found) == n_rows
    assert n_made < n_rows // 4


def test_a_map_of_before_there_were_quotas_is_read_and_written(tmp_path: Path) -> None:
    write(tmp_path, {3: (b"k" * 32, b"p" * 32, 2, 5, 7, None)})
    with contextlib.closing(sqlite3.connect(tmp_path / "map.db", isolation_level=None)) as db:
        db.execute("ALTER TABLE pages DROP COLUMN tenant")
    old_map = Map(tmp_path, IDENTITY)
    found, unsound = old_map.between(0, N_SLOTS)
    assert by_slot(found) == {3: (b"k" * 32, b"p" * 32, 2, 5, 7, None)}
    assert not len(unsound)
    none = np.empty(0, np.int64)
    row = PageRows(
        np.array([4]), b"K" * 32, bytes(32), np.array([0]), np.array([1], np.uint64), np.array([8]), b"t" * 16
    )
    old_map.apply(none, row, (none, none), clock=1)
    old_map.close()
    again = Map(tmp_path, IDENTITY)
    found, _ = again.between(4, 5)
    assert by_slot(found) == {4: (b"K" * 32, bytes(32), 0, 1, 8, b"t" * 16)}
    again.close()


def write(folder: Path, rows: Mapping[int, Row]) -> dict[int, Row]:
    """A map with these rows. Returns them as they lie there: SQLite turns some numbers into others."""
    Map(folder, IDENTITY).close()
    db = sqlite3.connect(folder / "map.db", isolation_level=None)
    try:
        db.executescript(
            """
            DROP TABLE pages;
            CREATE TABLE pages(slot INTEGER PRIMARY KEY, key BLOB, parent BLOB, depth INTEGER, checksum INTEGER,
                last_use INTEGER, tenant BLOB);
            """
        )
        values = [(slot, *row) for slot, row in rows.items()]
        db.executemany("INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return {row[0]: row[1:] for row in db.execute("SELECT * FROM pages")}
    finally:
        db.close()


def is_sound(row: Row) -> bool:
    key, parent, depth, checksum, last_use, tenant = row
    return (
        isinstance(key, bytes)
        and len(key) == KEY_NBYTES
        and isinstance(parent, bytes)
        and len(parent) == KEY_NBYTES
        and isinstance(depth, int)
        and 0 <= depth < 1 << 31
        and isinstance(checksum, int)
        and isinstance(last_use, int)
        and last_use >= 0
        and (tenant is None or (isinstance(tenant, bytes) and len(tenant) == DIGEST_NBYTES))
    )


def key_of(row: Row) -> bytes:
    """The key of a sound row."""
    assert isinstance(row[0], bytes)
    return row[0]


def by_slot(rows: PageRows) -> dict[int, Row]:
    columns = zip(
        rows.slots.tolist(),
        split(rows.keys),
        split(rows.parents),
        rows.depths.tolist(),
        rows.checksums.view("int64").tolist(),
        rows.last_uses.tolist(),
        (words.tobytes() if words.any() else None for words in rows.tenant_words()),
        strict=True,
    )
    return {row[0]: row[1:] for row in columns}
