"""What `lfu` and `gdsf` share: pages in line by a priority that ages.

Ageing is that of GreedyDual: a page's priority is its worth plus the level at which it was last used, and the level
rises to the priority of what is evicted. So a page that is used no more is overtaken by all that are, however often it
was used once, and nothing ever has to be halved or swept.

Priorities are whole numbers and at most `RING - 1` above the level, so the pages of each are one queue, and the queues
are a ring. (N. Young, "The k-server dual and loose competitiveness for paging", 1994; Cao and Irani, "Cost-aware WWW
proxy caching algorithms", 1997.)
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix import queues
from radix.columns import Columns, Rows
from radix.policy import AGELESS, Policy
from radix.queues import Worths

RING: Final = 256


class AgeingPriority(Policy):
    """`_worth` is what a policy adds: whole numbers from 1 to `RING - 2`."""

    n_kinds = RING

    def restart(self, columns: Columns) -> None:
        super().restart(columns)
        self._level = np.zeros(self._n_groups, np.int64)
        kinds = np.arange(RING * self._n_groups) % RING
        self._queues.onward[:] = np.arange(RING * self._n_groups) - kinds + (kinds + 1) % RING
        self._front[:] = np.arange(self._n_groups) * RING

    def admitted(self, rows: Rows) -> None:
        self._rank(rows, only_members=False)

    def used(self, rows: Rows) -> None:
        queues.count_use(self._queues, rows, 255)
        self._rank(rows, only_members=True)

    def _rank(self, rows: Rows, *, only_members: bool) -> None:
        is_new = self._queues.queue[rows] == 0
        n_uses = np.where(is_new, 1, self._queues.chances[rows].astype(np.int64) + 1)
        level = self._level[self._columns.group[rows]]
        self._place(rows, (level + self._worth(rows, n_uses)) % RING, only_members=only_members)

    def _worth(self, rows: Rows, n_uses: NDArray[np.int64]) -> NDArray[np.int64]:
        raise NotImplementedError

    def victims(self, n: int, now: int, group: int) -> Rows:
        rows = super().victims(n, now, group)
        if len(rows):
            self._rise(group, int(self._queues.queue[rows[-1]]) - 1)
        return rows

    def _rise(self, group: int, to: int) -> None:
        """The level goes up to the queue of the last victim, as far as nothing is left below it."""
        first, level = group * RING, int(self._level[group])
        n_steps = (to - first - level) % RING
        size = self._queues.size
        for _ in range(n_steps):
            if size[first + level % RING] > 0:
                break
            level += 1
        self._level[group] = level
        self._front[group] = first + level % RING

    def _worths(self, group: int) -> Worths:
        above_level: NDArray[np.float64] = (np.arange(RING, dtype=np.float64) - self._level[group]) % RING
        return Worths(above_level[:, None], AGELESS, RING)
