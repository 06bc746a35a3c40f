"""Our host memory in SGLang's gauges of HiCache's; that they are published is seen on a server (test_metrics)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.observability.metrics_collector import SchedulerStats

from sgl_lmcache import BACKEND
from sgl_lmcache.hicache_gauges import after_hicache_stats, before_collector
from tests.support.real_cache import RealCache, request

PAGE = 16
N_SLOTS = 40


@pytest.fixture
def real() -> Iterator[RealCache]:
    cache = RealCache(n_device_pages=24, n_slots=N_SLOTS, page_size=PAGE)
    yield cache
    cache.close()


def reporter(tree_cache: object) -> Any:
    return SimpleNamespace(scheduler=SimpleNamespace(tree_cache=tree_cache), stats=SchedulerStats())


def gauges(tree_cache: object) -> tuple[int, int]:
    """Used, total."""
    asked = reporter(tree_cache)
    after_hicache_stats(None, asked)
    return asked.stats.hicache_host_used_tokens, asked.stats.hicache_host_total_tokens


def test_the_gauges_say_what_host_memory_holds_in_tokens(real: RealCache) -> None:
    assert gauges(real.cache) == (0, N_SLOTS * PAGE)
    prompt = list(range(100, 100 + 10 * PAGE + 5))
    asked = request("r", prompt)
    real.arrive(asked)
    real.iterate()
    real.admit(asked)
    real.settle()
    assert real.engine.host.n_resident == 10
    assert gauges(real.cache) == (10 * PAGE, N_SLOTS * PAGE)
    real.cache.reset()
    real.allocator.clear()
    assert gauges(real.cache) == (0, N_SLOTS * PAGE)


def test_another_cache_is_left_alone() -> None:
    assert gauges(object()) == (0, 0)


@pytest.mark.parametrize(
    ("backend", "is_disabled", "has_gauges"), [(BACKEND, False, True), (BACKEND, True, False), (None, False, False)]
)
def test_only_with_our_cache_the_collector_has_the_gauges(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, is_disabled: bool, has_gauges: bool
) -> None:
    memory = SimpleNamespace(radix_cache_backend=backend, disable_radix_cache=is_disabled)
    monkeypatch.setattr(runtime_context, "get_memory", lambda: memory)
    given = {"server_args": None, "enable_lora": False, "enable_hierarchical_cache": False}
    changed = before_collector("the class", **given)
    assert changed == ((("the class",), given | {"enable_hierarchical_cache": True}) if has_gauges else None)
