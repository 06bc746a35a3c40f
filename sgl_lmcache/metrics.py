"""Prometheus metrics of the tiers below host memory, in SGLang's own `/metrics`. docs/metrics.md lists them.

A tier counts for itself (`Tier.stats`), on any thread. The scheduler thread carries the counts over now and then, so
that nothing here is called where pages move. SGLang's scheduler processes share a folder of metric files, and counters
of several ranks are summed by SGLang's endpoint.

`prometheus_client` looks for that folder when it is imported; SGLang names it before it starts its schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hicache import SpillStats, Tier

PERIOD_S = 2.0
"""How often the counts are carried over."""


@dataclass(frozen=True)
class Metric:
    """A counter, and the counts of a tier that it is made of: by the value of its second label, or by an empty one."""

    name: str
    help: str
    stats: Mapping[str, str]
    label: str = ""


SKIPPED = Metric(
    "sgl_lmcache_skipped_pages",
    "Pages not written to the tier, by why.",
    {"pressure": "skipped_pressure", "full": "skipped_full", "no_parent": "orphans"},
    label="reason",
)
COUNTERS = (
    Metric("sgl_lmcache_loaded_pages", "Pages read from the tier, verified.", {"": "loaded"}),
    Metric("sgl_lmcache_stored_pages", "Pages written to the tier.", {"": "stored"}),
    Metric("sgl_lmcache_evicted_pages", "Pages that left the tier to make room.", {"": "evicted"}),
    Metric("sgl_lmcache_corrupt_pages", "Pages found damaged when they were read, and dropped.", {"": "corrupt"}),
    SKIPPED,
    Metric(
        "sgl_lmcache_tier_errors",
        "Operations that the tier's store refused, by what they were.",
        {"read": "read_errors", "write": "write_errors", "map": "map_errors"},
        label="operation",
    ),
    Metric("sgl_lmcache_read_bytes", "Bytes read from the tier's store.", {"": "read_nbytes"}),
    Metric("sgl_lmcache_written_bytes", "Bytes written to the tier's store.", {"": "written_nbytes"}),
)

GAUGES = {
    "sgl_lmcache_tier_available": "1 while the tier is used, 0 while its store is given up; the least of all ranks.",
    "sgl_lmcache_tier_used_bytes": "Bytes that the tier's pages take, of all ranks.",
    "sgl_lmcache_tier_limit_bytes": "Bytes that they may take, of all ranks.",
    "sgl_lmcache_tier_bad_slots": "Places that the tier's disk refused, and that are used no more, of all ranks.",
}


class GivenTier(Protocol):
    """A tier, and what the engine has given to it."""

    tier: Tier
    stats: SpillStats


@dataclass
class _Published:
    """What has been carried over of one tier. `counts`: of the store that it has now, by metric and label."""

    tier: Tier
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    n_skipped: int = 0


@dataclass
class TierMetrics:
    """Carries the tiers' counts over. One for a process: names are registered once. clock: monotonic seconds."""

    clock: Callable[[], float]
    _due_s: float = 0.0
    _published: dict[str, _Published] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self._counters = {
            metric.name: Counter(metric.name, metric.help, ["tier", *filter(None, [metric.label])])
            for metric in COUNTERS
        }
        self._gauges = {
            name: Gauge(name, text, ["tier"], multiprocess_mode="livemin" if name.endswith("available") else "livesum")
            for name, text in GAUGES.items()
        }

    def publish(self, given: Sequence[GivenTier], *, now: bool = False) -> None:
        """Once an iteration: does something every `PERIOD_S`, or `now`. Never blocks.

        Pages that the engine did not even offer to a tier were skipped, too.
        """
        now_s = self.clock()
        if now_s < self._due_s and not now:
            return
        self._due_s = now_s + PERIOD_S
        for one in given:
            self._publish(one.tier, one.stats)

    def _publish(self, tier: Tier, spills: SpillStats) -> None:
        stats, name = tier.stats(), tier.name
        published = self._published.setdefault(name, _Published(tier))
        if tier is not published.tier:  # another store counts from 0
            published.tier = tier
            published.counts.clear()
        for metric in COUNTERS:
            for label, stat in metric.stats.items():
                self._carry_over(metric, name, label, stats.get(stat, 0))
        self._counters[SKIPPED.name].labels(name, "pressure").inc(spills.skipped - published.n_skipped)
        published.n_skipped = spills.skipped
        capacity = tier.capacity()
        self._gauges["sgl_lmcache_tier_available"].labels(name).set(tier.health().available)
        self._gauges["sgl_lmcache_tier_used_bytes"].labels(name).set(capacity.used_nbytes)
        self._gauges["sgl_lmcache_tier_limit_bytes"].labels(name).set(capacity.limit_nbytes)
        self._gauges["sgl_lmcache_tier_bad_slots"].labels(name).set(stats.get("n_bad_slots", 0))

    def _carry_over(self, metric: Metric, tier: str, label: str, count: int) -> None:
        published = self._published[tier].counts
        new = count - published.get((metric.name, label), 0)
        published[metric.name, label] = count
        self._counters[metric.name].labels(tier, *filter(None, [label])).inc(max(0, new))
