"""Ranks in one process: each runs on a thread of its own, and they meet where real ones would exchange a message.

A rank that waits for an answer which another has gone past is a hang in a real server. Here it is seen at once and
without a clock: all ranks take one step at a time, and who waits when another has ended its step waits for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field


class HangError(AssertionError):
    """A rank waits for a message that will not come."""


class Meeting:
    """Where `n_ranks` ranks exchange minima. Made, driven and closed by the test's thread."""

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self._changed = threading.Condition()
        self._said: dict[int, list[int]] = {}
        self._answer: list[int] = []
        self._n_answers = 0
        self._one_is_through = False
        self._threads = ThreadPoolExecutor(n_ranks)

    def take(self, steps: Sequence[Callable[[], None]]) -> None:
        """Every rank takes its step, all at the same time. Raises what the first that failed has raised."""
        self._one_is_through = False
        futures = [self._threads.submit(self._take, step) for step in steps]
        errors = [error for future in futures if (error := future.exception()) is not None]
        self._said.clear()
        for error in sorted(
            errors, key=lambda error: isinstance(error, HangError)
        ):  # a hang is what follows from others
            raise error

    def _take(self, step: Callable[[], None]) -> None:
        try:
            step()
        finally:
            with self._changed:
                self._one_is_through = True
                self._changed.notify_all()

    def minimum(self, rank: int, values: Sequence[int]) -> list[int]:
        with self._changed:
            self._said[rank] = list(values)
            n_before = self._n_answers
            if len(self._said) == self.n_ranks:
                self._answer = [min(said) for said in zip(*self._said.values(), strict=True)]
                self._said.clear()
                self._n_answers += 1
                self._changed.notify_all()
            else:
                self._changed.wait_for(lambda: self._n_answers > n_before or self._one_is_through)
                if self._n_answers == n_before:
                    raise HangError(f"rank {rank} waits for an answer that another rank has gone past")
            return self._answer

    def close(self) -> None:
        self._threads.shutdown()


@dataclass
class MeetingRanks:
    """One rank's end of a meeting, as `sgl_lmcache.ranks.Ranks`."""

    meeting: Meeting
    rank: int
    may_ask: Callable[[], bool] = field(default=lambda: True)
    """Whether there is anything to agree on; asking without is a message for nothing."""
    n_reductions: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def minimum(self, values: Sequence[int]) -> list[int]:
        assert self.may_ask(), "a reduction with nothing pending"
        self.n_reductions += 1
        return self.meeting.minimum(self.rank, values)
