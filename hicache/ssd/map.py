"""The map: which page lies in which file slot, in SQLite beside the data files.

The order of writes is what makes a crash harmless at any instant, and it is kept by whoever calls this:

    1. a page's bytes are written whole, then synced
    2. one transaction names it here
    3. a page that leaves is deleted here, and only then is its slot given to another

So what the map names is whole, and the rest is free space. (A power cut may undo the last transactions, since a commit
is not synced: then a row may name a slot that has been reused. Its checksum, which is bound to the page's name, tells.)

Transactions are short, so that the log stays below 12 MiB. Except for `open`, everything runs on one thread. Errors are
SQLite's own, and `is_damage` tells a file that is broken from a disk that is.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.quotas import DIGEST_NBYTES, NOBODY
from hicache.ssd.directory import FORMAT
from radix import KEY_NBYTES

TRANSACTION_ROWS: Final = 1024
"""At most so many rows change in one transaction; each dirties a page of the table and one of the key index at worst,
so 8 MiB of log, on top of what the checkpoint before has left."""

_NEW: Final = "map.new"
_LOG_NBYTES: Final = 4 << 20
_SMALL_NBYTES: Final = 1 << 20
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS pages(slot INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL,
    depth INTEGER NOT NULL, checksum INTEGER NOT NULL, last_use INTEGER NOT NULL, tenant BLOB);
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""
_COLUMNS: Final = "slot, key, parent, depth, checksum, last_use, tenant"
"""`tenant` is of first pages whose path belongs to a tenant with a quota, and null for others. Maps that were made
before there were quotas lack it, and get it when they are opened; versions of that time can use a map that has it."""

_PACKED: Final = np.dtype(
    [
        ("key", "V32"),
        ("parent", "V32"),
        ("tenant", "V16"),
        ("depth", ">i8"),
        ("checksum", ">i8"),
        ("last_use", ">i8"),
        ("slot", ">i8"),
    ]
)
_IS_SOUND: Final = f"""typeof(key) = 'blob' AND length(key) = {KEY_NBYTES}
    AND typeof(parent) = 'blob' AND length(parent) = {KEY_NBYTES}
    AND (tenant IS NULL OR typeof(tenant) = 'blob' AND length(tenant) = {DIGEST_NBYTES})
    AND typeof(depth) = 'integer' AND depth BETWEEN 0 AND {2**31 - 1}
    AND typeof(checksum) = 'integer'
    AND typeof(last_use) = 'integer' AND last_use >= 0"""
"""Whether each value has its column's type and length; SQLite gives whatever a damaged file holds."""

_UNSOUND: Final = "f" * 2 * (_PACKED.itemsize - 8)
"""Stands for the values of a row that is not sound: its depth is -1."""

_PACK: Final = f"""group_concat(CASE WHEN {_IS_SOUND}
    THEN hex(key) || hex(parent) || hex(ifnull(tenant, x'{NOBODY.hex()}'))
        || printf('%016x%016x%016x', depth, checksum, last_use)
    ELSE '{_UNSOUND}' END || printf('%016x', slot), '')"""
"""All rows as one value, `_PACKED` in hex. Fetched one by one, rows stall the other threads: Python's sqlite3 gives the
interpreter's lock up for every row and takes it back at once, so a thread that waits for it is woken each time in vain,
and enough tuples start a garbage collection of the whole heap."""

_DISK: Final = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_NOMEM,
)

Int64Array = NDArray[np.int64]


class ForeignMap(Exception):  # noqa: N818 - named for what was found
    """The map belongs to another namespace, format or geometry than the folder it lies in."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the map of a folder must say of itself."""

    namespace: str
    page_nbytes: int
    slot_nbytes: int

    def notes(self) -> dict[str, str | int]:
        return {
            "format": FORMAT,
            "namespace": self.namespace,
            "page_nbytes": self.page_nbytes,
            "slot_nbytes": self.slot_nbytes,
        }


@dataclass(frozen=True, slots=True, eq=False)
class PageRows:
    """Rows of the map, one array a column: int64[n]; keys and parents as blobs of 32 bytes a page.

    tenants: 16 bytes a page, digests of names (`quotas.digest_of`), and zeros where none is known.
    """

    slots: Int64Array
    keys: bytes
    parents: bytes
    depths: Int64Array
    checksums: NDArray[np.uint64]
    last_uses: Int64Array
    tenants: bytes

    def __len__(self) -> int:
        return len(self.slots)

    def tenant_words(self) -> NDArray[np.uint64]:
        """uint64[n, 2], a view."""
        return np.frombuffer(self.tenants, np.uint64).reshape(-1, 2)

    def take(self, order: Int64Array) -> PageRows:
        """These of the rows, in this order."""
        keys = np.frombuffer(self.keys, np.uint64).reshape(-1, 4)
        parents = np.frombuffer(self.parents, np.uint64).reshape(-1, 4)
        return PageRows(
            self.slots[order],
            keys[order].tobytes(),
            parents[order].tobytes(),
            self.depths[order],
            self.checksums[order],
            self.last_uses[order],
            self.tenant_words()[order].tobytes(),
        )


NO_SLOTS: Final = np.empty(0, np.int64)
NO_ROWS: Final = PageRows(NO_SLOTS, b"", b"", NO_SLOTS, NO_SLOTS.view(np.uint64), NO_SLOTS, b"")


def joined(parts: Sequence[PageRows]) -> PageRows:
    """All rows of several runs, in order."""
    if not parts:
        return NO_ROWS
    return PageRows(
        np.concatenate([part.slots for part in parts]),
        b"".join(part.keys for part in parts),
        b"".join(part.parents for part in parts),
        np.concatenate([part.depths for part in parts]),
        np.concatenate([part.checksums for part in parts]),
        np.concatenate([part.last_uses for part in parts]),
        b"".join(part.tenants for part in parts),
    )


class Map:
    """The map of one store; made if it is not there.

    is_damaged: something could not be read, and was passed over. The map should be made anew.
    Raises ForeignMap, sqlite3.Error, OSError.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.is_damaged = False
        self.is_open = True
        self.path = folder / "map.db"
        (folder / _NEW).unlink(missing_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            self._db.text_factory = bytes
            for pragma in (
                "locking_mode=EXCLUSIVE",
                "journal_mode=WAL",
                "synchronous=NORMAL",
                "wal_autocheckpoint=256",
                "temp_store=MEMORY",
                f"journal_size_limit={_LOG_NBYTES}",
            ):
                self._db.execute(f"PRAGMA {pragma}").close()
            self._db.executescript(_SCHEMA)
            if b"tenant" not in [column[1] for column in self._db.execute("PRAGMA table_info(pages)")]:
                self._db.execute("ALTER TABLE pages ADD COLUMN tenant BLOB")
            self._check(identity)
            self._inode = os.stat(self.path)
        except BaseException:
            self._db.close()
            raise

    def _check(self, identity: Identity) -> None:
        expected = identity.notes()
        if self.note("format") is None and not self.is_damaged:
            self._in_transaction(lambda: self._set_notes(expected))
        for name, value in expected.items():
            found = self.note(name)
            if found != value and not self.is_damaged:
                raise ForeignMap(f"{self.path} says {name} = {found!r}, not {value!r}")

    # ---- notes ----

    def note(self, name: str) -> str | int | None:
        """A value of the table `meta`; None if there is none, or if it cannot be read."""
        try:
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            self._pass_over(error)
            return None
        if row is None:
            return None
        return row[0].decode(errors="replace") if isinstance(row[0], bytes) else row[0]

    def set_note(self, name: str, value: str | int) -> None:
        self._set_notes({name: value})

    def try_set_note(self, name: str, value: str | int) -> None:
        """The same, as far as damage allows it."""
        try:
            self.set_note(name, value)
        except sqlite3.Error as error:
            self._pass_over(error)

    def _set_notes(self, notes: Mapping[str, str | int]) -> None:
        _note(self._db, notes)

    # ---- changes ----

    def apply(self, deleted: Int64Array, saved: PageRows, touched: tuple[Int64Array, Int64Array], clock: int) -> None:
        """One transaction: delete these slots, then name these pages, then note (slots, last uses) of others."""
        self._in_transaction(lambda: self._apply(deleted, saved, touched, clock))
        if os.stat(f"{self.path}-wal").st_size > _LOG_NBYTES:
            self.checkpoint()

    def _apply(self, deleted: Int64Array, saved: PageRows, touched: tuple[Int64Array, Int64Array], clock: int) -> None:
        self._db.executemany("DELETE FROM pages WHERE slot = ?", zip(deleted.tolist()))
        _insert(self._db, saved)
        slots, last_uses = touched
        uses = zip(last_uses.tolist(), slots.tolist(), strict=True)
        self._db.executemany("UPDATE pages SET last_use = ? WHERE slot = ?", uses)
        self.set_note("clock", clock)

    def delete_beyond(self, n_slots: int) -> int:
        """Forget rows of slots outside 0 .. n_slots, as far as they can be read. Returns how many there were."""
        n_deleted = 0
        try:
            while slots := self.slots_beyond(n_slots, TRANSACTION_ROWS):
                self.delete(slots)
                n_deleted += len(slots)
        except sqlite3.Error as error:
            self._pass_over(error)
        return n_deleted

    def slots_beyond(self, n_slots: int, limit: int = -1) -> list[int]:
        """The slots outside 0 .. n_slots that have rows; at most `limit` of them, if that is not negative."""
        beyond = "SELECT slot FROM pages WHERE slot < 0 OR slot >= ? LIMIT ?"
        return [slot for (slot,) in self._db.execute(beyond, (n_slots, limit))]

    def delete(self, slots: Sequence[int]) -> None:
        """Forget the rows of these slots, in one transaction: at most `TRANSACTION_ROWS`."""
        self._in_transaction(lambda: self._db.executemany("DELETE FROM pages WHERE slot = ?", zip(slots)))

    def try_delete(self, slots: Sequence[int]) -> None:
        """The same, as far as damage allows it."""
        try:
            self.delete(slots)
        except sqlite3.Error as error:
            self._pass_over(error)

    def delete_all(self) -> None:
        self._db.execute("DELETE FROM pages")
        self.checkpoint()

    def _in_transaction(self, work: Callable[[], object]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _pass_over(self, error: sqlite3.Error) -> None:
        if not is_damage(error):
            raise error
        self.is_damaged = True

    # ---- look-ups ----

    def between(self, first: int, end: int) -> tuple[PageRows, Int64Array]:
        """The rows of the slots first .. end, and the slots of those that make no sense by themselves.

        Where the range cannot be read, each row is tried by itself.
        """
        try:
            return self._select("slot >= ? AND slot < ?", first, end)
        except sqlite3.Error as error:
            self._pass_over(error)
        found = [self._row(slot) for slot in range(first, end)]
        return joined([rows for rows, _ in found]), np.concatenate([unsound for _, unsound in found])

    def _row(self, slot: int) -> tuple[PageRows, Int64Array]:
        try:
            return self._select("slot = ?", slot)
        except sqlite3.Error as error:
            self._pass_over(error)
            return NO_ROWS, NO_SLOTS

    def _select(self, condition: str, *values: int | bytes) -> tuple[PageRows, Int64Array]:
        ((packed,),) = self._db.execute(f"SELECT {_PACK} FROM pages WHERE {condition}", values)
        return _unpacked(packed) if packed else (NO_ROWS, NO_SLOTS)

    def pages(self, keys: bytes) -> PageRows:
        """The rows of those of these pages that have one, in the order of `keys`; not those that cannot be read."""
        asked = _split(keys)
        try:
            rows, _ = self._select(f"key IN ({', '.join('?' * len(asked))})", *asked)
        except sqlite3.Error as error:
            self._pass_over(error)
            return joined([self.pages(key) for key in asked]) if len(asked) > 1 else NO_ROWS
        row_of = {key: row for row, key in enumerate(_split(rows.keys))}
        return rows.take(np.array([row_of[key] for key in asked if key in row_of], np.int64))

    # ---- the file ----

    @property
    def nbytes(self) -> int:
        """How long it is, without its log. Raises OSError."""
        return os.stat(self.path).st_size

    def is_in_place(self) -> bool:
        """Whether the map's path still leads to the file that is open; of one that is closed nothing is expected."""
        if not self.is_open:
            return True
        try:
            return os.path.samestat(os.stat(self.path), self._inode)
        except FileNotFoundError:
            return False

    def compact(self, nbytes: int) -> None:
        """Make the file smaller if it is larger than this and `_SMALL_NBYTES`: it keeps the size it once had."""
        if not self.is_damaged and os.stat(self.path).st_size > nbytes + _SMALL_NBYTES:
            try:
                self._db.execute("VACUUM")
                self.checkpoint()
            except sqlite3.Error as error:
                self._pass_over(error)

    def checkpoint(self) -> None:
        """Move the log into the map, and empty it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """The log goes with it, if the disk allows."""
        self.is_open = False
        self._db.close()


class NewMap:
    """A map that is written beside the one whose place it will take, so that a crash on the way leaves that one.

    Raises sqlite3.Error, OSError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _NEW
        self._path.unlink(missing_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=OFF", "synchronous=OFF"):
                self._db.execute(f"PRAGMA {pragma}").close()
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")
        except BaseException:
            self.close()
            raise

    def add(self, rows: PageRows) -> None:
        _insert(self._db, rows)

    def complete(self, notes: Mapping[str, str | int]) -> None:
        """After this it is whole, and on the disk."""
        _note(self._db, notes)
        self._db.execute("COMMIT")
        self._db.close()
        _sync(self._path)

    def replace(self, old: Map, identity: Identity) -> Map:
        """Close `old`, take its place, and be opened. Should that fail, `old` is closed, and either may lie there."""
        old.close()
        _delete_logs(self._folder)  # SQLite would play the old log into the new map
        os.replace(self._path, old.path)
        _sync(self._folder)
        return Map(self._folder, identity)

    def close(self) -> None:
        """It is not wanted any more, unless it has taken the other's place."""
        self._db.close()


def delete_map(folder: Path) -> None:
    """Remove a map that is not open. Raises OSError."""
    (folder / "map.db").unlink(missing_ok=True)
    _delete_logs(folder)


def _delete_logs(folder: Path) -> None:
    for name in ("map.db-wal", "map.db-shm", "map.db-journal"):
        (folder / name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _insert(db: sqlite3.Connection, rows: PageRows) -> None:
    columns = zip(
        rows.slots.tolist(),
        _split(rows.keys),
        _split(rows.parents),
        rows.depths.tolist(),
        rows.checksums.view(np.int64).tolist(),
        rows.last_uses.tolist(),
        (None if tenant == NOBODY else tenant for tenant in _split(rows.tenants, DIGEST_NBYTES)),
        strict=True,
    )
    db.executemany(f"INSERT OR REPLACE INTO pages({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", columns)


def _note(db: sqlite3.Connection, notes: Mapping[str, str | int]) -> None:
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", notes.items())


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is broken, rather than what it lies on: a damaged one gives errors of almost every kind."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    return code != sqlite3.SQLITE_OK and code not in _DISK


def _split(blob: bytes, nbytes: int = KEY_NBYTES) -> list[bytes]:
    return [blob[at : at + nbytes] for at in range(0, len(blob), nbytes)]


def _unpacked(packed: bytes) -> tuple[PageRows, Int64Array]:
    """The sound rows, and the slots of the others."""
    rows = np.frombuffer(bytes.fromhex(packed.decode()), _PACKED)
    is_sound = rows["depth"] >= 0
    unsound, rows = rows[~is_sound], rows[is_sound]
    columns = PageRows(
        rows["slot"].astype(np.int64),
        rows["key"].tobytes(),
        rows["parent"].tobytes(),
        rows["depth"].astype(np.int64),
        rows["checksum"].astype(np.int64).view(np.uint64),
        rows["last_use"].astype(np.int64),
        rows["tenant"].tobytes(),
    )
    return columns, unsound["slot"].astype(np.int64)
