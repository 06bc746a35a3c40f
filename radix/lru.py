"""Least recently used, leaf first: one queue. Of pages used together the deepest goes first."""

from __future__ import annotations

import numpy as np

from radix.columns import Rows
from radix.policy import Policy


class Lru(Policy):
    """The policy `lru`. Every use counts, however often one request makes it."""

    def used(self, rows: Rows) -> None:
        self._place(rows, np.zeros(len(rows), np.int32), only_members=True)

    def touched(self, rows: Rows) -> None:
        staying = rows[~self._is_passing[rows]]
        self._place(staying, np.zeros(len(staying), np.int32), only_members=True)
