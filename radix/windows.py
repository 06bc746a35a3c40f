"""Which tokens have been seen, wherever they stood: short windows of them, as keyed hashes, in a fixed table.

A page's key covers all that lies before it, so it says nothing of a prompt that was cut at the front. A window is
`WIDTH` tokens in a row. Of all windows of a prompt those are noted whose hash says so, one in `RATE`, so the same are
chosen in another prompt, at any offset. With each goes the namespace that it was seen in and the page that it ended
in: a window that is seen again ends in the same page, in another page of the same namespace, or in another namespace.

The hash is a polynomial over the tokens with a random base, times a random number. Both are drawn when the table is
made and never leave it. So the table holds no tokens, nobody outside can compute what is in it, and two servers' have
nothing in common. It may be wrong: windows collide (one in 2**60), and of namespaces and pages only some bits are kept.
What follows from it is a line in an answer to a person, and no decision.
"""

from __future__ import annotations

import secrets
from typing import Final

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BYTES_T, inlined, kernel

WIDTH: Final = 16
RATE: Final = 16

UNSEEN: Final = 0
ELSEWHERE: Final = 1
MOVED: Final = 2
SAME: Final = 3
"""Where a window was seen: nowhere, in other namespaces only, in another page of this one, in this very page."""

NO_WINDOW: Final = 255
"""Of a page in which no chosen window ends."""

MAX_ENTRIES: Final = 1 << 17
"""16 bytes each: 2.1 MB, for about 2 million tokens."""

_WAYS: Final = 4
_CHOSEN: Final = 2**64 // RATE
"""A window is chosen if its hash is below this."""

_TIME_BITS: Final = 24
_LATEST: Final = (1 << _TIME_BITS) - 1
_TOKENS_T: Final = types.Array(types.int64, 1, "C", readonly=True)
_TABLE_T: Final = types.Array(types.uint64, 3, "C")
_PLACES_T: Final = types.Array(types.uint64, 1, "C", readonly=True)
_KEYED_T: Final = types.UniTuple(types.uint64, 3)

Keyed = tuple[np.uint64, np.uint64, np.uint64]
"""The base; the base to the power of `WIDTH`, for the token that leaves a window; the mixer."""

Table = NDArray[np.uint64]
"""[n_sets, _WAYS, 2]: a window's hash; then, from the top, 16 bits of its namespace, 24 of its page's key, and 24 of
when it was noted, counted in calls from 1. All 0: nothing is here."""


class Windows:
    """See the module's text. One thread. n_tokens: how many are to be remembered, up to what `MAX_ENTRIES` can."""

    def __init__(self, n_tokens: int) -> None:
        n_entries = min(MAX_ENTRIES, 1 << max(2, (n_tokens // RATE).bit_length()))
        self._table = np.zeros((n_entries // _WAYS, _WAYS, 2), np.uint64)
        self._now = 0
        base, mixer = (secrets.randbits(63) << 1 | 1 for _ in range(2))
        self._keyed = (np.uint64(base), np.uint64(pow(base, WIDTH, 1 << 64)), np.uint64(mixer))

    @property
    def nbytes(self) -> int:
        return int(self._table.nbytes)

    def note(self, tokens: NDArray[np.int64], keys: bytes, page_tokens: int, space: int) -> None:
        """A prompt with these tokens is here.

        keys: of its whole pages, 32 bytes each; tokens behind them are left out. space: a number for the namespace, of
        64 bits.
        """
        self._now = self._now % _LATEST + 1
        note(self._table, self._keyed, tokens, _places(keys, space), page_tokens, self._now)

    def find(self, tokens: NDArray[np.int64], keys: bytes, page_tokens: int, space: int) -> NDArray[np.uint8]:
        """uint8[n]: of each page the best that any chosen window says that ends in it. Changes nothing."""
        places = _places(keys, space)
        best = np.full(len(places), NO_WINDOW, np.uint8)
        find(self._table, self._keyed, tokens, places, page_tokens, best)
        return best


def _places(keys: bytes, space: int) -> NDArray[np.uint64]:
    """What an entry says of where a window ended, for each page, without the time."""
    pages = np.frombuffer(keys, np.uint64).reshape(-1, 4)[:, 1] >> np.uint64(40) << np.uint64(_TIME_BITS)
    return pages | np.uint64(space & 0xFFFF) << np.uint64(48)


@inlined
def _set_of(table: Table, name: np.uint64) -> int:
    """The highest bits of the hashes of chosen windows are all 0."""
    return int(np.int64((name >> np.uint64(36)) & np.uint64(len(table) - 1)))


@inlined
def _slide(window: np.uint64, keyed: Keyed, tokens: NDArray[np.int64], i: int) -> np.uint64:
    """The polynomial over the window that ends with token i, from that of the one before."""
    window = window * keyed[0] + np.uint64(tokens[i])
    return window - keyed[1] * np.uint64(tokens[i - WIDTH]) if i >= WIDTH else window


@kernel(types.void, _TABLE_T, _KEYED_T, _TOKENS_T, _PLACES_T, types.int64, types.int64)
def note(
    table: Table,
    keyed: Keyed,
    tokens: NDArray[np.int64],
    places: NDArray[np.uint64],
    page_tokens: int,
    now: int,
) -> None:
    """An entry for each chosen window: one that says the same is renewed, else the oldest of its set goes."""
    time = np.uint64(_LATEST)
    n_tokens = min(len(tokens), len(places) * page_tokens)
    window = np.uint64(0)
    for i in range(n_tokens):
        window = _slide(window, keyed, tokens, i)
        name = window * keyed[2]
        if name >= np.uint64(_CHOSEN) or i < WIDTH - 1:
            continue
        place, entries = places[i // page_tokens], table[_set_of(table, name)]
        at = 0
        for way in range(_WAYS):
            if entries[way, 0] == name and entries[way, 1] & ~time == place:
                at = way
                break
            if entries[way, 1] & time < entries[at, 1] & time:
                at = way
        entries[at, 0], entries[at, 1] = name, place | np.uint64(now)


@kernel(types.void, _TABLE_T, _KEYED_T, _TOKENS_T, _PLACES_T, types.int64, BYTES_T)
def find(
    table: Table,
    keyed: Keyed,
    tokens: NDArray[np.int64],
    places: NDArray[np.uint64],
    page_tokens: int,
    best: NDArray[np.uint8],
) -> None:
    """Write the best of each page's windows; pages without one are left as they are."""
    time = np.uint64(_LATEST)
    n_tokens = min(len(tokens), len(places) * page_tokens)
    window = np.uint64(0)
    for i in range(n_tokens):
        window = _slide(window, keyed, tokens, i)
        name = window * keyed[2]
        if name >= np.uint64(_CHOSEN) or i < WIDTH - 1:
            continue
        page, entries = i // page_tokens, table[_set_of(table, name)]
        seen = UNSEEN
        for way in range(_WAYS):
            if entries[way, 1] != 0 and entries[way, 0] == name:
                differs = entries[way, 1] & ~time ^ places[page]
                where = SAME if differs == 0 else MOVED if differs >> np.uint64(48) == 0 else ELSEWHERE
                seen = max(seen, where)
        if best[page] == NO_WINDOW or best[page] < seen:
            best[page] = seen
