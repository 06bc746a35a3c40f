"""The nodes that have segments of the pool: which of them not to ask for a while.

A page is on one node, and the master names that node until it has not heard of it for ten seconds. A node that is dead,
or cut off from this one alone, costs each load that asks it a time-out. So the first failure opens a breaker for the
node, and its pages are misses until a trial goes well. Mooncake reads the first complete copy of an object and no
other, so that copy's node is the one that counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from hicache.breaker import Breaker


class Owners:
    """By endpoint, as Mooncake names it: `address:port`. Any thread may call it. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}
        self._lock = threading.Lock()

    @property
    def all_serve(self) -> bool:
        """Then nobody need be told apart."""
        return not self._breakers

    def may_ask(self, owner: str) -> bool:
        breaker = self._breakers.get(owner)
        return breaker is None or breaker.is_due

    def failed(self, owners: Iterable[str]) -> list[str]:
        """Ask these for nothing for a while. Returns those that were asked until now."""
        with self._lock:
            news = []
            for owner in owners:
                breaker = self._breakers.setdefault(owner, Breaker(self._clock))
                if breaker.trip("does not answer"):
                    news.append(owner)
                else:
                    breaker.failed()
            return news

    def served(self, owners: Iterable[str]) -> list[str]:
        """These have answered. Returns those that had been given up."""
        with self._lock:
            return [owner for owner in owners if self._breakers.pop(owner, None) is not None]
