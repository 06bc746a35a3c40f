"""Where the pages of a path are now, and what became of those that are nowhere. For people: nothing here decides.

A tier below is asked what it has as for a request, from the first page on that host memory lacks, and from the root as
well. It answers when it does; looking again takes what has come by then. All else is read from the index and from what
is remembered (`radix.departures`, `radix.windows`), and changes nothing: not the order of eviction, not a count, not a
lease. So one rank may be asked and the others not.

Of a page that is nowhere the latest that is known counts:

    on its way into host memory; or it left a tier, at some time and for a reason; or a tier that was given it is given
    up, or does not answer, or lacks a page above it and was not asked for more; or it was asked for, and is not
    remembered to have been kept; or its tokens were seen behind others, or in another namespace; or nothing is known
    of it
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.host import MAX_GIVEN
from hicache.probe import Probe
from hicache.tier import Tier, has_answered
from radix import HBM, HOST, INCOMING, KEY_NBYTES, RESIDENT, Index, Rows
from radix.departures import HERE, NOT_KNOWN, Departures, Remembered
from radix.windows import ELSEWHERE, MOVED, NO_WINDOW, SAME, UNSEEN

BELOW: Final = 2
"""The number of the first tier below host memory; `HBM` and `HOST` are the two above it."""


class Fate(IntEnum):
    """What is known of a page that is on no tier."""

    NEVER_SEEN = 0
    OTHER_NAMESPACE = 1
    MOVED = 2
    FORGOTTEN = 3
    LEFT = 4
    BEHIND = 5
    NOT_ANSWERED = 6
    DOWN = 7
    ARRIVING = 8


_FATE_OF_WINDOW: Final = np.zeros(256, np.uint8)
_FATE_OF_WINDOW[[UNSEEN, ELSEWHERE, MOVED, SAME]] = Fate.NEVER_SEEN, Fate.OTHER_NAMESPACE, Fate.MOVED, Fate.FORGOTTEN


@dataclass(frozen=True, slots=True, eq=False)
class Whereabouts:
    """Of each page of a path, one array a column, root side first.

    on: uint16[n], bit t is set if it is on tier t; 0: on none. fate: uint8[n], a `Fate`, of pages on none. tier:
    uint8[n], which one the fate is about. reason: uint8[n], why it left (`radix.departures`). at_s: float64[n], when,
    by the engine's clock; nan: not known.
    """

    on: NDArray[np.uint16]
    fate: NDArray[np.uint8]
    tier: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    at_s: NDArray[np.float64]

    @property
    def is_known_by_name(self) -> NDArray[np.bool_]:
        """bool[n]: it is here, or was, or was asked for: its prefix has not changed since."""
        known: NDArray[np.bool_] = (self.on != 0) | (self.fate >= Fate.FORGOTTEN)
        return known


class Inquiry:
    """What the tiers below have of one path. Asks them when it is made. One thread, that of the engine.

    n_held: how many pages of it, from the root on, host memory has.
    """

    def __init__(self, tiers: Sequence[Tier], keys: bytes, n_held: int) -> None:
        self.keys = keys
        self._tiers = tuple(tiers)
        self._up = [position for position, tier in enumerate(tiers) if tier.health().available]
        up = [tiers[position] for position in self._up]
        self._n_held = n_held
        self._from_root = [tier.exists(keys) for tier in up] if keys else []
        """Of the tiers that are up."""
        self._probe = Probe(up, keys[n_held * KEY_NBYTES :], clock=time.monotonic, patience_s=math.inf)
        """As for a request."""

    @property
    def waiting(self) -> list[str]:
        """The tiers that have not answered."""
        waiting = {at for at, future in enumerate(self._from_root) if not future.done()}
        return [self._tiers[self._up[at]].name for at in sorted(waiting | set(self._probe.waiting))]

    @property
    def down(self) -> list[str]:
        """The tiers that are not asked, because they are given up."""
        return [tier.name for position, tier in enumerate(self._tiers) if position not in self._up]

    def look(self, index: Index, departures: Departures, windows: NDArray[np.uint8]) -> Whereabouts:
        """What is known now. windows: uint8[n], what `radix.windows` says of each page's tokens."""
        remembered = departures.find(self.keys)
        rows = index.match(self.keys)
        on = self._on(index, rows)
        found = Whereabouts(
            on,
            _fate_of(remembered),
            remembered.tier.copy(),
            np.where(remembered.reason == HERE, np.uint8(NOT_KNOWN), remembered.reason),
            np.where(remembered.reason == HERE, np.nan, remembered.at_s),
        )
        self._add_below(found, remembered.below)
        unknown = np.flatnonzero((on == 0) & (found.fate == Fate.NEVER_SEEN))
        found.fate[unknown] = _FATE_OF_WINDOW[_filled(windows[unknown])]
        arriving = np.flatnonzero(index.states(rows, HOST) == INCOMING)
        found.fate[arriving], found.tier[arriving] = Fate.ARRIVING, HOST
        return found

    def _on(self, index: Index, rows: Rows) -> NDArray[np.uint16]:
        on = np.zeros(len(self.keys) // KEY_NBYTES, np.uint16)
        for tier in (HBM, HOST):
            on[: len(rows)] |= (index.states(rows, tier) == RESIDENT).astype(np.uint16) << np.uint16(tier)
        for position, start, end in self._answers():
            if end is not None:
                on[start:end] |= np.uint16(1 << (BELOW + position))
        return on

    def _answers(self) -> Iterator[tuple[int, int, int | None]]:
        """Which tier, from which page on it was asked, and the first page from there on that it has not; None: it has
        not answered, or has failed."""
        for position, future in zip(self._up, self._from_root, strict=False):
            yield position, 0, future.result() if has_answered(future) else None
        for at, start, end in self._probe.answers():
            yield self._up[at], self._n_held + start, None if end is None else self._n_held + end

    def _add_below(self, found: Whereabouts, given: NDArray[np.uint8]) -> None:
        """What the tiers below remember themselves, and what has been given to those that do not say."""
        for position, tier in enumerate(self._tiers[:MAX_GIVEN]):
            theirs = tier.departed(self.keys)
            if theirs is not None:
                is_later = (theirs.reason != NOT_KNOWN) & (theirs.reason != HERE)
                is_later &= (found.reason == NOT_KNOWN) | (theirs.at_s >= found.at_s)
                found.fate[is_later], found.tier[is_later] = Fate.LEFT, BELOW + position
                found.reason[is_later], found.at_s[is_later] = theirs.reason[is_later], theirs.at_s[is_later]
            lost = (given >> np.uint8(position) & np.uint8(1)).astype(np.bool_) & (found.tier < BELOW)
            ends = [end for which, _, end in self._answers() if which == position]
            if position not in self._up:
                found.fate[lost] = Fate.DOWN
            elif None in ends:
                found.fate[lost] = Fate.NOT_ANSWERED
            elif theirs is None:
                behind = lost.copy()
                behind[[end for end in ends if end is not None and end < len(lost)]] = False
                found.fate[behind] = Fate.BEHIND
            found.tier[lost], found.reason[lost], found.at_s[lost] = BELOW + position, NOT_KNOWN, np.nan


def _fate_of(remembered: Remembered) -> NDArray[np.uint8]:
    fate = np.where(remembered.reason == NOT_KNOWN, np.uint8(Fate.NEVER_SEEN), np.uint8(Fate.LEFT))
    fate[remembered.reason == HERE] = Fate.FORGOTTEN
    return fate


def _filled(windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pages without a window count as the one before them, the first ones as the first that has one."""
    has_one = np.flatnonzero(windows != NO_WINDOW)
    if not len(has_one):
        return np.full(len(windows), UNSEEN, np.uint8)
    at = np.searchsorted(has_one, np.arange(len(windows)), side="right") - 1
    filled: NDArray[np.uint8] = windows[has_one[np.maximum(at, 0)]]
    return filled
