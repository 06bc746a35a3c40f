"""`check_invariants` finds damage, and names it. Each case breaks one column by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from radix import HBM, HOST, Index, Rows, kernels
from radix.columns import Columns
from tests.radix.model import page_keys

Damage = Callable[[Columns], object]


def broken(column: str, at: object, value: int) -> Damage:
    return lambda columns: getattr(columns, column).__setitem__(at, value)


def swap_table_entries(columns: Columns) -> None:
    first, second, *_ = np.flatnonzero(columns.table)
    columns.table[[first, second]] = columns.table[[second, first]]


def copy_key(columns: Columns) -> None:
    columns.key[1] = columns.key[0]


def index() -> Index:
    """Rows 0 to 3 are a path, on the host tier and but for the last in HBM; row 4 is free."""
    index = Index(16)
    rows: Rows = index.insert(b"".join(page_keys("abcde")))
    index.begin(rows[:4], HOST, np.arange(4, dtype=np.int32))
    index.commit(rows[:4], HOST)
    index.put(rows[:3], HBM)
    index.forget(rows[4:])
    return index


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken("tally", kernels.N_ROWS, 5), "count of rows"),
        (broken("tally", kernels.N_LEASES, 1), "count of leases"),
        (broken("tally", kernels.FREE_HEAD, -1), "not on the free stack"),
        (broken("tally", kernels.FREE_HEAD, 2), "free stack"),
        (broken("leases", 4, 1), "holds a free row"),
        (broken("residency", 4, 2), "holds a free row"),
        (broken("leases", 0, -1), "leases are negative"),
        (broken("leases", 0, 1), "count of leases"),
        (broken("table", slice(None), 0), "table does not hold"),
        (swap_table_entries, "cannot be reached"),
        (copy_key, "two rows have one key"),
        (broken("parent", 3, 4), "parent is not in use"),
        (broken("depth", 0, 1), "depth"),
        (broken("depth", 3, 7), "depth"),
        (broken("n_children", 3, 1), "count of children"),
        (broken("tier_children", (0, HOST), 0), "tier 1: a count of children"),
        (broken("counts", (HBM, 2), 4), "tier 0: counts"),
        (broken("residency", 0, 0), "tier 0: counts"),
        (broken("slot", 1, 0), "two pages have one slot"),
        (broken("slot", 1, -1), "has no slot"),
    ],
)
def test_damage_is_named(damage: Damage, message: str) -> None:
    damaged = index()
    damaged.check_invariants()
    damage(damaged._columns)
    with pytest.raises(AssertionError, match=message):
        damaged.check_invariants()


def test_a_slot_outside_host_memory_is_named() -> None:
    damaged = index()
    damaged.drop(np.array([3], np.int32), HOST)
    rows = damaged.insert(b"".join(page_keys("abcd")))
    damaged._columns.slot[rows[-1]] = 3
    with pytest.raises(AssertionError, match="not in host memory has a slot"):
        damaged.check_invariants()


def test_a_policy_that_lost_a_page_is_named() -> None:
    damaged = index()
    damaged._policies[HOST].removed(np.array([2], np.int32))
    with pytest.raises(AssertionError, match="tier 1: the policy"):
        damaged.check_invariants()
