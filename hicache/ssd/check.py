"""An offline scan of stores: every page that a map names is read and verified, and what is wrong is named.

A store that is open is left alone: its lock is taken for the scan. With `fix` the map forgets what is damaged and
what hangs below it; a map that cannot be opened at all is deleted, and its store starts empty. A map that opens and is
damaged is left as it is, since the next start of its server saves what can be read of it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from hicache.checksum import checksum, namespace_seed, seeds
from hicache.ssd.directory import FORMAT, StoreFolder, data_files, is_own_file, stores_in
from hicache.ssd.locks import N_TRIES, StoreError, attempts, lock_store
from hicache.ssd.map import TRANSACTION_ROWS, ForeignMap, Identity, Map, PageRows, delete_map, is_damage
from hicache.tier import ROOT_KEY
from radix import KEY_NBYTES
from transfer.files import segment_of

_CHUNK_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong. key, slot: of the page, where it is about one and they are known."""

    what: str
    key: bytes | None = None
    slot: int | None = None


@dataclass(slots=True)
class Report:
    """What a scan found in one store. skipped: why it was not scanned, or empty.

    n_pages: verified or found damaged. n_dropped: rows that `fix` took out of the map.
    n_fixed: how much of the damage `fix` has put right.
    """

    folder: Path
    skipped: str = ""
    n_pages: int = 0
    nbytes: int = 0
    n_dropped: int = 0
    n_fixed: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.damage

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is wrong any more."""
        return self.n_fixed == len(self.damage)


Progress = Callable[[Path, int], None]
"""Told (store, slots done) every 8 MiB."""


def no_progress(folder: Path, n_done: int) -> None:
    """Tells nobody."""


def check_path(path: Path, *, fix: bool, progress: Progress = no_progress) -> Iterator[Report]:
    """Scan all stores below a directory, one after another. Raises StoreError if it is no such directory."""
    if not path.is_dir():
        raise StoreError(f"{path} is not a folder: name the path of an SSD tier")
    for store in stores_in(path):
        yield check_store(store, fix=fix, progress=progress)


def check_store(store: StoreFolder, *, fix: bool, progress: Progress = no_progress) -> Report:
    """Scan one store. Blocks for as long as reading it takes; holds one chunk of it in memory. Raises OSError."""
    if store.format != FORMAT:
        return Report(store.path, skipped=f"it has format {store.format}, this version reads {FORMAT}")
    for _ in attempts(N_TRIES):
        lock = lock_store(store.path)
        if lock is not None:
            try:
                return _Scan(store, fix, progress).run()
            finally:
                lock.release()
    return Report(store.path, skipped="it is in use")


class _Scan:
    """One scan, under the store's lock."""

    def __init__(self, store: StoreFolder, fix: bool, progress: Progress) -> None:
        self._store = store
        self._fix = fix
        self._progress = progress
        self._report = Report(store.path)
        self._seed = namespace_seed(store.path.parent.name)
        self._good: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}
        self._dropped: list[int] = []
        self._page_nbytes = 0
        self._segment_slots = 0

    def run(self) -> Report:
        if not (self._store.path / "map.db").exists():
            if data_files(self._store.path):
                self._found("there is no map: what its files hold cannot be found, and its server starts empty")
            return self._report
        try:
            sizes = self._read_sizes()
            if sizes is not None and not all(sizes):
                self._found("its map does not say how large pages and files are: its server starts empty")
                return self._report
            self._page_nbytes, self._segment_slots = sizes or (self._store.slot_nbytes, 1)
            identity = Identity(self._store.path.parent.name, self._page_nbytes, self._store.slot_nbytes)
            store_map = Map(self._store.path, identity)
        except ForeignMap as error:
            self._found(f"{error}: its server starts empty")
            return self._report
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return self._unusable(error)
        try:
            if sizes is not None:
                self._scan(store_map)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._found(f"the map cannot be read: {error}")
        finally:
            with contextlib.suppress(sqlite3.Error):
                store_map.close()
        if store_map.is_damaged:
            self._found("a part of the map cannot be read: the next start of its server makes it anew from the rest")
        return self._report

    def _read_sizes(self) -> tuple[int, int] | None:
        """Bytes a page and slots a file, 0 for what the map does not say; None if it opens, and cannot be asked."""
        with contextlib.closing(sqlite3.connect(self._store.path / "map.db")) as db:
            db.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            try:
                notes = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('page_nbytes', 'segment_slots')"))
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if isinstance(error, sqlite3.Error) and not is_damage(error):
                    raise
                return None
        page_nbytes, segment_slots = (
            size if isinstance(size, int) and size > 0 else 0
            for size in (notes.get("page_nbytes"), notes.get("segment_slots"))
        )
        return page_nbytes, segment_slots

    def _unusable(self, error: sqlite3.Error | UnicodeDecodeError) -> Report:
        """The next start of its server would delete the map too, unless it is the disk that refuses it."""
        self._found(f"the map cannot be used: {error}")
        if self._fix and (isinstance(error, UnicodeDecodeError) or is_damage(error)):
            delete_map(self._store.path)
            self._report.n_fixed += 1
        return self._report

    def _found(self, what: str, key: bytes | None = None, slot: int | None = None) -> None:
        self._report.damage.append(Damage(what, key, slot))

    # ---- pages ----

    def _scan(self, store_map: Map) -> None:
        segments = 0
        while (data := self._store.path / f"data.{segments}").exists():
            with data.open("rb", buffering=0) as file:
                self._scan_segment(store_map, file, segments * self._segment_slots)
            segments += 1
        self._find_outside(store_map, segments)
        self._find_orphans()
        if self._fix and not store_map.is_damaged:
            for at in range(0, len(self._dropped), TRANSACTION_ROWS):
                dropped = self._dropped[at : at + TRANSACTION_ROWS]
                store_map.delete(dropped)
                self._report.n_dropped += len(dropped)
                self._report.n_fixed += len(dropped)

    def _scan_segment(self, store_map: Map, file: FileIO, base: int) -> None:
        slot_nbytes = self._store.slot_nbytes
        step = max(1, _CHUNK_NBYTES // slot_nbytes)
        for first in range(0, self._segment_slots, step):
            end = min(first + step, self._segment_slots)
            rows, unsound = store_map.between(base + first, base + end)
            for slot in unsound.tolist():
                self._damaged(None, slot, "its row in the map makes no sense")
            try:
                data = os.pread(file.fileno(), (end - first) * slot_nbytes, first * slot_nbytes)
            except OSError as error:
                self._found(f"slots {base + first} to {base + end} cannot be read: {error}")
                data = b""
            self._verify(rows, memoryview(data), base + first)
            os.posix_fadvise(file.fileno(), first * slot_nbytes, len(data), os.POSIX_FADV_DONTNEED)
            self._progress(self._store.path, base + end)

    def _verify(self, rows: PageRows, data: memoryview, base: int) -> None:
        page_seeds, wanted = seeds(rows.keys, self._seed).tolist(), rows.checksums.tolist()
        for at, slot in enumerate(rows.slots.tolist()):
            span = slice(KEY_NBYTES * at, KEY_NBYTES * (at + 1))
            key = rows.keys[span]
            start = (slot - base) * self._store.slot_nbytes
            payload = data[start : start + self._page_nbytes]
            self._report.n_pages += 1
            self._report.nbytes += self._page_nbytes
            if len(payload) < self._page_nbytes:
                self._damaged(key, slot, "its bytes are missing, or cannot be read")
            elif checksum(payload, page_seeds[at]) != wanted[at]:
                self._damaged(key, slot, "its bytes do not match its checksum and name")
            else:
                self._good[key] = slot
                self._parents[key] = rows.parents[span]

    def _damaged(self, key: bytes | None, slot: int, what: str) -> None:
        self._found(what, key, slot)
        self._dropped.append(slot)

    # ---- rows ----

    def _find_outside(self, store_map: Map, n_segments: int) -> None:
        for slot in store_map.slots_beyond(n_segments * self._segment_slots):
            self._damaged(None, slot, "the map names it, and no file has it")
        for name in sorted(os.listdir(self._store.path)):
            if not is_own_file(name) or (segment_of(name) or 0) >= max(1, n_segments):
                self._found(f"a file that does not belong to the store: {name}")

    def _find_orphans(self) -> None:
        """Good pages whose path to the root is not whole: they cannot be reached, so `fix` drops them too."""
        whole, lost = {ROOT_KEY}, set[bytes]()
        for key in self._good:
            path: dict[bytes, None] = {}
            while key not in whole and key in self._parents and key not in lost and key not in path:
                path[key] = None
                key = self._parents[key]
            (whole if key in whole else lost).update(path)
        for key in sorted(lost, key=self._good.__getitem__):
            self._damaged(key, self._good[key], "a page above it is damaged or missing")
