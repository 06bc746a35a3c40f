"""Our Prometheus metrics: what is published of what has happened, by whom, and that the page lists exactly these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import prometheus_client
import pytest

from hicache import Distribution, Engine, Movement, SpillStats, Tier
from hicache.quotas import Share
from hicache.ssd import Counters
from sgl_lmcache.calls import Calls
from sgl_lmcache.hits import Hits
from sgl_lmcache.metrics import COUNTERS, FIRST_RANK_ONLY, GAUGES, HISTOGRAMS, Carried, Registry
from sgl_lmcache.readings import PERIOD_S, TIER_COUNTS, Readings
from tests.hicache.rig import Rig
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.tiers import MemoryTier

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"
SLOT_NBYTES = 1000
N_HBM_PAGES = 40


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
    n_pages: int = 0


@dataclass
class Linker:
    """What is read of the linker."""

    engine: Engine
    calls: Calls
    n_pending_pages: int = 0
    slot_nbytes: int = SLOT_NBYTES


class Published:
    """An engine and its metrics, as one process has them."""

    def __init__(self, *, speaks: bool = True, n_slots: int = 32, writes: tuple[str, ...] = ("through",)) -> None:
        self.clock = Clock()
        self.clock.now_s = 100.0
        self.rig = Rig(n_slots=n_slots, writes=writes, clock=self.clock)
        self.engine = self.rig.engine
        self.linker = Linker(self.engine, Calls(self.clock))
        self.hits = Hits(self.engine.prefill_speed, page_size=16)
        self.readings = Readings(
            Registry(speaks=speaks), self.linker, self.hits, n_hbm_pages=N_HBM_PAGES, clock=self.clock
        )

    def value(self, name: str, **labels: str) -> float | None:
        """Of a metric, after everything has been carried over."""
        self.readings.publish(now=True)
        return value(name, **labels)


@pytest.fixture
def names() -> Iterator[None]:
    """Names are registered once in a process, so they are taken back."""
    registry = prometheus_client.REGISTRY
    before = set(registry._collector_to_names)
    yield
    for collector in set(registry._collector_to_names) - before:
        registry.unregister(collector)


@pytest.fixture
def published(names: None) -> Published:
    return Published()


def value(name: str, **labels: str) -> float | None:
    found: float | None = prometheus_client.REGISTRY.get_sample_value(f"sgl_lmcache_{name}", labels)
    return found


def tier(named: str = "memory", **counts: int) -> CountingTier:
    tier = CountingTier(np.zeros((4, 4096), np.uint8), 4)
    tier.named, tier.counts = named, counts
    return tier


# ---- when ----


def test_numbers_are_carried_over_every_now_and_then(published: Published) -> None:
    published.readings.publish()
    published.engine.stats.restored = 3
    published.readings.publish()
    assert value("loaded_pages_total", tier="host") == 0, "not in each iteration"
    published.clock.now_s += PERIOD_S
    published.readings.publish()
    assert value("loaded_pages_total", tier="host") == 3
    published.engine.stats.restored = 10
    published.readings.publish(now=True)
    assert value("loaded_pages_total", tier="host") == 10


# ---- tiers below ----


def test_what_a_tier_counts_is_published_by_its_name(published: Published) -> None:
    counts = {"loaded": 3, "corrupt": 1, "orphans": 2, "read_errors": 5, "evicted": 6, "n_pages": 9, "n_bad_slots": 1}
    published.readings.publish_tier(Given(tier("memory", **counts), SpillStats(skipped=4), n_pages=8))
    assert value("loaded_pages_total", tier="memory") == 3
    assert value("corrupt_pages_total", tier="memory") == 1
    assert value("evicted_pages_total", tier="memory", reason="capacity") == 6
    assert value("skipped_pages_total", tier="memory", reason="no_parent") == 2
    assert value("skipped_pages_total", tier="memory", reason="pressure") == 4
    assert value("tier_errors_total", tier="memory", operation="read") == 5
    assert value("tier_pages", tier="memory") == 9
    assert value("tier_bad_slots", tier="memory") == 1
    assert value("spill_pages", tier="memory") == 8


def test_each_tier_counts_for_itself(published: Published) -> None:
    first, second = (Given(tier(name, loaded=3), SpillStats(skipped=2)) for name in ("first", "second"))
    published.readings.publish_tier(first)
    published.readings.publish_tier(second)
    second.tier = tier("second", loaded=1)  # new weights
    second.stats.skipped = 7
    published.readings.publish_tier(second)
    assert [value("loaded_pages_total", tier=name) for name in ("first", "second")] == [3, 4]
    skipped = [value("skipped_pages_total", tier=name, reason="pressure") for name in ("first", "second")]
    assert skipped == [2, 7]


def test_another_store_counts_on(published: Published) -> None:
    """New weights bring a store of their own, whose counts begin at 0."""
    old = tier(stored=3)
    published.readings.publish_tier(Given(old))
    old.counts = {"stored": 7}
    published.readings.publish_tier(Given(old))
    published.readings.publish_tier(Given(tier(stored=2)))
    assert value("stored_pages_total", tier="memory") == 9


def test_a_tier_that_is_given_up_is_seen(published: Published) -> None:
    one = tier()
    published.readings.publish_tier(Given(one))
    assert value("tier_available", tier="memory") == 1
    assert value("tier_limit_bytes", tier="memory") == 4 * 4096
    assert value("tier_pages", tier="memory") is None, "a store that does not count its pages"
    one.close()
    published.readings.publish_tier(Given(one))
    assert value("tier_available", tier="memory") == 0


# ---- the engine, by what is done with it ----


def test_host_memory_by_what_its_slots_are(published: Published) -> None:
    engine = published.engine
    published.rig.write_back(path_keys("abc"))
    offload = engine.begin_offload(path_keys("xy"))
    assert offload is not None
    states = {
        state: published.value("host_slots", state=state) for state in ("free", "resident", "incoming", "lingering")
    }
    assert states == {"free": 27, "resident": 3, "incoming": 2, "lingering": 0}
    assert published.value("tier_pages", tier="host") == 3
    assert published.value("tier_used_bytes", tier="host") == 5 * SLOT_NBYTES
    assert published.value("tier_limit_bytes", tier="host") == 32 * SLOT_NBYTES
    assert published.value("tier_pages", tier="hbm") == 5
    assert published.value("tier_limit_bytes", tier="hbm") == N_HBM_PAGES * SLOT_NBYTES
    engine.finish_offload(offload, landed=False)
    assert published.value("skipped_pages_total", tier="host", reason="failed") == 2
    assert published.value("stored_pages_total", tier="host") == 3
    assert published.value("written_bytes_total", tier="host") == 3 * SLOT_NBYTES


def test_restored_pages_are_loaded_from_host_memory(published: Published) -> None:
    engine = published.engine
    published.rig.write_back(path_keys("abc"))
    assert engine.lookup(path_keys("abc")) == 3
    restore = engine.begin_restore(path_keys("abc"))
    assert restore is not None
    engine.finish_restore(restore, copied=True)
    assert published.value("loaded_pages_total", tier="host") == 3
    assert published.value("read_bytes_total", tier="host") == 3 * SLOT_NBYTES


def test_a_flush_is_not_taken_for_a_lack_of_room(names: None) -> None:
    published = Published(n_slots=4)
    published.rig.write_back(path_keys("abcd"))
    published.engine.hbm_evicted(path_keys("abcd")[-32:])
    published.rig.settle()
    published.rig.write_back(path_keys("xy"))
    published.rig.settle()
    published.engine.reset()
    seen = {
        (tier, reason): published.value("evicted_pages_total", tier=tier, reason=reason)
        for tier, reason in (("host", "capacity"), ("host", "quota"), ("host", "flush"), ("hbm", "capacity"))
    }
    assert seen == {("host", "capacity"): 2, ("host", "quota"): 0, ("host", "flush"): 4, ("hbm", "capacity"): 1}
    assert published.value("evicted_pages_total", tier="hbm", reason="flush") == 5
    assert published.value("flushes_total") == 1


def test_what_leaves_for_a_quota_is_told_apart(names: None) -> None:
    published = Published(n_slots=4, writes=())
    engine = published.engine
    published.rig.write_back(path_keys("abcd"))
    engine.tick()
    engine.set_quota("tenant", 3)
    engine.open_ticket(path_keys("pqrs"), None, tenant="tenant")
    published.rig.write_back(path_keys("pqr"))
    assert published.value("evicted_pages_total", tier="host", reason="quota") == 3
    assert published.value("quota_used_bytes", tier="host", group="1") == 3 * SLOT_NBYTES
    assert published.value("quota_limit_bytes", tier="host", group="1") == 3 * SLOT_NBYTES
    assert published.value("quota_used_bytes", tier="host", group="0") == SLOT_NBYTES
    engine.tick()
    engine.set_quota("tenant", 1)
    assert published.value("evicted_pages_total", tier="host", reason="quota") == 5
    assert published.value("evicted_pages_total", tier="host", reason="capacity") == 0
    assert "tenant" not in prometheus_client.generate_latest().decode().replace("tenant take", ""), "salts are secrets"


def test_quotas_of_tiers_below(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.rig.tier, "shares", lambda: [Share(5, 9), Share(1, 3)])
    assert published.value("quota_used_bytes", tier="faulty memory", group="0") == 5 * SLOT_NBYTES
    assert published.value("quota_limit_bytes", tier="faulty memory", group="1") == 3 * SLOT_NBYTES


def test_leases_and_pins(published: Published) -> None:
    published.rig.write_back(path_keys("abc"))
    ticket = published.engine.open_ticket(path_keys("abc"), None)
    published.engine.pin(path_keys("ab"), 60.0)
    assert published.value("leased_pages") == 3
    assert published.value("pinned_pages") == 2
    published.engine.close_ticket(ticket)
    assert published.engine.unpin(path_keys("ab"))
    assert published.value("leased_pages") == 0
    assert published.value("pinned_pages") == 0


def test_who_waits_and_what_is_under_way(published: Published) -> None:
    rig = published.rig
    rig.store_below_only(path_keys("abc"))
    rig.tier.hold()
    ticket = rig.engine.open_ticket(path_keys("abc"), None)
    assert published.value("fetches", state="probing") == 1
    assert published.value("waiting_requests", waiting_for="pages") == 1
    rig.tier.release(1)
    rig.agree()
    assert published.value("fetches", state="probing") == 0
    assert published.value("fetches", state="loading") == 1
    assert published.value("fetch_pages") == 3
    rig.tier.release()
    rig.settle()
    assert published.value("fetch_pages") == 0
    assert published.value("waiting_requests", waiting_for="pages") == 0
    assert published.value("fetch_decisions_total", decision="load") == 1
    assert published.value("stored_pages_total", tier="host") == 6, "written back, then fetched"
    rig.engine.close_ticket(ticket)
    published.linker.n_pending_pages = 7
    assert published.value("write_back_pages") == 7


def test_spills_under_way(published: Published) -> None:
    published.rig.tier.hold()
    published.rig.write_back(path_keys("abc"))
    assert published.value("spill_pages", tier="faulty memory") == 3
    published.rig.tier.release()
    published.rig.settle()
    assert published.value("spill_pages", tier="faulty memory") == 0


def test_tiers_that_the_ranks_have_given_up_are_not_available(published: Published) -> None:
    assert published.value("tier_available", tier="faulty memory") == 1
    published.engine.stand_down()
    published.engine.retire()
    assert published.value("tier_available", tier="faulty memory") == 0
    assert published.value("tier_available", tier="host") == 0


def test_a_taint_makes_host_memory_unavailable(published: Published) -> None:
    assert published.value("tier_available", tier="host") == 1
    published.engine.taint()
    published.rig.write_back(path_keys("ab"))
    assert published.value("tier_available", tier="host") == 0
    assert published.value("skipped_pages_total", tier="host", reason="new_weights") == 2


# ---- times ----


def test_ages_idle_times_and_reuse_gaps_are_of_pages(names: None) -> None:
    published = Published(n_slots=4, writes=())
    rig, clock = published.rig, published.clock
    rig.write_back(path_keys("ab"))
    clock.now_s += 100.0
    rig.engine.close_ticket(rig.engine.open_ticket(path_keys("ab"), None))
    assert published.value("page_reuse_gap_seconds_count") == 2
    assert published.value("page_reuse_gap_seconds_sum") == 200.0
    assert published.value("page_reuse_gap_seconds_bucket", le="60.0") == 0
    assert published.value("page_reuse_gap_seconds_bucket", le="300.0") == 2
    clock.now_s += 10.0
    rig.engine.tick()
    rig.write_back(path_keys("wxyz"))
    assert published.value("page_age_seconds_sum") == 2 * 110.0
    assert published.value("page_idle_seconds_sum") == 2 * 10.0
    assert published.value("page_idle_seconds_bucket", le="15.0") == 2
    assert published.value("page_idle_seconds_bucket", le="5.0") == 0
    clock.now_s += 1.0
    assert published.value("page_age_seconds_count") == 2, "each page once"


def test_movements_are_observed_once(published: Published) -> None:
    movements = published.engine.observed.movements
    movements.append(Movement("host", 40, 0.002))
    movements.append(Movement("ssd", 10, 0.2))
    movements.append(Movement("host", 1, 0.0))
    assert published.value("restore_seconds_count") == 2
    assert published.value("restore_seconds_sum") == 0.002
    assert published.value("restore_bytes_per_second_sum") == 40 * SLOT_NBYTES / 0.002
    assert published.value("restore_bytes_per_second_count") == 1, "no rate without a time"
    assert published.value("fetch_seconds_sum", tier="ssd") == 0.2
    assert published.value("fetch_bytes_per_second_sum", tier="ssd") == 10 * SLOT_NBYTES / 0.2
    assert not movements


def test_buckets_are_filled_as_the_client_fills_them(names: None) -> None:
    """`observe` is the client's; thousands of pages at once are added by us."""
    registry = Registry(speaks=True)
    values = [0.0, 1.0, 1.001, 5.0, 59.0, 1e9]
    theirs = prometheus_client.Histogram("theirs", "Their own.", buckets=HISTOGRAMS[-1].bounds)
    ours = Distribution(HISTOGRAMS[-1].bounds)
    for one in values:
        theirs.observe(one)
        ours.add(np.array([one]))
    registry.distribute(Carried(), HISTOGRAMS[-1].name, ours)
    samples = {
        (sample.name.rpartition("_")[2], sample.labels.get("le")): sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("theirs_") and not sample.name.endswith("created")
    }
    assert len(samples) == len(HISTOGRAMS[-1].bounds) + 3
    for (kind, bound), expected in samples.items():
        labels = {} if bound is None else {"le": bound}
        assert value(f"page_reuse_gap_seconds_{kind}", **labels) == expected
    prometheus_client.REGISTRY.unregister(theirs)


def test_calls_that_keep_the_scheduler(published: Published) -> None:
    calls = published.linker.calls
    for took_s in (0.001, 0.006, 1.0):
        with calls.timed("arrival"):
            published.clock.now_s += took_s
    with suppress(KeyError), calls.timed("restore"):
        published.clock.now_s += 2.0
        raise KeyError
    assert published.value("slow_calls_total", call="arrival") == 2
    assert published.value("call_seconds_total", call="arrival") == pytest.approx(1.007)
    assert published.value("slow_calls_total", call="restore") == 1, "one that fails, too"
    assert published.value("slow_calls_total", call="iteration") == 0


# ---- ranks, and the page ----


def test_what_all_ranks_see_alike_only_the_first_one_tells(names: None) -> None:
    published = Published(speaks=False)
    published.rig.write_back(path_keys("abc"))
    published.engine.close_ticket(published.engine.open_ticket(path_keys("abc"), None))
    published.engine.observed.movements.append(Movement("host", 3, 0.1))
    published.hits.n_requests = 5
    assert published.value("stored_pages_total", tier="host") == 3, "each rank has pages of its own"
    for metric in (*COUNTERS, *GAUGES, *HISTOGRAMS):
        if metric.name in FIRST_RANK_ONLY:
            samples = [
                sample.value
                for family in prometheus_client.REGISTRY.collect()
                if family.name == metric.name
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            assert not any(samples), metric.name


def test_names_that_only_the_first_rank_tells_exist() -> None:
    assert {metric.name for metric in (*COUNTERS, *GAUGES, *HISTOGRAMS)} >= FIRST_RANK_ONLY


def test_every_count_of_a_tier_that_is_published_is_one_of_the_ssd_tier() -> None:
    known = set(Counters.__dataclass_fields__)
    for counts in TIER_COUNTS.values():
        assert set(counts.values()) <= known


def test_every_metric_gets_a_value(published: Published) -> None:
    """A name that nothing is published under would be a row of the page that says nothing."""
    published.rig.store_below_only(path_keys("ab"))
    published.engine.observed.movements.extend([Movement("host", 1, 0.1), Movement("memory", 1, 0.1)])
    published.readings.publish(now=True)
    collected = {
        family.name
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if family.name.startswith("sgl_lmcache_") and not sample.name.endswith("_created")
    }
    assert collected == {metric.name for metric in (*COUNTERS, *GAUGES, *HISTOGRAMS)}


def test_the_page_lists_every_metric_with_its_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(sgl_lmcache_\w+)` \| ([^|]*)\|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert len(listed) == len(rows)
    assert listed == {
        **{f"{metric.name}_total": metric.labels for metric in COUNTERS},
        **{metric.name: metric.labels for metric in (*GAUGES, *HISTOGRAMS)},
    }
