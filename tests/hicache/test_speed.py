import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache import PrefillSpeed


def test_nothing_is_foretold_before_something_was_seen() -> None:
    speed = PrefillSpeed()
    assert speed.predict(0, 10) is None
    speed.observe([], 1.0)
    speed.observe([(5, 5)], 1.0)
    assert speed.predict(0, 10) is None


def test_batches_of_one_kind_foretell_that_kind() -> None:
    speed = PrefillSpeed()
    for _ in range(5):
        speed.observe([(0, 100)], 2.0)
    assert speed.predict(0, 100) == pytest.approx(2.0)


@given(
    linear=st.floats(1e-4, 1.0),
    quadratic=st.floats(0, 1e-2),
    ends=st.lists(st.integers(1, 500), min_size=2, max_size=10, unique=True),
)
def test_both_parts_of_the_cost_are_found(linear: float, quadratic: float, ends: list[int]) -> None:
    def seconds(start: int, end: int) -> float:
        return linear * (end - start) + quadratic * (end**2 - start**2) / 2

    speed = PrefillSpeed()
    for end in ends:
        speed.observe([(0, end)], seconds(0, end))
    for start, end in ((0, max(ends)), (min(ends), max(ends)), (0, min(ends))):
        assert speed.predict(start, end) == pytest.approx(seconds(start, end), rel=1e-2)


def test_a_batch_of_several_requests_counts_as_their_sum() -> None:
    speed = PrefillSpeed()
    speed.observe([(0, 10), (0, 10), (0, 20)], 4.0)
    assert speed.predict(0, 10) == pytest.approx(1.0)


def test_old_observations_fade() -> None:
    speed = PrefillSpeed()
    speed.observe([(0, 10)], 100.0)
    for _ in range(60):
        speed.observe([(0, 10)], 1.0)
    assert speed.predict(0, 10) == pytest.approx(1.0, rel=0.25)


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 300), st.floats(0, 10)).map(
            lambda drawn: (min(drawn[:2]), max(drawn[:2]), drawn[2])
        ),
        min_size=1,
    )
)
def test_no_forecast_is_negative(observed: list[tuple[int, int, float]]) -> None:
    speed = PrefillSpeed()
    for start, end, seconds in observed:
        speed.observe([(start, end)], seconds)
    for start, end in ((0, 1), (0, 300), (299, 300)):
        assert (speed.predict(start, end) or 0.0) >= 0.0
