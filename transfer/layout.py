"""The bytes of one page of KV below HBM.

A page is the KV of `page_size` consecutive tokens, all layers, one rank, as one contiguous range:

    NHD   [layer, 2 (K, V), page_size, heads, head_dim]     token-major, SGLang's usual device pool
    HND   [layer, 2 (K, V), heads, page_size, head_dim]     head-major, a device pool whose rows are pages
    MLA   [layer, page_size, dim]                           one latent row a token, no V

The invariant: each layer of a page is exactly FlashInfer's paged block. So `view(slab)[:, layer]` is a FlashInfer
paged KV cache that shares the slab's memory, and one layer of one page is two plain copies (one for MLA), whatever
the order: K and V of a page are contiguous on both sides.

A slot is a page rounded up to 4096 bytes, so that direct I/O and RDMA may address it. Where nothing is rounded the
slab is one dense tensor, which SGLang's kernels demand; otherwise the view is strided and copies go chunk by chunk.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from transfer.errors import LayoutError

Order = Literal["NHD", "HND", "MLA"]

SLOT_ALIGNMENT_NBYTES = 4096
"""Slots start at multiples of this: the block of direct I/O, and a memory page."""


@dataclass(frozen=True)
class PageLayout:
    """Sizes and order of one page. Raises `LayoutError` for sizes that describe no page.

    `n_heads` counts this rank's KV heads. `dtype` is what the device pool stores (SGLang keeps fp8 as uint8).
    MLA has one head, `head_dim` is the whole latent row, and `v_head_dim` is 0.
    """

    n_layers: int
    page_size: int
    n_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    order: Order

    def __post_init__(self) -> None:
        for name in ("n_layers", "page_size", "n_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.order not in get_args(Order):
            raise LayoutError(f"order must be one of {', '.join(get_args(Order))}, not {self.order!r}.")
        if self.order == "MLA" and (self.n_heads != 1 or self.v_head_dim != 0):
            raise LayoutError("An MLA page has n_heads 1 and v_head_dim 0: one latent row a token holds K and V.")
        if self.order != "MLA" and self.v_head_dim < 1:
            raise LayoutError(f"v_head_dim must be at least 1, not {self.v_head_dim}.")

    @property
    def k_nbytes(self) -> int:
        """Bytes of K in one layer of one page; for MLA, of the latent rows."""
        return self.page_size * self.n_heads * self.head_dim * int(self.dtype.itemsize)

    @property
    def v_nbytes(self) -> int:
        """Bytes of V in one layer of one page; 0 for MLA."""
        return self.page_size * self.n_heads * self.v_head_dim * int(self.dtype.itemsize)

    @property
    def layer_nbytes(self) -> int:
        return self.k_nbytes + self.v_nbytes

    @property
    def page_nbytes(self) -> int:
        """The payload: what is stored, checksummed and sent."""
        return self.n_layers * self.layer_nbytes

    @property
    def slot_nbytes(self) -> int:
        """The payload rounded up to `SLOT_ALIGNMENT_NBYTES`. The padding's content is undefined."""
        return -(-self.page_nbytes // SLOT_ALIGNMENT_NBYTES) * SLOT_ALIGNMENT_NBYTES

    @property
    def is_packed(self) -> bool:
        """True when slots have no padding, so that the slab is one dense tensor of pages."""
        return self.slot_nbytes == self.page_nbytes

    def view(self, slab: torch.Tensor) -> torch.Tensor:
        """The slab's pages as one typed tensor that shares its memory.

        `slab` is uint8, `(n_slots, slot_nbytes)`. Returns `[slot, layer, 2, page_size, heads, head_dim]` (NHD),
        `[slot, layer, 2, heads, page_size, head_dim]` (HND) or `[slot, layer, page_size, head_dim]` (MLA); contiguous
        when `is_packed`. The result keeps the slab's memory alive. Raises `LayoutError` when K and V differ in size:
        no single tensor describes both, use `k_view` and `v_view`.
        """
        if self.order == "MLA":
            return self.k_view(slab)
        if self.head_dim != self.v_head_dim:
            raise LayoutError(
                f"K (head_dim {self.head_dim}) and V (v_head_dim {self.v_head_dim}) differ: no tensor holds both."
            )
        block = self._block(self.head_dim)
        return self._strided(slab, (2, *block), first=0)

    def k_view(self, slab: torch.Tensor) -> torch.Tensor:
        """K of every page, as `view` without its K/V axis; for MLA, the latent rows."""
        if self.order == "MLA":
            return self._strided(slab, (self.page_size, self.head_dim), first=0)
        return self._strided(slab, self._block(self.head_dim), first=0)

    def v_view(self, slab: torch.Tensor) -> torch.Tensor:
        """V of every page, as `view` without its K/V axis. Raises `LayoutError` for MLA, which has no V."""
        if self.order == "MLA":
            raise LayoutError("An MLA page has no V.")
        return self._strided(slab, self._block(self.v_head_dim), first=self.k_nbytes)

    def describe(self) -> str:
        """A stable string that differs whenever the bytes of a page would; for digests and messages."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"layers={self.n_layers},page={self.page_size},heads={self.n_heads}"
        return f"{self.order}/{sizes},dim={self.head_dim},v_dim={self.v_head_dim}/{dtype}"

    def _block(self, dim: int) -> tuple[int, int, int]:
        if self.order == "HND":
            return (self.n_heads, self.page_size, dim)
        return (self.page_size, self.n_heads, dim)

    def _strided(self, slab: torch.Tensor, block: tuple[int, ...], first: int) -> torch.Tensor:
        """`[slot, layer, *block]`, where a layer's block is dense and starts `first` bytes into its layer."""
        if slab.dtype != torch.uint8 or slab.ndim != 2 or slab.shape[1] != self.slot_nbytes:
            raise LayoutError(
                f"Expected a uint8 slab of (n_slots, {self.slot_nbytes}), not {slab.dtype} of {tuple(slab.shape)}."
            )
        itemsize = self.dtype.itemsize
        typed = slab.view(self.dtype)
        strides = [self.slot_nbytes // itemsize, self.layer_nbytes // itemsize]
        dense = [1]
        for size in reversed(block[1:]):
            dense.insert(0, dense[0] * size)
        offset = typed.storage_offset() + first // itemsize
        return typed.as_strided((slab.shape[0], self.n_layers, *block), (*strides, *dense), offset)
