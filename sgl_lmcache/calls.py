"""What our calls cost SGLang's scheduler thread. While it is in one of them, no request gets a token.

Calls are timed by the wall, so what they wait for counts as well: another rank, a device, the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SLOW_S: Final = 5e-3
"""A call that takes longer is a slow one: a good part of the time from one token to the next."""

CALLS: Final = ("arrival", "iteration", "write_back", "restore")
"""A request arrives, an iteration of the scheduler begins, pages are offered, a batch's restores are started."""


class Calls:
    """See the module's text. clock: monotonic seconds. Scheduler thread only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds = dict.fromkeys(CALLS, 0.0)
        self.n_slow = dict.fromkeys(CALLS, 0)

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        started_s = self._clock()
        try:
            yield
        finally:
            took_s = self._clock() - started_s
            self.seconds[call] += took_s
            self.n_slow[call] += took_s > SLOW_S
