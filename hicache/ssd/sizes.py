"""How a cap becomes slots: the arithmetic of a store's size.

A member's share of the directory's cap pays for everything it puts there: whole slots, a row of the map a slot, and
a fixed part for the map's log. What is left over is never used, so the cap holds whatever the map does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIXED_NBYTES: Final = 16 << 20
"""For what does not grow with the pages: the map's log above all, which `map.py` keeps below 12 MiB."""

OUTSIDE_NBYTES: Final = 1 << 20
"""The part of it that is for folders and locks outside of the store."""

MAP_SLOT_NBYTES: Final = 256
"""What one page may take in the map. Measured: 137 bytes, of which half is the index of the keys."""

SEGMENT_NBYTES: Final = 1 << 30
N_SEGMENTS: Final = 16
"""A segment is at most `SEGMENT_NBYTES`, and at most this part of the share."""

MIN_SLOTS: Final = 4


_SEGMENTS_FACTOR: Final = 4
"""So many times the files that a new store of the same share would have, an old one may have. Each is a descriptor."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one store.

    page_nbytes: payload; slot_nbytes: the same rounded up, what is written.
    segment_slots: slots a file. max_segments: how many files the share has room for.
    """

    page_nbytes: int
    slot_nbytes: int
    segment_slots: int
    max_segments: int

    @property
    def n_slots(self) -> int:
        return self.segment_slots * self.max_segments

    @property
    def segment_nbytes(self) -> int:
        return self.segment_slots * self.slot_nbytes

    @property
    def allowance_nbytes(self) -> int:
        """What one member may use beside its data files, in its store's folder."""
        return FIXED_NBYTES - OUTSIDE_NBYTES + self.n_slots * MAP_SLOT_NBYTES


def slots_within(limit_nbytes: int, n_members: int, slot_nbytes: int) -> int:
    """How many slots each of `n_members` may have under a cap for all of them; 0 or less if there is no room."""
    return (limit_nbytes // n_members - FIXED_NBYTES) // (slot_nbytes + MAP_SLOT_NBYTES)


def limit_for(n_slots: int, n_members: int, slot_nbytes: int) -> int:
    """The smallest cap under which each member may have `n_slots`."""
    return n_members * (FIXED_NBYTES + n_slots * (slot_nbytes + MAP_SLOT_NBYTES))


def segment_slots_for(n_slots: int, slot_nbytes: int) -> int:
    """Slots a file, for a new store of `n_slots`."""
    return max(1, min(SEGMENT_NBYTES // slot_nbytes, n_slots // N_SEGMENTS))


def max_segments_for(n_slots: int, slot_nbytes: int, segment_slots: int) -> int:
    """Files of a store with a share of `n_slots`, whatever share its files were made for."""
    usual = max(N_SEGMENTS, n_slots // max(1, SEGMENT_NBYTES // slot_nbytes))
    return min(n_slots // segment_slots, _SEGMENTS_FACTOR * usual)
