"""An open store: its folder and locks, its data files, map and books, and what is known of the disk's health.

One lock guards the books (`pages`), the counters and the flags here. It is held for some ten microseconds at a time,
never over I/O, SQLite or another lock: decide under the lock, act outside it. `files` may be used by every I/O thread,
`map` by the keeper's thread only.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.breaker import Breaker
from hicache.checksum import namespace_seed
from hicache.logs import CHANGE, get_logger
from hicache.quotas import Quotas
from hicache.ssd.counters import Counters
from hicache.ssd.directory import StoreFolder
from hicache.ssd.endurance import COMMIT_NBYTES, MAP_PAGE_NBYTES, Endurance, pages_nbytes, touches_nbytes
from hicache.ssd.locks import Lock
from hicache.ssd.map import TRANSACTION_ROWS, Identity, Int64Array, Map, is_damage
from hicache.ssd.pages import Pages, Slots
from hicache.ssd.sizes import Geometry
from hicache.workers import Workers
from transfer.files import ALIGNMENT_NBYTES, SegmentFiles, System

logger = get_logger(__name__)

N_RESERVED = 1 << 19
"""Slots whose books have their memory from the start: 90 MB, in 30 ms or more, or the first stores wait for it."""

READ_NBYTES = 2 << 20
WRITE_NBYTES = 3 << 20
PIECE_PAGES = 64
"""About so much an I/O thread moves before it takes the next piece of work. Writes have fewer threads and no hurry."""


_OF_A_SECTOR: Final = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ})
"""How a disk refuses a sector. Other errors are of the file system or the way to it."""


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """What a store is opened with, again and again if it is deleted under us. See `SsdTier.open`.

    quotas: by tenant, so many bytes of `limit_nbytes`, as they were at first.
    endurance_nbytes: this member's own part of the budget; None: there is none.
    device: the file system that it was on when it was first opened, as `st_dev`; None before that.
    """

    path: Path
    folder: StoreFolder
    identity: Identity
    slab: NDArray[np.uint8]
    limit_nbytes: int
    server: str
    eviction: str
    system: System
    quotas: Mapping[str, int] = field(default_factory=dict)
    endurance_nbytes: int | None = None
    device: int | None = None

    @property
    def n_members(self) -> int:
        return self.folder.n_ranks


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What is open of a store. Belongs to the volume, which closes it. Closing it again does nothing."""

    geometry: Geometry
    locks: tuple[Lock, Lock]
    files: SegmentFiles
    map: Map

    def close(self) -> None:
        """Raises sqlite3.Error, OSError; the locks are released all the same."""
        try:
            self.map.close()
            self.files.close()
        finally:
            for lock in self.locks:
                lock.release()


class Volume:
    """See the module's text."""

    def __init__(self, spec: Spec, opened: Opened, workers: Workers, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.lock = threading.Lock()
        self.workers = workers
        self.clock = clock
        self.counters = Counters()
        self.reads = Breaker(clock)
        self.writes = Breaker(clock)
        self.seed = namespace_seed(spec.identity.namespace)
        self.memory: memoryview = spec.slab.reshape(-1).data
        self.is_filling = True
        self.wants_growth = False
        self.grow_again_at_s = 0.0
        self.opened = opened
        self.quotas = _quotas(spec, opened)
        self.pages = _books(spec, opened, self.quotas, clock)
        limit_nbytes = spec.endurance_nbytes
        self.endurance = None if limit_nbytes is None else Endurance(limit_nbytes, clock)
        self._suspects: set[int] = set()
        self._told_bad = False
        self._probing = threading.Lock()

    @property
    def geometry(self) -> Geometry:
        return self.opened.geometry

    @property
    def files(self) -> SegmentFiles:
        return self.opened.files

    @property
    def map(self) -> Map:
        return self.opened.map

    def pieces(self, n_pages: int, nbytes: int) -> list[tuple[int, int]]:
        """Half-open ranges of n pages, about equally long and of about so many bytes, each for one I/O thread."""
        wanted = max(1, min(PIECE_PAGES, nbytes // self.geometry.slot_nbytes))
        n_pieces = max(1, round(n_pages / wanted)) if n_pages else 0
        return [(n_pages * i // n_pieces, n_pages * (i + 1) // n_pieces) for i in range(n_pieces)]

    @property
    def may_grow(self) -> bool:
        """Whether another segment may be had. What the directory has no room for is asked for again after a while."""
        return self.files.n_segments < self.geometry.max_segments and self.clock() >= self.grow_again_at_s

    @property
    def n_to_come(self) -> int:
        """Slots that are not in the books yet: of segments that may still be had, or that have just been made."""
        return (self.pages.n_slots if self.may_grow else self.files.n_slots) - self.pages.n_live

    # ---- the endurance budget; under the lock ----

    def allowed_pages(self, n_pages: int) -> int:
        """How many of these may be stored now."""
        return n_pages if self.endurance is None else self.endurance.allowed_pages(n_pages, self.geometry.slot_nbytes)

    def pay_pages(self, n_pages: int) -> None:
        """So many are about to be written, in one batch."""
        self.pay(pages_nbytes(n_pages, self.geometry.slot_nbytes))

    @property
    def allows_touches(self) -> bool:
        """Whether a transaction may note last uses, however scattered they are in the map."""
        most_nbytes = TRANSACTION_ROWS * MAP_PAGE_NBYTES + COMMIT_NBYTES
        return self.endurance is None or self.endurance.left_nbytes >= most_nbytes

    def pay_touches(self, slots: Int64Array) -> None:
        self.pay(touches_nbytes(slots))

    def pay(self, nbytes: int) -> None:
        if self.endurance is not None:
            self.endurance.pay(nbytes)

    # ---- bytes ----

    def payload(self, slab_slot: int) -> memoryview:
        """The page in a slot of the slab."""
        start = slab_slot * self.geometry.slot_nbytes
        return self.memory[start : start + self.geometry.page_nbytes]

    def read(self, file_slots: Slots, slab_slots: Slots) -> NDArray[np.bool_]:
        """Claimed file slots into the slab. Returns which are whole. Raises OSError if the disk fails. Blocks."""
        complete = np.zeros(len(file_slots), np.bool_)

        def move(part: slice) -> None:
            complete[part] = self.files.read(file_slots[part], slab_slots[part])

        refused = self._move(file_slots, move, self.files.try_read)
        with self.lock:
            self.counters.read_errors += int(np.count_nonzero(refused))
        return complete

    def write(self, file_slots: Slots, slab_slots: Slots) -> NDArray[np.bool_]:
        """The slab into incoming file slots. Returns which were written. Raises OSError if the disk fails. Blocks."""

        def move(part: slice) -> None:
            self.files.write(file_slots[part], slab_slots[part])

        refused = self._move(file_slots, move, self._try_file)
        with self.lock:
            self.counters.write_errors += int(np.count_nonzero(refused))
        return ~refused

    def _move(self, slots: Slots, move: Callable[[slice], None], try_disk: Callable[[], None]) -> NDArray[np.bool_]:
        """All together, or if that fails each by itself. Returns which slots the disk refuses: they are bad then.

        Raises OSError if `try_disk` does, or if the disk refuses most of them, unless it has done so before.
        """
        refused = np.zeros(len(slots), np.bool_)
        try:
            move(slice(0, len(slots)))
        except OSError as error:
            if error.errno not in _OF_A_SECTOR:
                raise
            for at in range(len(slots)):
                try:
                    move(slice(at, at + 1))
                except OSError as again:
                    refused[at] = True
                    if again.errno in _OF_A_SECTOR and not self._are_most(slots[refused].tolist(), len(slots)):
                        continue
                    try_disk()
                    self._suspects.update(slots[refused].tolist())
                    raise error from again
            if refused.any():
                try_disk()
                self._spoil(slots[refused], error)
        return refused

    def _are_most(self, refused: list[int], n_slots: int) -> bool:
        n_known = len(self._suspects.intersection(refused))
        return 2 * len(refused) > max(2, n_slots) and 2 * n_known < len(refused)

    def _spoil(self, slots: Slots, error: OSError) -> None:
        with self.lock:
            self.pages.spoil(slots)
        if not self._told_bad:
            self._told_bad = True
            store = self.spec.folder.path
            logger.warning("sgl_lmcache: the disk refuses parts of %s, which are used no more: %s", store, error)

    # ---- another store in the place of this one ----

    def release(self) -> bool:
        """Close the store and forget its pages. Returns False, with nothing changed, while one is read or written.

        Until `renew` nothing is found here and nothing starts. Raises sqlite3.Error, OSError. Blocks.
        """
        empty = Pages(self.geometry.n_slots, self.spec.eviction, self.quotas, time_s=self.clock)
        with self.lock:
            if not self.pages.is_quiet:
                return False
            self.pages, self.is_filling = empty, True
        self.opened.close()
        return True

    def renew(self, opened: Opened) -> None:
        """Go on with this store, which is still to be filled."""
        pages = _books(self.spec, opened, self.quotas, self.clock)
        with self.lock:
            self.quotas.resize(opened.geometry.n_slots)
            self.opened, self.pages = opened, pages
        self._suspects.clear()

    def replace_map(self, new: Map) -> None:
        self.opened = replace(self.opened, map=new)

    # ---- failures ----

    def read_failed(self, error: Exception) -> None:
        with self.lock:
            self.counters.read_errors += 1
        self._give_up(f"cannot be read: {error}", self.reads)

    def write_failed(self, error: Exception) -> None:
        with self.lock:
            self.counters.write_errors += 1
        self._give_up(f"cannot be written: {error}", self.writes)

    def map_failed(self, error: Exception) -> None:
        with self.lock:
            self.counters.map_errors += 1
        if isinstance(error, sqlite3.Error) and is_damage(error):
            self.map.is_damaged = True
        self._give_up(f"has a map that cannot be used: {error}", self.writes)

    def went_away(self, error: Exception) -> None:
        """The folder is not what was opened any more: nothing of it may be served."""
        self._give_up(f"is not usable any more: {error}", self.reads, self.writes)

    def _give_up(self, what: str, *breakers: Breaker) -> None:
        """The first failure is told; what waits for the disk is withdrawn."""
        sentence = f"the store {self.spec.folder.path} {what}"
        tripped = [breaker for breaker in breakers if breaker.trip(sentence)]
        if tripped:
            logger.error("sgl_lmcache: SSD tier: %s; going on without it, and trying again", sentence, extra=CHANGE)
        self.workers.withdraw(reads=self.reads in breakers, writes=self.writes in breakers)

    @property
    def ails(self) -> str:
        """What is wrong; empty if nothing is."""
        return self.reads.reason or self.writes.reason

    # ---- trials ----

    def check_in_place(self) -> None:
        """Raises OSError if the files that are open are not the ones that lie in the folder. Blocks."""
        if not self.is_in_place():
            raise OSError(errno.ESTALE, "it was deleted or replaced")

    def is_in_place(self) -> bool:
        """Whether the files that are open lie in the folder. Raises OSError if that cannot be told. Blocks."""
        locked = all(lock.is_in_place() for lock in self.opened.locks)
        return locked and self.map.is_in_place() and self.files.are_in_place()

    def try_writes(self) -> None:
        """Write, sync, read back and remove a file, and write to the map. Raises OSError, sqlite3.Error. Blocks."""
        self._try_file()
        self.map.try_set_note("tried_at_tick", self.pages.clock)

    def try_reads(self) -> None:
        """Read a block of the data files. Raises OSError. Blocks."""
        self.files.try_read()

    def _try_file(self) -> None:
        system, path = self.spec.system, self.spec.folder.path / "probe"
        wanted = os.urandom(ALIGNMENT_NBYTES)
        with self._probing:
            fd = system.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            try:
                found = bytearray(len(wanted))
                system.pwritev(fd, [memoryview(wanted)], 0)
                system.fdatasync(fd)
                system.preadv(fd, [memoryview(found)], 0)
                if found != wanted:
                    raise OSError(errno.EIO, "what was written did not come back")
            finally:
                system.close(fd)
                system.unlink(path)


def _quotas(spec: Spec, opened: Opened) -> Quotas:
    """Each is the same part of the slots as of the bytes. Raises QuotaError."""
    n_slots = opened.geometry.n_slots
    quotas = Quotas(n_slots)
    quotas.update({tenant: n_slots * nbytes // spec.limit_nbytes for tenant, nbytes in spec.quotas.items()})
    return quotas


def _books(spec: Spec, opened: Opened, quotas: Quotas, clock: Callable[[], float]) -> Pages:
    """Empty ones, with memory for what the fill will find, and for what most stores will ever hold."""
    n_slots = opened.geometry.n_slots
    n_expected = max(opened.files.n_slots, min(n_slots, N_RESERVED))
    return Pages(n_slots, spec.eviction, quotas, n_expected, clock)
