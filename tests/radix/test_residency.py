"""States and transitions, slots, leases. All or nothing, always."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from radix import HBM, HOST, IllegalTransition, Index, NotLeased, Rows, State, StillHeld
from tests.radix.model import LEGAL, page_keys

SSD = 2


def run_of(index: Index, path: str) -> Rows:
    return index.insert(b"".join(page_keys(path)))


def slots(*numbers: int) -> Rows:
    return np.array(numbers, np.int32)


def bring(index: Index, rows: Rows, tier: int, state: State, first_slot: int = 0) -> None:
    """From ABSENT into a state; from INCOMING too, if RESIDENT is asked for."""
    if state is not State.ABSENT:
        index.begin(rows, tier, np.arange(len(rows), dtype=np.int32) + first_slot if tier == HOST else None)
    if state is State.RESIDENT:
        index.commit(rows, tier)


@pytest.fixture
def index() -> Index:
    return Index(32, policies={HOST: "lru", SSD: "lru"})


@pytest.mark.parametrize(
    ("name", "state", "tier"),
    [
        (name, state, tier)
        for name, state, tier in itertools.product(sorted(LEGAL), State, [HBM, HOST, SSD])
        if (name, tier) != ("put", HOST)
    ],
)
def test_the_table_of_transitions(index: Index, name: str, state: State, tier: int) -> None:
    rows = run_of(index, "abc")
    index.put(rows, 3)
    bring(index, rows, tier, state)
    arguments = [slots(7, 8, 9)] if name == "begin" and tier == HOST else []
    sources, target = LEGAL[name]
    if state in sources:
        getattr(index, name)(rows, tier, *arguments)
        assert index.states(rows, tier).tolist() == [target] * 3
    else:
        with pytest.raises(IllegalTransition, match=f"{name} of row 0 on tier {tier}: it is {state.name}"):
            getattr(index, name)(rows, tier, *arguments)
        assert index.states(rows, tier).tolist() == [state] * 3
    assert index.states(rows, 3).tolist() == [State.RESIDENT] * 3, "other tiers are untouched"
    index.check_invariants()


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_page_in_the_wrong_state_stops_all(index: Index, odd: int) -> None:
    rows = run_of(index, "abc")
    index.put(rows[odd : odd + 1], HBM)
    with pytest.raises(IllegalTransition):
        index.begin(rows, HBM)
    assert index.states(rows, HBM).tolist() == [2 * (i == odd) for i in range(3)]
    assert index.count(HBM, State.INCOMING) == 0
    index.check_invariants()


def test_a_row_that_is_not_in_use_stops_all(index: Index) -> None:
    rows = run_of(index, "abc")
    index.put(rows, HBM)
    index.drop(rows[2:], HBM)
    changes: list[Callable[[Rows], object]] = [
        lambda given: index.begin(given, HOST, np.arange(len(given), dtype=np.int32)),
        lambda given: index.put(given, SSD),
        index.lease,
        index.release,
    ]
    for stale in (2, 3, -1, 32, 2**31 - 1):
        given = np.array([0, 1, stale], np.int32)
        for change in changes:
            with pytest.raises((ValueError, IndexError, NotLeased)):
                change(given)
            index.check_invariants()
    assert index.count(HOST, State.INCOMING) == index.count(SSD, State.RESIDENT) == 0
    index.clear()


def test_slots_follow_the_host_copy(index: Index) -> None:
    rows = run_of(index, "abcd")
    assert index.slots(rows).tolist() == [-1] * 4
    index.begin(rows, HOST, slots(5, 3, 9, 1))
    assert index.slots(rows).tolist() == [5, 3, 9, 1]
    index.commit(rows[:2], HOST)
    index.put(rows[:1], HBM)
    assert index.abort(rows[2:], HOST).tolist() == [9, 1]
    assert index.drop(rows[:2], HOST).tolist() == [5, 3]
    assert index.slots(rows[:1]).tolist() == [-1]
    assert len(index) == 1, "only the page in HBM is still known"


def test_only_the_host_tier_takes_slots(index: Index) -> None:
    rows = run_of(index, "ab")
    with pytest.raises(ValueError, match="slots"):
        index.begin(rows, HOST)
    with pytest.raises(ValueError, match="slots"):
        index.begin(rows, SSD, slots(1, 2))
    for wrong in (slots(1), slots(1, 2, 3), slots(1, -1)):
        with pytest.raises(ValueError, match="slots"):
            index.begin(rows, HOST, wrong)
    with pytest.raises(ValueError, match="begin and commit"):
        index.put(rows, HOST)
    index.put(rows, SSD)
    assert index.drop(rows, SSD).tolist() == []
    index.check_invariants()


def test_the_slots_given_are_copied(index: Index) -> None:
    given = slots(4, 5)
    rows = run_of(index, "ab")
    index.begin(rows, HOST, given)
    given[:] = 0
    assert index.slots(rows).tolist() == [4, 5]


def test_a_tier_that_is_not_there_is_refused() -> None:
    index = Index(8, n_tiers=2)
    rows = run_of(index, "a")
    for tier in (-1, 2):
        with pytest.raises(ValueError, match="tier"):
            index.put(rows, tier)
        with pytest.raises(ValueError, match="tier"):
            index.states(rows, tier)
        with pytest.raises(ValueError, match="tier"):
            index.count(tier, State.RESIDENT)
    with pytest.raises(ValueError, match="tier"):
        Index(8, n_tiers=2, policies={2: "lru"})


def test_the_resident_prefix_ends_at_the_first_hole(index: Index) -> None:
    rows = run_of(index, "abcd")
    assert index.resident_prefix(rows, HOST) == 0
    bring(index, rows, HOST, State.RESIDENT)
    assert index.resident_prefix(rows, HOST) == 4
    index.drop(rows[1:2], HOST)
    assert index.resident_prefix(rows, HOST) == 1
    assert index.states(rows, HOST).tolist() == [2, 0, 2, 2], "its children stay, as orphans"
    assert index.resident_prefix(rows[:0], HOST) == 0
    index.check_invariants()


def test_leases_are_counted_and_keep_rows_alive(index: Index) -> None:
    rows = run_of(index, "ab")
    bring(index, rows, HOST, State.RESIDENT)
    index.lease(rows)
    index.lease(rows)
    assert index.drop(rows, HOST).tolist() == [0, 1]
    index.release(rows)
    assert len(index) == 2
    index.release(rows)
    assert len(index) == 0
    index.check_invariants()


def test_an_abort_under_a_lease_keeps_the_row(index: Index) -> None:
    rows = run_of(index, "ab")
    bring(index, rows, HOST, State.INCOMING)
    index.lease(rows)
    index.abort(rows, HOST)
    assert len(index) == 2
    index.release(rows)
    assert len(index) == 0


def test_release_below_zero_changes_nothing(index: Index) -> None:
    rows = run_of(index, "abc")
    index.lease(rows[:2])
    for given in (rows, np.array([0, 1, 0], np.int32)):
        with pytest.raises(NotLeased):
            index.release(given)
        index.check_invariants()
    index.release(rows[:2])
    assert len(index) == 3, "the third page was never held, and is there until it is forgotten"
    index.forget(rows)
    assert len(index) == 0


def test_clear_refuses_while_anything_is_open(index: Index) -> None:
    rows = run_of(index, "ab")
    index.lease(rows)
    with pytest.raises(StillHeld, match="2 leases and 0 incoming"):
        index.clear()
    bring(index, rows, HOST, State.INCOMING)
    index.release(rows)
    with pytest.raises(StillHeld, match="0 leases and 2 incoming"):
        index.clear()
    assert len(index) == 2
    index.commit(rows, HOST)
    index.clear()
    assert len(index) == 0


def test_rows_of_another_type_are_refused(index: Index) -> None:
    rows = run_of(index, "abcd")
    for wrong in (rows.astype(np.int64), rows[::2]):
        with pytest.raises(TypeError):
            index.lease(wrong)  # type: ignore[arg-type]
    index.check_invariants()
