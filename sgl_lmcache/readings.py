"""Where the numbers of our metrics come from: what `metrics` names is read here, and carried over every two seconds.

Reading costs a few hundred microseconds each time, whatever has happened meanwhile. Nothing here blocks, and nothing
here decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from hicache import Engine, SpillStats, Tier
from hicache.quotas import Share
from radix import HBM, RESIDENT
from sgl_lmcache.calls import Calls
from sgl_lmcache.hits import Hits
from sgl_lmcache.metrics import Carried, Labels, Registry

PERIOD_S: Final = 2.0
"""How often the numbers are carried over."""

Reading = tuple[str, Labels, float]
"""A metric's name without `sgl_lmcache_`, its labels, and where it stands."""

TIER_COUNTS: Final[Mapping[str, Mapping[Labels, str]]] = {
    "loaded_pages": {(): "loaded"},
    "stored_pages": {(): "stored"},
    "evicted_pages": {("capacity",): "evicted", ("quota",): "evicted_quota"},
    "corrupt_pages": {(): "corrupt"},
    "skipped_pages": {
        ("pressure",): "skipped_pressure",
        ("full",): "skipped_full",
        ("quota",): "skipped_quota",
        ("no_parent",): "orphans",
        ("endurance",): "skipped_endurance",
    },
    "tier_errors": {("read",): "read_errors", ("write",): "write_errors", ("map",): "map_errors"},
    "read_bytes": {(): "read_nbytes"},
    "written_bytes": {(): "written_nbytes"},
}
"""Counters of a tier below host memory: by their labels behind `tier`, what the tier itself calls it (`Tier.stats`)."""


class WriteBacks(Protocol):
    """What is read of the linker."""

    engine: Engine
    calls: Calls

    @property
    def n_pending_pages(self) -> int: ...

    @property
    def slot_nbytes(self) -> int: ...


class GivenTier(Protocol):
    """A tier below host memory, and what the engine has given to it."""

    tier: Tier
    stats: SpillStats

    @property
    def n_pages(self) -> int: ...


@dataclass
class _LowerTier:
    """What has been carried over of one tier below: of the store that it has now, and of what it was given."""

    tier: Tier
    of_store: Carried = field(default_factory=Carried)
    of_spills: Carried = field(default_factory=Carried)


def start_readings(linker: WriteBacks, *, page_size: int, n_hbm_pages: int, speaks: bool) -> Readings:
    """For the cache of this process, which has no other. speaks: as for `Registry`."""
    hits = Hits(linker.engine.prefill_speed, page_size)
    return Readings(Registry(speaks=speaks), linker, hits, n_hbm_pages=n_hbm_pages, clock=time.monotonic)


class Readings:
    """Carries all numbers over into a registry. One for a cache; scheduler thread only.

    n_hbm_pages: how many pages HBM holds. clock: monotonic seconds.
    """

    def __init__(
        self, registry: Registry, linker: WriteBacks, hits: Hits, *, n_hbm_pages: int, clock: Callable[[], float]
    ) -> None:
        self.hits = hits
        self._registry = registry
        self._linker = linker
        self._engine = linker.engine
        self._n_hbm_pages = n_hbm_pages
        self._clock = clock
        self._due_s = 0.0
        self._carried = Carried()
        self._below: dict[str, _LowerTier] = {}

    def publish(self, *, now: bool = False) -> None:
        """Once an iteration: does something every `PERIOD_S`, or `now`. Never blocks."""
        now_s = self._clock()
        if now_s < self._due_s and not now:
            return
        self._due_s = now_s + PERIOD_S
        for name, labels, count in (*self._counts(), *self._host_counts()):
            self._registry.count(self._carried, f"sgl_lmcache_{name}", labels, count)
        for name, labels, value in (*self._gauges(), *self._upper_gauges()):
            self._registry.set(f"sgl_lmcache_{name}", labels, value)
        self._distributions()
        self._movements()
        if self._engine.below is not None:
            for spills in self._engine.below.spills:
                self.publish_tier(spills)
        else:
            for tier in self._below:  # the ranks have given all of them up
                self._registry.set("sgl_lmcache_tier_available", (tier,), 0)

    # ---- what the server as a whole does ----

    def _counts(self) -> Iterator[Reading]:
        hits, calls, stats, observed = self.hits, self._linker.calls, self._engine.stats, self._engine.observed
        yield "requests", (), hits.n_requests
        yield "miss_tokens", (), hits.miss_tokens
        for tier, n_tokens in hits.hit_tokens.items():
            yield "hit_tokens", (tier,), n_tokens
            yield "saved_seconds", (tier,), hits.saved_s[tier]
        yield "fetch_decisions", ("load",), observed.fetches_loaded
        yield "fetch_decisions", ("load_part",), observed.fetches_shortened
        yield "fetch_decisions", ("recompute",), observed.fetches_recomputed
        yield "fetch_decisions", ("absent",), observed.fetches_absent
        yield "fetch_missed_pages", (), stats.fetch_missed
        yield "expired_waits", ("pages",), stats.tickets_expired
        yield "expired_waits", ("prefill",), stats.followers_expired
        yield "followed_prefills", (), stats.followers
        yield "unleased_requests", (), stats.tickets_unleased
        yield "flushes", (), stats.resets
        for call, seconds in calls.seconds.items():
            yield "call_seconds", (call,), seconds
            yield "slow_calls", (call,), calls.n_slow[call]

    def _gauges(self) -> Iterator[Reading]:
        engine, host = self._engine, self._engine.host
        yield "leased_pages", (), engine.n_leased
        yield "pinned_pages", (), engine.n_pinned
        yield "write_back_pages", (), self._linker.n_pending_pages
        yield "waiting_requests", ("pages",), engine.n_awaiting_pages
        yield "waiting_requests", ("prefill",), engine.n_awaiting_prefills
        yield from self._shares("host", host.quotas.shares(host.n_held))
        if engine.below is not None:
            fetches = engine.below.fetches
            yield "fetch_pages", (), fetches.n_loading_pages
            yield "fetches", ("probing",), fetches.n_probing
            yield "fetches", ("queued",), fetches.n_found
            yield "fetches", ("loading",), fetches.n_loading

    def _shares(self, tier: str, shares: Iterable[Share]) -> Iterator[Reading]:
        for group, share in enumerate(shares):
            yield "quota_used_bytes", (tier, str(group)), share.n_held * self._linker.slot_nbytes
            yield "quota_limit_bytes", (tier, str(group)), share.limit * self._linker.slot_nbytes

    def _distributions(self) -> None:
        observed = self._engine.observed
        for name, values in (
            ("page_age_seconds", observed.age_s),
            ("page_idle_seconds", observed.idle_s),
            ("page_reuse_gap_seconds", observed.reuse_gap_s),
        ):
            self._registry.distribute(self._carried, f"sgl_lmcache_{name}", values)

    def _movements(self) -> None:
        movements = self._engine.observed.movements
        while movements:
            movement = movements.popleft()
            name, labels = ("restore", ()) if movement.tier == "host" else ("fetch", (movement.tier,))
            self._registry.observe(f"sgl_lmcache_{name}_seconds", labels, movement.seconds)
            if movement.seconds > 0:
                rate = movement.n_pages * self._linker.slot_nbytes / movement.seconds
                self._registry.observe(f"sgl_lmcache_{name}_bytes_per_second", labels, rate)

    # ---- HBM and host memory ----

    def _host_counts(self) -> Iterator[Reading]:
        stats, slot_nbytes = self._engine.stats, self._linker.slot_nbytes
        n_stored = stats.offloaded + stats.fetched
        yield "loaded_pages", ("host",), stats.restored
        yield "stored_pages", ("host",), n_stored
        yield "read_bytes", ("host",), stats.restored * slot_nbytes
        yield "written_bytes", ("host",), n_stored * slot_nbytes
        yield "evicted_pages", ("hbm", "capacity"), stats.hbm_evicted
        yield "evicted_pages", ("hbm", "flush"), stats.hbm_flushed
        yield "evicted_pages", ("host", "capacity"), stats.evicted - stats.evicted_quota
        yield "evicted_pages", ("host", "quota"), stats.evicted_quota
        yield "evicted_pages", ("host", "flush"), stats.flushed
        yield "skipped_pages", ("host", "full"), stats.skipped_full
        yield "skipped_pages", ("host", "pressure"), stats.skipped_pressure
        yield "skipped_pages", ("host", "new_weights"), stats.skipped_tainted
        yield "skipped_pages", ("host", "failed"), stats.failed

    def _upper_gauges(self) -> Iterator[Reading]:
        host, slot_nbytes = self._engine.host, self._linker.slot_nbytes
        n_hbm = self._engine.index.count(HBM, RESIDENT)
        yield "tier_pages", ("hbm",), n_hbm
        yield "tier_used_bytes", ("hbm",), n_hbm * slot_nbytes
        yield "tier_limit_bytes", ("hbm",), self._n_hbm_pages * slot_nbytes
        yield "tier_available", ("host",), not self._engine.tainted
        yield "tier_pages", ("host",), host.n_resident
        yield "tier_used_bytes", ("host",), (host.n_slots - host.n_free) * slot_nbytes
        yield "tier_limit_bytes", ("host",), host.n_slots * slot_nbytes
        yield "host_slots", ("free",), host.n_free
        yield "host_slots", ("incoming",), host.n_incoming
        yield "host_slots", ("resident",), host.n_resident
        yield "host_slots", ("lingering",), host.n_lingering

    # ---- below ----

    def publish_tier(self, given: GivenTier) -> None:
        """One tier below host memory. Pages that the engine did not even offer to it were skipped, too."""
        tier = given.tier
        known = self._below.get(tier.name)
        if known is None:
            known = self._below[tier.name] = _LowerTier(tier)
        if tier is not known.tier:  # another store counts from 0
            known.tier, known.of_store = tier, Carried()
        stats = tier.stats()
        for name, labels, count in _tier_counts(tier.name, stats):
            self._registry.count(known.of_store, f"sgl_lmcache_{name}", labels, count)
        skipped = ("sgl_lmcache_skipped_pages", (tier.name, "pressure"))
        self._registry.count(known.of_spills, *skipped, given.stats.skipped)
        for name, value in _tier_gauges(tier, stats):
            self._registry.set(f"sgl_lmcache_{name}", (tier.name,), value)
        for name, labels, value in self._shares(tier.name, tier.shares()):
            self._registry.set(f"sgl_lmcache_{name}", labels, value)
        self._registry.set("sgl_lmcache_spill_pages", (tier.name,), given.n_pages)


def _tier_counts(tier: str, stats: Mapping[str, int]) -> Iterator[Reading]:
    for name, counts in TIER_COUNTS.items():
        for labels, stat in counts.items():
            yield name, (tier, *labels), stats.get(stat, 0)


def _tier_gauges(tier: Tier, stats: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    capacity = tier.capacity()
    yield "tier_available", tier.health().available
    yield "tier_used_bytes", capacity.used_nbytes
    yield "tier_limit_bytes", capacity.limit_nbytes
    yield "tier_bad_slots", stats.get("n_bad_slots", 0)
    if "n_pages" in stats:
        yield "tier_pages", stats["n_pages"]
