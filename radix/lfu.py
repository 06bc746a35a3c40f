"""Least frequently used, with ageing: the requests that have asked for a page since it came, plus the level."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from radix.columns import Rows
from radix.ring import AgeingPriority

MOST_USES: Final = 63


class Lfu(AgeingPriority):
    """The policy `lfu`. A request counts once, however often it is matched while it waits."""

    def _worth(self, rows: Rows, n_uses: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.minimum(n_uses, MOST_USES)
