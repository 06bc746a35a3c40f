"""What is remembered of keys that were asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from radix import history
from radix.history import WAYS, History


def keys(*first_words: int) -> NDArray[np.uint64]:
    """A key of each of these first words; the other three differ from key to key, and do not matter."""
    rows = [[word, n, n, n] for n, word in enumerate(first_words)]
    return np.array(rows, np.uint64).reshape(-1, 4)


def note(into: History, now: int, *first_words: int) -> tuple[list[int], list[bool]]:
    places, is_known = np.empty(len(first_words), np.int64), np.empty(len(first_words), np.uint8)
    history.note(into, keys(*first_words), now, places, is_known)
    return places.tolist(), (is_known != 0).tolist()


def find(into: History, *first_words: int) -> list[int]:
    return [int(place) for place in history.places_of(into, keys(*first_words))]


def test_a_key_that_was_noted_is_found_where_it_was_put() -> None:
    memory = history.allocate(1000)
    places, is_known = note(memory, 1, 7, 7 << 40, 9 << 50)
    assert is_known == [False, False, False]
    assert len(set(places)) == 3
    assert find(memory, 7, 7 << 40, 9 << 50, 8) == [*places, -1]
    assert note(memory, 2, 9 << 50, 7) == ([places[2], places[0]], [True, True])


def test_a_key_that_is_named_twice_in_a_call_is_known_the_second_time() -> None:
    memory = history.allocate(8)
    places, is_known = note(memory, 1, 5, 5)
    assert places[0] == places[1]
    assert is_known == [False, True]


def test_in_a_full_set_the_one_noted_longest_ago_is_forgotten() -> None:
    memory = history.allocate(WAYS)
    for now, word in enumerate((1, 2, 3, 4), start=1):
        note(memory, now, word)
    note(memory, 5, 1)
    place = find(memory, 2)[0]
    assert note(memory, 6, 5) == ([place], [False])
    assert find(memory, 2) == [-1]
    assert -1 not in find(memory, 1, 3, 4, 5)


def test_a_key_that_takes_anothers_place_is_counted_from_one() -> None:
    memory = history.allocate(WAYS)
    note(memory, 1, *(1, 1, 1), 2, 3, 4)
    assert memory.n_times[find(memory, 1)[0]] == 3
    place = note(memory, 2, 5)[0][0]
    assert memory.n_times[place] == 1


def test_the_count_stays_at_its_most() -> None:
    memory = history.allocate(WAYS)
    for now in range(1, 300):
        note(memory, now, 1)
        assert memory.n_times[find(memory, 1)[0]] == min(now, 255)


def test_other_sets_are_left_alone() -> None:
    memory = history.allocate(1024)
    n_sets = len(memory.name) // WAYS
    place_of_other = note(memory, 1, 1 << 20)[0]
    note(memory, 2, *((n * n_sets) << 20 for n in range(3 * WAYS)))
    assert find(memory, 1 << 20) == place_of_other


def test_there_is_room_for_as_many_as_were_asked_for() -> None:
    for n_keys in (0, 1, 2, 4, 5, 8, 9, 1000):
        memory = history.allocate(n_keys)
        assert len(memory.name) >= n_keys
        assert memory.nbytes == 17 * len(memory.name)


@given(st.lists(st.integers(0, 15), max_size=200))
def test_what_was_noted_lately_is_remembered_with_its_count(words: list[int]) -> None:
    """One set of four: exactly the four distinct keys noted last, each with how often it was noted since it came."""
    memory = history.allocate(WAYS)
    counts: dict[int, int] = {}
    for now, word in enumerate(words, start=1):
        expected = word in counts
        assert note(memory, now, word)[1] == [expected]
        counts[word] = counts.pop(word, 0) + 1
        if len(counts) > WAYS:
            del counts[next(iter(counts))]
        for known in range(16):
            place = find(memory, known)[0]
            assert (place >= 0) == (known in counts)
            if place >= 0:
                assert memory.n_times[place] == counts[known]
