"""How long our entry points keep SGLang's scheduler thread: for a benchmark, switched on by its own variable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

ENTRY_POINTS = (
    "wrapper.TieredLinkerWrapper.match",
    "wrapper.TieredLinkerWrapper._offload_node",
    "cache.TieredRadixCache.prefetch_from_storage",
    "cache.TieredRadixCache.check_prefetch_progress",
    "cache.TieredRadixCache.check_hicache_events",
    "cache.TieredRadixCache.on_release",
    "cache.TieredRadixCache._evict_device_leaf",
    "linker.Linker.load",
    "linker.Linker.start_layer_wise_loading",
    "linker.Linker.finish_layer_wise_loading",
)


@dataclass
class _Calls:
    count: int = 0
    total_ns: int = 0
    max_ns: int = 0


_calls: dict[str, _Calls] = {}


def register_hooks() -> None:
    for target in ENTRY_POINTS:
        name = target.rpartition(".")[2]
        calls = _calls.setdefault(name, _Calls())
        HookRegistry.register(f"sgl_lmcache.{target}", partial(_around, calls), HookType.AROUND)


def measured() -> dict[str, dict[str, int]]:
    """By the method's name: calls, and nanoseconds in all and at most. Empty when switched off."""
    return {name: vars(calls) for name, calls in _calls.items()}


def _around(calls: _Calls, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    start_ns = time.perf_counter_ns()
    try:
        return original(*args, **kwargs)
    finally:
        elapsed_ns = time.perf_counter_ns() - start_ns
        calls.count += 1
        calls.total_ns += elapsed_ns
        calls.max_ns = max(calls.max_ns, elapsed_ns)
