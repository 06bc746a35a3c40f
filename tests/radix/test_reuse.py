"""What requests teach about reuse: counts, classes, and what a page is worth by them."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from radix import history, reuse
from radix.reuse import HEAD, LEVELS, MAX_CLASSES, N_BINS, N_CHUNKS, N_CLASSES, Reuse
from tests.radix.model import page_keys
from tests.radix.reuse_model import ReuseModel


class Learner:
    """What a policy does with `radix.reuse`, and no more: requests are paths, one character a page."""

    def __init__(self, n_pages: int, n_keys: int = 1 << 14) -> None:
        self.history = history.allocate(n_keys)
        self.reuse = reuse.allocate(len(self.history.name), n_pages)
        self.n_pages = n_pages
        self.now = 0
        self.n_requests = 0

    def ask(self, path: str) -> list[int]:
        """Returns the chunk of each page."""
        keys = np.frombuffer(b"".join(page_keys(path)), np.uint64).reshape(-1, 4)
        return [int(chunk) for chunk in self.ask_keys(keys)]

    def ask_keys(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        places, is_known = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint8)
        history.note(self.history, keys, self.now + len(keys), places, is_known)
        reuse.grow_older(self.reuse, self.now)
        chunks = np.empty(len(keys), np.int64)
        reuse.ask(self.history, self.reuse, places, is_known, self.now, chunks)
        self.now += len(keys)
        self.n_requests += 1
        return chunks

    def answer(self, path: str, level: int) -> int:
        keys = np.frombuffer(page_keys(path)[-1], np.uint64).reshape(1, 4)
        return reuse.answered(self.reuse, int(history.places_of(self.history, keys)[0]), level)

    def learn(self, keep: float = 1.0) -> None:
        reuse.learn(self.reuse, keep, self.now / self.n_requests)

    def features(self, chunk: int) -> tuple[int, ...]:
        return tuple(self.reuse.features[self.reuse.class_[chunk % N_CHUNKS]].tolist())

    @property
    def n_classes(self) -> int:
        return int(self.reuse.tally[N_CLASSES])

    @property
    def n_living(self) -> int:
        return int(self.reuse.living.sum())


# ---- against the model ----


def random_requests(seed: int, n: int) -> list[str]:
    """Some go on, some branch off, some come again, some are new."""
    rng = random.Random(seed)
    paths = ["a"]
    for _ in range(n):
        path = rng.choice(paths[-20:])
        kept = len(path) if rng.random() < 0.6 else rng.randrange(len(path) + 1)
        paths.append((path[:kept] + "".join(rng.choice("abc") for _ in range(rng.randrange(6))))[-40:] or "b")
    return paths


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), n_pages=st.sampled_from([1, 5, 30, 300]))
def test_counts_and_conclusions_are_those_of_the_model(seed: int, n_pages: int) -> None:
    learner, model = Learner(n_pages), ReuseModel(n_pages)
    rng = random.Random(seed)
    for number, path in enumerate(random_requests(seed, 150), start=1):
        learner.ask(path)
        model.ask(page_keys(path))
        if rng.random() < 0.5:
            level = rng.randrange(1, 6)
            learner.answer(path, level)
            model.answer(page_keys(path)[-1], level)
        if number % 50 == 0:
            learner.learn(0.7)
            model.learn(0.7, learner.now / number)
            n = len(model.classes)
            assert learner.n_classes == n
            assert learner.reuse.features[:n].tolist() == [list(levels) for levels in model.classes]
            np.testing.assert_allclose(learner.reuse.entered[:n], model.entered, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(learner.reuse.reused[:n], model.reused, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(learner.reuse.worth[:n], model.table, rtol=1e-9)
            np.testing.assert_allclose(learner.reuse.chance[:n], model.chance, rtol=1e-9, atol=1e-12)
            assert learner.n_living == len(model.pages)


# ---- ages ----


@pytest.mark.parametrize("n_pages", [1, 2, 7, 100, 10**6, 10**9])
def test_ages_grow_whatever_the_tiers_size(n_pages: int) -> None:
    memory = reuse.allocate(16, n_pages)
    assert memory.edges[0] == 0
    assert (np.diff(memory.edges) > 0).all()
    assert (np.diff(memory.gaps) >= 0).all()
    assert memory.gaps[0] >= 1
    if n_pages >= 100:
        assert memory.edges[-1] == pytest.approx(32 * n_pages, rel=0.01)
    assert np.isfinite(memory.worth).all()


def test_before_anything_was_seen_the_oldest_is_worth_least() -> None:
    memory = reuse.allocate(16, 1000)
    assert (np.diff(memory.worth[0, 1:]) < 0).all(), "but for the first bin, which is wider than its neighbours"
    assert (memory.worth == memory.worth[0]).all()


def test_a_page_is_counted_at_each_age_it_reaches_and_where_it_is_used_again() -> None:
    learner = Learner(32)  # ages begin at 1, 2, 3, 4, ... pages
    learner.ask("a")
    for number in range(9):
        learner.ask(chr(200 + number))
    counts = learner.reuse.entered[0].sum(), learner.reuse.reused.sum()
    assert counts[1] == 0
    learner.ask("a")
    age_bin = int(np.searchsorted(learner.reuse.edges[:N_BINS], 10, side="right")) - 1
    assert learner.reuse.reused[0, age_bin] == 1
    assert learner.reuse.reused.sum() == 1
    assert learner.reuse.entered[0, 0] == 10
    assert learner.reuse.entered[0, age_bin] == 1
    assert learner.reuse.entered[0, age_bin + 1] == 0


# ---- classes ----


def test_a_class_says_how_often_how_it_goes_on_and_how_long_ago() -> None:
    learner = Learner(32)
    first = learner.features(learner.ask("abc")[0])
    assert first == (0, 1, 0, 0), "never seen, branches off with 1 to 3 new pages, no gap, no answer yet"
    chunks = learner.ask("abcd")
    assert chunks[0] == chunks[1] == chunks[2] != chunks[3]
    assert learner.features(chunks[0]) == (1, 9 + 1, 1, 0), "once before, goes on"
    assert learner.features(chunks[3]) == (0, 9 + 1, 1, 0), "new, in a request that goes on"
    assert learner.features(learner.ask("abcd")[0]) == (2, 9, 1, 0), "all was known"
    learner.ask("ax")
    assert learner.features(learner.ask("ayyyyy")[-1]) == (0, 2, 1, 0), "branches off with 4 to 15 new pages"
    for number in range(40):
        learner.ask(chr(200 + number))
    assert learner.features(learner.ask("abcd")[-1])[2] == 3, "after more than the tier holds, not four times that"


def test_an_answer_moves_the_chunks_of_its_request_and_no_others() -> None:
    learner = Learner(32)
    before = learner.ask("xyz")
    mine = [*learner.ask("ab"), *learner.ask("abcd")]
    after = learner.ask("q")
    assert learner.answer("abcd", 3) == mine[2]
    for chunk in {*before, *mine[:2], *after}:
        assert learner.features(chunk)[3] == 0
    assert [learner.features(chunk)[3] for chunk in sorted(set(mine[2:]))] == [3, 3]
    assert learner.features(mine[2])[:3] == (1, 10, 1)


def test_when_there_are_no_more_classes_one_that_is_alike_stands_in() -> None:
    """Of the same times and context, whatever the gap and the answer."""
    memory = reuse.allocate(16, 64)
    for levels in np.ndindex(*LEVELS):
        number = reuse._class(memory, *levels)
        assert 0 <= number < MAX_CLASSES
        is_known = (memory.features[:, :2] == levels[:2]).all(axis=1).any()
        if memory.tally[N_CLASSES] < MAX_CLASSES:
            assert tuple(memory.features[number]) == levels
        elif is_known:
            assert tuple(memory.features[number, :2]) == levels[:2]
        else:
            assert number == 0
    assert memory.tally[N_CLASSES] == MAX_CLASSES == np.count_nonzero(memory.class_of)
    reuse.learn(memory, 1.0, 1.0)
    assert np.isfinite(memory.worth).all()


# ---- what is forgotten ----


def test_a_page_that_the_history_forgets_is_no_more_counted() -> None:
    learner = Learner(8, n_keys=4)
    for path in "abcd":
        learner.ask(path)
    assert learner.n_living == 4
    learner.ask("e")
    assert learner.n_living == 4, "one was forgotten and one has come"
    assert learner.reuse.living.tolist()[:5] == [0, 1, 1, 1, 1]
    learner.ask("a")
    assert learner.reuse.reused.sum() == 0, "it is not known that it was here"


def test_of_more_chunks_than_there_are_places_the_oldest_are_forgotten() -> None:
    learner = Learner(1000, n_keys=4 * N_CHUNKS)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, (N_CHUNKS + 500, 4)).astype(np.uint64)
    for number in range(len(keys)):
        learner.ask_keys(keys[number : number + 1])
    assert learner.reuse.tally[HEAD] == len(keys)
    assert learner.n_living <= N_CHUNKS
    reused = learner.reuse.reused.sum()
    assert learner.features(int(learner.ask_keys(keys[:1])[0]))[2] == reuse.N_GAPS - 1, "its last use is forgotten"
    assert learner.reuse.reused.sum() == reused
    learner.ask_keys(keys[-1:])
    assert learner.reuse.reused.sum() == reused + 1
    place = int(history.places_of(learner.history, keys[600:601])[0])
    assert reuse.answered(learner.reuse, place, 1) == -1 or learner.reuse.chunk[place] > 501
    place = int(history.places_of(learner.history, keys[1:2])[0])
    assert reuse.answered(learner.reuse, place, 1) == -1


def test_what_was_seen_fades() -> None:
    learner = Learner(32)
    for path in ("ab", "ab", "cd", "ab") * 30:
        learner.ask(path)
    n = learner.n_classes
    entered, reused = learner.reuse.entered[:n].copy(), learner.reuse.reused[:n].copy()
    learner.learn(0.25)
    assert np.array_equal(learner.reuse.entered[:n], 0.25 * entered)
    assert np.array_equal(learner.reuse.reused[:n], 0.25 * reused)


# ---- what is learned ----


def of_one_class(n_pages: int, used_again_at: int | None) -> Reuse:
    """A great many pages of one class: each is used again at this age, or never."""
    memory = reuse.allocate(16, n_pages)
    memory.tally[N_CLASSES] = 1
    last = N_BINS - 1
    if used_again_at is not None:
        last = int(np.searchsorted(memory.edges[:N_BINS], used_again_at, side="right")) - 1
        memory.reused[0, last] = 1e6
    memory.entered[0, : last + 1] = 1e6
    reuse.learn(memory, 1.0, 1.0)
    return memory


@pytest.mark.parametrize("used_again_at", [100, 500, 3000])
def test_a_class_that_is_used_again_at_one_age_is_worth_most_just_before_it(used_again_at: int) -> None:
    memory = of_one_class(1000, used_again_at)
    worth = memory.worth[0]
    at = int(np.searchsorted(memory.edges[:N_BINS], used_again_at, side="right")) - 1
    assert abs(int(worth.argmax()) - at) <= 1
    assert (np.diff(worth[: at - 1]) > 0).all(), "it grows until then"
    assert worth[at + 3 :].max() < 0.2 * worth.max()


def test_a_class_that_nobody_comes_back_to_is_worth_next_to_nothing_at_once() -> None:
    used, unused = of_one_class(1000, 500), of_one_class(1000, None)
    assert unused.worth[0].max() < 0.01 * used.worth[0, :10].min()
