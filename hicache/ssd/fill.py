"""After a start: the pages that the map names become known in memory, while the tier already answers.

    read      all rows of the map, some hundred at a time, into arrays by slot
    insert    parents first, again some hundred at a time, each slice shortly under the lock
    free      what no row names
    order     from the least recently used page to the most, the pages used meanwhile last
    quotas    what is above a quota leaves, since quotas may be smaller than they were

Until the end no page is stored, so no slot is given away; what is asked for and not known yet is looked up in the map
by its key. Rows that make no sense are deleted. Where the map is damaged, each row is tried by itself, and at the end
the map is made anew from what could be read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hicache.logs import get_logger
from hicache.ssd.map import NO_ROWS, Int64Array, NewMap, PageRows, joined
from hicache.ssd.room import keep_quotas
from hicache.ssd.volume import Volume
from hicache.tier import ROOT_KEY
from radix import KEY_NBYTES

logger = get_logger(__name__)

SLICE = 256
"""Pages a step: well under a millisecond of Python, and of the lock."""

OWNED_SLICE = 64
"""First pages of tenants with a quota, of which each takes its own call of the index."""

FREE_SLICE = 1 << 14
FIRST_LOOK = 16
"""Pages that are looked up at once, before it is known whether there are any; then twice as many, up to a slice."""

_MAX_ROUNDS = 3
_MAX_CLOCK = 1 << 62


class Fill:
    """One reading of one map, all on the keeper's thread. Raises sqlite3.Error."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._n_live = volume.files.n_slots
        self._keys = np.zeros((self._n_live, 4), np.uint64)
        self._parents = np.zeros((self._n_live, 4), np.uint64)
        self._depths = np.full(self._n_live, -1, np.int64)
        self._checksums = np.zeros(self._n_live, np.uint64)
        self._last_uses = np.zeros(self._n_live, np.int64)
        self._tenants = np.zeros((self._n_live, 2), np.uint64)
        n_beyond, clock = volume.map.delete_beyond(self._n_live), volume.map.note("clock")
        with volume.lock:
            volume.counters.map_rejected += n_beyond
            volume.pages.begin_fill(self._n_live, clock + 1 if isinstance(clock, int) and clock < _MAX_CLOCK else 1)
            self._began_at = volume.pages.clock

    def steps(self) -> Iterator[None]:
        """All of it, in short steps. Raises sqlite3.Error and OSError; begin anew then."""
        volume = self._volume
        yield from self._touch_memory()
        yield from self._read()
        yield from self._insert()
        yield from self._free()
        yield from self._order()
        yield from keep_quotas(self._volume, SLICE)
        yield from self._give_memory_back()
        if volume.map.is_damaged:
            yield from rebuild_map(volume)
        with volume.lock:
            volume.pages.end_fill()
            volume.is_filling = False

    # ---- the parts ----

    def _touch_memory(self) -> Iterator[None]:
        """A first touch takes the system milliseconds, and an assignment of a slice keeps the interpreter's lock."""
        for column in (self._keys, self._parents, self._checksums, self._last_uses, self._tenants):
            column.fill(0)
            yield

    def _read(self) -> Iterator[None]:
        for first in range(0, self._n_live, SLICE):
            rows, unsound = self._volume.map.between(first, min(first + SLICE, self._n_live))
            at = rows.slots
            self._keys[at] = np.frombuffer(rows.keys, np.uint64).reshape(-1, 4)
            self._parents[at] = np.frombuffer(rows.parents, np.uint64).reshape(-1, 4)
            self._depths[at] = rows.depths
            self._checksums[at] = rows.checksums
            self._last_uses[at] = rows.last_uses
            self._tenants[at] = rows.tenant_words()
            self._reject(unsound)
            yield

    def _insert(self) -> Iterator[None]:
        named = np.flatnonzero(self._depths >= 0)
        order = named[np.argsort(self._depths[named], kind="stable")]
        is_owned = self._tenants[order].any(axis=1) & ~self._parents[order].any(axis=1)
        yield from self._adopt(order[is_owned], OWNED_SLICE)
        yield from self._adopt(order[~is_owned], SLICE)

    def _adopt(self, slots: Int64Array, n_pages: int) -> Iterator[None]:
        """So many pages at a time."""
        for first in range(0, len(slots), n_pages):
            rows = self._rows(slots[first : first + n_pages])
            with self._volume.lock:
                wrong = self._volume.pages.adopt(rows)
                self._volume.counters.filled += len(rows) - len(wrong)
            self._reject(wrong)
            yield

    def _free(self) -> Iterator[None]:
        for first in range(0, self._n_live, FREE_SLICE):
            with self._volume.lock:
                self._volume.pages.free_unused(first, min(first + FREE_SLICE, self._n_live))
            yield

    def _order(self) -> Iterator[None]:
        pages, began_at = self._volume.pages, self._began_at
        named = np.flatnonzero(self._depths >= 0)
        order = named[np.lexsort((-self._depths[named], self._last_uses[named]))]
        yield from self._make_newest(order, used_before=began_at)
        for _ in range(_MAX_ROUNDS):
            until = pages.clock + 1
            yield
            yield from self._make_newest(pages.used_since(began_at), used_before=until)
            began_at = until

    def _make_newest(self, slots: Int64Array, used_before: int) -> Iterator[None]:
        for first in range(0, len(slots), SLICE):
            with self._volume.lock:
                self._volume.pages.make_newest(slots[first : first + SLICE], used_before)
            yield

    def _give_memory_back(self) -> Iterator[None]:
        """A column a step, since the system takes it back while the interpreter's lock is held."""
        columns = (self._keys, self._parents, self._depths, self._checksums, self._last_uses, self._tenants)
        for column in columns:
            column.resize(0, refcheck=False)
            yield

    # ---- rows ----

    def _rows(self, slots: Int64Array) -> PageRows:
        return PageRows(
            slots,
            self._keys[slots].tobytes(),
            self._parents[slots].tobytes(),
            self._depths[slots],
            self._checksums[slots],
            self._last_uses[slots],
            self._tenants[slots].tobytes(),
        )

    def _reject(self, slots: Int64Array) -> None:
        """Count these rows as senseless, and delete them unless the whole map will be made anew."""
        if not len(slots):
            return
        with self._volume.lock:
            self._volume.counters.map_rejected += len(slots)
        if not self._volume.map.is_damaged:
            self._volume.map.try_delete(slots.tolist())


def rebuild_map(volume: Volume) -> Iterator[None]:
    """Put a new map, with what the books know, in the place of a damaged one, in short steps.

    Raises sqlite3.Error, OSError; begin anew then. What a commit has still to save is not in it.
    """
    folder, identity = volume.spec.folder.path, volume.spec.identity
    volume.map.is_damaged = True
    new = NewMap(folder)
    try:
        for first in range(0, volume.pages.n_live, SLICE):
            with volume.lock:
                rows = volume.pages.named(first, first + SLICE)
            new.add(rows)
            yield
        notes = {"segment_slots": volume.geometry.segment_slots, "clock": volume.pages.clock}
        new.complete(identity.notes() | notes)
        yield
        volume.replace_map(new.replace(volume.map, identity))
    finally:
        new.close()
    nbytes = volume.map.nbytes
    with volume.lock:
        volume.counters.map_salvaged += 1
        volume.pay(nbytes)
    logger.warning("sgl_lmcache: the map of %s was damaged: it is made anew from what could be read", folder)


def look_up(volume: Volume, keys: bytes, *, prefix: bool) -> None:
    """While a fill runs: make known what the map has of these pages; with `prefix`, up to the first it has not.

    On the keeper's thread. Raises sqlite3.Error; what cannot be read is not there.
    """
    with volume.lock:
        n_known = volume.pages.n_found(keys) if prefix else 0
    found: list[PageRows] = []
    at, n_asked = KEY_NBYTES * n_known, FIRST_LOOK
    while at < len(keys):
        asked = keys[at : at + KEY_NBYTES * n_asked]
        found.append(_pages(volume, asked))
        if prefix and KEY_NBYTES * len(found[-1]) < len(asked):
            break
        at, n_asked = at + len(asked), min(2 * n_asked, SLICE)
    rows = joined(found)
    if len(rows):
        rows = joined([*_above(volume, rows), rows])
        order = np.argsort(rows.depths, kind="stable")
        for first in range(0, len(rows), SLICE):
            with volume.lock:
                volume.pages.adopt(rows.take(order[first : first + SLICE]))


def _pages(volume: Volume, keys: bytes) -> PageRows:
    """The rows of those pages that the map has, in the order of `keys`."""
    rows = volume.map.pages(keys)
    return rows.take(np.flatnonzero((rows.slots >= 0) & (rows.slots < volume.pages.n_live)))


def _above(volume: Volume, rows: PageRows) -> list[PageRows]:
    """The rows of what lies above these: of each path up to the first page that is known, or to the root."""
    above: list[PageRows] = []
    seen = {ROOT_KEY, *_split(rows.keys)}
    for key in _split(rows.parents):
        while key not in seen:
            seen.add(key)
            with volume.lock:
                is_known = volume.pages.n_found(key) > 0
            row = NO_ROWS if is_known else _pages(volume, key)
            if not len(row):
                break
            above.append(row)
            key = row.parents
    return above


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_NBYTES] for at in range(0, len(keys), KEY_NBYTES)]
