"""Queues of pages in line for eviction: what every policy is made of.

A policy puts the pages of its tier into queues, oldest first, and says by a table which queue's oldest page is worth
least now; `take` evicts that page, again and again, leaf first. So a policy is a rule for where a page goes when it
arrives and when it is used, and a table; `lru` is one queue and a table of one number.

What may not go now is dealt with when the walk meets it, once, so that no call pays for it again:

    it has a child on the tier   it is parked: out of line, until its last child leaves. Then it is first in line, or
                                 goes with that child, since it has waited longer than all that are in line
    it is leased                 it is in use: it becomes the newest of the queue `onward` of its own
    it has a chance left         so does it, and has one less (policies of the clock kind)
    it was used in this pass     it stays where it is, which is near the newest end

Queues are doubly linked lists through columns with one place a row, so a row is in one queue at most. Stamps grow along
each list, by which the walk knows whether it has passed a page. Pages of different groups (tenants) are in different
queues: group g has the queues `g * n_kinds` to `(g + 1) * n_kinds`.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BYTES_T, COLUMNS_T, ROWS_T, STAMPS_T, Columns, Rows, inlined, kernel

_NONE = -1
_HIGH, _LOW = 0, 1
_LAST = 1e300


class Queues(NamedTuple):
    """The memory of a policy's queues. A row is outside, in line (`stamp` is not 0), or parked."""

    older: NDArray[np.int32]
    newer: NDArray[np.int32]
    """[capacity]: neighbours in the queue, or -1."""
    stamp: NDArray[np.int64]
    """[capacity]: grows along a queue; 0 when not in line."""
    queue: NDArray[np.int32]
    """[capacity]: the queue's number + 1; 0 outside."""
    n_taken: NDArray[np.int32]
    """[capacity]: children taken in the walk under way; 0 outside one."""
    chances: NDArray[np.uint8]
    """[capacity]: how often it was used, as far as the policy counts."""
    used_at: NDArray[np.int64]
    """[capacity]: since when it ages, by the policy's clock."""
    ends: NDArray[np.int64]
    """[2 * n_queues]: the oldest row of each, then the newest of each; -1: the queue is empty."""
    size: NDArray[np.int64]
    """[n_queues]: rows in line."""
    spared: NDArray[np.int64]
    """[n_queues]: while no more than this are left in line, other queues go first."""
    threshold: NDArray[np.int64]
    """[n_queues]: a page with more chances than this is not taken but goes `onward`."""
    onward: NDArray[np.int64]
    """[n_queues]: where to; so do pages that are leased."""
    cursor: NDArray[np.int64]
    left: NDArray[np.int64]
    score: NDArray[np.float64]
    """[n_queues]: of the walk under way."""
    tally: NDArray[np.int64]
    """[2]: the highest and the lowest stamp given."""


class Worths(NamedTuple):
    """What the oldest page of a queue is worth, by which the walk decides: the least goes first."""

    table: NDArray[np.float64]
    """[kinds in use, n_bins]: by the kind of the queue and the age of the page."""
    edges: NDArray[np.int64]
    """[n_bins or more]: where each age begins. The first is 0."""
    n_kinds: int
    """Queues that each group has, in use or not."""


_FLOATS_T: Final = types.Array(types.float64, 1, "C")
WORTHS_T: Final = types.NamedTuple((types.Array(types.float64, 2, "C"), STAMPS_T, types.int64), Worths)
QUEUES_T: Final = types.NamedTuple(
    (
        ROWS_T,
        ROWS_T,
        STAMPS_T,
        ROWS_T,
        ROWS_T,
        BYTES_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        STAMPS_T,
        _FLOATS_T,
        STAMPS_T,
    ),
    Queues,
)
BY_ROW: Final = 7
"""So many of the fields are by row."""


def allocate(capacity: int, n_queues: int) -> Queues:
    """Empty queues for rows below `capacity`."""
    return Queues(
        older=np.zeros(capacity, np.int32),
        newer=np.zeros(capacity, np.int32),
        stamp=np.zeros(capacity, np.int64),
        queue=np.zeros(capacity, np.int32),
        n_taken=np.zeros(capacity, np.int32),
        chances=np.zeros(capacity, np.uint8),
        used_at=np.zeros(capacity, np.int64),
        ends=np.full(2 * n_queues, _NONE, np.int64),
        size=np.zeros(n_queues, np.int64),
        spared=np.zeros(n_queues, np.int64),
        threshold=np.full(n_queues, 255, np.int64),
        onward=np.arange(n_queues, dtype=np.int64),
        cursor=np.zeros(n_queues, np.int64),
        left=np.zeros(n_queues, np.int64),
        score=np.zeros(n_queues, np.float64),
        tally=np.zeros(2, np.int64),
    )


# ---- one row ----


@inlined
def _unlink(queues: Queues, row: int) -> None:
    """Out of line; what its queue is stays known."""
    q, older, newer = queues.queue[row] - 1, queues.older[row], queues.newer[row]
    n_queues = len(queues.size)
    if older == _NONE:
        queues.ends[q] = newer
    else:
        queues.newer[older] = newer
    if newer == _NONE:
        queues.ends[n_queues + q] = older
    else:
        queues.older[newer] = older
    queues.size[q] -= 1
    queues.stamp[row] = 0


@inlined
def _push_newest(queues: Queues, row: int, q: int) -> None:
    """Put a row that is not in line at the newest end of a queue."""
    n_queues = len(queues.size)
    newest = queues.ends[n_queues + q]
    queues.older[row], queues.newer[row] = newest, _NONE
    if newest == _NONE:
        queues.ends[q] = row
    else:
        queues.newer[newest] = row
    queues.ends[n_queues + q] = row
    queues.queue[row] = q + 1
    queues.size[q] += 1
    queues.tally[_HIGH] += 1
    queues.stamp[row] = queues.tally[_HIGH]


@inlined
def _push_oldest(queues: Queues, row: int, q: int) -> None:
    """The same at the oldest end."""
    n_queues = len(queues.size)
    oldest = queues.ends[q]
    queues.older[row], queues.newer[row] = _NONE, oldest
    if oldest == _NONE:
        queues.ends[n_queues + q] = row
    else:
        queues.older[oldest] = row
    queues.ends[q] = row
    queues.queue[row] = q + 1
    queues.size[q] += 1
    queues.tally[_LOW] -= 1
    queues.stamp[row] = queues.tally[_LOW]


# ---- what policies do ----


@kernel(types.void, QUEUES_T, ROWS_T, ROWS_T, STAMPS_T, types.boolean)
def place(queues: Queues, rows: Rows, to: Rows, used_at: NDArray[np.int64], only_members: bool) -> None:
    """Make `rows`, in path order, the newest of the queues `to`: the deepest of them the least so.

    used_at: since when each ages. only_members: pass over rows that are in no queue. A row that is new has no chances.
    """
    for i in range(len(rows) - 1, -1, -1):
        row = rows[i]
        if queues.queue[row] == 0:
            if only_members:
                continue
            queues.chances[row] = 0
        elif queues.stamp[row] != 0:
            _unlink(queues, row)
        _push_newest(queues, row, to[i])
        queues.used_at[row] = used_at[i]


@kernel(types.void, QUEUES_T, ROWS_T)
def place_first(queues: Queues, rows: Rows) -> None:
    """These pages, in path order, are the first to go of the queues they are in line of: the deepest before all."""
    for i in range(len(rows)):
        row = rows[i]
        if queues.stamp[row] != 0:
            q = queues.queue[row] - 1
            _unlink(queues, row)
            _push_oldest(queues, row, q)


@kernel(types.void, QUEUES_T, ROWS_T, types.int64)
def count_use(queues: Queues, rows: Rows, most: int) -> None:
    """One chance more for those of `rows` that are in a queue, up to `most`."""
    for row in rows:
        if queues.queue[row] != 0 and queues.chances[row] < most:
            queues.chances[row] += 1


@kernel(types.void, COLUMNS_T, QUEUES_T, ROWS_T, types.int64, STAMPS_T)
def remove(columns: Columns, queues: Queues, rows: Rows, tier: int, front: NDArray[np.int64]) -> None:
    """These pages have left the tier, or have not come: a parent that was parked, and has no child now, is in line.

    front: int64[n_groups], the queue in which it is then the first; -1: the one it was in.
    """
    for row in rows:
        if queues.stamp[row] != 0:
            _unlink(queues, row)
        queues.queue[row] = 0
        parent = columns.parent[row]
        if parent < 0 or columns.tier_children[parent, tier] != 0:
            continue
        if queues.queue[parent] != 0 and queues.stamp[parent] == 0:
            q = front[columns.group[parent]]
            _push_oldest(queues, parent, q if q != _NONE else queues.queue[parent] - 1)


# ---- eviction ----


@inlined
def _start(queues: Queues, worths: Worths, group: int, clock: int) -> None:
    """Stand before the oldest page of each queue of a group."""
    for kind in range(len(worths.table)):
        q = group * worths.n_kinds + kind
        queues.cursor[q], queues.left[q] = queues.ends[q], queues.size[q]
        _weigh(queues, worths, q, kind, clock)


@inlined
def _weigh(queues: Queues, worths: Worths, q: int, kind: int, clock: int) -> None:
    """What the page before which the walk stands is worth."""
    row = queues.cursor[q]
    if row == _NONE:
        return
    age, low, high = clock - queues.used_at[row], 0, worths.table.shape[1] - 1
    while low < high:
        middle = (low + high + 1) // 2
        if age >= worths.edges[middle]:
            low = middle
        else:
            high = middle - 1
    queues.score[q] = worths.table[kind, low]


@inlined
def _turn(queues: Queues, q: int) -> float:
    """The queue in which the walk has the least before it is the next."""
    if queues.cursor[q] == _NONE:
        return 2.0 * _LAST
    return float(queues.score[q] + _LAST) if queues.left[q] <= queues.spared[q] else float(queues.score[q])


@inlined
def _best(queues: Queues, worths: Worths, group: int) -> tuple[int, float]:
    """The kind of queue whose turn it is, and up to which score it stays so; -1: the walk is at the end of all."""
    best, lowest, second = _NONE, 2.0 * _LAST, 2.0 * _LAST
    for kind in range(len(worths.table)):
        turn = _turn(queues, group * worths.n_kinds + kind)
        if turn < lowest:
            best, lowest, second = kind, turn, lowest
        elif turn < second:
            second = turn
    return best, second


@inlined
def _next_kind(queues: Queues, worths: Worths, group: int, kind: int, second: float) -> tuple[int, float]:
    """As `_best`, after a walk in the queues of `kind` (-1: none yet), which goes on as long as it stays the best."""
    if kind != _NONE:
        q = group * worths.n_kinds + kind
        if queues.cursor[q] != _NONE and _turn(queues, q) <= second:
            return kind, second
    return _best(queues, worths, group)


@inlined
def _step(queues: Queues, worths: Worths, q: int, kind: int, clock: int) -> int:
    """Go past the page before which the walk stands, which is returned."""
    row = int(queues.cursor[q])
    queues.cursor[q] = queues.newer[row]
    _weigh(queues, worths, q, kind, clock)
    return row


@inlined
def _may_go(queues: Queues, columns: Columns, row: int, tier: int, now: int) -> bool:
    """Whether nothing keeps a page here but its chances, once the walk has taken what it has taken."""
    is_leaf = columns.tier_children[row, tier] == queues.n_taken[row]
    return bool(is_leaf and columns.leases[row] == 0 and columns.last_use[row] != now)


@inlined
def _has_chance(queues: Queues, row: int) -> bool:
    return bool(queues.chances[row] > queues.threshold[queues.queue[row] - 1])


@inlined
def _go_onward(queues: Queues, worths: Worths, row: int, clock: int, walked: int) -> float:
    """A page that is leased or has a chance left, parked or not, becomes the newest of the queue `onward` of its own.

    Returns when it is the turn of that queue, if it is another than the one that is walked now.
    """
    q = queues.queue[row] - 1
    onward = queues.onward[q]
    if _has_chance(queues, row):
        queues.chances[row] = queues.chances[row] - 1 if onward == q else 0
    if queues.stamp[row] != 0:
        _unlink(queues, row)
        queues.left[q] -= 1
    _push_newest(queues, row, onward)
    queues.left[onward] += 1
    if queues.cursor[onward] == _NONE:
        queues.cursor[onward] = row
        _weigh(queues, worths, onward, onward % worths.n_kinds, clock)
    return float(_turn(queues, onward)) if onward != walked else 2.0 * _LAST


@inlined
def _take_up(
    columns: Columns,
    queues: Queues,
    worths: Worths,
    row: int,
    tier: int,
    now: int,
    clock: int,
    walked: int,
    n: int,
    out: Rows,
) -> tuple[int, float]:
    """Write a page behind the `n` in `out`, and those above it that were parked and that nothing keeps now.

    Returns how many are there, and when it is the turn of a queue that a page above has gone to.
    """
    while True:
        out[n] = row
        n += 1
        row = int(columns.parent[row])
        if row == _NONE:
            return n, 2.0 * _LAST
        queues.n_taken[row] += 1
        is_parked = queues.queue[row] != 0 and queues.stamp[row] == 0
        if n == len(out) or not is_parked or not _may_go(queues, columns, row, tier, now):
            return n, 2.0 * _LAST
        if _has_chance(queues, row):
            return n, _go_onward(queues, worths, row, clock, walked)


@kernel(types.int64, COLUMNS_T, QUEUES_T, WORTHS_T, types.int64, types.int64, types.int64, types.int64, ROWS_T)
def take(
    columns: Columns, queues: Queues, worths: Worths, tier: int, now: int, clock: int, group: int, out: Rows
) -> int:
    """Fill `out` with pages of a group that are to go, children before parents. Returns how many there are.

    now: the index's clock. clock: the policy's.
    """
    n, last_stamp, kind, second = 0, queues.tally[_HIGH], _NONE, 0.0
    _start(queues, worths, group, clock)
    while n < len(out):
        kind, second = _next_kind(queues, worths, group, kind, second)
        if kind == _NONE:
            break
        q = group * worths.n_kinds + kind
        row = _step(queues, worths, q, kind, clock)
        if columns.tier_children[row, tier] != queues.n_taken[row]:
            _unlink(queues, row)
            queues.left[q] -= 1
        elif columns.leases[row] != 0:
            if queues.stamp[row] <= last_stamp:
                second = min(second, _go_onward(queues, worths, row, clock, q))
        elif columns.last_use[row] == now:
            continue
        elif _has_chance(queues, row):
            second = min(second, _go_onward(queues, worths, row, clock, q))
        else:
            queues.left[q] -= 1
            n, turn = _take_up(columns, queues, worths, row, tier, now, clock, q, n, out)
            second = min(second, turn)
    for i in range(n):
        parent = columns.parent[out[i]]
        if parent != _NONE:
            queues.n_taken[parent] = 0
    return n


@kernel(types.int64, QUEUES_T, WORTHS_T, types.int64, types.int64, ROWS_T)
def order(queues: Queues, worths: Worths, clock: int, group: int, out: Rows) -> int:
    """Fill `out` with the first pages in line of a group, whether they may go or not. Returns how many there are."""
    n, kind, second = 0, _NONE, 0.0
    _start(queues, worths, group, clock)
    while n < len(out):
        kind, second = _next_kind(queues, worths, group, kind, second)
        if kind == _NONE:
            break
        q = group * worths.n_kinds + kind
        queues.left[q] -= 1
        out[n] = _step(queues, worths, q, kind, clock)
        n += 1
    return n


def members(queues: Queues) -> Rows:
    """All rows that are in line or parked. Raises AssertionError if the lists are not what the columns say."""
    known = np.flatnonzero(queues.queue).astype(np.int32)
    n_queues = len(queues.size)
    in_line = 0
    for q in range(n_queues):
        row, before, n = int(queues.ends[q]), _NONE, 0
        while row != _NONE:
            n += 1
            assert n <= queues.size[q], f"queue {q} is longer than its size, or runs in a circle"
            assert queues.queue[row] == q + 1, f"row {row} stands in queue {q} and says {queues.queue[row] - 1}"
            assert queues.older[row] == before, f"row {row} does not know the row before it"
            assert before == _NONE or queues.stamp[before] < queues.stamp[row], "stamps do not grow along a queue"
            before, row = row, int(queues.newer[row])
        assert queues.ends[n_queues + q] == before, f"queue {q} does not end with its newest row"
        assert n == queues.size[q], f"queue {q} is shorter than its size"
        in_line += n
    assert in_line == np.count_nonzero(queues.stamp[known]), "a row has a stamp and is in no queue"
    assert not queues.n_taken.any(), "a walk has left its notes"
    return known
