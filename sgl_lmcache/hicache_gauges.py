"""SGLang's gauges of host memory, `sglang:hicache_host_used_tokens` and `..._total_tokens`, with our host tier in them.

Dashboards and autoscalers that know HiCache find them under the names and labels that they have there. SGLang makes
them only with `--enable-hierarchical-cache`, which stands for its own host memory and which we refuse. So its collector
alone is told that the flag is on: it does nothing else with it. It goes on publishing them when it publishes its
others, and what they say is filled in here each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_lmcache import BACKEND

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter


def register() -> None:
    """Put the hooks in place. They do nothing in a server whose cache is not ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.init_new",
        before_collector,
        HookType.BEFORE,
    )
    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter._log_hicache_stats",
        after_hicache_stats,
        HookType.AFTER,
    )


def before_collector(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The scheduler makes its collector: with the gauges. None: as it was asked for."""
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if memory.radix_cache_backend != BACKEND or memory.disable_radix_cache:
        return None
    return args, kwargs | {"enable_hierarchical_cache": True}


def after_hicache_stats(_result: None, reporter: SchedulerMetricsReporter) -> None:
    """SGLang is about to publish. As with HiCache, room that is being filled counts as used."""
    from sgl_lmcache.cache import TieredRadixCache

    cache = reporter.scheduler.tree_cache
    if not isinstance(cache, TieredRadixCache) or cache.linker is None:
        return
    host = cache.linker.cache_linker.engine.host
    reporter.stats.hicache_host_used_tokens = (host.n_slots - host.n_free) * cache.page_size
    reporter.stats.hicache_host_total_tokens = host.n_slots * cache.page_size
