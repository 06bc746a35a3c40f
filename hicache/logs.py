"""Log lines: one for an event that matters, and not thousands when an event comes back all the time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BURST: Final = 20
"""Lines of one place in the code that are written one after another."""

PERIOD_S: Final = 60.0
"""After them, another one is written each time this has passed."""


CHANGE: Final = {"sgl_lmcache_change": True}
"""As `extra`: the line is of a change between two states, at a pace that is bounded where it is made, as by a breaker.
It is always written: without it, the one before it would stand for what is."""


def get_logger(name: str) -> logging.Logger:
    """Python's logger of this name, of which each place in the code is heard as often as the constants above say."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, RateLimit) for one in logger.filters):
        logger.addFilter(RateLimit())
    return logger


@dataclass(slots=True)
class _Place:
    n_left: float
    as_of_s: float
    n_omitted: int = 0


class RateLimit(logging.Filter):
    """A token bucket for each place that logs. The next line that is written says how many were not. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], _Place] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record, to which the count is added."""
        if hasattr(record, "sgl_lmcache_change"):
            return True
        now_s = self._clock()
        with self._lock:
            place = self._places.setdefault((record.pathname, record.lineno), _Place(BURST, now_s))
            place.n_left = min(BURST, place.n_left + (now_s - place.as_of_s) / PERIOD_S)
            place.as_of_s = now_s
            if place.n_left < 1:
                place.n_omitted += 1
                return False
            place.n_left -= 1
            n_omitted, place.n_omitted = place.n_omitted, 0
        if n_omitted:
            record.msg = f"{record.getMessage()} (and {n_omitted:,} such lines before it that were not written)"
            record.args = ()
        return True
