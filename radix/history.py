"""What is remembered of keys, whether their pages are here or not, as long as there is room, which is a fixed amount.

A table of sets of four entries; a key's set follows from its first 8 bytes, which also name it. In a full set the entry
that was noted longest ago makes room. So what is forgotten first is what was noted first, nearly, and nothing is ever
searched or swept. Who wants to remember more of a key keeps arrays of their own, by its place in the table.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BYTES_T, STAMPS_T, inlined, kernel

WAYS: Final = 4


class History(NamedTuple):
    """The memory."""

    name: NDArray[np.uint64]
    """[n_sets * WAYS]: the first 8 bytes of the key."""
    noted_at: NDArray[np.int64]
    """[n_sets * WAYS]: when it was noted last, from 1; 0: nothing is here."""
    n_times: NDArray[np.uint8]
    """[n_sets * WAYS]: how often it was noted, up to 255."""

    @property
    def nbytes(self) -> int:
        return sum(int(column.nbytes) for column in self)


HISTORY_T: Final = types.NamedTuple((types.Array(types.uint64, 1, "C"), STAMPS_T, BYTES_T), History)
KEYS_T: Final = types.Array(types.uint64, 2, "C", readonly=True)


def allocate(n_keys: int) -> History:
    """Room for at least `n_keys`."""
    n_entries = WAYS << max(0, (max(1, n_keys) - 1).bit_length() - 2)
    return History(np.zeros(n_entries, np.uint64), np.zeros(n_entries, np.int64), np.zeros(n_entries, np.uint8))


@inlined
def _first_of_set(history: History, name: np.uint64) -> int:
    """Where the set of a key begins."""
    n_sets = len(history.noted_at) // WAYS
    return WAYS * int(np.int64((name >> np.uint64(20)) & np.uint64(n_sets - 1)))


@kernel(types.void, HISTORY_T, KEYS_T, types.int64, STAMPS_T, BYTES_T)
def note(
    history: History, keys: NDArray[np.uint64], now: int, places: NDArray[np.int64], is_known: NDArray[np.uint8]
) -> None:
    """Note the keys, uint64[n, 4], as of `now`. Writes where they are, and which of them were remembered.

    What a place held of a key that was not remembered is that of another key, which is forgotten now.
    """
    for i in range(len(keys)):
        name = keys[i, 0]
        first = _first_of_set(history, name)
        place, is_known[i] = first, 0
        for entry in range(first, first + WAYS):
            if history.noted_at[entry] != 0 and history.name[entry] == name:
                place, is_known[i] = entry, 1
                break
            if history.noted_at[entry] < history.noted_at[place]:
                place = entry
        history.n_times[place] = min(255, int(history.n_times[place]) + 1) if is_known[i] != 0 else 1
        history.name[place], history.noted_at[place] = name, now
        places[i] = place


@kernel(types.void, HISTORY_T, KEYS_T, STAMPS_T)
def find(history: History, keys: NDArray[np.uint64], places: NDArray[np.int64]) -> None:
    """Write where each key is remembered; -1: it is not."""
    for i in range(len(keys)):
        name = keys[i, 0]
        first = _first_of_set(history, name)
        places[i] = -1
        for entry in range(first, first + WAYS):
            if history.noted_at[entry] != 0 and history.name[entry] == name:
                places[i] = entry


def places_of(history: History, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64[n]: where each key, uint64[n, 4], is remembered; -1: it is not."""
    places = np.empty(len(keys), np.int64)
    find(history, keys, places)
    return places
