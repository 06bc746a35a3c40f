"""Our end of the probe: files in a folder, by which a test looks into the scheduler of each rank and gives it trouble.

What the other end does is written in `probe/sgl_lmcache_probe`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tests.support.processes import wait_for

ANSWER_TIMEOUT_S = 180.0
STACKS_TIMEOUT_S = 10.0

T = TypeVar("T")


class Inspection(msgspec.Struct, frozen=True):
    """What the probe saw in one rank between two scheduler iterations; see `probe/sgl_lmcache_probe/inspection.py`.

    Of one inspection the ranks see the same iteration. So with nothing under way all of it is equal on them, but for
    what a clock has measured (`loop`, `times`), for `n_delays`, and for `namespace`, which is of one rank's KV.
    """

    violation: str | None
    first_violation: str | None
    n_checks: int
    n_iterations: int
    digest: int
    namespace: str
    contents: dict[str, int]
    history: int
    stats: dict[str, int]
    host: dict[str, int]
    requests: dict[str, list[str]]
    ended: dict[str, str]
    open: dict[str, int]
    unfinished_at_reset: int
    hbm: dict[str, int]
    mirror: dict[str, int]
    restored: int
    checked: int
    mismatched: int
    tainted: bool
    tier: dict[str, int]
    n_delays: int
    n_reductions: int
    loop: dict[str, int]
    times: dict[str, dict[str, int]]

    @property
    def is_at_rest(self) -> bool:
        return not (any(self.requests.values()) or any(self.open.values()) or self.hbm["protected"])


class Faults(msgspec.Struct, frozen=True):
    """Trouble for the rank `rank`, or for all of them.

    copy_delay_s, call_delay_s: each piece of a write-back or restore, and some calls of the scheduler, take that much
    longer at most. n_failing_offloads, n_failing_restores: so many pieces of them fail, from now on.
    copies_go_on: write-backs copy their bytes again and again, and end only when this does.
    disk_errno: those system calls of the SSD tier that `disk_calls` names fail with it. disk_hangs: its reads and
    writes end only when this does. disk_nbytes_per_s: its reads are no faster than that, one after another; 0: as they
    are.
    """

    rank: int | None = None
    copy_delay_s: float = 0.0
    call_delay_s: float = 0.0
    n_failing_offloads: int = 0
    n_failing_restores: int = 0
    copies_go_on: bool = False
    disk_errno: int = 0
    disk_calls: tuple[str, ...] = ("preadv", "pwritev")
    disk_hangs: bool = False
    disk_nbytes_per_s: float = 0.0


class ProbeFolder:
    """Where one server's probes of `n_ranks` ranks find questions and leave answers.

    check_alive: raises if the server has ended; called while waiting.
    """

    def __init__(self, path: Path, n_ranks: int, check_alive: Callable[[], None]) -> None:
        self._path = path
        self._n_ranks = n_ranks
        self._check_alive = check_alive
        self._n_inspections = 0

    def facts(self, rank: int = 0) -> dict[str, Any]:
        """What SGLang's scheduler made of its arguments, written at the start."""
        return dict(msgspec.json.decode((self._path / f"facts-{rank}.json").read_bytes()))

    def inspect(self) -> list[Inspection]:
        """Look into every rank, in the same iteration. For one thread at a time."""
        self._n_inspections += 1
        self._put("request", str(self._n_inspections).encode())
        answers = [self._path / f"answer-{self._n_inspections}-{rank}.json" for rank in range(self._n_ranks)]

        def read() -> list[Inspection] | None:
            self._check_alive()
            if not all(answer.exists() for answer in answers):
                return None
            return [msgspec.json.decode(answer.read_bytes(), type=Inspection) for answer in answers]

        return self.wait_for("the probe's answer", read, ANSWER_TIMEOUT_S)

    @contextmanager
    def held_copies(self) -> Iterator[None]:
        """Copies into host memory begin and do not end, until the context is left or the server flushes."""
        hold = self._path / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink(missing_ok=True)

    @contextmanager
    def faults(self, faults: Faults) -> Iterator[None]:
        """Until the context is left."""
        self._put("faults.json", msgspec.json.encode(faults))
        try:
            yield
        finally:
            (self._path / "faults.json").unlink()

    def wait_for(self, what: str, poll: Callable[[], T | None], timeout_s: float) -> T:
        """`processes.wait_for`, with the stacks of all ranks in the error: a server that hangs says where."""
        try:
            return wait_for(what, poll, timeout_s)
        except AssertionError as error:
            error.add_note(self.stacks())
            raise

    def stacks(self) -> str:
        """Where every thread of every rank is."""
        return "\n".join(f"rank {rank}:\n{self._stacks_of(rank)}" for rank in range(self._n_ranks))

    def _stacks_of(self, rank: int) -> str:
        path = self._path / f"stacks-{rank}.txt"
        n_before = path.stat().st_size
        os.kill(self.facts(rank)["pid"], signal.SIGUSR1)
        wait_for("stacks", lambda: path.stat().st_size > n_before or None, STACKS_TIMEOUT_S)
        return path.read_text()[n_before:]

    def _put(self, name: str, content: bytes) -> None:
        """Whoever finds the file finds it whole."""
        unfinished = self._path / f"{name}.part"
        unfinished.write_bytes(content)
        unfinished.replace(self._path / name)
