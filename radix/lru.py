"""Least recently used, leaf first: a doubly linked list through two columns, oldest page first.

`victims` walks from the oldest page and passes over those that may not go. A page that has been passed becomes
evictable when its last child is taken: then it is older than everything ahead of the walk, so it is the next victim.
The stamps, which grow along the list, tell such a parent from one that the walk has still to reach. So the order is
exactly "the oldest evictable page, again and again", in one pass that costs what it takes and passes over.

A leased page that the walk passes over is in use, so it becomes the newest. Waiting requests may lease half of a tier,
and without this every eviction would walk past all their pages again.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import COLUMNS_T, ROWS_T, STAMPS_T, Columns, Rows, inlined, kernel

_NONE = -1


class Links(NamedTuple):
    """The list's memory."""

    older: NDArray[np.int32]
    newer: NDArray[np.int32]
    """[capacity]: neighbours in the list, or -1."""
    stamp: NDArray[np.int64]
    """[capacity]: grows along the list; 0 outside it."""
    n_taken: NDArray[np.int32]
    """[capacity]: children taken in the walk under way; 0 outside one."""
    ends: NDArray[np.int64]
    """[3]: the oldest row, the newest row, the last stamp."""


LINKS_T: Final = types.NamedTuple((ROWS_T, ROWS_T, STAMPS_T, ROWS_T, STAMPS_T), Links)


@inlined
def _unlink(links: Links, row: int) -> None:
    older, newer, ends = links.older[row], links.newer[row], links.ends
    if older == _NONE:
        ends[0] = newer
    else:
        links.newer[older] = newer
    if newer == _NONE:
        ends[1] = older
    else:
        links.older[newer] = older
    links.stamp[row] = 0


@inlined
def _push(links: Links, row: int) -> None:
    """Put a row that is not in the list at its newest end."""
    ends = links.ends
    links.older[row], links.newer[row] = ends[1], _NONE
    if ends[1] == _NONE:
        ends[0] = row
    else:
        links.newer[ends[1]] = row
    ends[1] = row
    ends[2] += 1
    links.stamp[row] = ends[2]


@kernel(types.void, LINKS_T, ROWS_T)
def _admit(links: Links, rows: Rows) -> None:
    """Make `rows` the newest, the first of them newest of all."""
    for row in rows[::-1]:
        if links.stamp[row] != 0:
            _unlink(links, row)
        _push(links, row)


@kernel(types.void, LINKS_T, ROWS_T)
def _touch(links: Links, rows: Rows) -> None:
    """The same for those of `rows` that are in the list."""
    for row in rows[::-1]:
        if links.stamp[row] != 0:
            _unlink(links, row)
            _push(links, row)


@kernel(types.void, LINKS_T, ROWS_T)
def _remove(links: Links, rows: Rows) -> None:
    for row in rows:
        if links.stamp[row] != 0:
            _unlink(links, row)


@inlined
def _may_go(columns: Columns, links: Links, row: int, tier: int, now: int) -> bool:
    children_gone = columns.tier_children[row, tier] == links.n_taken[row]
    return bool(children_gone and columns.leases[row] == 0 and columns.last_use[row] != now)


@kernel(types.int64, COLUMNS_T, LINKS_T, types.int64, types.int64, ROWS_T)
def _victims(columns: Columns, links: Links, tier: int, now: int, out: Rows) -> int:
    """Fill `out` with victims. Returns how many there are."""
    n, at, last_stamp = 0, links.ends[0], links.ends[2]
    while at != _NONE and n < len(out) and links.stamp[at] <= last_stamp:
        row, following = at, links.newer[at]
        while n < len(out) and _may_go(columns, links, row, tier, now):
            out[n] = row
            n += 1
            parent = int(columns.parent[row])
            if parent == _NONE:
                break
            links.n_taken[parent] += 1
            if not 0 < links.stamp[parent] < links.stamp[at]:
                break
            row = parent
        if columns.leases[at] > 0:
            _unlink(links, at)
            _push(links, at)
        at = following
    for i in range(n):
        parent = int(columns.parent[out[i]])
        if parent != _NONE:
            links.n_taken[parent] = 0
    return n


@kernel(types.int64, LINKS_T, ROWS_T)
def _order(links: Links, out: Rows) -> int:
    """Fill `out` from the oldest on. Returns how many there are."""
    n, at = 0, links.ends[0]
    while at != _NONE and n < len(out):
        out[n] = at
        n += 1
        at = links.newer[at]
    return n


class Lru:
    """The policy `lru`. Of pages touched together the deepest goes first."""

    def __init__(self, columns: Columns, tier: int) -> None:
        capacity = len(columns.parent)
        self._columns = columns
        self._tier = tier
        self._links = Links(
            older=np.zeros(capacity, np.int32),
            newer=np.zeros(capacity, np.int32),
            stamp=np.zeros(capacity, np.int64),
            n_taken=np.zeros(capacity, np.int32),
            ends=np.array([_NONE, _NONE, 0], np.int64),
        )

    def admitted(self, rows: Rows) -> None:
        _admit(self._links, rows)

    def touched(self, rows: Rows) -> None:
        _touch(self._links, rows)

    def removed(self, rows: Rows) -> None:
        _remove(self._links, rows)

    def victims(self, n: int, now: int) -> Rows:
        out = np.empty(n, np.int32)
        return out[: _victims(self._columns, self._links, self._tier, now, out)]

    def order(self, n: int) -> Rows:
        out = np.empty(n, np.int32)
        return out[: _order(self._links, out)]

    def members(self) -> Rows:
        """Raises AssertionError if the list does not end."""
        rows: list[int] = []
        row = int(self._links.ends[0])
        while row != _NONE:
            rows.append(row)
            assert len(rows) <= len(self._links.newer), "the LRU list runs in a circle"
            row = int(self._links.newer[row])
        return np.array(rows, np.int32)

    def reserve(self, n_rows: int) -> None:
        for column in self._links[:-1]:
            column[:n_rows] = 0

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self._links)
