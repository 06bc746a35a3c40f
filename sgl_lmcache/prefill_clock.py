"""Measures how long prefills take, by the calls that the scheduler makes anyway.

    ready_to_load_host_cache       a prefill batch is about to be launched
    finish_external_linker_loads   it has been, with these requests
    checkpoint                     the KV of one of them is published

A checkpoint comes behind the forward only for the last chunk of a prompt: SGLang publishes the others while they may
still be computed. So the chunks of a prompt are measured as one, from the first one's beginning to the last one's end.
With overlap scheduling the next batch is launched before the last one's results are looked at: batches wait in line,
and the time of one begins when the one before it has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hicache import PrefillSpeed

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_RUNNING = 64
"""Batches of which no request is ever published are forgotten when so many have followed."""


@dataclass(slots=True)
class _Batch:
    """One batch, or several with chunks of one prompt. `extents`: pages from and to, of each request."""

    started_s: float
    rids: set[str] = field(default_factory=set)
    extents: list[tuple[int, int]] = field(default_factory=list)


class PrefillClock:
    """Tells `speed` of each prefill that has ended. clock: monotonic seconds. Scheduler thread only."""

    def __init__(self, speed: PrefillSpeed, page_size: int, clock: Callable[[], float]) -> None:
        self._speed = speed
        self._page_size = page_size
        self._clock = clock
        self._started_s: float | None = None
        self._chunked: _Batch | None = None
        self._running: deque[_Batch] = deque(maxlen=MAX_RUNNING)
        self._ended_s = float("-inf")

    def begin(self) -> None:
        """A prefill batch is about to be launched."""
        self._started_s = self._clock()

    def launched(self, reqs: Sequence[Req]) -> None:
        """A batch was launched: the one that has begun, or one that decodes."""
        if self._started_s is None:
            return
        batch = self._chunked or _Batch(self._started_s)
        self._started_s = self._chunked = None
        for req in reqs:
            batch.extents.append((req.prefix_len // self._page_size, -(-req.extend_end // self._page_size)))
        if any(req.extend_end < len(req.full_untruncated_fill_ids) for req in reqs):
            self._chunked = batch
            return
        batch.rids = {req.rid for req in reqs}
        self._running.append(batch)

    def computed(self, req: Req) -> None:
        """The KV of this request is published: the forward of the last batch with it has ended."""
        if not any(req.rid in batch.rids for batch in self._running):
            return
        while self._running:
            batch = self._running.popleft()
            if req.rid in batch.rids:
                now_s = self._clock()
                self._speed.observe(batch.extents, now_s - max(batch.started_s, self._ended_s))
                self._ended_s = now_s
                return
