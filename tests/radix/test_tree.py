"""The tree: matching, splits, rows and their reuse, a hash table that collides, capacity."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from radix import HBM, HOST, ROOT, Index, IndexFull, State
from tests.radix.model import page_keys


def keys_of(path: str, n_homes: int = 2**64) -> bytes:
    return b"".join(page_keys(path, n_homes))


def numbered(home: int, n: int) -> bytes:
    """A key with a chosen home in the table."""
    return home.to_bytes(8, "little") + hashlib.sha256(bytes([n])).digest()[8:]


def hold(index: Index, path: str) -> list[int]:
    rows = index.insert(keys_of(path))
    index.put(rows, HBM)
    return [int(row) for row in rows]


def test_a_run_is_matched_as_far_as_it_is_known() -> None:
    index = Index(16)
    rows = hold(index, "abcd")
    assert rows == [0, 1, 2, 3]
    assert index.match(keys_of("abcd")).tolist() == rows
    assert index.match(keys_of("abxy")).tolist() == rows[:2]
    assert index.match(keys_of("abcdef")).tolist() == rows
    assert index.match(keys_of("x")).tolist() == []
    assert index.match(b"").tolist() == []


def test_a_run_may_be_matched_from_any_depth() -> None:
    index = Index(16)
    rows = hold(index, "abcd")
    assert index.match(keys_of("abcdx")[64:]).tolist() == rows[2:]


def test_keys_that_do_not_chain_are_not_matched_as_a_run() -> None:
    index = Index(16)
    hold(index, "ab")
    hold(index, "xy")
    jumbled = keys_of("ab")[:32] + keys_of("xy")[32:]
    assert index.match(jumbled).tolist() == index.match(keys_of("a")).tolist()


def test_an_edge_splits_where_another_run_leaves_it() -> None:
    index = Index(16)
    stem = hold(index, "abcdef")
    branch = hold(index, "abcxyz")
    assert branch == [*stem[:3], 6, 7, 8]
    assert index.match(keys_of("abcdef")).tolist() == stem
    assert index.match(keys_of("abcxyz")).tolist() == branch
    assert index.path(branch[-1]).tolist() == branch
    index.check_invariants()


def test_one_edge_splits_at_every_page() -> None:
    index = Index(64)
    stem = hold(index, "abcdef")
    for n in range(6):
        hold(index, "abcdef"[:n] + "x")
    assert index.match(keys_of("abcdef")).tolist() == stem
    assert [len(index.match(keys_of("abcdef"[:n] + "xa"))) for n in range(6)] == [1, 2, 3, 4, 5, 6]
    index.check_invariants()


def test_half_of_an_edge_may_go_and_come_back() -> None:
    index = Index(16)
    rows = np.array(hold(index, "abcdef"), np.int32)
    index.drop(rows[3:], HBM)
    assert index.match(keys_of("abcdef")).tolist() == rows[:3].tolist()
    hold(index, "q")
    assert hold(index, "abcdef")[:3] == rows[:3].tolist()
    index.check_invariants()


def test_a_run_can_be_inserted_below_a_row() -> None:
    index = Index(16)
    rows = hold(index, "abc")
    tail = index.insert(keys_of("abcde")[96:], rows[-1])
    index.put(tail, HBM)
    assert index.match(keys_of("abcde")).tolist() == [*rows, *tail.tolist()]
    assert index.path(int(tail[-1])).tolist() == [*rows, *tail.tolist()]


def test_insert_refuses_what_is_not_a_run_below_its_parent() -> None:
    index = Index(16)
    a, b = hold(index, "ab")
    hold(index, "xy")
    unchained = keys_of("pq") + keys_of("ab")[32:]
    for keys, parent in (
        (keys_of("ab")[32:], ROOT),
        (keys_of("xy")[32:], a),
        (unchained, ROOT),
        (keys_of("p") * 2, ROOT),
        (keys_of("pq"), 4),
        (keys_of("pq"), -2),
        (keys_of("pq"), 1 << 20),
        (keys_of("pq")[1:], ROOT),
    ):
        with pytest.raises(ValueError, match=r"not a run below|whole keys"):
            index.insert(keys, parent)
        assert len(index) == 4
        index.check_invariants()
    assert b == index.row_of(keys_of("ab")[32:])


def test_what_nothing_holds_can_be_forgotten() -> None:
    index = Index(16)
    held = hold(index, "ab")
    rows = index.insert(keys_of("abcd"))
    index.forget(rows)
    assert index.match(keys_of("abcd")).tolist() == held
    index.check_invariants()


def test_the_end_of_a_leaf_frees_the_bare_branch_above_it() -> None:
    index = Index(16)
    rows = index.insert(keys_of("abcd"))
    index.put(rows[:1], HBM)
    index.lease(rows[3:])
    assert len(index) == 4
    index.release(rows[3:])
    assert index.match(keys_of("abcd")).tolist() == rows[:1].tolist()


def test_rows_never_used_go_first_and_freed_runs_come_back_in_order() -> None:
    index = Index(8)
    index.drop(np.array(hold(index, "abcd"), np.int32), HBM)
    assert hold(index, "wxyz") == [4, 5, 6, 7]
    assert hold(index, "pqrs") == [0, 1, 2, 3]
    index.check_invariants()


def test_a_freed_row_is_not_taken_for_the_next_page_of_a_run() -> None:
    """Its key stays in the column, and the row before it is the parent it had."""
    index = Index(8)
    rows = np.array(hold(index, "abc"), np.int32)
    index.drop(rows[2:], HBM)
    assert index.match(keys_of("abc")).tolist() == [0, 1]
    assert index.row_of(keys_of("abc")[64:]) is None


def test_a_row_never_used_is_not_taken_for_the_next_page_of_a_run() -> None:
    """The memory of row 1 is all zeros: the key and the parent that are looked for."""
    index = Index(8)
    index.put(index.insert(keys_of("a")), HBM)
    assert index.match(keys_of("a") + bytes(32)).tolist() == [0]


def test_capacity_is_exact_and_a_run_that_does_not_fit_changes_nothing() -> None:
    index = Index(4)
    rows = hold(index, "abc")
    with pytest.raises(IndexFull):
        index.insert(keys_of("abxy"))
    assert len(index) == 3
    index.check_invariants()
    assert index.insert(keys_of("abcd")).tolist() == [*rows, 3]
    with pytest.raises(IndexFull):
        index.insert(keys_of("q"))
    assert index.insert(keys_of("abcd")).tolist() == [*rows, 3], "known pages need no room"


def test_keys_with_the_same_first_8_bytes_are_told_apart_in_a_full_table() -> None:
    index = Index(64)
    path = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"
    assert len(path) == 64
    index.put(index.insert(keys_of(path, n_homes=1)), HBM)
    assert index.match(keys_of(path, n_homes=1)).tolist() == list(range(64))
    assert index.row_of(keys_of(path[::-1], n_homes=1)[:32]) is None
    index.check_invariants()


@pytest.mark.parametrize("byte", range(32))
def test_all_32_bytes_of_a_key_count(byte: int) -> None:
    index = Index(8)
    key = bytes(range(32))
    other = key[:byte] + b"\xff" + key[byte + 1 :]
    index.put(index.insert(key), HBM)
    assert index.row_of(other) is None
    assert index.insert(other).tolist() == [1]
    assert index.row_of(key) == 0


@pytest.mark.parametrize("first_home", [0, 13, 28, 30, 31])
def test_deletion_inside_a_probe_chain_leaves_no_hole(first_home: int) -> None:
    """A chain over seven homes, in a table of 32 whose end it may run over. Every entry is deleted once, first."""
    homes = [0, 0, 1, 0, 2, 1, 4, 6, 6]
    for deleted in range(len(homes)):
        index = Index(16)
        keys = [numbered((first_home + home) % 32, n) for n, home in enumerate(homes)]
        for key in keys:
            index.put(index.insert(key), HBM)
        row = index.row_of(keys[deleted])
        assert row is not None
        index.drop(np.array([row], np.int32), HBM)
        index.check_invariants()
        assert index.row_of(keys[deleted]) is None
        assert all(index.row_of(key) is not None for n, key in enumerate(keys) if n != deleted)


def test_a_full_index_is_turned_over_many_times() -> None:
    """Chains grow and are cut at 50% load, the most there can be."""
    index = Index(32)
    random = np.random.default_rng(7)
    held: list[bytes] = []
    for n in range(2000):
        if len(index) == 32:
            row = index.row_of(held.pop(int(random.integers(32))))
            assert row is not None
            index.drop(np.array([row], np.int32), HBM)
        held.append(int(random.integers(64)).to_bytes(8, "little") + n.to_bytes(24, "little"))
        index.put(index.insert(held[-1]), HBM)
        if n % 50 == 0:
            index.check_invariants()
    assert all(index.row_of(key) is not None for key in held)


def test_clear_drops_everything_and_keeps_the_clock() -> None:
    index = Index(8)
    rows = index.insert(keys_of("abc"))
    index.begin(rows, HOST, np.arange(3, dtype=np.int32))
    index.commit(rows, HOST)
    index.tick()
    index.clear()
    assert len(index) == 0
    assert index.now == 1
    assert index.count(HOST, State.RESIDENT) == 0
    index.tick()
    assert index.evict(8).keys == b""
    assert hold(index, "xyz") == [0, 1, 2]
    index.check_invariants()


def test_memory_is_allocated_once_and_counted() -> None:
    index = Index(1000)
    nbytes = index.nbytes
    index.put(index.insert(np.random.default_rng(0).bytes(32 * 1000)), HBM)
    assert index.nbytes == nbytes
    fixed = Index(1).nbytes
    assert 1000 * 32 < nbytes - fixed < 1000 * 300


def test_sizes_that_cannot_be_are_refused() -> None:
    for capacity, n_tiers in ((0, 4), (2**30, 4), (8, 1), (8, 5)):
        with pytest.raises(ValueError, match="not"):
            Index(capacity, n_tiers=n_tiers)


def test_a_row_that_is_not_in_use_has_no_path() -> None:
    index = Index(8)
    rows = np.array(hold(index, "ab"), np.int32)
    index.drop(rows[1:], HBM)
    for row in (-1, 1, 2, 8):
        with pytest.raises(ValueError, match="not in use"):
            index.path(row)
