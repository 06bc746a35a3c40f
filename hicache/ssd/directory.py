"""The directory that all stores of a server share: names, the cap, and stores that nobody uses any more.

    directory/<namespace>/r<i>of<n>-v<format>-<slot bytes>/{lock, map.db, data.0, data.1, ...}

So a store is found again only by a server that would read its bytes in the same way. All that lies under the directory
counts against the cap, ours or not. Where room is lacking, stores of ours that no process has locked are deleted, the
longest unused first, a whole store at a time. Nothing whose name is not ours is ever touched.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Final

from hicache.logs import get_logger
from hicache.ssd.locks import StoreError, lock_store
from hicache.ssd.sizes import MIN_SLOTS, limit_for, slots_within
from transfer.files import segment_of

logger = get_logger(__name__)

FORMAT: Final = 1
"""Of the map and the data files: one more whenever an old store could be misread."""

_STORE = re.compile(r"r(0|[1-9]\d{0,9})of([1-9]\d{0,9})-v([1-9]\d{0,9})-([1-9]\d{0,9})")
_NAMESPACE = re.compile(r"[0-9a-f]{16,128}")
_ALLOWED = re.compile(r"lock|map\.(db|new)(-wal|-shm|-journal)?|probe")
_told_undeletable: set[Path] = set()


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder that is named like a store of ours."""

    path: Path
    rank: int
    n_ranks: int
    format: int
    slot_nbytes: int

    def is_sibling_of(self, other: StoreFolder) -> bool:
        """Whether it may be what another rank of the same server left behind, and is about to open again."""
        mine = (self.n_ranks, self.format, self.slot_nbytes)
        return self.rank != other.rank and mine == (other.n_ranks, other.format, other.slot_nbytes)

    def last_use_s(self) -> float:
        """When its map was last written, in seconds of the wall clock; 0 without a map."""
        times = [_stat(self.path / name) for name in ("map.db", "map.db-wal")]
        return max((found.st_mtime for found in times if found), default=0.0)


def store_folder(path: Path, namespace: str, member: tuple[int, int], slot_nbytes: int) -> StoreFolder:
    """Where a member keeps its store. Raises ValueError for a namespace that is not hex digits."""
    if not _NAMESPACE.fullmatch(namespace):
        raise ValueError(f"a namespace is 16 to 128 hex digits, not {namespace!r}")
    rank, n_ranks = member
    name = f"r{rank}of{n_ranks}-v{FORMAT}-{slot_nbytes}"
    return StoreFolder(path / namespace / name, rank, n_ranks, FORMAT, slot_nbytes)


def stores_in(path: Path) -> Iterator[StoreFolder]:
    """All folders that are named like stores of ours, of any format."""
    for namespace in _folders_in(path):
        if _NAMESPACE.fullmatch(namespace.name):
            for folder in _folders_in(namespace):
                if match := _STORE.fullmatch(folder.name):
                    yield StoreFolder(folder, *(int(number) for number in match.groups()))


def _folders_in(path: Path) -> list[Path]:
    """None where they cannot be listed."""
    try:
        with os.scandir(path) as found:
            return sorted(Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def is_own_file(name: str) -> bool:
    """Whether a file in a store's folder is the store's, going by its name."""
    return bool(_ALLOWED.fullmatch(name)) or segment_of(name) is not None


def data_files(folder: Path) -> list[Path]:
    """The data files of a store: `data.0` and the next ones, up to the first that is missing."""
    found = {name for name in os.listdir(folder) if segment_of(name) is not None}
    return [folder / f"data.{i}" for i in takewhile(lambda i: f"data.{i}" in found, count())]


def used_nbytes(path: Path) -> int:
    """What is allocated under a folder: everything, ours or not, itself included."""
    total = 0
    for folder, _, names in os.walk(path):
        found = [_stat(Path(folder)), *(_stat(Path(folder, name)) for name in names)]
        total += sum(512 * status.st_blocks for status in found if status)
    return total


def allowed_nbytes(folder: Path) -> int:
    """What is allocated of that which a store's allowance pays for: its map, log and lock, and the folder itself."""
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    found = [_stat(folder), *(_stat(folder / name) for name in names if _ALLOWED.fullmatch(name))]
    return sum(512 * status.st_blocks for status in found if status)


def _stat(path: Path) -> os.stat_result | None:
    """None for what is not there, or cannot be looked at."""
    try:
        return path.lstat()
    except OSError:
        return None


# ---- what is checked before anything is opened ----


def check_directory(path: Path, limit_nbytes: int) -> None:
    """Raises StoreError unless `path` is, or can be made, a folder that takes files and has room for the cap.

    Makes the folder, 0700, and leaves nothing else behind. What our stores occupy counts as room.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = path / f"probe.{os.getpid()}"
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        probe.unlink()
        free = os.statvfs(path)
    except OSError as error:
        raise _refusal(path, error) from error
    room = free.f_bavail * free.f_frsize + used_nbytes(path)
    if room < limit_nbytes:
        raise StoreError(
            f"{path} has room for {room:,} bytes, the capacity is {limit_nbytes:,}: lower it, or free space there"
        )


def check_limit(path: Path, limit_nbytes: int, n_members: int, slot_nbytes: int) -> None:
    """Raises StoreError if a cap is too small to be of use."""
    if slots_within(limit_nbytes, n_members, slot_nbytes) < MIN_SLOTS:
        raise StoreError(
            f"{limit_nbytes:,} bytes in {path} are too few for pages of {slot_nbytes:,} bytes on {n_members} ranks: at "
            f"least {limit_for(MIN_SLOTS, n_members, slot_nbytes):,} are needed"
        )


def _refusal(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return StoreError(f"{path} is not a folder, and cannot be made one: name a folder, or a place for one")
    if error.errno == errno.EROFS:
        return StoreError(f"{path} is on a read-only file system: name a folder that can be written")
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreError(f"{path} cannot be written by this user ({error.strerror}): name a folder that can")
    return StoreError(f"{path} cannot be used ({error.strerror}): name a folder that can be written")


# ---- room ----


def reclaim(path: Path, own: StoreFolder, wanted_nbytes: int, *, spare_siblings: bool) -> int:
    """Delete stores that nobody has open until `wanted_nbytes` are free; returns how many are.

    The longest unused goes first; none goes if all together are not enough. spare_siblings: keep what other ranks of
    this server may be about to open. The caller holds the directory's growth lock.

    A store that cannot be deleted is told once, and left alone from then on.
    """
    freed = 0
    stores = [
        store
        for store in stores_in(path)
        if store.path != own.path
        and store.path not in _told_undeletable
        and not (spare_siblings and store.is_sibling_of(own))
    ]
    if sum(_under_lock(store, _deletable_nbytes) for store in stores) < wanted_nbytes:
        return 0
    for store in sorted(stores, key=StoreFolder.last_use_s):
        if freed >= wanted_nbytes:
            break
        freed += _under_lock(store, _delete)
    return freed


def _under_lock(store: StoreFolder, work: Callable[[StoreFolder], int]) -> int:
    """What `work` returns; 0 if the store is open, or the system refuses."""
    try:
        lock = lock_store(store.path)
        if lock is None:
            return 0
        try:
            return work(store)
        finally:
            lock.release()
    except FileNotFoundError:
        return 0
    except OSError as error:
        _tell_undeletable(store, error)
        return 0


def _tell_undeletable(store: StoreFolder, error: OSError) -> None:
    _told_undeletable.add(store.path)
    logger.warning("sgl_lmcache: %s, which no server uses, cannot be deleted: %s", store.path, error)


def _own_files(store: StoreFolder) -> list[Path]:
    """The lock last: as long as it is there, nobody else can take the store."""
    names = [name for name in os.listdir(store.path) if is_own_file(name)]
    return [store.path / name for name in sorted(names, key=lambda name: (name == "lock", name))]


def _deletable_nbytes(store: StoreFolder) -> int:
    return sum(512 * status.st_blocks for file in _own_files(store) if (status := _stat(file)))


def _delete(store: StoreFolder) -> int:
    """Returns how many bytes that freed. The store is locked."""
    nbytes = used_nbytes(store.path)
    try:
        for file in _own_files(store):
            file.unlink()
        _remove_if_empty(store.path)
        _remove_if_empty(store.path.parent)
    except OSError as error:
        _tell_undeletable(store, error)
        return nbytes - used_nbytes(store.path)
    freed = nbytes - used_nbytes(store.path)
    logger.warning("sgl_lmcache: deleted %s, which no server uses, to make room: %s bytes", store.path, f"{freed:,}")
    return freed


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
