"""Our Prometheus metrics, in SGLang's own `/metrics`: what there is. docs/metrics.md lists them for users.

Whoever does something counts it in plain numbers, on its own thread: the engine (`hicache.stats`), the tiers
(`Tier.stats`), the hits and the calls of this package. The scheduler thread carries the numbers over now and then
(`readings`), so nothing of this is called where pages move. A counter is carried over as what has been added since the
last time; a histogram of pages likewise, bucket by bucket.

SGLang's scheduler processes share a folder of metric files, and its endpoint sums what they say. So each rank publishes
its own pages and bytes, and only the first rank of a replica what all of them see alike: requests, tokens, times.

`prometheus_client` looks for that folder when it is imported; SGLang names it before it starts its schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hicache import TIME_BOUNDS_S, Distribution
from sgl_lmcache.metrics_port import forget_the_dead

if TYPE_CHECKING:
    from prometheus_client import Histogram

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BYTES_PER_SECOND: Final = tuple(1e6 * 2**exponent for exponent in range(4, 18))
"""From 16 MB/s to 131 GB/s."""


@dataclass(frozen=True)
class Metric:
    """name: of a counter, without the `_total` that it is published with. bounds: of a histogram's buckets."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


def _metric(name: str, help_text: str, *labels: str, bounds: tuple[float, ...] = ()) -> Metric:
    return Metric(f"sgl_lmcache_{name}", help_text, labels, bounds)


COUNTERS: Final = (
    _metric("requests", "Requests whose prefill has begun."),
    _metric("hit_tokens", "Prompt tokens that were found, by tier.", "tier"),
    _metric("miss_tokens", "Prompt tokens that had to be computed."),
    _metric("saved_seconds", "Estimated seconds of prefill that hits have saved, loading not deducted.", "tier"),
    _metric("loaded_pages", "Pages read from the tier, verified.", "tier"),
    _metric("stored_pages", "Pages written to the tier.", "tier"),
    _metric("evicted_pages", "Pages that left the tier, by why.", "tier", "reason"),
    _metric("corrupt_pages", "Pages found damaged when they were read, and dropped.", "tier"),
    _metric("skipped_pages", "Pages not written to the tier, by why.", "tier", "reason"),
    _metric("tier_errors", "Operations that the tier's store refused, by what they were.", "tier", "operation"),
    _metric("read_bytes", "Bytes read from the tier's store.", "tier"),
    _metric("written_bytes", "Bytes written to the tier's store.", "tier"),
    _metric("fetch_decisions", "What was decided of what the tiers below host memory have of a prompt.", "decision"),
    _metric("fetch_missed_pages", "Pages that a tier said it had, and that none has brought."),
    _metric("expired_waits", "Times that a request waited its time in vain, by for what.", "waiting_for"),
    _metric("followed_prefills", "Times that a request began to wait for pages that another was computing."),
    _metric("unleased_requests", "Requests whose pages could not be kept while they waited."),
    _metric("flushes", "Times that HBM and host memory were emptied."),
    _metric("call_seconds", "Seconds that our calls have kept the scheduler, by call.", "call"),
    _metric("slow_calls", "Calls that have kept the scheduler for more than 5 ms.", "call"),
)

GAUGES: Final = (
    _metric(
        "tier_available", "1 while the tier is used, 0 while its store is given up; the least of all ranks.", "tier"
    ),
    _metric("tier_pages", "Pages on the tier.", "tier"),
    _metric("tier_used_bytes", "Bytes that the tier's pages take.", "tier"),
    _metric("tier_limit_bytes", "Bytes that they may take.", "tier"),
    _metric("tier_bad_slots", "Places that the tier's disk refused, and that are used no more.", "tier"),
    _metric("host_slots", "Places of a page in host memory, by what they are.", "state"),
    _metric("leased_pages", "Pages that cannot leave host memory because a request waits for them."),
    _metric("pinned_pages", "Pages that are pinned, in host memory or not."),
    _metric("quota_used_bytes", "Bytes of the tier that the pages of a quota's tenant take.", "tier", "group"),
    _metric("quota_limit_bytes", "Bytes that they may take.", "tier", "group"),
    _metric("write_back_pages", "Pages on their way from HBM to host memory."),
    _metric("fetch_pages", "Pages on their way from lower tiers to host memory."),
    _metric("spill_pages", "Pages on their way from host memory to the tier.", "tier"),
    _metric("fetches", "Fetches from lower tiers, by how far they are.", "state"),
    _metric("waiting_requests", "Requests that wait, by for what.", "waiting_for"),
)

HISTOGRAMS: Final = (
    _metric("restore_seconds", "How long a batch's restore from host memory took.", bounds=SECONDS),
    _metric("restore_bytes_per_second", "How fast it was.", bounds=BYTES_PER_SECOND),
    _metric("fetch_seconds", "How long a tier took to bring a request's pages.", "tier", bounds=SECONDS),
    _metric("fetch_bytes_per_second", "How fast it was.", "tier", bounds=BYTES_PER_SECOND),
    _metric("page_age_seconds", "How long evicted pages had been in host memory.", bounds=TIME_BOUNDS_S),
    _metric("page_idle_seconds", "How long nobody had asked for evicted pages.", bounds=TIME_BOUNDS_S),
    _metric("page_reuse_gap_seconds", "Of pages asked for: how long before it they last were.", bounds=TIME_BOUNDS_S),
)

FIRST_RANK_ONLY: Final = frozenset(
    f"sgl_lmcache_{name}"
    for name in (
        *("requests", "hit_tokens", "miss_tokens", "saved_seconds", "fetch_decisions", "expired_waits", "flushes"),
        *("followed_prefills", "unleased_requests", "fetches", "waiting_requests", "restore_seconds", "fetch_seconds"),
        *("restore_bytes_per_second", "fetch_bytes_per_second"),
        *("page_age_seconds", "page_idle_seconds", "page_reuse_gap_seconds"),
    )
)
"""Of what each rank would say alike, the first of a replica speaks for all."""

Labels = tuple[str, ...]
"""The values of a metric's labels, in their order."""


@dataclass
class Carried:
    """What has been carried over of one source's counts, which begin at 0 with it."""

    counts: dict[tuple[str, Labels], float] = field(default_factory=dict)
    buckets: dict[str, Distribution] = field(default_factory=dict)


class Registry:
    """All metrics, registered. One for a process: names are registered once. One thread.

    speaks: whether this process publishes what is `FIRST_RANK_ONLY`.
    """

    def __init__(self, *, speaks: bool) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        forget_the_dead()
        self._speaks = speaks
        self._metrics: dict[str, Any] = {}
        for metric in COUNTERS:
            self._metrics[metric.name] = Counter(metric.name, metric.help, metric.labels)
        for metric in GAUGES:
            mode = "livemin" if metric.name == "sgl_lmcache_tier_available" else "livesum"
            self._metrics[metric.name] = Gauge(metric.name, metric.help, metric.labels, multiprocess_mode=mode)
        for metric in HISTOGRAMS:
            self._metrics[metric.name] = Histogram(metric.name, metric.help, metric.labels, buckets=metric.bounds)
        self._children: dict[tuple[str, Labels], Any] = {}

    def count(self, carried: Carried, name: str, labels: Labels, count: float) -> None:
        """A counter of this source stands at `count`."""
        before = carried.counts.get((name, labels))
        if before is None or count > before:
            self._add(name, labels, count - (before or 0))
            carried.counts[name, labels] = count

    def _add(self, name: str, labels: Labels, amount: float) -> None:
        if self._is_ours(name):
            self._child(name, labels).inc(amount)

    def set(self, name: str, labels: Labels, value: float) -> None:
        """A gauge stands at `value`."""
        if self._is_ours(name):
            self._child(name, labels).set(value)

    def observe(self, name: str, labels: Labels, value: float) -> None:
        """A histogram has one more value."""
        if self._is_ours(name):
            self._child(name, labels).observe(value)

    def distribute(self, carried: Carried, name: str, values: Distribution) -> None:
        """A histogram without labels, whose buckets have the bounds of `values`, has come to all of these."""
        if not self._is_ours(name):
            return
        before = carried.buckets.setdefault(name, Distribution(values.bounds.tolist()))
        new = values.counts - before.counts
        if new.any():
            _add_to_buckets(self._child(name, ()), new.tolist(), values.total - before.total)
            before.counts[:] = values.counts
            before.total = values.total

    def _is_ours(self, name: str) -> bool:
        return self._speaks or name not in FIRST_RANK_ONLY

    def _child(self, name: str, labels: Labels) -> Any:
        child = self._children.get((name, labels))
        if child is None:
            metric = self._metrics[name]
            child = self._children[name, labels] = metric.labels(*labels) if labels else metric
        return child


def _add_to_buckets(histogram: Histogram, counts: Sequence[int], total: float) -> None:
    """As so many calls of `observe`, of which the client has no form for many values at once.

    A page each would be thousands of them. `_buckets` and `_sum` are what `observe` adds to.
    """
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
