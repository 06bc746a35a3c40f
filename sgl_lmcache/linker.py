"""The linker: what SGLang's linker wrapper drives, carried out by the engine (which slots) and the copies (bytes).

It stands in the place of SGLang's `UnifiedCacheLinker`, without being a subclass: that class's `offload` is not told
the parent of the pages it gets, and without the parent a page has no place in a radix tree. Our wrapper calls
`write_back` with it, and calls the rest as the original does.

Order is part of the contract: SGLang pairs completions with its own list of pending nodes by position. So entries are
popped from the front only, and a write-back that copies nothing adds none: its pages need no lock, and would otherwise
stay locked behind the copies of others. Each reports success, also when nothing was kept: a node that SGLang believes
unstored is offered again on every later insert along its path, which is quadratic in the depth of a conversation. What
was not kept is counted by the engine instead.

Life of the slots: the engine leases them at `begin_*`, and this file calls the matching `finish_*` only when the copy
says that it is done, on every rank. A rank sees for itself how far its copies are (`progress`); nothing follows from
that until the ranks have agreed on it, because leases decide what is evicted next. For the same reason back-pressure
counts what has not been acknowledged, which the ranks know alike, and not what still waits to be copied.

Everything here runs on SGLang's scheduler thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from hicache import Engine, Movement, Offload, Restore
from hicache.logs import get_logger
from sgl_lmcache.calls import Calls
from sgl_lmcache.keys import to_blob
from transfer.copies import Copies, Copy, LayerwiseCopy
from transfer.errors import CopyError
from transfer.slab import Slab

logger = get_logger(__name__)

Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the copies at the front of their lines are: of this rank, or, as minima, of all ranks together."""

    n_ended: int
    """Write-backs that have ended, well or badly."""
    n_landed: int
    """Write-backs that have ended well, up to the first that has not."""
    n_restored: int
    """Restores that read no slot any more."""


@dataclass(frozen=True, slots=True, eq=False)
class _WriteBack:
    """One node's write-back."""

    offload: Offload
    copy: Copy

    @property
    def landed(self) -> bool:
        return self.copy.done() and self.copy.failed is None

    @property
    def n_pages(self) -> int:
        return len(self.offload.rows)


@dataclass(frozen=True, slots=True, eq=False)
class _QueuedLoad:
    """A restore that SGLang has decided on but not started; `pages` are the request's own device pages."""

    restore: Restore
    pages: Pages


@dataclass(frozen=True, slots=True, eq=False)
class _RunningLoad:
    copy: _TimedCopy
    restores: Sequence[Restore]

    def movement(self) -> Movement:
        n_pages = sum(len(restore.slots) for restore in self.restores)
        return Movement("host", n_pages, self.copy.ended_s - self.copy.started_s)


class _TimedCopy:
    """A restore, and when it began and was first seen to have ended.

    The forward looks at each of its layers, and the scheduler in each of its iterations. clock: monotonic seconds.
    """

    def __init__(self, copy: LayerwiseCopy, clock: Callable[[], float]) -> None:
        self._copy = copy
        self._clock = clock
        self.started_s = clock()
        self._ended_s: float | None = None

    @property
    def ended_s(self) -> float:
        """When it was first seen to have ended; now, if it was not."""
        return self._clock() if self._ended_s is None else self._ended_s

    @property
    def failed(self) -> BaseException | None:
        return self._copy.failed

    def done(self) -> bool:
        if self._ended_s is None and self._copy.done():
            self._ended_s = self._clock()
        return self._ended_s is not None

    def wait(self) -> None:
        self._copy.wait()
        self.done()

    def wait_layer(self, layer: int) -> None:
        self._copy.wait_layer(layer)
        self.done()


class LayerCounter:
    """What SGLang's KV pool asks before it reads a layer: has this batch's restore put it there?

    SGLang sets the consumer to the index that `start_layer_wise_loading` gave for the batch about to run, or to -1.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = -1
        self._copies: dict[int, LayerwiseCopy] = {}
        self._next_index = 0

    def add(self, copy: LayerwiseCopy) -> int:
        index = self._next_index
        self._next_index += 1
        self._copies[index] = copy
        return index

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Called by the forward for each layer, counted from the pool's first: see `LayerwiseCopy.wait_layer`.

        A failed copy must not raise into the forward: SGLang lets it run on whatever the pages hold, is told by
        `finish_layer_wise_loading`, and drops what came of it.
        """
        copy = self._copies.get(self.consumer_index)
        if copy is not None:
            with suppress(CopyError):
                copy.wait_layer(threshold)

    def remove(self, index: int) -> LayerwiseCopy | None:
        return self._copies.pop(index, None)

    def reset(self) -> None:
        self._copies.clear()
        self.consumer_index = -1


class Linker:
    """See the module's text.

    slab: the host memory that `copies` fills; the linker frees it at the end. page_size: tokens a page.
    max_pending_pages: write-backs are skipped, not queued, while more pages than this have not been acknowledged,
    because they stay locked in HBM until then.
    """

    def __init__(
        self, engine: Engine, copies: Copies, slab: Slab, *, page_size: int, num_layers: int, max_pending_pages: int
    ) -> None:
        self.engine = engine
        self.copies = copies
        self.calls = Calls(engine.clock)
        self._slab = slab
        self.layer_done_counter = LayerCounter(num_layers)
        # SGLang asks only which pools are here.
        self.pools = {PoolName.KV: None}
        self._page_size = page_size
        self._max_pending_pages = max_pending_pages
        self._n_pending_pages = 0
        self._write_backs: deque[_WriteBack] = deque()
        self._queued: dict[str, _QueuedLoad] = {}
        self._running: deque[_RunningLoad] = deque()

    # ---- HBM -> host ----

    def write_back(self, keys: bytes, parent: bytes | None, device_indices: torch.Tensor) -> bool:
        """Keep these pages. True: they are being copied, and SGLang holds them locked in HBM until the entry is popped.

        keys: 32n bytes below the page `parent`. device_indices: int64[n * page_size], whole pages of token rows.
        """
        with self.calls.timed("write_back"):
            return self._begin_write_back(keys, parent, device_indices)

    def _begin_write_back(self, keys: bytes, parent: bytes | None, device_indices: torch.Tensor) -> bool:
        if self._n_pending_pages > self._max_pending_pages:
            self.engine.skip_offload(keys, parent)
            return False
        offload = self.engine.begin_offload(keys, parent)
        if offload is None:
            return False
        pages = self._pages(device_indices)[offload.positions]
        write_back = _WriteBack(offload, self.copies.offload(pages, offload.slots))
        self._n_pending_pages += write_back.n_pages
        self._write_backs.append(write_back)
        return True

    def pop_write_back(self, *, landed: bool) -> None:
        """Take the first write-back out of the line. It has ended on every rank, and well if `landed`."""
        write_back = self._write_backs.popleft()
        self._n_pending_pages -= write_back.n_pages
        if write_back.copy.failed is not None:
            logger.error("%d pages were not copied to host memory", write_back.n_pages, exc_info=write_back.copy.failed)
        self.engine.finish_offload(write_back.offload, landed=landed)

    def wait_write_back(self) -> None:
        """Block until the first write-back has ended on this rank, well or badly. There has to be one."""
        with suppress(CopyError):
            self._write_backs[0].copy.wait()

    @property
    def n_pending_pages(self) -> int:
        """How many pages are being copied from HBM into host memory, or wait for it."""
        return self._n_pending_pages

    @property
    def slot_nbytes(self) -> int:
        """Of a page in host memory, its padding included."""
        return self._slab.slot_nbytes

    # ---- what the ranks have to agree on ----

    @property
    def is_copying(self) -> bool:
        """Whether there is progress to agree on. The same on all ranks."""
        return bool(self._write_backs or self._running)

    def progress(self) -> Progress:
        """How far this rank's copies are. Never blocks."""
        n_landed = _n_leading(write_back.landed for write_back in self._write_backs)
        n_ended = _n_leading(write_back.copy.done() for write_back in self._write_backs)
        return Progress(n_ended, n_landed, _n_leading(load.copy.done() for load in self._running))

    def end_restores(self, n: int) -> None:
        """The first n restores have been copied on every rank: their leases end."""
        for _ in range(n):
            load = self._running.popleft()
            if load.copy.failed is None:
                self.engine.observed.movements.append(load.movement())
            for restore in load.restores:
                self.engine.finish_restore(restore, copied=True)

    # ---- host -> HBM ----

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue a restore into the device slots that SGLang has allocated. False: recompute.

        That is when a page has gone since the lookup, or when two live requests of one client share a rid: SGLang keeps
        one private load for each rid, so the second of them in a batch computes its prompt.
        """
        if rid in self._queued:
            return False
        (kv,) = transfers
        restore = self.engine.begin_restore(to_blob(kv.keys))
        if restore is None:
            return False
        self._queued[rid] = _QueuedLoad(restore, self._pages(kv.device_indices))
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        load = self._queued.pop(rid, None)
        if load is None:
            return False
        self.engine.finish_restore(load.restore, copied=False)
        return True

    def start_layer_wise_loading(self) -> int:
        """Start all queued restores as one layer-wise copy. Returns its index for the layer counter, -1 for none."""
        with self.calls.timed("restore"):
            index = self._start_queued_loads()
        # Generation sets the consumer again, to the same; the forward of an embedding model never does.
        self.layer_done_counter.set_consumer(index)
        return index

    def _start_queued_loads(self) -> int:
        if not self._queued:
            return -1
        loads = tuple(self._queued.values())
        self._queued.clear()
        pages = np.concatenate([load.pages for load in loads])
        slots = np.concatenate([load.restore.slots for load in loads])
        copy = _TimedCopy(self.copies.restore(pages, slots), self.engine.clock)
        self._running.append(_RunningLoad(copy, tuple(load.restore for load in loads)))
        return self.layer_done_counter.add(copy)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """After the forward was launched: when this returns, no later device work can overtake the restore."""
        copy = self.layer_done_counter.remove(counter_index)
        if copy is None:
            return not self._queued  # a load that was never started has not landed
        try:
            copy.wait_layer(self.layer_done_counter.num_layers - 1)
        except CopyError:
            logger.exception("A restore from host memory failed; its requests will be aborted")
            return False
        return True

    # ---- life ----

    def reset(self) -> None:
        """Wait for all copies, then forget everything that is in host memory. Blocks for the copies in flight."""
        self.copies.quiesce()
        while self._write_backs:
            self.pop_write_back(landed=False)
        for rid in tuple(self._queued):
            self.cancel_queued_load(rid)
        self.end_restores(len(self._running))
        self.layer_done_counter.reset()
        self.engine.reset()

    def close(self) -> None:
        """Stop the copies and free host memory. Blocks for the copies in flight."""
        logger.info("sgl_lmcache: %s", self.engine.stats)
        if self.engine.below is not None:
            for spills in self.engine.below.spills:
                logger.info("sgl_lmcache: %s: %s, %s", spills.tier.name, spills.stats, dict(spills.tier.stats()))
        self.engine.close()
        self.reset()
        self.copies.close()
        self._slab.close()

    def _pages(self, device_indices: torch.Tensor) -> Pages:
        """Token rows of whole pages -> device page numbers.

        On a GPU this waits for the schedule stream, which with overlap scheduling may wait for the forward in flight.
        """
        first_rows = device_indices[:: self._page_size].cpu().numpy()
        pages: Pages = first_rows // self._page_size
        return pages


def _n_leading(flags: Iterable[bool]) -> int:
    """How many are true before the first that is not."""
    return sum(1 for _ in takewhile(bool, flags))
