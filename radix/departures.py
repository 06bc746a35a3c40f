"""What became of pages that are not here any more: when each left, from which tier, and why. For people only.

A table of sets of four entries, found by the first 8 bytes of a page's key, as in `radix.history`; in a full set the
entry that was written longest ago makes room. A page that comes is written too, so that one that has neither left nor
is here is known to have been flushed: a flush writes one line and no pages. No decision follows from any of this.

Memory is fixed when the table is made. A page costs some ten nanoseconds to write, in batches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BLOB_T, BYTES_T, STAMPS_T, inlined, kernel

NOT_KNOWN: Final = 0
CAPACITY: Final = 1
QUOTA: Final = 2
DAMAGED: Final = 3
CLEARED: Final = 4
FLUSH: Final = 5
WEIGHTS: Final = 6
DISAGREEMENT: Final = 7
"""Why a page has left. The last three are of flushes, which take all pages at once."""

HERE: Final = 255
"""In the place of a reason: it came, and has not been seen to leave."""

MAX_ENTRIES: Final = 1 << 18
"""19 bytes each: 5.0 MB."""

MAX_FLUSHES: Final = 64

_WAYS: Final = 4
_TIMES_T: Final = types.Array(types.float64, 1, "C")
_NAMES_T: Final = types.Array(types.uint64, 1, "C")
_GIVEN_T: Final = types.Array(types.uint8, 1, "C", readonly=True)


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """Of a run of pages, one array a column.

    reason: uint8[n], see above; `NOT_KNOWN` for a page that was never here, as far as is remembered. tier: uint8[n],
    which it left, or came to. at_s: float64[n], when, in the caller's seconds. below: uint8[n], bit i is set if the
    tier that is i-th below host memory had been given it.
    """

    reason: NDArray[np.uint8]
    tier: NDArray[np.uint8]
    at_s: NDArray[np.float64]
    below: NDArray[np.uint8]


class Departures:
    """See the module's text. One thread at a time. Times are the caller's, in seconds, and never go back.

    n_pages: how many pages the tiers hold that this is about; twice as many are remembered, up to `MAX_ENTRIES`.
    """

    def __init__(self, n_pages: int) -> None:
        n_entries = min(MAX_ENTRIES, 1 << max(2, (2 * n_pages - 1).bit_length()))
        self._name = np.zeros(n_entries, np.uint64)
        self._at_s = np.zeros(n_entries, np.float64)
        self._tier = np.zeros(n_entries, np.uint8)
        self._reason = np.zeros(n_entries, np.uint8)
        self._below = np.zeros(n_entries, np.uint8)
        self._flushes: deque[tuple[float, int]] = deque(maxlen=MAX_FLUSHES)

    @property
    def nbytes(self) -> int:
        columns = (self._name, self._at_s, self._tier, self._reason, self._below)
        return sum(int(column.nbytes) for column in columns)

    def came(self, keys: bytes, tier: int, now_s: float) -> None:
        """These pages are on the tier now. keys: 32 bytes a page, in any order."""
        self._write(keys, tier, HERE, now_s, None)

    def left(self, keys: bytes, tier: int, reason: int, now_s: float, below: NDArray[np.uint8] | None = None) -> None:
        """These pages have left the tier. below: uint8[n], as in `Remembered`, added to what was known; None: nothing.

        keys: 32 bytes a page, in any order.
        """
        self._write(keys, tier, reason, now_s, below)

    def _write(self, keys: bytes, tier: int, reason: int, now_s: float, below: NDArray[np.uint8] | None) -> None:
        names = np.frombuffer(keys, np.uint64).reshape(-1, 4)
        if below is None:
            below = np.zeros(len(names), np.uint8)
        write(self._name, self._at_s, self._tier, self._reason, self._below, names, below, tier, reason, now_s)

    def flushed(self, reason: int, now_s: float) -> None:
        """Everything that was here has left, all tiers that this is about."""
        self._flushes.append((now_s, reason))

    def forget_below(self) -> None:
        """The tiers below host memory have been emptied, or are others."""
        self._below[:] = 0

    def find(self, keys: bytes) -> Remembered:
        """What is remembered of these pages. Changes nothing. One that came and was flushed since has left."""
        names = np.frombuffer(keys, np.uint64).reshape(-1, 4)
        places = np.empty(len(names), np.int64)
        find(self._name, self._reason, names, places)
        is_known = places >= 0
        reason = np.where(is_known, self._reason[places], np.uint8(NOT_KNOWN))
        at_s = self._at_s[places]
        if self._flushes:
            times_s = np.array([time_s for time_s, _ in self._flushes])
            reasons = np.array([why for _, why in self._flushes], np.uint8)
            flush = np.searchsorted(times_s, at_s)
            is_flushed = (reason == HERE) & (flush < len(times_s))
            flush = np.minimum(flush, len(times_s) - 1)
            reason = np.where(is_flushed, reasons[flush], reason)
            at_s = np.where(is_flushed, times_s[flush], at_s)
        nothing = np.uint8(0)
        tier, below = (np.where(is_known, column[places], nothing) for column in (self._tier, self._below))
        return Remembered(reason, tier, at_s, below)


@inlined
def _first_of_set(n_entries: int, name: np.uint64) -> int:
    """Where the set of a key begins."""
    return _WAYS * int(np.int64((name >> np.uint64(20)) & np.uint64(n_entries // _WAYS - 1)))


@kernel(
    types.void, _NAMES_T, _TIMES_T, BYTES_T, BYTES_T, BYTES_T, BLOB_T, _GIVEN_T, types.int64, types.int64, types.float64
)
def write(
    name: NDArray[np.uint64],
    at_s: NDArray[np.float64],
    tier_of: NDArray[np.uint8],
    reason_of: NDArray[np.uint8],
    below_of: NDArray[np.uint8],
    keys: NDArray[np.uint64],
    below: NDArray[np.uint8],
    tier: int,
    reason: int,
    now_s: float,
) -> None:
    """An entry for each key. What was known of the tiers below stays."""
    for i in range(len(keys)):
        wanted = keys[i, 0]
        first = _first_of_set(len(name), wanted)
        place, is_known = first, False
        for entry in range(first, first + _WAYS):
            if reason_of[entry] != 0 and name[entry] == wanted:
                place, is_known = entry, True
                break
            if reason_of[place] != 0 and (reason_of[entry] == 0 or at_s[entry] < at_s[place]):
                place = entry
        below_of[place] = below[i] | below_of[place] if is_known else below[i]
        name[place], at_s[place], tier_of[place], reason_of[place] = wanted, now_s, tier, reason


@kernel(types.void, _NAMES_T, BYTES_T, BLOB_T, STAMPS_T)
def find(
    name: NDArray[np.uint64], reason_of: NDArray[np.uint8], keys: NDArray[np.uint64], places: NDArray[np.int64]
) -> None:
    """Write where each key is; -1: it is not."""
    for i in range(len(keys)):
        wanted = keys[i, 0]
        first = _first_of_set(len(name), wanted)
        places[i] = -1
        for entry in range(first, first + _WAYS):
            if reason_of[entry] != 0 and name[entry] == wanted:
                places[i] = entry
