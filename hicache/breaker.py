"""When to stop asking a store that fails, and when to ask again.

A breaker is closed while all is well. The first failure opens it: from then on nobody asks. After a second, and then
after twice as long each time, up to a minute, one trial may tell that the store is back. If it soon fails again, that
counts as one more trial that failed. Each pause is shorter by a random part, so that servers that share a store do not
come back to it all at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

FIRST_RETRY_S: Final = 1.0
LAST_RETRY_S: Final = 60.0

JITTER: Final = 0.25
"""A pause is shorter by up to this part of it."""

CALM_S: Final = 180.0
"""After so long without a failure the first pause is short again."""


class Breaker:
    """One kind of access to one store. Any thread may call it; a race between two costs at most one more trial."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reason = ""
        self._pause_s = FIRST_RETRY_S
        self._retry_at_s = 0.0
        self._closed_at_s = -CALM_S

    @property
    def is_open(self) -> bool:
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """The sentence that opened it; empty while it is closed."""
        return self._reason

    @property
    def is_due(self) -> bool:
        """Whether it is open and the time for a trial has come."""
        return self.is_open and self._clock() >= self._retry_at_s

    def trip(self, reason: str) -> bool:
        """Open it. Returns False if it was open: then its first reason stands, and it has been told."""
        if self.is_open:
            return False
        if self._clock() - self._closed_at_s >= CALM_S:
            self._pause_s = FIRST_RETRY_S / 2
        self.failed()
        self._reason = reason
        return True

    def failed(self) -> None:
        """The trial failed: the next is later."""
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)
        self._retry_at_s = self._clock() + self._pause_s * (1 - JITTER * random.random())

    def close(self) -> None:
        """The trial went well."""
        self._closed_at_s = self._clock()
        self._reason = ""
