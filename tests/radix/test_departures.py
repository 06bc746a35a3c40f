"""What is remembered of pages that have left."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from radix.departures import (
    CAPACITY,
    DAMAGED,
    FLUSH,
    HERE,
    MAX_ENTRIES,
    MAX_FLUSHES,
    NOT_KNOWN,
    QUOTA,
    WEIGHTS,
    Departures,
)


def keys(*names: int) -> bytes:
    """A key a name."""
    return np.array([[name, 1, 2, 3] for name in names], np.uint64).tobytes()


def said(departures: Departures, *names: int) -> list[tuple[int, int, float]]:
    found = departures.find(keys(*names))
    return [
        (int(reason), int(tier), float(at_s)) if reason else (NOT_KNOWN, 0, 0.0)
        for reason, tier, at_s in zip(found.reason, found.tier, found.at_s, strict=True)
    ]


def test_a_page_is_known_by_the_last_that_was_said_of_it() -> None:
    departures = Departures(100)
    departures.came(keys(1, 2, 3), 0, 5.0)
    departures.left(keys(2), 1, CAPACITY, 7.0)
    departures.left(keys(3), 1, QUOTA, 8.0)
    departures.left(keys(3), 0, DAMAGED, 9.0)
    assert said(departures, 4, 3, 2, 1) == [(NOT_KNOWN, 0, 0.0), (DAMAGED, 0, 9.0), (CAPACITY, 1, 7.0), (HERE, 0, 5.0)]


def test_nothing_is_known_of_a_page_that_never_was_here_however_full_it_is() -> None:
    departures = Departures(2)
    given = np.full(50, 0b101, np.uint8)
    departures.left(keys(*range(50)), 1, CAPACITY, 7.0, given)
    found = departures.find(keys(99, 98))
    assert (found.reason.tolist(), found.tier.tolist(), found.below.tolist()) == ([NOT_KNOWN] * 2, [0] * 2, [0] * 2)


def test_a_flush_is_of_what_was_here_and_of_nothing_else() -> None:
    departures = Departures(100)
    departures.came(keys(1, 2), 1, 5.0)
    departures.left(keys(2), 1, CAPACITY, 6.0)
    departures.flushed(FLUSH, 7.0)
    departures.came(keys(3), 1, 8.0)
    departures.flushed(WEIGHTS, 9.0)
    departures.came(keys(4), 1, 10.0)
    assert said(departures, 1, 2, 3, 4) == [(FLUSH, 1, 7.0), (CAPACITY, 1, 6.0), (WEIGHTS, 1, 9.0), (HERE, 1, 10.0)]


def test_only_so_many_flushes_are_kept() -> None:
    departures = Departures(100)
    departures.came(keys(1), 1, 0.0)
    for time_s in range(MAX_FLUSHES + 5):
        departures.flushed(FLUSH, float(time_s))
    assert said(departures, 1) == [(FLUSH, 1, 5.0)]


def test_what_tiers_below_were_given_stays_known_until_they_are_emptied() -> None:
    departures = Departures(100)
    departures.left(keys(1, 2), 1, CAPACITY, 1.0, np.array([0b01, 0b10], np.uint8))
    departures.left(keys(1), 0, CAPACITY, 2.0)
    assert departures.find(keys(1, 2, 3)).below.tolist()[:2] == [0b01, 0b10]
    departures.forget_below()
    assert departures.find(keys(1, 2)).below.tolist() == [0, 0]
    assert said(departures, 1) == [(CAPACITY, 0, 2.0)]


def test_an_entry_that_makes_room_takes_what_was_given_with_it() -> None:
    departures = Departures(1)
    for name in range(4):
        departures.left(keys(name), 1, CAPACITY, float(name), np.array([1], np.uint8))
    departures.left(keys(9), 1, CAPACITY, 9.0)
    found = departures.find(keys(9))
    assert (int(found.reason[0]), int(found.below[0])) == (CAPACITY, 0)
    assert said(departures, 0) == [(NOT_KNOWN, 0, 0.0)]


def test_memory_is_bounded() -> None:
    assert Departures(1 << 24).nbytes == Departures(MAX_ENTRIES).nbytes == 19 * MAX_ENTRIES
    assert Departures(1).nbytes == 19 * 4
    assert Departures(100).find(b"").reason.tolist() == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=100))
def test_a_set_remembers_the_four_that_were_written_last(written: list[tuple[int, int]]) -> None:
    """Against a dictionary: a table of one set, each write at a time of its own; now and then a flush."""
    departures, model = Departures(1), dict[int, tuple[int, int, float]]()
    for now, (name, what) in enumerate(written, start=1):
        if what == 3:
            departures.flushed(FLUSH, float(now))
            for known, (reason, tier, _) in model.items():
                if reason == HERE:
                    model[known] = (FLUSH, tier, float(now))
            continue
        model.pop(name, None)
        if len(model) == 4:
            del model[next(iter(model))]
        if what == 0:
            departures.came(keys(name), 1, float(now))
            model[name] = (HERE, 1, float(now))
        else:
            departures.left(keys(name), what, CAPACITY, float(now))
            model[name] = (CAPACITY, what, float(now))
        assert said(departures, *range(10)) == [model.get(known, (NOT_KNOWN, 0, 0.0)) for known in range(10)]
