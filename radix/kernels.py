"""The compiled loops of the index: what it does to many pages in one call.

Each kernel does all it is asked or nothing, and says by its result which; `Index` turns a refusal into an exception.
None may run at the same time as another.

The hash table stores row numbers only. A key is a SHA-256, so its first 8 bytes are as good a hash as any, and the 32
bytes that are compared lie in the row. Probing is linear; a deletion moves later entries of the probe chain back into
the hole, so there are no tombstones and an old table is as fast as a new one.

A row is in use as long as something holds it: residency on any tier, a child, or a lease. `reap` frees rows that
nothing holds and goes on to their parents, so the end of a leaf frees the bare branch above it.
"""

from typing import Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BLOB_T, BYTES_T, COLUMNS_T, ROWS_T, Columns, Rows, inlined, kernel

Blob = NDArray[np.uint64]
"""[n, 4]: the keys of a run."""

# Fields of `Columns.tally`.
N_TOUCHED: Final = 0
"""Rows from this one on have never been in use."""
FREE_HEAD: Final = 1
"""The freed row to be used next, or -1."""
N_ROWS: Final = 2
"""Rows in use."""
N_LEASES: Final = 3
"""The sum of the leases column."""

FREE_LINK: Final = -3
"""The parent column of a free row holds this - the next free row (-1: none), which is below the root's -1."""

# Refusals of `insert`.
FULL: Final = -1
NOT_BELOW: Final = -2

_NONE = -1
_ROOT = -1


# ---- keys ----


@inlined
def _same_key(columns: Columns, row: int, blob: Blob, i: int) -> bool:
    known = columns.key[row]
    wanted = blob[i]
    first_half = known[0] == wanted[0] and known[1] == wanted[1]
    return bool(first_half and known[2] == wanted[2] and known[3] == wanted[3])


@inlined
def _home(columns: Columns, first_word: np.uint64) -> int:
    return int(np.int64(first_word & np.uint64(len(columns.table) - 1)))


@inlined
def _probe(columns: Columns, blob: Blob, i: int) -> int:
    """The table entry that holds key i, or the empty one where it belongs."""
    table, mask = columns.table, len(columns.table) - 1
    entry = _home(columns, blob[i, 0])
    while table[entry] != 0 and not _same_key(columns, table[entry] - 1, blob, i):
        entry = (entry + 1) & mask
    return entry


@inlined
def _next_row(columns: Columns, above: int, blob: Blob, i: int) -> int:
    """The row of key i: the row after `above` if the run goes on there, else what the table says, or `_NONE`.

    A free row keeps its old key, but its `parent` is no row.
    """
    row = above + 1
    if 0 < row < columns.tally[N_TOUCHED] and columns.parent[row] == above and _same_key(columns, row, blob, i):
        return row
    return int(columns.table[_probe(columns, blob, i)]) - 1


@inlined
def _unlink_key(columns: Columns, row: int) -> None:
    """Take a row out of the table and close the gap in its probe chain."""
    table, mask = columns.table, len(columns.table) - 1
    hole = _home(columns, columns.key[row, 0])
    while table[hole] != row + 1:
        hole = (hole + 1) & mask
    entry = (hole + 1) & mask
    while table[entry] != 0:
        home = _home(columns, columns.key[table[entry] - 1, 0])
        if ((entry - home) & mask) >= ((entry - hole) & mask):
            table[hole] = table[entry]
            hole = entry
        entry = (entry + 1) & mask
    table[hole] = 0


# ---- rows ----


@inlined
def _in_use(columns: Columns, row: int) -> bool:
    return bool(0 <= row < columns.tally[N_TOUCHED] and columns.parent[row] >= _ROOT)


@inlined
def _new_row(columns: Columns, parent: int, group: int, now: int) -> int:
    """A row with no key and no residency. The caller has made sure that one is free. group: of a first page."""
    tally = columns.tally
    row = int(tally[N_TOUCHED])
    if row < len(columns.parent):
        tally[N_TOUCHED] += 1
    else:
        row = int(tally[FREE_HEAD])
        tally[FREE_HEAD] = FREE_LINK - int(columns.parent[row])
    columns.parent[row] = parent
    columns.depth[row] = 0
    columns.group[row] = group
    columns.backed[row] = 0
    if parent != _ROOT:
        columns.group[row] = columns.group[parent]
        columns.depth[row] = columns.depth[parent] + 1
        columns.n_children[parent] += 1
    columns.slot[row] = _NONE
    columns.last_use[row] = now
    tally[N_ROWS] += 1
    for tier in range(len(columns.counts)):
        columns.counts[tier, 0] += 1
    return row


@inlined
def _free_row(columns: Columns, row: int) -> int:
    """Give back a row that nothing holds. Returns its parent."""
    _unlink_key(columns, row)
    parent, tally = int(columns.parent[row]), columns.tally
    if parent != _ROOT:
        columns.n_children[parent] -= 1
    columns.parent[row] = FREE_LINK - tally[FREE_HEAD]
    tally[FREE_HEAD] = row
    tally[N_ROWS] -= 1
    for tier in range(len(columns.counts)):
        columns.counts[tier, 0] -= 1
    return parent


@inlined
def _held(columns: Columns, row: int) -> bool:
    return bool(columns.residency[row] != 0 or columns.n_children[row] != 0 or columns.leases[row] != 0)


# ---- the tree ----


@kernel(types.int64, COLUMNS_T, BLOB_T, ROWS_T)
def match(columns: Columns, blob: Blob, out: Rows) -> int:
    """Write the rows of the longest known prefix of `blob` into `out`. Returns its length."""
    above = _NONE
    for i in range(len(blob)):
        row = _next_row(columns, above, blob, i)
        if row == _NONE or (i > 0 and columns.parent[row] != above):
            return i
        out[i] = row
        above = row
    return len(blob)


@kernel(types.int64, COLUMNS_T, BLOB_T, types.int64, types.int64, types.int64, ROWS_T)
def insert(columns: Columns, blob: Blob, parent: int, group: int, now: int, out: Rows) -> int:
    """Write a row for each key into `out`, new ones where there were none.

    Returns the number of new rows; or `FULL`; or `NOT_BELOW` if `parent` is not in use or a key is known below another
    page, which chained keys cannot be.
    """
    if parent != _ROOT and not _in_use(columns, parent):
        return NOT_BELOW
    above, n_known = parent, 0
    while n_known < len(blob):
        row = _next_row(columns, above, blob, n_known)
        if row == _NONE:
            break
        if columns.parent[row] != above:
            return NOT_BELOW
        out[n_known] = row
        above = row
        n_known += 1
    if len(blob) - n_known > len(columns.parent) - columns.tally[N_ROWS]:
        return FULL
    for i in range(n_known, len(blob)):
        entry = _probe(columns, blob, i)
        if columns.table[entry] != 0:
            for j in range(i - 1, n_known - 1, -1):
                _free_row(columns, out[j])
            return NOT_BELOW
        row = _new_row(columns, above, group, now)
        columns.table[entry] = row + 1
        for word in range(4):
            columns.key[row, word] = blob[i, word]
        out[i] = row
        above = row
    return len(blob) - n_known


@inlined
def _names_root(parents: Blob, i: int) -> bool:
    parent = parents[i]
    return bool(parent[0] == 0 and parent[1] == 0 and parent[2] == 0 and parent[3] == 0)


@kernel(types.int64, COLUMNS_T, BLOB_T, BLOB_T, types.int64, ROWS_T)
def insert_pages(columns: Columns, keys: Blob, parents: Blob, now: int, out: Rows) -> int:
    """Write a row for each key into `out`, or `_NONE` for one whose parent has no row or is not the one it has.

    Returns the number of new rows; or `FULL`, if there are more keys without a row than free rows.
    """
    n_missing = 0
    for i in range(len(keys)):
        if columns.table[_probe(columns, keys, i)] == 0:
            n_missing += 1
    if n_missing > len(columns.parent) - columns.tally[N_ROWS]:
        return FULL
    n_new = 0
    for i in range(len(keys)):
        above = _ROOT
        if not _names_root(parents, i):
            above = int(columns.table[_probe(columns, parents, i)]) - 1
            if above == _NONE:
                out[i] = _NONE
                continue
        entry = _probe(columns, keys, i)
        row = int(columns.table[entry]) - 1
        if row == _NONE:
            row = _new_row(columns, above, 0, now)
            columns.table[entry] = row + 1
            for word in range(4):
                columns.key[row, word] = keys[i, word]
            n_new += 1
        elif columns.parent[row] != above:
            row = _NONE
        out[i] = row
    return n_new


@kernel(types.void, COLUMNS_T, types.int64, ROWS_T)
def path(columns: Columns, row: int, out: Rows) -> None:
    """Write the rows from the root to `row` into `out`, which is as long as that path."""
    for i in range(len(out) - 1, -1, -1):
        out[i] = row
        row = int(columns.parent[row])


@kernel(types.void, COLUMNS_T, ROWS_T)
def reap(columns: Columns, rows: Rows) -> None:
    """Free those of `rows` that nothing holds, and the parents that only they held. Others are skipped."""
    for i in range(len(rows) - 1, -1, -1):
        row = int(rows[i])
        while _in_use(columns, row) and not _held(columns, row):
            row = _free_row(columns, row)


# ---- what holds a row ----


@kernel(types.int64, COLUMNS_T, ROWS_T, types.int64, types.int64, types.int64, BYTES_T)
def transition(
    columns: Columns, rows: Rows, tier: int, source_bits: int, target: int, before: NDArray[np.uint8]
) -> int:
    """Change the state of all `rows` on a tier. `before` is for the kernel's own use, as long as `rows`.

    Returns their number; or the position of the first that is not in use or not in a state whose bit is set in
    `source_bits`, with nothing changed. A row that is named twice is refused by its second mention, unless the
    transition may start from its own target.
    """
    residency, shift = columns.residency, 2 * tier
    for i in range(len(rows)):
        row = rows[i]
        if not _in_use(columns, row) or (source_bits >> ((residency[row] >> shift) & 3)) & 1 == 0:
            for j in range(i - 1, -1, -1):
                residency[rows[j]] = before[j]
            return i
        before[i] = residency[row]
        residency[row] = (before[i] & ~(3 << shift)) | (target << shift)
    for i in range(len(rows)):
        source = (before[i] >> shift) & 3
        columns.counts[tier, source] -= 1
        change = int(target != 0) - int(source != 0)
        columns.held[columns.group[rows[i]], tier] += change
        parent = columns.parent[rows[i]]
        if parent != _ROOT:
            columns.tier_children[parent, tier] += change
    columns.counts[tier, target] += len(rows)
    return len(rows)


@kernel(types.int64, COLUMNS_T, ROWS_T, types.int64)
def add_leases(columns: Columns, rows: Rows, change: int) -> int:
    """Add `change` (1 or -1) to the leases of all `rows`, once for each mention.

    Returns their number; or the position of the first that is not in use or would go below zero, with nothing changed.
    """
    for i in range(len(rows)):
        row = rows[i]
        if not _in_use(columns, row) or columns.leases[row] + change < 0:
            for j in range(i):
                columns.leases[rows[j]] -= change
            return i
        columns.leases[row] += change
    columns.tally[N_LEASES] += change * len(rows)
    return len(rows)
