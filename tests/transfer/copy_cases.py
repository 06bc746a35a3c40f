"""Layouts, pools and oracles that the copy tests share. The oracles slice bytes by hand."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from transfer.copies import DevicePool
from transfer.layout import PageLayout
from transfer.slab import Slab

Bytes = npt.NDArray[np.uint8]

LAYOUTS = {
    "packed NHD": PageLayout(2, 16, 2, 32, 32, torch.bfloat16, "NHD"),
    "padded NHD": PageLayout(3, 5, 3, 7, 7, torch.bfloat16, "NHD"),
    "HND": PageLayout(3, 4, 2, 64, 64, torch.bfloat16, "HND"),
    "padded HND": PageLayout(2, 3, 5, 9, 9, torch.float32, "HND"),
    "MLA": PageLayout(4, 16, 1, 72, 0, torch.bfloat16, "MLA"),
    "fp8 stored as uint8": PageLayout(3, 16, 2, 33, 33, torch.uint8, "NHD"),
    "K wider than V": PageLayout(2, 8, 2, 192, 128, torch.bfloat16, "NHD"),
    "V wider than K, HND": PageLayout(2, 8, 2, 16, 24, torch.bfloat16, "HND"),
}


def random_pool(layout: PageLayout, n_pages: int, seed: int = 0) -> DevicePool:
    """A CPU pool of random bytes (NaNs among them: compare bytes, not numbers)."""
    random = np.random.default_rng(seed)

    def buffer(dim: int) -> torch.Tensor:
        shape: tuple[int, ...] = (n_pages * layout.page_size, layout.n_heads, dim)
        if layout.order == "HND":
            shape = (n_pages, layout.n_heads, layout.page_size, dim)
        nbytes = int(np.prod(shape)) * layout.dtype.itemsize
        raw = torch.from_numpy(random.integers(0, 256, nbytes, dtype=np.uint8))
        return raw.clone().view(layout.dtype).view(shape)

    k = tuple(buffer(layout.head_dim) for _ in range(layout.n_layers))
    v = () if layout.order == "MLA" else tuple(buffer(layout.v_head_dim) for _ in range(layout.n_layers))
    return DevicePool(k, v, rows_are_pages=layout.order == "HND", page_size=layout.page_size)


def random_slab(layout: PageLayout, n_slots: int, seed: int = 1) -> Slab:
    slab = Slab(n_slots, layout.slot_nbytes)
    slab.array[:] = np.random.default_rng(seed).integers(0, 256, slab.array.shape, dtype=np.uint8)
    return slab


def pool_bytes(pool: DevicePool) -> Bytes:
    """The pool as pages, `(n_pages, page_nbytes)`: a private copy, in the order that a slot has."""
    n_pages = pool.k[0].shape[0] // (1 if pool.rows_are_pages else pool.page_size)
    pages = []
    for page in range(n_pages):
        rows = (
            slice(page, page + 1) if pool.rows_are_pages else slice(page * pool.page_size, (page + 1) * pool.page_size)
        )
        pairs = zip(pool.k, pool.v, strict=True) if pool.v else ((k,) for k in pool.k)
        chunks = [tensor[rows].contiguous().view(torch.uint8).flatten() for pair in pairs for tensor in pair]
        pages.append(torch.cat(chunks).numpy())
    return np.stack(pages)


@dataclass(frozen=True)
class Batch:
    pages: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int32]


def random_batch(n: int, *, n_pages: int, n_slots: int, seed: int = 2) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(random.permutation(n_pages)[:n].astype(np.int64), random.permutation(n_slots)[:n].astype(np.int32))
