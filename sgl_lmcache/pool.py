"""From SGLang's KV pool to the plain description that the copies take.

The one place that knows SGLang's pool classes. A pool is taken by its exact class: a subclass may lay the same names
out differently (FP4, page-major, HiSparse), and a wrong guess here would be wrong KV.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from sgl_lmcache.errors import RefusedError
from transfer.copies import DevicePool
from transfer.layout import PageLayout


def describe_pool(pool: Any, page_size: int) -> tuple[DevicePool, PageLayout]:
    """The pool's buffers and the layout of one of its pages. Raises `RefusedError` for a pool we do not know."""
    if type(pool) is MHATokenToKVPool and pool.kv_cache_layout in ("nhd", "hnd"):
        device_pool, layout = _describe_mha(pool, page_size)
    elif type(pool) is MLATokenToKVPool:
        device_pool, layout = _describe_mla(pool, page_size)
    else:
        kind = f"{type(pool).__name__} (layout {getattr(pool, 'kv_cache_layout', 'unknown')})"
        raise RefusedError(f"this model keeps its KV in a {kind}, and only plain MHA, GQA and MLA pools are supported")
    device_pool.check(layout)
    return device_pool, layout


def _describe_mha(pool: MHATokenToKVPool, page_size: int) -> tuple[DevicePool, PageLayout]:
    rows_are_pages = pool.kv_cache_layout == "hnd"
    device_pool = DevicePool(tuple(pool.k_buffer), tuple(pool.v_buffer), rows_are_pages, page_size)
    layout = PageLayout(
        n_layers=pool.layer_num,
        page_size=page_size,
        n_heads=pool.head_num,
        head_dim=pool.head_dim,
        v_head_dim=pool.v_head_dim,
        dtype=pool.store_dtype,
        order="HND" if rows_are_pages else "NHD",
    )
    return device_pool, layout


def _describe_mla(pool: MLATokenToKVPool, page_size: int) -> tuple[DevicePool, PageLayout]:
    device_pool = DevicePool(tuple(pool.kv_buffer), (), rows_are_pages=False, page_size=page_size)
    layout = PageLayout(
        n_layers=pool.layer_num,
        page_size=page_size,
        n_heads=1,
        head_dim=pool.kv_cache_dim,
        v_head_dim=0,
        dtype=pool.store_dtype,
        order="MLA",
    )
    return device_pool, layout
