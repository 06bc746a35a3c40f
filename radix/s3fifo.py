"""S3-FIFO, leaf first: a small queue that most pages pass through once, a main queue, and a memory of what has passed.

A page that nobody asks for a second time leaves by the small queue and never costs a page of the main one its place.
What was asked for again, or comes back while it is remembered, goes into the main queue, which it leaves when it has
gone round once without a use. (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.)
"""

from __future__ import annotations

from typing import Final

import numpy as np

from radix import history, queues
from radix.columns import Columns, Rows
from radix.policy import AGELESS, Policy
from radix.queues import Worths

SMALL, MAIN = 0, 1

SMALL_SHARE: Final = 0.1
"""Of the tier's pages: how long the small queue may be."""

MOST_USES: Final = 3

_WORTHS: Final = Worths(np.array([[0.0], [1.0]]), AGELESS, 2)


class S3Fifo(Policy):
    """The policy `s3fifo`. A request counts once, however often it is matched while it waits."""

    n_kinds = 2

    def restart(self, columns: Columns) -> None:
        super().restart(columns)
        small = np.arange(self._n_groups) * 2 + SMALL
        self._queues.threshold[small], self._queues.threshold[small + MAIN] = 1, 0
        self._queues.onward[small] = small + MAIN
        self._passed = history.allocate(len(columns.parent))
        self._n_passed = 0

    def admitted(self, rows: Rows) -> None:
        is_new = self._queues.queue[rows] == 0
        places = history.places_of(self._passed, self._columns.key.take(rows, axis=0))
        noted_at = np.where(places < 0, 0, self._passed.noted_at[places])
        n_main = (1 - SMALL_SHARE) * self._columns.held[self._columns.group[rows], self._setting.tier]
        is_remembered = (noted_at > 0) & (self._n_passed - noted_at < n_main)
        new = rows[is_new]
        if len(new):
            self._place(new, np.where(is_remembered, MAIN, SMALL)[is_new])

    def used(self, rows: Rows) -> None:
        queues.count_use(self._queues, rows, MOST_USES)

    def victims(self, n: int, now: int, group: int) -> Rows:
        small = group * 2 + SMALL
        n_pages = int(self._columns.held[group, self._setting.tier])
        self._queues.spared[small] = int(n_pages * SMALL_SHARE)
        rows = super().victims(n, now, group)
        passed = rows[self._queues.queue[rows] == small + 1]
        if len(passed):
            self._n_passed += len(passed)
            keys, unread = self._columns.key.take(passed, axis=0), np.empty(len(passed), np.int64)
            history.note(self._passed, keys, self._n_passed, unread, np.empty(len(passed), np.uint8))
        return rows

    def _worths(self, group: int) -> Worths:
        return _WORTHS

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._passed.nbytes
