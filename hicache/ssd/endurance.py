"""The endurance budget: how much a rank may write to its SSD, so that no 24 hours see more than its share of the limit.

It is a token bucket. It holds at most an eighth of a day's bytes, and seven eighths flow in over a day: whatever 24
hours are looked at, what was there at their beginning and what has come in since are the limit together.

Nothing of it is kept on the disk: every start begins with an empty bucket. What is written in any 24 hours was paid by
one bucket at their beginning, and by what has flowed in while some process had the store open; processes follow each
other, and the monotonic clock of each counts no time twice. So the limit holds across restarts, kills, lost and
replaced maps, changes of the model (which has a store of its own) and of the wall clock, without a byte of bookkeeping
that a crash could lose. A restart costs what was in the bucket: an eighth of a day's bytes at most.

Bytes are paid before they are handed to the disk, and are not given back if it fails. What is paid for:

    pages      the whole slot, and what its row of the map costs, from its coming to its leaving (`ROW_NBYTES`)
    batches    what a commit writes to the map for however few rows (`COMMIT_NBYTES`)
    last uses  what noting them costs (`touches_nbytes`); if there is not enough, they wait
    the rest   a map that is made anew, and segments on file systems that write what they allocate: paid afterwards

The map's figures are bounds. Measured with what SQLite really writes: 3.6 KB for a page that comes and pushes out
another where the map has 20,000, 14.5 KB where it has 200,000, and 30 KB where slots are used in no order; 36 KB with
its commit for one that comes alone. What file systems and drives write on top of that is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.logs import get_logger

logger = get_logger(__name__)

BURST_PARTS: Final = 8
"""The bucket holds this part of a day's bytes."""

KEPT_PARTS: Final = 16
"""This part of the bucket is not for pages, or last uses would wait for ever where pages take all there is."""

MAP_PAGE_NBYTES: Final = 2 * (4096 + 24)
"""What SQLite writes for one of its pages: to the log, and by a checkpoint to the map."""

MAP_PAGE_SLOTS: Final = 16
"""A page of the map has the rows of so many neighbouring slots or more."""

ROW_NBYTES: Final = 4 * MAP_PAGE_NBYTES
"""A page of the table and one of the key index when it comes, and again when it leaves."""

COMMIT_NBYTES: Final = 2 * MAP_PAGE_NBYTES

TELL_AGAIN_S: Final = 3600.0

_DAY_NS: Final = 86_400 * 10**9


def pages_nbytes(n_pages: int, slot_nbytes: int) -> int:
    """What it costs to store so many pages in one batch."""
    return n_pages * (slot_nbytes + ROW_NBYTES) + COMMIT_NBYTES


def touches_nbytes(slots: NDArray[np.int64]) -> int:
    """What it costs to note when the pages in these slots were last used."""
    return len(np.unique(slots // MAP_PAGE_SLOTS)) * MAP_PAGE_NBYTES + COMMIT_NBYTES if len(slots) else 0


def smallest_limit(slot_nbytes: int) -> int:
    """For one rank: with less, not even one page could ever be paid."""
    nbytes = pages_nbytes(1, slot_nbytes)
    return BURST_PARTS * -(-nbytes * KEPT_PARTS // (KEPT_PARTS - 1) + 1)


class Endurance:
    """The bucket of one rank. Its user holds the volume's lock. clock: monotonic seconds."""

    def __init__(self, limit_nbytes: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._burst_nbytes = limit_nbytes // BURST_PARTS
        self._kept_nbytes = self._burst_nbytes // KEPT_PARTS
        self._nbytes_a_day = limit_nbytes - self._burst_nbytes
        self._level = 0
        """In bytes times nanoseconds of a day: whole numbers, so that nothing is lost or won by rounding."""
        self._level_at_ns = self._now_ns()
        self._told_at_s = -math.inf
        self._n_told = 0

    @property
    def left_nbytes(self) -> int:
        """What may be written now. Below 0: what is owed."""
        now_ns = self._now_ns()
        if now_ns > self._level_at_ns:
            came = (now_ns - self._level_at_ns) * self._nbytes_a_day
            self._level = min(self._level + came, self._burst_nbytes * _DAY_NS)
            self._level_at_ns = now_ns
        return self._level // _DAY_NS

    def allowed_pages(self, n_pages: int, slot_nbytes: int) -> int:
        """How many of these could be stored now."""
        left_nbytes = self.left_nbytes - self._kept_nbytes - COMMIT_NBYTES
        return max(0, min(n_pages, left_nbytes // (slot_nbytes + ROW_NBYTES)))

    def pay(self, nbytes: int) -> None:
        """Also if there is less than that: then it is owed, and nothing is allowed until it has come in."""
        self._level -= nbytes * _DAY_NS

    def tell(self, store: str, n_refused: int) -> None:
        """A line in the log if pages have been refused, so many in all; then none for a while."""
        now_s = self._clock()
        if n_refused > self._n_told and now_s - self._told_at_s >= TELL_AGAIN_S:
            self._told_at_s, self._n_told = now_s, n_refused
            logger.warning(
                "sgl_lmcache: the endurance budget of %s is used up for now: %s pages have not been stored",
                *(store, f"{n_refused:,}"),
            )

    def _now_ns(self) -> int:
        return int(self._clock() * 1e9)
