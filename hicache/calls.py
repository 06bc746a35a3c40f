"""A call of a tier in pieces, which I/O threads run in any order: what becomes of its pages, and the answer.

The pieces of a call end on any thread. When the last has ended nobody is at the slots any more, and the future is done.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from hicache.tier import TierError, true_prefix
from hicache.workers import Work, Workers

UNASKED, ABSENT, GOOD, NEW, CORRUPT, OTHER_VERSION, FULL, FAILED = range(8)
"""What has become of a page. NEW: it is good, and was not there before. FAILED: who has it did not answer."""


class Call(ABC):
    """`future` is settled by it, once; with TierError if the store failed. lock: of the tier's counters."""

    is_read = True

    def __init__(self, n_pages: int, lock: threading.Lock, future: Future[int]) -> None:
        self.found = np.full(n_pages, UNASKED, np.int8)
        self.n_known = n_pages
        """Pages behind this one do not matter any more: one before them is missing."""
        self._lock = lock
        self._future = future
        self._n_left = 0
        self._error: Exception | None = None

    @abstractmethod
    def count(self, n_head: int) -> int:
        """Everything has ended, with so many good pages at the head: count it. Returns the answer. Under the lock."""

    @abstractmethod
    def explain(self, error: Exception) -> TierError:
        """The store failed with this: which store, and how."""

    def begin(self, workers: Workers, pieces: Sequence[Work]) -> None:
        """Have these run. Each says `piece_ended` when it is finished."""
        self._n_left = len(pieces)
        if pieces:
            workers.submit(pieces)
        else:
            self.settle(None)

    def piece_ended(self, positions: Sequence[int], error: Exception | None) -> None:
        """positions: of the piece's pages in the call. error: the store failed."""
        with self._lock:
            self._error = self._error or error
            bad = [at for at in positions if self.found[at] not in (GOOD, NEW)]
            self.n_known = min([self.n_known, *bad[:1]])
            self._n_left -= 1
            is_over = self._n_left == 0
        if is_over:
            self.settle(self._error)

    def settle(self, error: Exception | None) -> None:
        """Once, when nothing is under way. error: why the store failed."""
        n_head = true_prefix((self.found == GOOD) | (self.found == NEW))
        with self._lock:
            answer = self.count(n_head if error is None else 0)
        if error is None:
            self._future.set_result(answer)
        else:
            self._future.set_exception(self.explain(error))
