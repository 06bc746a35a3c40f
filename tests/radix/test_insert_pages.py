"""`Index.insert_pages`, held against `insert`: the same pages one by one, in any order that has parents first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix import HBM, ROOT, Index, IndexFull, StillHeld
from tests.radix.model import page_keys

PATHS = st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=8)
ROOT_KEY = bytes(32)


def pages_of(paths: list[str], n_homes: int) -> dict[bytes, bytes]:
    """Each page's parent, by key, parents first."""
    parents: dict[bytes, bytes] = {}
    for path in paths:
        above = ROOT_KEY
        for key in page_keys(path, n_homes):
            parents.setdefault(key, above)
            above = key
    return parents


def shuffled(parents: dict[bytes, bytes], data: st.DataObject) -> list[bytes]:
    """All keys in a random order that has parents first."""
    order: list[bytes] = []
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if parents[key] in (ROOT_KEY, *order)]
        order.append(data.draw(st.sampled_from(ready)))
        waiting.remove(order[-1])
    return order


@given(paths=PATHS, known=PATHS, n_homes=st.sampled_from([1, 3, 2**64]), data=st.data())
def test_pages_one_by_one_make_the_tree_that_runs_make(
    paths: list[str], known: list[str], n_homes: int, data: st.DataObject
) -> None:
    by_pages, by_runs = Index(128), Index(128)
    for path in known:
        for index in (by_pages, by_runs):
            index.put(index.insert(b"".join(page_keys(path, n_homes))), HBM)
    parents = pages_of(paths, n_homes)
    order = shuffled(parents, data)
    rows = by_pages.insert_pages(b"".join(order), b"".join(parents[key] for key in order))
    assert (rows > ROOT).all()
    by_pages.put(rows, HBM)
    for path in paths:
        keys = page_keys(path, n_homes)
        by_runs.put(by_runs.insert(b"".join(keys)), HBM)
        assert by_pages.keys_of(by_pages.match(b"".join(keys))) == b"".join(keys)
        row = by_pages.row_of(keys[-1])
        assert row is not None
        assert by_pages.keys_of(by_pages.path(row)) == b"".join(keys)
    assert len(by_pages) == len(by_runs)
    by_pages.check_invariants()


@given(paths=PATHS, data=st.data())
def test_pages_without_a_known_parent_get_no_row(paths: list[str], data: st.DataObject) -> None:
    parents = pages_of(paths, 3)
    lost = data.draw(st.sampled_from(sorted(parents)))
    order = [key for key in shuffled(parents, data) if key != lost]
    index = Index(128)
    rows = index.insert_pages(b"".join(order), b"".join(parents[key] for key in order))
    gone = {lost}
    for key, row in zip(order, rows.tolist(), strict=True):
        if parents[key] in gone:
            gone.add(key)
        assert (row == -1) == (key in gone)
    index.put(rows[rows >= 0], HBM)
    index.check_invariants()


def test_a_page_below_another_parent_than_it_has_gets_no_row() -> None:
    index = Index(16)
    a, b, x = page_keys("ab") + page_keys("x")
    held = index.insert_pages(a + b + x, ROOT_KEY + a + ROOT_KEY)
    index.put(held, HBM)
    assert index.insert_pages(b + b + b, x + ROOT_KEY + a).tolist() == [-1, -1, held[1]]
    assert len(index) == 3
    index.check_invariants()


def test_a_page_named_twice_has_one_row_and_its_own_parent_none() -> None:
    index = Index(16)
    a, b = page_keys("ab")
    rows = index.insert_pages(a + a + b, ROOT_KEY + ROOT_KEY + b)
    assert rows[0] == rows[1]
    assert rows[2] == -1
    assert len(index) == 1


def test_too_many_pages_change_nothing() -> None:
    index = Index(3)
    index.put(index.insert(b"".join(page_keys("x"))), HBM)
    keys = page_keys("abc")
    with pytest.raises(IndexFull, match="2 rows are free"):
        index.insert_pages(b"".join(keys), ROOT_KEY + b"".join(keys[:2]))
    assert len(index) == 1
    assert index.insert_pages(b"".join(keys[:2]), ROOT_KEY + keys[0]).dtype == np.int32


def test_blobs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 pages have as many parents, not 2"):
        Index(4).insert_pages(bytes(32), bytes(64))
    with pytest.raises(ValueError, match="whole keys"):
        Index(4).insert_pages(bytes(31), bytes(31))


def test_reserving_changes_nothing_and_is_for_an_empty_index() -> None:
    index = Index(64)
    index.reserve(32)
    index.check_invariants()
    rows = index.insert(b"".join(page_keys("abc")))
    index.put(rows, HBM)
    with pytest.raises(StillHeld, match="3 rows are in use"):
        index.reserve(32)
    index.check_invariants()


def test_parents_and_depths_say_where_rows_are() -> None:
    index = Index(8)
    rows = index.insert(b"".join(page_keys("abc")))
    index.put(rows, HBM)
    assert index.parents(rows).tolist() == [ROOT, *rows[:2].tolist()]
    assert index.depths(rows[::-1].copy()).tolist() == [2, 1, 0]
