#!/usr/bin/env python3
"""What each of our calls costs SGLang's scheduler thread, at 2,048 pages a call.

    python scripts/benchmarks/calls.py [--pages 2048] [--rounds 9] [--ssd] [--json]

No server and no forward: SGLang's real tree, allocator and pool, driven in the scheduler's order through requests of
`--pages` pages that are cold, found in HBM, and found in host memory; with `--ssd` also on an SSD, to which all is
written, after everything above has been flushed. What a call spends inside SGLang (hashing a
prompt's pages, walking its tree) is measured on its own line and not part of ours. Microseconds; medians over the
rounds, and the worst. The target is 1,000 us a call.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgl_lmcache import cpu

if TYPE_CHECKING:
    from hicache import Tier
    from sgl_lmcache.namespace import Namespace
    from transfer.slab import Slab

TARGET_US = 1000.0


@dataclass(frozen=True)
class Cost:
    """One call: how often it was made, and its cost to the scheduler thread."""

    call: str
    calls: int
    median_us: float
    worst_us: float


class Stopwatch:
    """Times calls by name; a call's time is without that of calls inside it that have a name of their own."""

    def __init__(self) -> None:
        self.on = False
        self._inner_ns = [0]
        self._times_us: defaultdict[str, list[float]] = defaultdict(list)

    def watch(self, owner: type | Any, name: str, label: str | None = None) -> Any:
        """A patch that times `owner.name`."""
        original: Callable[..., Any] = getattr(owner, name)
        label = label or f"{owner.__name__}.{name}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner_ns.append(0)
            start_ns = time.perf_counter_ns()
            try:
                return original(*args, **kwargs)
            finally:
                elapsed_ns = time.perf_counter_ns() - start_ns
                own_ns = elapsed_ns - self._inner_ns.pop()
                self._inner_ns[-1] += elapsed_ns
                if self.on:
                    self._times_us[label].append(own_ns / 1000)

        return mock.patch.object(owner, name, timed)

    def costs(self) -> list[Cost]:
        return [
            Cost(label, len(times), round(statistics.median(times), 1), round(max(times), 1))
            for label, times in self._times_us.items()
        ]


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """Patch every entry point that SGLang's scheduler thread calls, and what they call of SGLang."""
    from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from sgl_lmcache.cache import TieredRadixCache
    from sgl_lmcache.linker import Linker
    from sgl_lmcache.wrapper import TieredLinkerWrapper

    stopwatch = Stopwatch()
    ours = {
        TieredLinkerWrapper: ("match", "_offload_node"),
        Linker: ("load", "start_layer_wise_loading", "finish_layer_wise_loading", "pop_write_back"),
        TieredRadixCache: (
            "prefetch_from_storage",
            "check_prefetch_progress",
            "check_hicache_events",
            "finish_external_linker_loads",
            "_evict_device_leaf",
            "on_release",
        ),
    }
    theirs = {
        UnifiedCacheLinkerWrapper: ("_tail_hashes",),
        UnifiedRadixCache: ("_evict_device_leaf", "inc_lock_ref"),
        RustUnifiedTreeCore: ("collect_path_info", "mark_external_linker_offload_pending"),
    }
    with ExitStack() as stack:
        for owner, names in ours.items():
            for name in names:
                stack.enter_context(stopwatch.watch(owner, name, name.lstrip("_")))
        for owner, names in theirs.items():
            for name in names:
                stack.enter_context(stopwatch.watch(owner, name, f"(SGLang) {name.lstrip('_')}"))
        yield stopwatch


def measure(n_pages: int, n_rounds: int, *, ssd: Path | None) -> list[Cost]:
    """Three prompts take turns in HBM that holds one of them: each round is a miss, a host hit and a device hit.

    ssd: an empty folder for a tier below, of which each round is a hit as well.
    """
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

    from hicache.ssd import SsdTier
    from tests.support.real_cache import RealCache, request

    page_size = 16
    rng = random.Random(1)
    n_tokens = n_pages * page_size + 1

    def open_tier(slab: Slab, namespace: Namespace) -> Tier:
        assert ssd is not None
        return SsdTier.open(
            ssd,
            namespace=namespace.digest,
            member=(0, 1),
            page_nbytes=slab.slot_nbytes,
            slab=slab.array,
            limit_nbytes=(n_rounds + 8) * n_pages * 2 * slab.slot_nbytes + (64 << 20),
            server="benchmark",
        )

    real = RealCache(
        n_pages + n_pages // 8,
        5 * n_pages,
        page_size=page_size,
        max_len=n_tokens + page_size,
        open_tiers=() if ssd is None else [(open_tier, "through")],
        batch_pages=128,
    )

    def serve(rid: str, prompt: list[int]) -> None:
        req = request(rid, prompt)
        real.arrive(req)
        real.iterate()
        while not real.cache.check_prefetch_progress(CacheRequestHandle(rid, 0)):
            real.iterate()
        assert real.admit(req) is not None
        real.settle()
        while real.engine.is_pending:
            real.iterate()

    def flush() -> None:
        real.cache.reset()
        real.req_to_token_pool.clear()
        real.allocator.clear()

    with watched() as stopwatch, mock.patch.multiple(real, _forward=lambda *_: None, _check_bytes=lambda *_: None):
        prompts = [[rng.randrange(100_000) for _ in range(n_tokens)] for _ in range(n_rounds + 3)]
        for number in range(n_rounds + 2):
            stopwatch.on = number >= 2
            serve(f"{number} cold", prompts[number + 1])
            serve(f"{number} device", prompts[number + 1])
            serve(f"{number} host", prompts[number])
            if ssd is not None:
                flush()
                serve(f"{number} ssd", prompts[number])
                serve(f"{number} again", prompts[number + 1])
    assert real.engine.stats.fetched >= (n_rounds * n_pages if ssd else 0)
    assert real.engine.stats.restored >= n_rounds * n_pages
    real.close()
    return stopwatch.costs()


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of our calls on SGLang's scheduler thread.")
    parser.add_argument("--pages", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ssd", action="store_true", help="with an SSD tier, in a temporary folder of this one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not cpu.has_gpu():
        cpu.enable()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        costs = measure(arguments.pages, arguments.rounds, ssd=Path(folder).resolve() if arguments.ssd else None)
    if arguments.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
        return 0
    print(f"{'call':34}{'calls':>7}{'median us':>12}{'worst us':>12}   ({arguments.pages:,} pages a request)")
    for cost in costs:
        over = "  above the target" if cost.median_us > TARGET_US and not cost.call.startswith("(") else ""
        print(f"{cost.call:34}{cost.calls:>7}{cost.median_us:>12,.1f}{cost.worst_us:>12,.1f}{over}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
