"""Cost-aware, like GreedyDual-Size-Frequency: what it would cost to have a page again, times how often it is used.

All pages are of one size, so what differs is the cost. To compute a page again takes time in proportion to its tokens,
and attention to all that is above it: the deeper, the dearer. A page with a copy on a lower tier costs a fetch, which
is cheap beside either. (Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
policy", 1998.)
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix.columns import Rows
from radix.ring import RING, AgeingPriority

CONTEXT_TOKENS: Final = 16384
"""Where attention costs as much as the rest of a layer: about twice the width of the hidden state, for models of some
billion parameters."""

MOST_DEPTH: Final = 3.0
"""Deeper pages count as this many times `CONTEXT_TOKENS`."""

FETCH_COST: Final = 0.25
"""Of a page that lies below, in parts of what computing it costs."""

MOST_USES: Final = 15

STEPS: Final = (RING - 2) / (MOST_USES * (1 + MOST_DEPTH))
"""Priorities told apart for each use of a page at the root."""


class Gdsf(AgeingPriority):
    """The policy `gdsf`."""

    def _worth(self, rows: Rows, n_uses: NDArray[np.int64]) -> NDArray[np.int64]:
        depth = self._columns.depth[rows] * (self._setting.page_tokens / CONTEXT_TOKENS)
        cost = 1 + np.minimum(depth, MOST_DEPTH)
        cost[self._columns.backed[rows] != 0] *= FETCH_COST
        worth: NDArray[np.int64] = np.maximum(1, np.rint(STEPS * np.minimum(n_uses, MOST_USES) * cost)).astype(np.int64)
        return worth
