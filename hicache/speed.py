"""How long a prefill takes on this server, learnt from those that it has run.

The forward of pages a to b is some work for each token (projections, experts) and some for each pair of a token and one
before it (attention), so

    seconds = linear * (b - a) + quadratic * (b**2 - a**2) / 2

Both coefficients are fitted by least squares over the batches seen so far, where each new one makes the old ones count
a tenth less. Neither is negative. With one kind of batch only the two cannot be told apart, and the fit still answers
rightly for that kind.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

DECAY = 0.9
"""What an observation still counts after the next one."""

SINGULAR = 1e-9
"""Below this share of its greatest possible value the determinant says that all batches were of one kind."""


class PrefillSpeed:
    """Seconds of a prefill from its extent in pages. No clock of its own. One thread."""

    def __init__(self) -> None:
        self._normal = np.zeros((2, 2))
        self._right = np.zeros(2)
        """The normal equations: `_normal @ coefficients == _right`."""

    def observe(self, extents: Iterable[tuple[int, int]], seconds: float) -> None:
        """A batch that computed these half-open ranges of pages, one of each request, took so long."""
        features = np.sum([_features(*extent) for extent in extents], axis=0)
        if not features.any():
            return
        self._normal = DECAY * self._normal + np.outer(features, features)
        self._right = DECAY * self._right + features * seconds

    def predict(self, start: int, end: int) -> float | None:
        """Seconds to compute pages `start` to `end` of one request. None: nothing has been seen yet."""
        if not self._normal[0, 0]:
            return None
        return float(self._coefficients() @ _features(start, end))

    def _coefficients(self) -> NDArray[np.float64]:
        """(linear, quadratic), seconds."""
        (xx, _), (_, yy) = self._normal
        if np.linalg.det(self._normal) > SINGULAR * xx * yy:
            solution = np.linalg.solve(self._normal, self._right).astype(np.float64)
            if (solution >= 0).all():
                return solution
            if solution[0] < 0:
                return np.array([0.0, self._right[1] / yy])
        return np.array([self._right[0] / xx, 0.0])


def _features(start: int, end: int) -> NDArray[np.float64]:
    return np.array([end - start, (end**2 - start**2) / 2])
