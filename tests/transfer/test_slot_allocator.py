import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transfer.slots import SlotAllocator


def test_fresh_slots_come_in_ascending_order() -> None:
    allocator = SlotAllocator(5)
    first = allocator.take(2)
    assert first is not None
    assert first.dtype == np.int32
    assert first.tolist() == [0, 1]
    allocator.give(first)
    again = allocator.take(5)
    assert again is not None
    assert again.tolist() == [0, 1, 2, 3, 4]


def test_taking_is_all_or_nothing() -> None:
    allocator = SlotAllocator(3)
    assert allocator.take(4) is None
    assert allocator.n_free == 3
    assert allocator.take(3) is not None
    assert allocator.take(1) is None
    nothing = allocator.take(0)
    assert nothing is not None
    assert nothing.size == 0


def test_a_taken_array_is_the_callers_own() -> None:
    allocator = SlotAllocator(3)
    taken = allocator.take(3)
    assert taken is not None
    own = taken.copy()
    allocator.give(taken)
    taken[:] = 0
    allocator.check_invariants()
    again = allocator.take(3)
    assert again is not None
    assert sorted(again.tolist()) == sorted(own.tolist())


@pytest.mark.parametrize("bad", [[3], [0, 3], [-1], [0, 0], [5], [0, 1, 4]])
def test_a_refused_give_changes_nothing(bad: list[int]) -> None:
    allocator = SlotAllocator(5)
    allocator.take(3)
    with pytest.raises(ValueError, match=r"(?i)slot"):
        allocator.give(np.array(bad, dtype=np.int32))
    assert allocator.n_free == 2
    allocator.check_invariants()
    allocator.give(np.array([0, 1, 2], dtype=np.int32))
    assert allocator.n_free == 5


@pytest.mark.parametrize("bad", [np.zeros((1, 1), dtype=np.int32), np.array([0.0]), np.array([True])])
def test_give_takes_slot_numbers_only(bad: np.ndarray) -> None:
    allocator = SlotAllocator(2)
    allocator.take(2)
    with pytest.raises(ValueError, match="integer array"):
        allocator.give(bad)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SlotAllocator(0)
    with pytest.raises(ValueError, match="Cannot take"):
        SlotAllocator(1).take(-1)


def test_check_invariants_finds_a_lost_slot() -> None:
    allocator = SlotAllocator(4)
    allocator._is_free[2] = False
    with pytest.raises(AssertionError):
        allocator.check_invariants()


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside a plain set of free slots."""

    @initialize(n_slots=st.integers(1, 40))
    def start(self, n_slots: int) -> None:
        self.allocator = SlotAllocator(n_slots)
        self.free = set(range(n_slots))
        self.taken: set[int] = set()

    @rule(n=st.integers(0, 45))
    def take(self, n: int) -> None:
        slots = self.allocator.take(n)
        assert (slots is None) == (n > len(self.free))
        if slots is not None:
            got = set(slots.tolist())
            assert len(got) == n
            assert got <= self.free
            self.free -= got
            self.taken |= got

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.taken)), unique=True))
        self.allocator.give(np.array(slots, dtype=np.int32))
        self.taken -= set(slots)
        self.free |= set(slots)

    @rule(slots=st.lists(st.integers(-2, 45), min_size=1, max_size=6))
    def give_anything(self, slots: list[int]) -> None:
        if len(set(slots)) == len(slots) and set(slots) <= self.taken:
            return
        with pytest.raises(ValueError, match=r"(?i)slot"):
            self.allocator.give(np.array(slots, dtype=np.int64))

    @invariant()
    def conserved(self) -> None:
        self.allocator.check_invariants()
        assert self.allocator.n_free == len(self.free)
        assert len(self.free) + len(self.taken) == self.allocator.n_slots


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=30)
