"""Opening a store: checks, locks, sizes, and what has to go before anything is added.

Nothing here reads the pages' rows, so it takes milliseconds whatever the store holds; `fill.py` reads them afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from pathlib import Path

from hicache.logs import get_logger
from hicache.ssd.directory import (
    allowed_nbytes,
    check_directory,
    check_limit,
    data_files,
    reclaim,
    stores_in,
    used_nbytes,
)
from hicache.ssd.endurance import smallest_limit
from hicache.ssd.locks import N_TRIES, Lock, StoreError, attempts, growing, lock_directory, lock_store
from hicache.ssd.map import ForeignMap, Map, delete_map, is_damage
from hicache.ssd.sizes import MAP_SLOT_NBYTES, Geometry, max_segments_for, segment_slots_for, slots_within
from hicache.ssd.volume import Opened, Spec
from transfer.files import SegmentFiles

logger = get_logger(__name__)


def open_store(spec: Spec) -> Opened:
    """Lock the directory and the store, make what is missing, and drop what exceeds the cap.

    Raises StoreError for what the user can put right, and OSError or sqlite3.Error for what the disk refuses then.
    Blocks.
    """
    check_limit(spec.path, spec.limit_nbytes, spec.n_members, spec.identity.slot_nbytes)
    _check_endurance(spec)
    _check_file_system(spec)
    check_directory(spec.path, spec.limit_nbytes)
    with contextlib.ExitStack() as undo:
        directory_lock = lock_directory(spec.path, spec.server)
        undo.callback(directory_lock.release)
        store_lock = _lock_own(spec)
        undo.callback(store_lock.release)
        store_map, geometry, files = _open_store(spec)
        undo.callback(store_map.close)
        undo.callback(files.close)
        shrink(spec, geometry)
        undo.pop_all()
    return Opened(geometry, (directory_lock, store_lock), files, store_map)


def _check_endurance(spec: Spec) -> None:
    least = smallest_limit(spec.identity.slot_nbytes)
    if spec.endurance_nbytes is not None and spec.endurance_nbytes < least:
        raise StoreError(
            f"an endurance of {spec.endurance_nbytes:,} bytes a day and rank would never allow a page of "
            f"{spec.identity.slot_nbytes:,} bytes to be written to {spec.path}: give at least {least:,} for each of "
            f"{spec.n_members} ranks"
        )


def _check_file_system(spec: Spec) -> None:
    """Opened again, a store must not come to lie on the file system that its own was mounted on. Raises OSError."""
    if spec.device is None or (spec.folder.path / "map.db").exists():
        return
    nearest = next(folder for folder in (spec.path, *spec.path.parents) if folder.exists())
    if nearest.stat().st_dev != spec.device:
        raise OSError(errno.ENODEV, "it is not on the file system that it was on at the start", str(spec.path))


def _lock_own(spec: Spec) -> Lock:
    folder = spec.folder.path
    for _ in attempts(N_TRIES):
        with contextlib.suppress(FileNotFoundError):  # it was just being deleted by another rank, to make room
            folder.parent.mkdir(exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            lock = lock_store(folder)
            if lock is not None:
                return lock
    raise StoreError(
        f"{folder} is open already: another process has it, or another tier or rank of the same number in this one; "
        f"stop it, or wait until `sgl-lmcache ssd check` is done"
    )


def _open_store(spec: Spec) -> tuple[Map, Geometry, SegmentFiles]:
    """A map that cannot be used at all is deleted; one that is damaged in parts is made anew by the fill."""
    folder = spec.folder.path
    try:
        return _open_map_and_files(spec)
    except ForeignMap as error:
        logger.warning("sgl_lmcache: %s: the store starts empty", error)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.Error) and not is_damage(error):
            raise
        logger.warning("sgl_lmcache: the map of %s cannot be opened (%s): the store starts empty", folder, error)
    delete_map(folder)
    return _open_map_and_files(spec)


def _open_map_and_files(spec: Spec) -> tuple[Map, Geometry, SegmentFiles]:
    store_map = Map(spec.folder.path, spec.identity)
    try:
        return store_map, *_open_files(spec, store_map)
    except BaseException:
        store_map.close()
        raise


def _open_files(spec: Spec, store_map: Map) -> tuple[Geometry, SegmentFiles]:
    """The data files, as far as the share reaches. Rows of what lies beyond leave the map before the bytes do."""
    identity, folder = spec.identity, spec.folder.path
    n_slots = slots_within(spec.limit_nbytes, spec.n_members, identity.slot_nbytes)
    segment_slots = _known_segment_slots(spec, store_map)
    if segment_slots is None or segment_slots > n_slots:
        segment_slots = segment_slots_for(n_slots, identity.slot_nbytes)
        store_map.delete_beyond(0)
        _delete_files(data_files(folder))
        store_map.set_note("segment_slots", segment_slots)
    max_segments = max_segments_for(n_slots, identity.slot_nbytes, segment_slots)
    geometry = Geometry(identity.page_nbytes, identity.slot_nbytes, segment_slots, max_segments)
    if max_segments < n_slots // segment_slots:
        _tell_small_files(spec, geometry, n_slots)
    store_map.delete_beyond(geometry.n_slots)
    store_map.compact(geometry.n_slots * MAP_SLOT_NBYTES)
    _delete_files(data_files(folder)[max_segments:])
    files = SegmentFiles(folder, spec.slab, segment_slots=segment_slots, max_segments=max_segments, system=spec.system)
    return geometry, files


def _delete_files(files: list[Path]) -> None:
    """The highest first, so that no gap is left if this is cut short."""
    for file in reversed(files):
        file.unlink()


def _tell_small_files(spec: Spec, geometry: Geometry, n_slots: int) -> None:
    logger.warning(
        "sgl_lmcache: %s was made for a smaller capacity, and can use %s of its %s bytes: to have it made anew, delete "
        "it while the server is down",
        spec.folder.path,
        f"{geometry.n_slots * geometry.slot_nbytes:,}",
        f"{n_slots * geometry.slot_nbytes:,}",
    )


def _known_segment_slots(spec: Spec, store_map: Map) -> int | None:
    """What the map says, or else the length of the first file: a lost map loses no file."""
    noted = store_map.note("segment_slots")
    if isinstance(noted, int) and noted > 0:
        return noted
    first = spec.folder.path / "data.0"
    found = first.stat().st_size // spec.identity.slot_nbytes if first.exists() else 0
    if found and not store_map.is_damaged:
        store_map.set_note("segment_slots", found)
    return found or None


# ---- the cap ----


def shrink(spec: Spec, geometry: Geometry) -> None:
    """Make the directory fit its cap, if deleting stores that nobody uses can. Raises OSError.

    What cannot be done now, since another process does not let go of the directory, is done before the store grows.
    """
    try:
        with growing(spec.path):
            excess = _excess_nbytes(spec, geometry)
            if excess > 0:
                reclaim(spec.path, spec.folder, excess, spare_siblings=True)
    except TimeoutError as error:
        logger.warning("sgl_lmcache: %s: what it holds has not been counted: %s", spec.path, error)


def grow(spec: Spec, opened: Opened) -> bool:
    """Add a segment, if the directory has or can make room for it. Raises OSError if the disk refuses. Blocks."""
    with growing(spec.path):
        excess = _excess_nbytes(spec, opened.geometry) + opened.geometry.segment_nbytes
        if excess > 0 and reclaim(spec.path, spec.folder, excess, spare_siblings=False) < excess:
            return False
        opened.files.grow()
        return True


def _excess_nbytes(spec: Spec, geometry: Geometry) -> int:
    """How much more is used than the cap allows, if every rank's map and log are as large as they may become."""
    newest = {spec.folder.rank: spec.folder}
    for store in sorted(stores_in(spec.path), key=lambda store: store.last_use_s()):
        if store.is_sibling_of(spec.folder):
            newest[store.rank] = store
    allowed = sum(allowed_nbytes(store.path) for store in newest.values())
    return used_nbytes(spec.path) - allowed + spec.n_members * geometry.allowance_nbytes - spec.limit_nbytes
