"""The cache, the linker and SGLang's tree under everything that a scheduler can do to them, in random order.

No server and no model, but SGLang's own requests, tree, allocator and pool, and real bytes. Copies end late, in any
order, or fail; clients go away at any moment; HBM and host memory are far too small; weights change under all of it.
In two of three walks there are one or two tiers below, each of which answers late, fails, and loses pages on its own.
After each step the laws of conservation are checked (`Scheduler.check`), and each forward checks the KV that it reads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from random import Random

import pytest

from hicache import WRITE_POLICIES, Tier, prefills
from sgl_lmcache.namespace import Namespace
from tests.support.clock import Clock
from tests.support.real_cache import OpenTier, RealCache
from tests.support.scheduler import Scheduler
from tests.support.stepped_copies import SteppedCopies
from tests.support.tiers import FaultyTier, MemoryTier
from tests.support.walk import Walk, copy_step
from transfer.slab import Slab

PAGE = 4
N_STEPS = 2_500
N_WALKS = {"rust": 24, "python": 8}
MUST_BE_SEEN = (
    "host hits",
    "host hits of new weights",
    "tenants' host hits",
    "chunks",
    "retracted",
    "aborted with a queued load",
    "failed restores",
    "write-backs failed",
    "write-backs ended out of order",
    "flushes",
    "weight updates",
    "weight sessions",
    "evicted",
    "followers",
    "followers_expired",
    "deduplicated",
    "skipped_full",
    "skipped_pressure",
    "skipped_tainted",
    "tickets_unleased",
    "fetched",
    "fetch_missed",
    "spilled through",
    "spilled selective",
    "spilled back",
    "skipped by tiers",
    "failed by tiers",
    "admitted with fetched pages",
)


def make_scheduler(rng: Random, tree_core: str, clock: Clock, n_tiers: int) -> Scheduler:
    """HBM from a little more than the longest request needs, host memory from next to nothing."""
    real = RealCache(
        rng.randint(13, 40),
        rng.choice((2, 6, 12, 24, 40, 80)),
        page_size=PAGE,
        tree_core=tree_core,
        max_len=128,
        max_pending_pages=rng.choice((3, 1000)),
        max_leased_share=rng.choice((0.0, 0.5, 1.0)),
        clock=clock,
        make_copies=SteppedCopies,
        open_tiers=draw_tiers(rng, n_tiers),
        batch_pages=rng.choice((1, 3)),
    )
    assert isinstance(real.copies, SteppedCopies)
    return Scheduler(real, real.copies)


def draw_tiers(rng: Random, n_tiers: int) -> list[tuple[OpenTier, str]]:
    """Tiers of any size and write policy."""
    return [(slow_tier(rng.choice((10, 1000))), rng.choice(tuple(WRITE_POLICIES))) for _ in range(n_tiers)]


def slow_tier(limit_pages: int) -> OpenTier:
    """Opens a tier that keeps so many pages in memory and answers when it is told to."""

    def open_tier(slab: Slab, namespace: Namespace) -> Tier:
        tier = FaultyTier(MemoryTier(slab.array, limit_pages))
        tier.hold()
        return tier

    return open_tier


def walk(seed: int, tree_core: str) -> Counter[str]:
    """N_STEPS steps, then an end to everything. What has been seen on the way."""
    rng, clock = Random(f"{tree_core}/{seed}"), Clock()
    scheduler = make_scheduler(rng, tree_core, clock, n_tiers=seed // 3 % 3)
    walk = Walk(rng, scheduler)
    try:
        for _ in range(N_STEPS):
            step = (copy_step(rng, scheduler) if rng.random() < 0.3 else None) or walk.next()
            walk.taken.append(str(step))
            step.take(scheduler)
            scheduler.check()
            clock.now_s += rng.choice((0.0, 0.1, 0.1, 5.0, 70.0)) if rng.random() < 0.1 else 0.0
        drain(scheduler)
    except BaseException as error:
        error.add_note("\n".join([f"seed {seed}; the last steps were:", *walk.taken]))
        raise
    scheduler.seen.update(stats_of(scheduler))
    return scheduler.seen


def drain(scheduler: Scheduler) -> None:
    """Whatever has happened, everybody is served within a bounded number of passes, and nothing is left behind."""
    scheduler.fail_restores(False)
    for _ in range(100):
        if not scheduler.waiting and not scheduler.live:
            break
        drain_step(scheduler)
        scheduler.check()
    assert not scheduler.waiting, f"{len(scheduler.waiting)} requests wait for ever"
    assert not scheduler.live, f"{len(scheduler.live)} requests run for ever"
    scheduler.copies.quiesce()
    while scheduler.cache._engine.below is not None and scheduler.cache._engine.below.is_pending:
        drain_step(scheduler)
    scheduler.cache.check_hicache_events()
    scheduler.check()
    assert scheduler.cache.protected_size() == 0
    assert not scheduler.cache._waiting
    assert not scheduler.cache._prefills
    scheduler.real.close()


def drain_step(scheduler: Scheduler) -> None:
    scheduler.copies.quiesce()
    scheduler.tiers_answer()
    scheduler.prefill(32, 6)
    scheduler.decode()


def stats_of(scheduler: Scheduler) -> Counter[str]:
    """What the engine has counted; and what has been given to tiers, by their write policies and of all."""
    engine = scheduler.real.engine
    counts = Counter(asdict(engine.stats))
    if engine.below is not None:
        for spills, (_, write) in zip(engine.below.spills, scheduler.real.open_tiers, strict=True):
            for name, count in asdict(spills.stats).items():
                counts[f"{name} {write}"] += count
                counts[f"{name} by tiers"] += count
    return counts


@pytest.mark.parametrize("tree_core", ["rust", "python"])
def test_everything_that_a_scheduler_can_do_in_random_order(tree_core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    for seed in range(N_WALKS[tree_core]):
        # Prompts are short here; the figure in use would let almost nobody follow.
        monkeypatch.setattr(prefills, "MIN_SHARED_PAGES", (1, 2, 16)[seed % 3])
        seen += walk(seed, tree_core)
    rare = {name: seen[name] for name in MUST_BE_SEEN if seen[name] < N_WALKS[tree_core]}
    assert not rare, f"next to never seen: {rare}"
