"""The linker: what SGLang's linker wrapper drives, carried out by the engine (which slots) and the copies (bytes).

It stands in the place of SGLang's `UnifiedCacheLinker`, without being a subclass: that class's `offload` is not told
the parent of the pages it gets, and without the parent a page has no place in a radix tree. Our wrapper calls
`write_back` with it, and calls the rest as the original does.

Order is part of the contract: SGLang pairs completions with its own list of pending nodes by position. So every call of
`write_back` adds one entry, whether or not it copies anything, and entries are popped from the front only. Each reports
success, also when nothing was kept: a node that SGLang believes unstored is offered again on every later insert along
its path, which is quadratic in the depth of a conversation. What was not kept is counted by the engine instead.

Life of the slots: the engine leases them at `begin_*`, and this file calls the matching `finish_*` only when the copy
says that it is done. Everything here runs on SGLang's scheduler thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from hicache import Engine, Offload, Restore
from sgl_lmcache.keys import to_blob
from transfer.copies import Copies, Copy, LayerwiseCopy
from transfer.errors import CopyError
from transfer.slab import Slab

logger = logging.getLogger(__name__)

Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _WriteBack:
    """One node's write-back. Both fields are None when there was nothing to copy."""

    offload: Offload | None
    copy: Copy | None

    @property
    def done(self) -> bool:
        return self.copy is None or self.copy.done()


@dataclass(frozen=True, slots=True, eq=False)
class _QueuedLoad:
    """A restore that SGLang has decided on but not started; `pages` are the request's own device pages."""

    restore: Restore
    pages: Pages


@dataclass(frozen=True, slots=True, eq=False)
class _RunningLoad:
    copy: LayerwiseCopy
    restores: Sequence[Restore]


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
    max_pending_nbytes: write-backs are skipped, not queued, while more bytes than this wait to be copied, because their
    HBM pages stay locked until the copy is done.
    """

    def __init__(
        self, engine: Engine, copies: Copies, slab: Slab, *, page_size: int, num_layers: int, max_pending_nbytes: int
    ) -> None:
        self.engine = engine
        self.copies = copies
        self._slab = slab
        self.layer_done_counter = LayerCounter(num_layers)
        # SGLang asks only which pools are here.
        self.pools = {PoolName.KV: None}
        self._page_size = page_size
        self._max_pending_nbytes = max_pending_nbytes
        self._write_backs: deque[_WriteBack] = deque()
        self._queued: dict[str, _QueuedLoad] = {}
        self._running: list[_RunningLoad] = []

    # ---- HBM -> host ----

    def write_back(self, keys: bytes, parent: bytes | None, device_indices: torch.Tensor) -> None:
        """Keep these pages, which SGLang holds locked in HBM until the entry that this adds is popped.

        keys: 32n bytes below the page `parent`. device_indices: int64[n * page_size], whole pages of token rows.
        """
        if self.copies.pending_nbytes > self._max_pending_nbytes:
            self.engine.skip_offload(keys, parent)
            offload = None
        else:
            offload = self.engine.begin_offload(keys, parent)
        copy = None
        if offload is not None:
            pages = self._pages(device_indices)[offload.positions]
            copy = self.copies.offload(pages, offload.slots)
        self._write_backs.append(_WriteBack(offload, copy))

    def num_completed_offloads(self) -> int:
        """How many write-backs at the front of the line are done."""
        n_done = 0
        for write_back in self._write_backs:
            if not write_back.done:
                break
            n_done += 1
        return n_done

    def pop_completed_offload(self) -> bool:
        write_back = self._write_backs.popleft()
        if write_back.offload is not None and write_back.copy is not None:
            failed = write_back.copy.failed
            if failed is not None:
                logger.error("%d pages were not copied to host memory", len(write_back.offload.rows), exc_info=failed)
            self.engine.finish_offload(write_back.offload, landed=failed is None)
        return True

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
        copy = self.copies.restore(pages, slots)
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
        finally:
            self.collect_restores()
        return True

    def settle_write_backs(self) -> None:
        """Wait until every write-back is done. Blocks for the copies in flight, a bounded number of bytes."""
        self.copies.quiesce()

    def collect_restores(self) -> None:
        """End the leases of restores whose copies have stopped reading the slab. Cheap when there are none."""
        if not self._running:
            return
        running, self._running = self._running, []
        for load in running:
            if load.copy.done():
                for restore in load.restores:
                    self.engine.finish_restore(restore, copied=True)
            else:
                self._running.append(load)

    # ---- life ----

    def reset(self) -> None:
        """Wait for all copies, then forget everything that is in host memory. Blocks for the copies in flight."""
        self.copies.quiesce()
        while self._write_backs:
            self.pop_completed_offload()
        for rid in tuple(self._queued):
            self.cancel_queued_load(rid)
        self.collect_restores()
        self.layer_done_counter.reset()
        self.engine.reset()

    def close(self) -> None:
        """Stop the copies and free host memory. Blocks for the copies in flight."""
        logger.info("sgl_lmcache: %s", self.engine.stats)
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
