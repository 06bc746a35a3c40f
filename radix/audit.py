"""The invariants of the index, stated once, over its whole memory.

Every fact that is kept in two places is derived again from one of them and compared: the table from the rows, the
counts of children from the parents, the counters from the columns, the policies' members from the residencies.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from radix import kernels
from radix.columns import NONE, ROOT, Columns, Rows
from radix.policy import Policy
from radix.residency import HOST, State


def audit(columns: Columns, policies: Mapping[int, Policy]) -> None:
    """Raises AssertionError that names the first violation. Takes memory and time in proportion to the rows touched."""
    used = np.flatnonzero(columns.parent[: columns.tally[kernels.N_TOUCHED]] >= ROOT).astype(np.int32)
    _check_rows(columns, used)
    _check_table(columns, used)
    _check_tree(columns, used)
    states = _check_residency(columns, used)
    for tier, policy in policies.items():
        members = policy.members()
        resident = used[states[:, tier] == State.RESIDENT]
        assert np.array_equal(np.sort(members), resident), f"tier {tier}: the policy has other pages than are resident"


def _check_rows(columns: Columns, used: Rows) -> None:
    """Every row ever touched is in use or on the free stack, once; what is in use is held by something."""
    n_touched = int(columns.tally[kernels.N_TOUCHED])
    assert columns.tally[kernels.N_ROWS] == len(used), "the count of rows is wrong"
    free: list[int] = []
    row = int(columns.tally[kernels.FREE_HEAD])
    while row != NONE:
        free.append(row)
        assert len(free) <= n_touched - len(used), "the free stack is longer than the free rows"
        row = kernels.FREE_LINK - int(columns.parent[row])
    assert len(free) == n_touched - len(used), "a free row is not on the free stack"
    assert (columns.parent[free] < ROOT).all(), "a row in use is on the free stack"
    for column in (columns.residency, columns.leases, columns.n_children, columns.tier_children):
        assert not column[free].any(), "something holds a free row"
    assert (columns.leases[used] >= 0).all(), "leases are negative"
    assert columns.tally[kernels.N_LEASES] == columns.leases[used].sum(), "the count of leases is wrong"


def _check_table(columns: Columns, used: Rows) -> None:
    """The table holds each row in use once, reachable from its key's home without a gap, and no key twice."""
    table, mask = columns.table, len(columns.table) - 1
    entries = np.flatnonzero(table)
    rows = table[entries] - 1
    assert np.array_equal(np.sort(rows), used), "the table does not hold exactly the rows in use"
    assert len(np.unique(columns.key[used], axis=0)) == len(used), "two rows have one key"
    homes = (columns.key[rows, 0] & np.uint64(mask)).astype(np.int64)
    gaps_before = np.concatenate(([0], np.cumsum(table == 0)))
    wrapped = entries < homes
    n_gaps = gaps_before[entries] - gaps_before[homes] + np.where(wrapped, gaps_before[-1], 0)
    assert not n_gaps.any(), "a row cannot be reached from its key's home"


def _check_tree(columns: Columns, used: Rows) -> None:
    parents = columns.parent[used]
    below = parents != ROOT
    assert np.isin(parents[below], used).all(), "a row's parent is not in use"
    assert (columns.depth[used[~below]] == 0).all(), "a first page is not at depth 0"
    expected = columns.depth[parents[below]] + 1
    assert np.array_equal(columns.depth[used[below]], expected), "a row's depth is not its parent's + 1"
    assert np.array_equal(columns.group[used[below]], columns.group[parents[below]]), (
        "a page is not of its parent's group"
    )
    n_children = np.bincount(parents[below], minlength=len(columns.parent))
    assert np.array_equal(columns.n_children[used], n_children[used]), "a count of children is wrong"


def _check_residency(columns: Columns, used: Rows) -> NDArray[np.uint8]:
    """Returns uint8[n, n_tiers], the states of the rows in use."""
    n_tiers = len(columns.counts)
    shifts = 2 * np.arange(n_tiers, dtype=np.uint8)
    states = (columns.residency[used, None] >> shifts) & np.uint8(3)
    parents = columns.parent[used]
    for tier in range(n_tiers):
        counts = np.bincount(states[:, tier], minlength=3)
        assert np.array_equal(columns.counts[tier], counts), f"tier {tier}: counts {columns.counts[tier]}, not {counts}"
        held = np.bincount(columns.group[used[states[:, tier] != State.ABSENT]], minlength=len(columns.held))
        assert np.array_equal(columns.held[:, tier], held), f"tier {tier}: a group's count of pages is wrong"
        there = parents[(states[:, tier] != State.ABSENT) & (parents != ROOT)]
        n_children = np.bincount(there, minlength=len(columns.parent))
        assert np.array_equal(columns.tier_children[used, tier], n_children[used]), (
            f"tier {tier}: a count of children is wrong"
        )
    slots = columns.slot[used]
    in_host = states[:, HOST] != State.ABSENT
    assert (slots[in_host] >= 0).all(), "a page in host memory has no slot"
    assert (slots[~in_host] == NONE).all(), "a page that is not in host memory has a slot"
    assert len(np.unique(slots[in_host])) == in_host.sum(), "two pages have one slot"
    return states
