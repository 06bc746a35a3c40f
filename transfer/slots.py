"""Which slots of a slab are free.

A stack of free slot numbers, and a flag a slot that says whether it is on the stack. The invariant: the stack's live
part holds each free slot once and no other. Both arrays are allocated once, every call is a few numpy operations on
the slots it names, and a refused call changes nothing. Slots come out in ascending runs as long as they went in so,
which lets a tier move neighbours in one call.

Owned by one thread (the scheduler's): no lock.
"""

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


class SlotAllocator:
    """Hands out the slots `0 .. n_slots`. Not thread-safe. Raises `ValueError` for a number of slots below 1.

    taken: slots that somebody has already, each once.
    """

    def __init__(self, n_slots: int, taken: npt.NDArray[np.integer] | None = None) -> None:
        if n_slots < 1:
            raise ValueError(f"n_slots must be at least 1, not {n_slots}.")
        self.n_slots = n_slots
        self._is_free = np.ones(n_slots, dtype=np.bool_)
        if taken is not None:
            self._is_free[taken] = False
        free = np.flatnonzero(self._is_free).astype(np.int32)
        self._n_free = len(free)
        self._stack = np.zeros(n_slots, dtype=np.int32)
        self._stack[: self._n_free] = free[::-1]

    @property
    def n_free(self) -> int:
        return self._n_free

    def take(self, n: int) -> Int32Array | None:
        """`n` slots that belong to the caller until given back, or None (and nothing taken) when fewer are free."""
        if n < 0:
            raise ValueError(f"Cannot take {n} slots.")
        if n > self._n_free:
            return None
        end = self._n_free
        slots = self._stack[end - n : end][::-1].copy()
        self._is_free[slots] = False
        self._n_free -= n
        return slots

    def give(self, slots: npt.NDArray[np.integer]) -> None:
        """Frees taken slots, in any number and order.

        Raises `ValueError`, and changes nothing, when a slot is foreign, already free, or named twice.
        """
        given = np.asarray(slots)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(f"Slots come as a 1-D integer array, not {given.dtype} of {given.shape}.")
        if not given.size:
            return
        if given.min() < 0 or given.max() >= self.n_slots:
            raise ValueError(f"A slot outside 0..{self.n_slots} cannot be freed.")
        if self._is_free[given].any():
            raise ValueError(f"Slot {given[self._is_free[given]][0]} is already free.")
        ordered = np.sort(given)
        repeated = ordered[1:] == ordered[:-1]
        if repeated.any():
            raise ValueError(f"Slot {ordered[1:][repeated][0]} is named twice.")
        self._stack[self._n_free : self._n_free + given.size] = given[::-1]
        self._is_free[given] = True
        self._n_free += given.size

    def check_invariants(self) -> None:
        """Asserts that the stack holds each free slot once and no other. O(n_slots)."""
        free = np.sort(self._stack[: self._n_free])
        assert np.array_equal(free, np.flatnonzero(self._is_free)), "the stack and the flags disagree on what is free"
