"""The nodes that have segments of the pool: which of them not to ask for a while.

A page is on one node, and the master names that node until it has not heard of it for ten seconds. A node that is dead,
or cut off from this one alone, costs each load that asks it a time-out. So the first failure opens a breaker for the
node, and its pages are misses until a trial goes well. Mooncake reads the first complete copy of an object and no
other, so that copy's node is the one that counts.

Mooncake sets no time-out when it connects, so a node that is cut off would hold a load until the client process is
killed, and its segment lost. Therefore a node that has not served for a moment is first tried here.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Final

from hicache.breaker import Breaker

FRESH_S: Final = 2.0
"""So long after it has served a node is taken to be reachable."""

FORGET_S: Final = 300.0
"""A node that has not been asked for so long is as good as new: its breaker's longest pause is a fifth of this."""


class Owners:
    """By endpoint, as Mooncake names it: `address:port`. Any thread may call it. clock: monotonic seconds.

    timeout_s: for a connection to be made.
    """

    def __init__(self, clock: Callable[[], float], timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._breakers: dict[str, Breaker] = {}
        self._served_at_s: dict[str, float] = {}
        self._failed_at_s: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def all_serve(self) -> bool:
        """Then nobody need be told apart."""
        return not self._breakers

    def may_ask(self, owner: str) -> bool:
        breaker = self._breakers.get(owner)
        return breaker is None or breaker.is_due

    def unreachable(self, owners: Iterable[str]) -> set[str]:
        """Those that no connection reaches. Blocks, for a time-out for each at most."""
        now_s = self._clock()
        stale = [owner for owner in owners if self._served_at_s.get(owner, -FRESH_S) <= now_s - FRESH_S]
        return {owner for owner in stale if not _is_reachable(owner, self._timeout_s)}

    def failed(self, owners: Iterable[str]) -> list[str]:
        """Ask these for nothing for a while. Returns those that were asked until now."""
        now_s = self._clock()
        with self._lock:
            self._forget(now_s - FORGET_S)
            news = []
            for owner in owners:
                self._served_at_s.pop(owner, None)
                self._failed_at_s[owner] = now_s
                breaker = self._breakers.setdefault(owner, Breaker(self._clock))
                if breaker.is_due:
                    breaker.failed()
                elif breaker.trip("does not answer"):
                    news.append(owner)
            return news

    def served(self, owners: Iterable[str]) -> list[str]:
        """These have answered. Returns those that had been given up."""
        now_s = self._clock()
        with self._lock:
            self._forget(now_s - FORGET_S)
            news = []
            for owner in owners:
                self._served_at_s[owner] = now_s
                self._failed_at_s.pop(owner, None)
                if self._breakers.pop(owner, None) is not None:
                    news.append(owner)
            return news

    def _forget(self, before_s: float) -> None:
        """Nodes that are started again have other ports, and the old ones are never heard of again."""
        for owner in [owner for owner, at_s in self._failed_at_s.items() if at_s < before_s]:
            del self._failed_at_s[owner]
            self._breakers.pop(owner, None)
        for owner in [owner for owner, at_s in self._served_at_s.items() if at_s < before_s]:
            del self._served_at_s[owner]


def _is_reachable(owner: str, timeout_s: float) -> bool:
    """Whether its machine answers. Nobody need listen: with a metadata server the port is only a part of the name."""
    host, _, port = owner.rpartition(":")
    try:
        with closing(socket.create_connection((host, int(port)), timeout_s)):
            return True
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
