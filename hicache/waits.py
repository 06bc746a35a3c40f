"""Those who wait for one kind of thing, first come first, each for at most the same time.

A deadline is the one thing here that a clock decides, and clocks differ between the ranks of a server. So nobody's
deadline passes by itself: `n_overdue` says how many at the head of the line are overdue by this process's clock, one
rank's answer is made known to all, and every rank then calls `expire` with it. The line has the same order on every
rank, because all join and leave it in the same calls, so all ranks give up on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

W = TypeVar("W")


class Waits(Generic[W]):
    """A line of hashable things. timeout_s: how long each may wait. clock: monotonic seconds. One thread."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._deadlines: dict[W, float] = {}

    def add(self, waiter: W) -> None:
        """Join the line at its end. Who is in it already keeps their place."""
        self._deadlines.setdefault(waiter, self._clock() + self._timeout_s)

    def discard(self, waiter: W) -> None:
        """Leave the line, if in it."""
        self._deadlines.pop(waiter, None)

    def n_overdue(self) -> int:
        """How many at the head of the line have waited their time, by this process's clock."""
        now_s = self._clock()
        n = 0
        for deadline_s in self._deadlines.values():
            if now_s < deadline_s:
                break
            n += 1
        return n

    def expire(self, n: int) -> list[W]:
        """Take the first n out of the line, or all if there are fewer."""
        expired = list(self._deadlines)[:n]
        for waiter in expired:
            del self._deadlines[waiter]
        return expired

    def waiting(self) -> list[W]:
        """Everybody in the line, first come first: a copy."""
        return list(self._deadlines)

    def __contains__(self, waiter: W) -> bool:
        return waiter in self._deadlines

    def __len__(self) -> int:
        return len(self._deadlines)
