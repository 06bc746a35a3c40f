"""The project's own policy: what a page is worth is learned from what requests do (`radix.reuse`).

A page is in the queue of its class, and what the oldest page of each class is worth at its age decides which goes. A
page with a copy below costs a fetch if it is wanted again, and not a prefill, so it is worth that much less than
another of its class.

A class that nobody comes back to has the lowest index at once: its pages are the next to go, and cost the others
nothing. That is how a scan passes through. Classes that are asked for again within minutes are held for these minutes
and let go of after them, which no order by last use or by frequency can do.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix import history, reuse
from radix.columns import Columns, Rows
from radix.gdsf import FETCH_COST
from radix.policy import Asked, Policy, Setting
from radix.queues import Worths

REFRESH_REQUESTS: Final = 100
REFRESH_SHARE: Final = 8
"""Conclusions are drawn each so many requests, or each time that so large a part of the tier (1/8) was asked for, if
that is less often."""


class Gittins(Policy):
    """The policy `gittins`. It learns from whole requests (`asked`), so it is for the tier that all go through."""

    n_kinds = 2 * reuse.MAX_CLASSES

    def __init__(self, columns: Columns, setting: Setting) -> None:
        self._reuse = reuse.allocate(len(setting.history.noted_at), setting.n_pages)
        self._n_requests = 0
        self._learned_at = 0
        self._conclude()
        super().__init__(columns, setting)

    def restart(self, columns: Columns) -> None:
        super().restart(columns)
        self._chunk = np.zeros(len(columns.parent), np.int64)
        """[capacity]: by row, the chunk of the page."""

    def asked(self, asked: Asked) -> None:
        reuse.grow_older(self._reuse, self._clock)
        chunks = np.empty(len(asked.places), np.int64)
        reuse.ask(self._setting.history, self._reuse, asked.places, asked.is_known, self._clock, chunks)
        self._chunk[asked.rows] = chunks[: len(asked.rows)]
        self._file(asked.rows, only_members=True)
        self._clock += len(asked.places)
        self._n_requests += 1
        request_pages = self._clock / self._n_requests
        n_requests = min(REFRESH_REQUESTS, 1 + self._n_requests / 4)
        n_pages = min(self._setting.n_pages / REFRESH_SHARE, self._clock / 4)
        if self._clock - self._learned_at >= max(n_requests * request_pages, n_pages):
            self._learn(request_pages)

    def _learn(self, request_pages: float) -> None:
        half_life = max(reuse.HALF_LIFE_REQUESTS * request_pages, reuse.HALF_LIFE_SIZES * self._setting.n_pages)
        keep = 1 / (1 + reuse.LN_2 * (self._clock - self._learned_at) / half_life)
        reuse.learn(self._reuse, keep, request_pages)
        self._learned_at = self._clock
        self._conclude()

    def _conclude(self) -> None:
        table: NDArray[np.float64] = self._reuse.worth[: max(1, self._n_classes)].repeat(2, axis=0)
        table[1::2] *= FETCH_COST
        self._known = Worths(table, self._reuse.edges, self.n_kinds)

    @property
    def _n_classes(self) -> int:
        return int(self._reuse.tally[reuse.N_CLASSES])

    def answered(self, rows: Rows, n_tokens: int) -> None:
        places = history.places_of(self._setting.history, self._columns.key.take(rows[-1:], axis=0))
        if places[0] < 0:
            return
        level = 1 + min(reuse.N_ANSWERS - 2, n_tokens.bit_length() // 3)
        last = int(self._reuse.chunk[places[0]]) - 1
        first = reuse.answered(self._reuse, int(places[0]), level)
        chunks = self._chunk[rows]
        mine = rows[(chunks >= first) & (chunks <= last)]
        if first >= 0 and len(mine):
            self._file(mine, only_members=True)

    def admitted(self, rows: Rows) -> None:
        """Pages that nobody has asked for, such as those of an answer, belong to what is above them."""
        places = history.places_of(self._setting.history, self._columns.key.take(rows, axis=0))
        chunks = np.where(places < 0, -1, self._reuse.chunk[places] - 1)
        if (chunks < 0).any():
            parent = self._columns.parent[rows[0]]
            above = self._chunk[parent] if parent >= 0 else 0
            last_known = np.maximum.accumulate(np.where(chunks < 0, -1, np.arange(len(rows))))
            chunks = np.where(last_known < 0, above, chunks[last_known])
        self._chunk[rows] = np.maximum(chunks, self._reuse.tally[reuse.HEAD] - reuse.N_CHUNKS)  # the oldest there is
        self._file(rows, only_members=False)

    def passing(self, rows: Rows) -> None:
        """What it has learned says better which pages only pass."""

    def backed(self, rows: Rows) -> None:
        self._file(rows, only_members=True)

    def chance_of_reuse(self, row: int) -> float:
        return float(self._reuse.chance[self._reuse.class_[self._chunk[row] % reuse.N_CHUNKS]])

    def _file(self, rows: Rows, *, only_members: bool) -> None:
        """Into the queues of their classes. Pages of chunks that are forgotten stay where they are."""
        is_known = self._chunk[rows] >= self._reuse.tally[reuse.HEAD] - reuse.N_CHUNKS
        rows = rows if is_known.all() else rows[is_known]
        at = self._chunk[rows] % reuse.N_CHUNKS
        kinds = 2 * self._reuse.class_[at] + (self._columns.backed[rows] != 0)
        self._place(rows, kinds, self._reuse.birth[at], only_members=only_members)

    def _worths(self, group: int) -> Worths:
        if len(self._known.table) < 2 * self._n_classes:
            self._conclude()
        return self._known

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._chunk.nbytes + self._reuse.nbytes
