"""Which tokens have been seen, wherever they stood."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from radix.windows import ELSEWHERE, MAX_ENTRIES, MOVED, NO_WINDOW, RATE, SAME, UNSEEN, WIDTH, Windows

PAGE = 16
SPACE, OTHER = 5, 0xABCD_0000_0006


def prompt(seed: object, n_tokens: int) -> NDArray[np.int64]:
    numbers = random.Random(str(seed))
    return np.array([numbers.randrange(150_000) for _ in range(n_tokens)], np.int64)


def keys(seed: object, n_pages: int) -> bytes:
    return random.Random(str(seed)).randbytes(32 * n_pages)


def counts(found: NDArray[np.uint8]) -> dict[int, int]:
    return {int(value): int(number) for value, number in zip(*np.unique(found, return_counts=True), strict=True)}


def pages_of(tokens: Sequence[int] | NDArray[np.int64]) -> int:
    return len(tokens) // PAGE


@pytest.fixture
def windows() -> Windows:
    return Windows(1 << 20)


def test_the_same_prompt_in_the_same_pages(windows: Windows) -> None:
    tokens, names = prompt(1, 4800), keys(1, 300)
    assert counts(windows.find(tokens, names, PAGE, SPACE)).keys() == {UNSEEN, NO_WINDOW}
    windows.note(tokens, names, PAGE, SPACE)
    found = counts(windows.find(tokens, names, PAGE, SPACE))
    assert found.keys() == {SAME, NO_WINDOW}
    assert found[SAME] > 120, "a page of the average has one chosen window"


@pytest.mark.parametrize("n_cut", [1, 16, 37, 1000])
def test_tokens_behind_a_cut_are_known_at_any_offset(windows: Windows, n_cut: int) -> None:
    tokens = prompt(1, 4800)
    windows.note(tokens, keys(1, 300), PAGE, SPACE)
    rest = tokens[n_cut:]
    found = counts(windows.find(rest, keys(2, pages_of(rest)), PAGE, SPACE))
    assert found.keys() <= {MOVED, NO_WINDOW}
    assert counts(windows.find(rest, keys(2, pages_of(rest)), PAGE, OTHER)).keys() <= {ELSEWHERE, NO_WINDOW}


def test_the_best_that_is_known_counts(windows: Windows) -> None:
    tokens = prompt(1, 1600)
    for names, space in ((keys(1, 100), OTHER), (keys(2, 100), SPACE), (keys(3, 100), SPACE)):
        windows.note(tokens, names, PAGE, space)
    for names, expected in ((keys(3, 100), SAME), (keys(4, 100), MOVED)):
        assert counts(windows.find(tokens, names, PAGE, SPACE)).keys() == {expected, NO_WINDOW}


def test_nothing_is_said_of_tokens_behind_the_last_page_and_of_prompts_shorter_than_a_window(windows: Windows) -> None:
    tokens = prompt(1, 200)
    windows.note(tokens, keys(1, 5), PAGE, SPACE)
    assert len(windows.find(tokens, keys(1, 5), PAGE, SPACE)) == 5
    behind = counts(windows.find(tokens[80 + WIDTH :], keys(2, 6), PAGE, SPACE))
    assert behind.keys() <= {UNSEEN, NO_WINDOW}
    short = windows.find(tokens[: WIDTH - 1], keys(1, 5), PAGE, SPACE)
    assert short.tolist() == [NO_WINDOW] * 5
    assert windows.find(tokens[:0], b"", PAGE, SPACE).tolist() == []


def test_two_tables_have_nothing_in_common() -> None:
    """The windows that are chosen depend on secrets of the table."""
    tokens, names = prompt(1, 4800), keys(1, 300)
    one, other = Windows(1 << 20), Windows(1 << 20)
    chosen = [table.find(tokens, names, PAGE, SPACE) != NO_WINDOW for table in (one, other)]
    assert not np.array_equal(*chosen)


def test_memory_is_bounded_and_the_latest_stay() -> None:
    assert Windows(1 << 40).nbytes == 16 * MAX_ENTRIES
    table = Windows(4000)
    for number in range(20):
        table.note(prompt(number, 1600), keys(number, 100), PAGE, SPACE)
    last = counts(table.find(prompt(19, 1600), keys(19, 100), PAGE, SPACE))
    first = counts(table.find(prompt(0, 1600), keys(0, 100), PAGE, SPACE))
    assert last[SAME] > 10 * first.get(SAME, 0)


@given(st.data())
def test_a_window_that_is_found_stands_in_what_was_noted(data: st.DataObject) -> None:
    """Over few different tokens, so that prompts have much in common: what is said to be seen was seen."""
    token = st.integers(0, 3)
    noted = data.draw(st.lists(token, min_size=0, max_size=200))
    asked = data.draw(st.lists(token, max_size=60)) + noted[data.draw(st.integers(0, 200)) :]
    table = Windows(1 << 16)
    table.note(np.array(noted, np.int64), keys(1, pages_of(noted)), PAGE, SPACE)
    noted = noted[: pages_of(noted) * PAGE]
    seen = {tuple(noted[end - WIDTH : end]) for end in range(WIDTH, len(noted) + 1)}
    found = table.find(np.array(asked, np.int64), keys(2, pages_of(asked)), PAGE, SPACE)
    for page, what in enumerate(found):
        ends = range(max(WIDTH, page * PAGE + 1), (page + 1) * PAGE + 1)
        known = [tuple(asked[end - WIDTH : end]) in seen for end in ends]
        if what == MOVED:
            assert any(known)
        elif what == UNSEEN:
            assert not all(known)


def test_about_one_window_in_so_many_is_chosen(windows: Windows) -> None:
    found = windows.find(prompt(1, 160_000), keys(1, 10_000), PAGE, SPACE)
    share = float(np.mean(found == NO_WINDOW))
    assert abs(share - (1 - 1 / RATE) ** PAGE) < 0.05
