"""The contract of copies between the device's KV pool and the slab.

Three nouns: the `DevicePool` describes SGLang's buffers, `Copies` starts batches, and a `Copy` is the handle of one
batch. Every start returns at once. A batch is checked in full before anything is queued, so a bad page or slot is a
ValueError at the call and moves no byte.

The fence is part of the contract, not of the caller: an offload reads what the forward had written when `offload` was
called, and a restore overwrites nothing that a forward in flight still touches. Between the start and `done()`, the
caller keeps both sides to itself: device pages locked, slots leased, and the destinations of one batch distinct.

Starts, `quiesce` and `close` come from one thread (the scheduler's). Handles may be polled from any thread.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from transfer.errors import LayoutError
from transfer.layout import PageLayout

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class DevicePool:
    """SGLang's KV buffers, one tensor a layer; `v` is empty for MLA. Holds the tensors, owns no memory.

    With token rows `k[i]` is `(rows, heads, head_dim)` and page p is rows `p * page_size .. (p + 1) * page_size`;
    with `rows_are_pages` it is `(pages, heads, page_size, head_dim)`. Both ways a page of K is one contiguous range.
    """

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    rows_are_pages: bool
    page_size: int

    @property
    def n_pages(self) -> int:
        rows = int(self.k[0].shape[0])
        return rows if self.rows_are_pages else rows // self.page_size

    def k_pages(self, layer: int) -> torch.Tensor:
        """One layer's K as raw bytes, uint8 `(n_pages, k_nbytes)`, sharing the pool's memory."""
        return self._pages(self.k[layer])

    def v_pages(self, layer: int) -> torch.Tensor:
        return self._pages(self.v[layer])

    def check(self, layout: PageLayout) -> None:
        """Raises `LayoutError` unless every buffer has the shape, dtype and density that `layout` implies."""
        is_mla = layout.order == "MLA"
        if self.page_size != layout.page_size or self.rows_are_pages != (layout.order == "HND"):
            raise LayoutError(f"A pool of {self.page_size}-token pages does not match {layout.describe()}.")
        if len(self.k) != layout.n_layers or len(self.v) != (0 if is_mla else layout.n_layers):
            raise LayoutError(f"A pool of {len(self.k)} K and {len(self.v)} V layers does not match the layout's.")
        for buffers, dim in ((self.k, layout.head_dim), (self.v, layout.v_head_dim)):
            block = (layout.n_heads, layout.page_size, dim) if self.rows_are_pages else (layout.n_heads, dim)
            for buffer in buffers:
                if tuple(buffer.shape[1:]) != block or buffer.shape[0] != self.k[0].shape[0]:
                    raise LayoutError(f"A buffer of {tuple(buffer.shape)} does not match rows of {block}.")
                if buffer.dtype != layout.dtype or not buffer.is_contiguous():
                    raise LayoutError(f"A buffer must be contiguous {layout.dtype}, not {buffer.dtype}.")

    def _pages(self, buffer: torch.Tensor) -> torch.Tensor:
        span = 1 if self.rows_are_pages else self.page_size
        return buffer[: self.n_pages * span].view(torch.uint8).view(self.n_pages, -1)


class Copy(Protocol):
    """One batch under way."""

    @property
    def failed(self) -> BaseException | None:
        """Why the batch did not complete. Meaningful once `done()`; None for a batch that succeeded."""

    def done(self) -> bool:
        """True when no byte of the batch is read or written any more. Never blocks, takes no lock."""

    def wait(self) -> None:
        """Blocks until `done()`. Raises `CopyError`, chained to `failed`, for a batch that failed."""


class LayerwiseCopy(Copy, Protocol):
    """A restore under way: layers arrive in order, 0 first."""

    def wait_layer(self, layer: int) -> None:
        """Returns when the forward may read layers `0 .. layer` (inclusive) of the batch.

        On the CPU it blocks the calling thread, with the GIL released, until the bytes are there. On CUDA it does not
        block: the current stream waits for the layer's event. Raises `CopyError` when the layer will not arrive.
        """


class Copies(Protocol):
    """Starts copies of whole pages between one device pool and one slab. See the module for threads and ownership."""

    def offload(self, pages: Int64Array, slots: Int32Array) -> Copy:
        """Copies device page `pages[j]`, all layers, to slot `slots[j]`. Returns at once; empty is legal.

        The arrays are copied. Raises ValueError for an index out of bounds or arrays that do not match,
        `CopyError` after `close`.
        """

    def restore(self, pages: Int64Array, slots: Int32Array) -> LayerwiseCopy:
        """Copies slot `slots[j]` to device page `pages[j]`, layer by layer. Otherwise as `offload`."""

    def quiesce(self) -> None:
        """Blocks until every batch started so far is done. Failed batches count as done."""

    def close(self) -> None:
        """Completes what is queued, then stops. Idempotent. Afterwards neither pool nor slab is touched."""


def checked_batch(pages: Int64Array, slots: Int32Array, *, n_pages: int, n_slots: int) -> tuple[Int64Array, Int64Array]:
    """Private copies of a batch's arrays. Raises ValueError unless they match in length and lie in bounds."""
    if pages.ndim != 1 or pages.shape != slots.shape:
        raise ValueError(f"Pages {pages.shape} and slots {slots.shape} must be 1-D and of the same length.")
    for name, numbers, end in (("Page", pages, n_pages), ("Slot", slots, n_slots)):
        if not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"{name} numbers must be integers, not {numbers.dtype}.")
        outside = (numbers < 0) | (numbers >= end)
        if outside.any():
            raise ValueError(f"{name} {numbers[outside][0]} is outside 0..{end}.")
    return pages.astype(np.int64), slots.astype(np.int64)
