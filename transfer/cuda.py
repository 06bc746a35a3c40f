"""Copies between a GPU's KV pool and the slab: streams and events around a device's copy functions.

It has not been run on a GPU yet. The streams follow SGLang's own host cache; the byte movement of `StridedOps` is
tested on CPU tensors against the compiled CPU path.

Offloads and restores have a stream each, so that a restore never queues behind offloads. The fence: before a batch,
its stream waits for what the forward stream and the current (scheduling) stream hold at that moment. An offload thus
reads finished KV, and a restore overwrites no row that a forward in flight still writes. After each restored layer an
event is recorded; `wait_layer` makes the current stream wait for it, and no thread ever blocks but in `wait`,
`quiesce` and `close`.

How bytes cross is not decided here: `DeviceOps` enqueues it on the current stream. SGLang's kernels become one in the
plug-in, so that this room never imports SGLang; `StridedOps` is the fallback of plain torch operations.

A CUDA error is fatal to the process that runs the model, so a batch has no failure to carry: torch raises it.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from transfer.copies import Copy, DevicePool, Int32Array, Int64Array, LayerwiseCopy, checked_batch
from transfer.errors import CopyError, SlabError
from transfer.layout import PageLayout
from transfer.slab import Slab

STAGING_NBYTES = 32 << 20
"""Device memory that `StridedOps` gathers into at once; a batch larger than that goes in several rounds."""


class DeviceOps(Protocol):
    """Enqueues copies of whole pages on the current stream. Never empty; bounds are checked, destinations distinct.

    `pages` and `slots` are int64 CPU tensors of one length; `slab` is uint8 `(n_slots, slot_nbytes)`, pinned. Index
    tensors that a method puts on the device must be allocated while the current stream is current.
    """

    def offload(self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor) -> None:
        """All layers of device page `pages[j]` to slot `slots[j]`."""

    def restore_layers(
        self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor
    ) -> Iterator[int]:
        """Slot `slots[j]` to device page `pages[j]`: yields 0, 1, ... each time a layer has been enqueued."""


class CudaCopies:
    """`Copies` between a CUDA pool and a pinned slab. `ops` is used by the calling thread only.

    Raises `LayoutError` when pool, slab and layout do not match, `SlabError` when the slab is not pinned.
    """

    def __init__(
        self, pool: DevicePool, layout: PageLayout, slab: Slab, *, ops: DeviceOps, forward_stream: torch.cuda.Stream
    ) -> None:
        pool.check(layout)
        slab.check(layout)
        if not slab.is_pinned:
            raise SlabError("The slab must be pinned before the GPU copies to it.")
        self._pool, self._slab = pool, slab.tensor
        self._ops = ops
        self._forward_stream = forward_stream
        self._offload_stream = torch.cuda.Stream(forward_stream.device)
        self._restore_stream = torch.cuda.Stream(forward_stream.device)
        self._is_open = True

    def offload(self, pages: Int64Array, slots: Int32Array) -> Copy:
        batch = self._batch(pages, slots)
        if batch is None:
            return _Events([])
        with torch.cuda.stream(self._fenced(self._offload_stream)):
            self._ops.offload(self._pool, *batch, self._slab)
            return _Events([self._offload_stream.record_event()])

    def restore(self, pages: Int64Array, slots: Int32Array) -> LayerwiseCopy:
        batch = self._batch(pages, slots)
        if batch is None:
            return _Events([])
        with torch.cuda.stream(self._fenced(self._restore_stream)):
            layers = self._ops.restore_layers(self._pool, *batch, self._slab)
            events = [self._restore_stream.record_event() for _ in layers]
        return _Events(events)

    def quiesce(self) -> None:
        self._offload_stream.synchronize()
        self._restore_stream.synchronize()

    def close(self) -> None:
        self._is_open = False
        self.quiesce()

    def _batch(self, pages: Int64Array, slots: Int32Array) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The checked batch as CPU tensors, or None for an empty one."""
        if not self._is_open:
            raise CopyError("These copies are closed.")
        own_pages, own_slots = checked_batch(pages, slots, n_pages=self._pool.n_pages, n_slots=len(self._slab))
        return (torch.from_numpy(own_pages), torch.from_numpy(own_slots)) if own_pages.size else None

    def _fenced(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        stream.wait_stream(self._forward_stream)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        return stream


class _Events:
    """The handle of a batch: one event for an offload, one a layer for a restore, none for an empty batch."""

    failed: BaseException | None = None

    def __init__(self, events: list[torch.cuda.Event]) -> None:
        self._events = events

    def done(self) -> bool:
        return not self._events or bool(self._events[-1].query())

    def wait(self) -> None:
        if self._events:
            self._events[-1].synchronize()

    def wait_layer(self, layer: int) -> None:
        if self._events:
            torch.cuda.current_stream().wait_event(self._events[layer])


class StridedOps:
    """`DeviceOps` of plain torch operations, for any layout, padded slots included, on any device.

    Pages are gathered on the device, then cross one asynchronous copy a page (offload) or a page and layer (restore).
    So it costs the calling thread some microseconds a page and layer: right everywhere, made for small batches only.
    """

    def __init__(self, layout: PageLayout, *, staging_nbytes: int = STAGING_NBYTES) -> None:
        self._layout = layout
        self._staging_nbytes = staging_nbytes

    def offload(self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor) -> None:
        layout, device = self._layout, pool.k[0].device
        n = max(1, self._staging_nbytes // layout.page_nbytes)
        for round_pages, round_slots in zip(pages.split(n), slots.split(n), strict=True):
            index = round_pages.to(device, non_blocking=True)
            staging = torch.empty((len(index), layout.n_layers, layout.layer_nbytes), dtype=torch.uint8, device=device)
            for layer in range(layout.n_layers):
                staging[:, layer, : layout.k_nbytes] = pool.k_pages(layer).index_select(0, index)
                if pool.v:
                    staging[:, layer, layout.k_nbytes :] = pool.v_pages(layer).index_select(0, index)
            for page, slot in zip(staging.flatten(1), round_slots.tolist(), strict=True):
                slab[slot, : layout.page_nbytes].copy_(page, non_blocking=True)

    def restore_layers(
        self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor
    ) -> Iterator[int]:
        layout, device = self._layout, pool.k[0].device
        n = max(1, self._staging_nbytes // layout.layer_nbytes)
        rounds = [
            (p.to(device, non_blocking=True), s.tolist()) for p, s in zip(pages.split(n), slots.split(n), strict=True)
        ]
        for layer in range(layout.n_layers):
            first = layer * layout.layer_nbytes
            for index, round_slots in rounds:
                staging = torch.empty((len(index), layout.layer_nbytes), dtype=torch.uint8, device=device)
                for block, slot in zip(staging, round_slots, strict=True):
                    block.copy_(slab[slot, first : first + layout.layer_nbytes], non_blocking=True)
                pool.k_pages(layer).index_copy_(0, index, staging[:, : layout.k_nbytes])
                if pool.v:
                    pool.v_pages(layer).index_copy_(0, index, staging[:, layout.k_nbytes :])
            yield layer
