"""How long the turns of SGLang's scheduler loop take, and, switched on by a variable, how long our calls in them."""

from __future__ import annotations

import time
from collections import deque
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
    "ranks.GroupRanks.minimum",
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


class Gaps:
    """From one turn of the loop to the next, of turns in which a batch was run."""

    def __init__(self) -> None:
        self._last_ns: int | None = None
        self._gaps_ns: deque[int] = deque(maxlen=10_000)

    def iterated(self, *, is_busy: bool) -> None:
        now_ns = time.perf_counter_ns()
        if is_busy and self._last_ns is not None:
            self._gaps_ns.append(now_ns - self._last_ns)
        self._last_ns = now_ns

    def take(self) -> dict[str, int]:
        """Of all turns since the last time, 10,000 at most."""
        gaps_ns = sorted(self._gaps_ns)
        self._gaps_ns.clear()
        if not gaps_ns:
            return {"n": 0, "median_ns": 0, "p99_ns": 0, "max_ns": 0}
        n = len(gaps_ns)
        return {"n": n, "median_ns": gaps_ns[n // 2], "p99_ns": gaps_ns[n * 99 // 100], "max_ns": gaps_ns[-1]}


def _around(calls: _Calls, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    start_ns = time.perf_counter_ns()
    try:
        return original(*args, **kwargs)
    finally:
        elapsed_ns = time.perf_counter_ns() - start_ns
        calls.count += 1
        calls.total_ns += elapsed_ns
        calls.max_ns = max(calls.max_ns, elapsed_ns)
