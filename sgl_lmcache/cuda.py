"""The copy functions of a CUDA device, from the kernels that SGLang ships for its `page_unified` host layout.

A slab whose slots are exactly pages is that layout with one head group, so the kernels read and write it in place.
Everything else (padded slots, HND pools, K and V of different sizes, rows that are no multiple of 16 bytes) goes
through `StridedOps`. The kernels are compiled at their first use, with nvcc.

This has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from transfer.copies import DevicePool
from transfer.cuda import STAGING_NBYTES, CudaCopies, DeviceOps, StridedOps
from transfer.layout import PageLayout
from transfer.slab import Slab

ROW_ALIGNMENT_NBYTES = 16
"""The kernels move a token's row in units of this."""


def cuda_copies(pool: DevicePool, layout: PageLayout, slab: Slab, *, forward_stream: torch.cuda.Stream) -> CudaCopies:
    """Copies by SGLang's kernels where they take this layout, by strided copies otherwise."""
    ops: DeviceOps = KernelOps(pool, layout) if kernels_take(layout) else StridedOps(layout)
    return CudaCopies(pool, layout, slab, ops=ops, forward_stream=forward_stream)


def kernels_take(layout: PageLayout) -> bool:
    """Whether SGLang's `page_unified` kernels move pages of this layout."""
    row_nbytes = layout.k_nbytes // layout.page_size
    return (
        layout.is_packed
        and layout.order in ("NHD", "MLA")
        and (layout.order == "MLA" or layout.head_dim == layout.v_head_dim)
        and row_nbytes % ROW_ALIGNMENT_NBYTES == 0
    )


class KernelOps:
    """`DeviceOps` by SGLang's kernels. Enqueues on the current stream; one staging buffer, used in stream order."""

    def __init__(self, pool: DevicePool, layout: PageLayout) -> None:
        device = pool.k[0].device
        self._layout = layout
        self._k_pointers = _pointers(pool.k, device)
        self._v_pointers = _pointers(pool.v, device)
        n_staged = max(1, STAGING_NBYTES // layout.page_nbytes)
        self._staging = torch.empty((n_staged, layout.slot_nbytes), dtype=torch.uint8, device=device)

    def offload(self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor) -> None:
        from sglang.kernels.ops.kvcache import hicache as kernels

        device_pages = pages.to(self._staging.device, non_blocking=True)
        staging, target = self._pages(self._staging), self._pages(slab)
        if self._layout.order == "MLA":
            kernels.transfer_hicache_all_layer_mla_staged_lf_page_unified(
                self._k_pointers, device_pages, slots, staging, target
            )
        else:
            kernels.transfer_hicache_all_layer_staged_lf_page_unified(
                self._k_pointers, self._v_pointers, device_pages, slots, staging, target
            )

    def restore_layers(
        self, pool: DevicePool, pages: torch.Tensor, slots: torch.Tensor, slab: torch.Tensor
    ) -> Iterator[int]:
        from sglang.kernels.ops.kvcache import hicache as kernels

        source_rows, target_rows = self._rows(slots), self._rows(pages)
        source = self._pages(slab)
        for layer in range(self._layout.n_layers):
            if self._layout.order == "MLA":
                kernels.transfer_hicache_one_layer_mla_page_unified_lf(
                    pool.k[layer], source, source_rows, target_rows, layer
                )
            else:
                kernels.transfer_hicache_one_layer_page_unified_lf(
                    pool.k[layer], pool.v[layer], source, source_rows, target_rows, layer
                )
            yield layer

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots as kernel pages: `(page, 1, layer, 2, page_size, heads, dim)`, MLA `(page, layer, page_size, dim)`."""
        view = self._layout.view(slots)
        return view if self._layout.order == "MLA" else view.unsqueeze(1)

    def _rows(self, pages: torch.Tensor) -> torch.Tensor:
        """Page numbers -> the token rows of those pages, on the device."""
        page_size = self._layout.page_size
        rows = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
        return rows.to(self._staging.device, non_blocking=True)


def _pointers(buffers: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    """uint64[n_layers] on the device: where each layer's buffer begins."""
    return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64, device=device)
