"""Trouble that a test asks for while the server runs: slow copies, slow calls, copies that fail; on one rank or on all.

Two files in the probe's folder say what is wanted. `hold`: copies into host memory do not end. `faults.json`: see
`Faults`, which has a text of its own in `tests/support/inspection.py`. Both count from the moment they are there.

Delays are random, so that two ranks meet in other orders each time; what a test asserts has to hold in all of them.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec

HOLD_POLL_S = 0.005
CALLS_DELAYED = 0.1
"""The share of calls that are delayed, if any are."""


class CopyFailureError(RuntimeError):
    """A copy that failed because a test wanted it to."""


class Faults(msgspec.Struct, frozen=True):
    rank: int | None
    copy_delay_s: float
    call_delay_s: float
    n_failing_offloads: int
    n_failing_restores: int
    copies_go_on: bool
    disk_errno: int
    disk_calls: tuple[str, ...]
    disk_hangs: bool
    disk_nbytes_per_s: float


NONE = Faults(None, 0.0, 0.0, 0, 0, False, 0, (), False, 0.0)

DISK_CALLS = ("open", "fallocate", "preadv", "pwritev", "fdatasync")
"""Methods of `transfer.files.System` that can be made to fail."""


class Trouble:
    """For one rank. The copies' hooks run on their threads, the calls' on the scheduler's."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.n_delays = 0
        self._hold = directory / "hold"
        self._path = directory / "faults.json"
        self._rank = rank
        self._chance = random.Random(rank)
        self._lock = Lock()
        self._disk = Lock()
        self._version = 0
        self._faults = NONE
        self._n_begun: Counter[str] = Counter()

    def around_offload(self, offload: Callable[..., None], *args: Any) -> None:
        """A piece of a write-back. Copying it again does no harm: its pages are locked, and its slots leased."""
        self._before_offload()
        offload(*args)
        while self._current().copies_go_on:
            self._wait_while_held()
            offload(*args)

    def _before_offload(self) -> None:
        self._wait_while_held()
        faults = self._current()
        self._disturb(faults, "offload", faults.n_failing_offloads)

    def before_restore(self, *_args: Any) -> None:
        """A layer of a piece of a restore."""
        faults = self._current()
        self._disturb(faults, "restore", faults.n_failing_restores)

    def _disturb(self, faults: Faults, direction: str, n_failing: int) -> None:
        """A piece of a copy begins late, and fails if it is one of the first `n_failing` of its direction."""
        self._delay(faults.copy_delay_s)
        with self._lock:
            self._n_begun[direction] += 1
            fails = self._n_begun[direction] <= n_failing
        if fails:
            raise CopyFailureError("a test wanted this copy to fail")

    def around_disk(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """A system call of the SSD tier."""
        faults = self._current()
        if faults.disk_errno and name in faults.disk_calls:
            raise OSError(faults.disk_errno, f"{os.strerror(faults.disk_errno)} (a test wanted it)")
        if name in ("preadv", "pwritev"):
            while self._current().disk_hangs:
                time.sleep(HOLD_POLL_S)
        result = call(*args)
        if name == "preadv" and faults.disk_nbytes_per_s:
            with self._disk:
                time.sleep(result / faults.disk_nbytes_per_s)
        return result

    def before_call(self, *_args: Any, **_kwargs: Any) -> None:
        longest_s = self._current().call_delay_s
        if longest_s and self._chance.random() < CALLS_DELAYED:
            self._delay(longest_s)

    def release(self) -> None:
        """A flush waits for copies, so nothing may be held."""
        self._hold.unlink(missing_ok=True)

    def _wait_while_held(self) -> None:
        while self._hold.exists():
            time.sleep(HOLD_POLL_S)

    def _delay(self, longest_s: float) -> None:
        if longest_s:
            self.n_delays += 1
            time.sleep(self._chance.uniform(0, longest_s))

    def _current(self) -> Faults:
        try:
            version = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return NONE
        with self._lock:
            if version != self._version:
                self._version = version
                self._n_begun.clear()
                self._faults = msgspec.json.decode(self._path.read_bytes(), type=Faults)
            faults = self._faults
        return faults if faults.rank in (None, self._rank) else NONE
