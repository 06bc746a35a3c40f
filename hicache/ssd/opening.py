"""Opening a store: checks, locks, sizes, and what has to go before anything is added.

Nothing here reads the pages' rows, so it takes milliseconds whatever the store holds; `fill.py` reads them afterwards.
"""

from __future__ import annotations

import logging
import sqlite3

from hicache.ssd.directory import check_directory, check_limit, data_nbytes, reclaim, stores_in, used_nbytes
from hicache.ssd.locks import Lock, StoreError, growing, lock_directory, lock_store
from hicache.ssd.map import ForeignMap, Map, delete_map, is_damage
from hicache.ssd.sizes import MAP_SLOT_NBYTES, Geometry, segment_slots_for, slots_within
from hicache.ssd.volume import Opened, Spec
from transfer.files import SegmentFiles

logger = logging.getLogger(__name__)


def open_store(spec: Spec) -> Opened:
    """Lock the directory and the store, make what is missing, and drop what exceeds the cap.

    Raises StoreError for what the user can put right, and OSError or sqlite3.Error for what the disk refuses then.
    Blocks.
    """
    check_limit(spec.path, spec.limit_nbytes, spec.n_members, spec.identity.slot_nbytes)
    check_directory(spec.path, spec.limit_nbytes)
    directory_lock = lock_directory(spec.path, spec.server)
    try:
        store_lock = _lock_own(spec)
    except BaseException:
        directory_lock.release()
        raise
    try:
        store_map = _open_map(spec)
        try:
            geometry, files = _open_files(spec, store_map)
            shrink(spec, geometry)
        except BaseException:
            store_map.close()
            raise
    except BaseException:
        store_lock.release()
        directory_lock.release()
        raise
    return Opened(geometry, (directory_lock, store_lock), files, store_map)


def _lock_own(spec: Spec) -> Lock:
    folder = spec.folder.path
    folder.parent.mkdir(exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    lock = lock_store(folder)
    if lock is None:
        raise StoreError(f"{folder} is open already: two tiers, or two ranks of one number, cannot share a store")
    return lock


def _open_map(spec: Spec) -> Map:
    folder = spec.folder.path
    try:
        return Map(folder, spec.identity)
    except ForeignMap as error:
        logger.warning("sgl_lmcache: %s: the store starts empty", error)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        logger.warning("sgl_lmcache: the map of %s cannot be opened (%s): the store starts empty", folder, error)
    delete_map(folder)
    return Map(folder, spec.identity)


def _open_files(spec: Spec, store_map: Map) -> tuple[Geometry, SegmentFiles]:
    """The data files, as far as the share reaches. Rows of what lies beyond leave the map before the bytes do."""
    identity, folder = spec.identity, spec.folder.path
    n_slots = slots_within(spec.limit_nbytes, spec.n_members, identity.slot_nbytes)
    segment_slots = _known_segment_slots(spec, store_map)
    if segment_slots is None or segment_slots > n_slots:
        segment_slots = segment_slots_for(n_slots, identity.slot_nbytes)
        store_map.delete_beyond(0)
        for file in folder.glob("data.*"):
            file.unlink()
        store_map.set_note("segment_slots", segment_slots)
    geometry = Geometry(identity.page_nbytes, identity.slot_nbytes, segment_slots, n_slots // segment_slots)
    store_map.delete_beyond(geometry.n_slots)
    store_map.compact(geometry.n_slots * MAP_SLOT_NBYTES)
    for segment in range(geometry.max_segments, _n_files(spec)):
        (folder / f"data.{segment}").unlink(missing_ok=True)
    files = SegmentFiles(folder, spec.slab, segment_slots=segment_slots, system=spec.system)
    return geometry, files


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


def _n_files(spec: Spec) -> int:
    numbers = [file.name.removeprefix("data.") for file in spec.folder.path.glob("data.*")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


# ---- the cap ----


def shrink(spec: Spec, geometry: Geometry) -> None:
    """Make the directory fit its cap, as far as stores that nobody uses are what exceeds it."""
    with growing(spec.path):
        excess = _excess_nbytes(spec, geometry)
        if excess > 0:
            reclaim(spec.path, spec.folder, excess, spare_siblings=True)


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
    beside_data = sum(used_nbytes(store.path) - data_nbytes(store.path) for store in newest.values())
    return used_nbytes(spec.path) - beside_data + spec.n_members * geometry.allowance_nbytes - spec.limit_nbytes
