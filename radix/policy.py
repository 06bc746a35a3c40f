"""The contract of an eviction policy, and what they have in common.

A policy orders the RESIDENT pages of one tier and proposes victims. It decides; `Index` applies. It may read all
columns of the index and writes only its own, which it allocates once, at the index's capacity.

All policies keep their pages in `radix.queues`, so leaf-first order, leases and groups are the same for all and stand
there. What a policy adds is where a page goes (`_arrived`, `_asked`, `touched`) and what the oldest page of each kind
of queue is worth (`_worths`).

Time is what is told, in the order in which it is told: pages asked for, not seconds. So ranks, which hear the same,
take the same victims.

To add one: a file with a class that extends this one, and a line in `radix.policies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix import queues
from radix.columns import Columns, Rows
from radix.history import History
from radix.queues import BY_ROW, Worths

AGELESS: Final = np.zeros(1, np.int64)
"""The edges of policies that tell no ages apart."""

_ALIKE: Final = Worths(np.zeros((1, 1)), AGELESS, 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a policy works.

    tier: its number. n_pages: what the tier is expected to hold. page_tokens: tokens a page. history: of all that was
    asked for.
    """

    tier: int
    n_pages: int
    page_tokens: int
    history: History


@dataclass(frozen=True, slots=True)
class Asked:
    """A request asks for a path of pages, from the root. One array a column, in path order."""

    rows: Rows
    """Of the pages at the head of the path that the index knows; on the tier or not."""
    places: NDArray[np.int64]
    """Of all pages, in the history, where they have just been noted."""
    is_known: NDArray[np.uint8]
    """Whether they were remembered before."""


class Policy:
    """Told of every change to the pages of its tier, after the columns show it. Never called for no rows."""

    n_kinds = 1
    """Queues that each group has."""

    def __init__(self, columns: Columns, setting: Setting) -> None:
        self._setting = setting
        self._n_groups = len(columns.held)
        self._clock = 0
        """Pages asked for so far."""
        self.restart(columns)

    def restart(self, columns: Columns) -> None:
        """The index has been emptied, and has these columns now. What has been learned stays."""
        self._columns = columns
        self._queues = queues.allocate(len(columns.parent), self._n_groups * self.n_kinds)
        self._front = np.full(self._n_groups, -1, np.int64)
        self._is_passing = np.zeros(len(columns.parent), np.bool_)
        """[capacity]: pages that are here for one request, until another asks for them."""

    # ---- what it is told ----

    def asked(self, asked: Asked) -> None:
        """Told once a request, when it arrives."""
        self._clock += len(asked.places)
        self._is_passing[asked.rows] = False
        if len(asked.rows):
            self.used(asked.rows)

    def used(self, rows: Rows) -> None:
        """A request uses these, in path order. Rows that are not RESIDENT on its tier are to be skipped."""

    def answered(self, rows: Rows, n_tokens: int) -> None:
        """A request has ended, with so many tokens. rows: the path of its prompt, as far as the index knows it."""

    def admitted(self, rows: Rows) -> None:
        """These have become RESIDENT. They may include rows it has: they count once."""
        self._place(rows, np.zeros(len(rows), np.int32))

    def passing(self, rows: Rows) -> None:
        """These, in path order, which it has, are here for one request only: they are the first to go of their kind."""
        self._is_passing[rows] = True
        queues.place_first(self._queues, rows)

    def touched(self, rows: Rows) -> None:
        """These, in path order, are in use now, maybe again by the same request. Others are to be skipped.

        For a page that only passes, the use of its one request is no reason to stay.
        """

    def backed(self, rows: Rows) -> None:
        """Of these it is believed from now on that copies lie below host memory, or that none do."""

    def removed(self, rows: Rows) -> None:
        """These are on the tier no more, or have not come after all. Keys and parents can still be read."""
        self._is_passing[rows] = False
        queues.remove(self._columns, self._queues, rows, self._setting.tier, self._front)

    # ---- what it is asked ----

    def victims(self, n: int, now: int, group: int) -> Rows:
        """Up to n rows of a group to evict now, in order; the tier itself is as before. This is the hot path.

        A victim is RESIDENT, has no lease and a `last_use` other than `now`, and all its children that are not ABSENT
        on the tier come before it. Fewer than n only if no more can be taken.
        """
        out = np.empty(n, np.int32)
        worths, tier = self._worths(group), self._setting.tier
        return out[: queues.take(self._columns, self._queues, worths, tier, now, self._clock, group, out)]

    def order(self, n: int, group: int) -> Rows:
        """The first n rows of a group in line for eviction, whether they may go now or not. One compiled call.

        Pages that were found to have children on the tier are not in line.
        """
        out = np.empty(n, np.int32)
        return out[: queues.order(self._queues, self._worths(group), self._clock, group, out)]

    def chance_of_reuse(self, row: int) -> float:
        """From 0 to 1: how likely a page on the tier is to be asked for again; 0 if the policy has no idea."""
        return 0.0

    def members(self) -> Rows:
        """All rows it holds, each once. Slow: for checks. Raises AssertionError if its queues are broken."""
        return queues.members(self._queues)

    def reserve(self, n_rows: int) -> None:
        """Write zeros into the memory of the first `n_rows` rows, while it holds none."""
        for column in self._queues[:BY_ROW]:
            column[:n_rows] = 0

    @property
    def nbytes(self) -> int:
        """Of its columns."""
        return self._is_passing.nbytes + sum(column.nbytes for column in self._queues)

    # ---- what a policy decides ----

    def _worths(self, group: int) -> Worths:
        return _ALIKE

    def _place(
        self,
        rows: Rows,
        kinds: NDArray[np.integer],
        used_at: NDArray[np.int64] | None = None,
        *,
        only_members: bool = False,
    ) -> None:
        """Make these pages, in path order, the newest of their kinds. used_at: since when they age; None: now."""
        to = self._columns.group.take(rows) * np.int32(self.n_kinds) + kinds.astype(np.int32)
        if used_at is None:
            used_at = np.full(len(rows), self._clock, np.int64)
        queues.place(self._queues, rows, to, used_at, only_members)
