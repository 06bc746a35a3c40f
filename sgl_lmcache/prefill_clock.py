"""Measures how long prefills take, by the calls that the scheduler makes anyway.

    ready_to_load_host_cache       a prefill batch is about to be launched
    finish_external_linker_loads   it has been, with these requests
    checkpoint                     the KV of one of them is complete: so was the forward of its batch

With overlap scheduling the next batch is launched before the last one's results are looked at, so batches wait in line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hicache import PrefillSpeed

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass(frozen=True, slots=True)
class _Batch:
    started_s: float
    rids: frozenset[str]
    extents: Sequence[tuple[int, int]]


class PrefillClock:
    """Tells `speed` of each prefill batch that has ended. clock: monotonic seconds. Scheduler thread only."""

    def __init__(self, speed: PrefillSpeed, page_size: int, clock: Callable[[], float]) -> None:
        self._speed = speed
        self._page_size = page_size
        self._clock = clock
        self._started_s: float | None = None
        self._running: deque[_Batch] = deque()

    def begin(self) -> None:
        """A prefill batch is about to be launched."""
        self._started_s = self._clock()

    def launched(self, reqs: Sequence[Req]) -> None:
        """A batch was launched: the one that has begun, or one that decodes."""
        if self._started_s is None:
            return
        extents = [(req.prefix_len // self._page_size, -(-req.extend_end // self._page_size)) for req in reqs]
        self._running.append(_Batch(self._started_s, frozenset(req.rid for req in reqs), extents))
        self._started_s = None

    def computed(self, req: Req) -> None:
        """The forward of the last batch with this request has ended."""
        if not any(req.rid in batch.rids for batch in self._running):
            return
        while self._running:
            batch = self._running.popleft()
            if req.rid in batch.rids:
                self._speed.observe(batch.extents, self._clock() - batch.started_s)
                return
