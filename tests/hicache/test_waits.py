from hypothesis import given
from hypothesis import strategies as st

from hicache.waits import Waits
from tests.support.clock import Clock


def test_whoever_has_waited_their_time_is_overdue_and_nobody_leaves_by_it() -> None:
    clock = Clock()
    waits: Waits[str] = Waits(5.0, clock)
    waits.add("first")
    clock.now_s = 1.0
    waits.add("second")
    clock.now_s = 4.999
    assert waits.n_overdue() == 0
    clock.now_s = 5.0
    assert waits.n_overdue() == 1
    assert waits.waiting() == ["first", "second"], "a clock alone takes nobody out"
    clock.now_s = 6.0
    assert waits.n_overdue() == 2


def test_expire_takes_the_first_and_what_the_clock_says_does_not_matter() -> None:
    waits: Waits[str] = Waits(5.0, Clock())
    for waiter in "abc":
        waits.add(waiter)
    assert waits.expire(0) == []
    assert waits.expire(2) == ["a", "b"]
    assert "a" not in waits
    assert "c" in waits
    assert waits.expire(9) == ["c"]
    assert len(waits) == 0


def test_adding_again_keeps_the_place_and_the_deadline() -> None:
    clock = Clock()
    waits: Waits[str] = Waits(5.0, clock)
    waits.add("a")
    waits.add("b")
    clock.now_s = 4.0
    waits.add("a")
    clock.now_s = 5.0
    assert waits.n_overdue() == 2
    assert waits.waiting() == ["a", "b"]


def test_who_comes_back_after_leaving_stands_at_the_end_with_a_new_deadline() -> None:
    clock = Clock()
    waits: Waits[str] = Waits(5.0, clock)
    waits.add("a")
    waits.add("b")
    waits.discard("a")
    waits.discard("never came")
    clock.now_s = 3.0
    waits.add("a")
    assert waits.waiting() == ["b", "a"]
    clock.now_s = 5.0
    assert waits.n_overdue() == 1


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "expire"]), st.integers(0, 5), st.floats(0, 3))))
def test_two_lines_under_the_same_calls_are_the_same_whatever_their_clocks_say(
    calls: list[tuple[str, int, float]],
) -> None:
    slow, fast = Clock(), Clock()
    first: Waits[int] = Waits(5.0, slow)
    second: Waits[int] = Waits(5.0, fast)
    for call, number, step_s in calls:
        slow.now_s += step_s
        fast.now_s += 10 * step_s
        if call == "expire":
            agreed = first.n_overdue()
            assert first.expire(agreed) == second.expire(agreed)
        else:
            getattr(first, call)(number)
            getattr(second, call)(number)
        assert first.waiting() == second.waiting()
