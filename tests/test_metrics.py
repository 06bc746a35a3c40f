"""Our Prometheus metrics: what is published, and that the page lists exactly these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import prometheus_client
import pytest

from hicache import SpillStats, Tier
from hicache.ssd import Counters
from sgl_lmcache.metrics import COUNTERS, GAUGES, PERIOD_S, TierMetrics
from tests.support.clock import Clock
from tests.support.tiers import MemoryTier

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"


class CountingTier(MemoryTier):
    """Counts what a test says."""

    counts: Mapping[str, int] = {}
    named = "memory"

    @property
    def name(self) -> str:
        return self.named

    def stats(self) -> Mapping[str, int]:
        return self.counts


@dataclass
class Given:
    """What the engine says of a tier."""

    tier: Tier
    stats: SpillStats = field(default_factory=SpillStats)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Iterator[TierMetrics]:
    """Names are registered once in a process, so they are taken back."""
    registry = prometheus_client.REGISTRY
    before = set(registry._collector_to_names)
    yield TierMetrics(clock)
    for collector in set(registry._collector_to_names) - before:
        registry.unregister(collector)


def value(name: str, *, tier: str = "memory", **labels: str) -> float | None:
    found: float | None = prometheus_client.REGISTRY.get_sample_value(name, {"tier": tier, **labels})
    return found


def tier(named: str = "memory", **counts: int) -> CountingTier:
    tier = CountingTier(np.zeros((4, 4096), np.uint8), 4)
    tier.named, tier.counts = named, counts
    return tier


def test_counts_are_carried_over_every_now_and_then(metrics: TierMetrics, clock: Clock) -> None:
    one = tier(loaded=3, corrupt=1, orphans=2, read_errors=5)
    clock.now_s = 100.0
    given = Given(one, SpillStats(skipped=4))
    metrics.publish([given])
    assert value("sgl_lmcache_skipped_pages_total", reason="pressure") == 4
    assert value("sgl_lmcache_loaded_pages_total") == 3
    assert value("sgl_lmcache_corrupt_pages_total") == 1
    assert value("sgl_lmcache_skipped_pages_total", reason="no_parent") == 2
    assert value("sgl_lmcache_tier_errors_total", operation="read") == 5
    one.counts = {**one.counts, "loaded": 10}
    metrics.publish([given])
    assert value("sgl_lmcache_loaded_pages_total") == 3, "not in each iteration"
    clock.now_s += PERIOD_S
    given.stats.skipped = 5
    metrics.publish([given])
    assert value("sgl_lmcache_loaded_pages_total") == 10
    assert value("sgl_lmcache_skipped_pages_total", reason="pressure") == 5


def test_each_tier_counts_for_itself(metrics: TierMetrics, clock: Clock) -> None:
    clock.now_s = 100.0
    first, second = (Given(tier(name, loaded=3), SpillStats(skipped=2)) for name in ("first", "second"))
    metrics.publish([first, second])
    second.tier = tier("second", loaded=1)  # new weights
    second.stats.skipped = 7
    metrics.publish([first, second], now=True)
    seen = [value("sgl_lmcache_loaded_pages_total", tier=name) for name in ("first", "second")]
    assert seen == [3, 4]
    seen = [value("sgl_lmcache_skipped_pages_total", tier=name, reason="pressure") for name in ("first", "second")]
    assert seen == [2, 7]


def test_another_tier_counts_on(metrics: TierMetrics, clock: Clock) -> None:
    """New weights bring a store of their own, whose counts begin at 0."""
    clock.now_s = 100.0
    old = tier(stored=3)
    metrics.publish([Given(old)])
    old.counts = {"stored": 7}
    metrics.publish([Given(old)], now=True)
    clock.now_s += PERIOD_S
    metrics.publish([Given(tier(stored=2))])
    assert value("sgl_lmcache_stored_pages_total") == 9


def test_a_tier_that_is_given_up_is_seen(metrics: TierMetrics, clock: Clock) -> None:
    one = tier()
    clock.now_s = 100.0
    metrics.publish([Given(one)])
    assert value("sgl_lmcache_tier_available") == 1
    assert value("sgl_lmcache_tier_limit_bytes") == 4 * 4096
    one.close()
    clock.now_s += PERIOD_S
    metrics.publish([Given(one)])
    assert value("sgl_lmcache_tier_available") == 0


def test_every_count_that_is_published_is_one_of_the_ssd_tier() -> None:
    known = set(Counters.__dataclass_fields__)
    for metric in COUNTERS:
        assert set(metric.stats.values()) <= known


def test_the_page_lists_every_metric_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(sgl_lmcache_\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {f"{metric.name}_total" for metric in COUNTERS} | set(GAUGES)
