"""Two ranks that make the same calls, with copies and tiers that answer, or fail, at other times, and other clocks.

Whatever they do, both ranks keep the same pages in the same slots and give the same verdicts, after every step; they
exchange equally many messages, and none when there is nothing to agree on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch

from hicache import Engine, SpillStats, Stats, prefills
from radix import HOST
from tests.integration.test_cache_machine import PAGE, drain_step, draw_tiers, slow_tier, stats_of
from tests.support.clock import Clock
from tests.support.meeting import Meeting, MeetingRanks
from tests.support.real_cache import OpenTier, RealCache
from tests.support.scheduler import Prompt, Scheduler
from tests.support.stepped_copies import SteppedCopies
from tests.support.walk import Step, Walk, copy_step, step

N_STEPS = 1_500
N_WALKS = 12
MUST_BE_SEEN = (
    "restored",
    "failed",
    "evicted",
    "followers",
    "followers_expired",
    "failed restores",
    "reductions",
    "fetched",
    "fetch_missed",
    "spilled through",
    "spilled selective",
    "spilled back",
    "failed by tiers",
    "admitted with fetched pages",
)


class TwoRanks:
    """Two schedulers that take the same steps. Their copies do as they like."""

    def __init__(self, rng: Random, below: Sequence[tuple[OpenTier, str]]) -> None:
        """below: the tiers of each, with their write policies."""
        sizes = rng.randint(13, 40), rng.choice((12, 16, 40) if below else (6, 12, 24, 40, 80))
        max_pending_pages, max_leased_share = rng.choice((3, 1000)), rng.choice((0.0, 0.5, 1.0))
        self.meeting = Meeting(2)
        self.ranks = [MeetingRanks(self.meeting, rank) for rank in range(2)]
        self.clocks = [Clock(), Clock()]
        self.clocks[1].now_s = 1e6
        self.schedulers = [
            self._scheduler(rank, sizes, max_pending_pages, max_leased_share, below)
            for rank in range(self.meeting.n_ranks)
        ]

    def _scheduler(
        self,
        rank: int,
        sizes: tuple[int, int],
        max_pending_pages: int,
        share: float,
        below: Sequence[tuple[OpenTier, str]],
    ) -> Scheduler:
        real = RealCache(
            *sizes,
            page_size=PAGE,
            max_len=128,
            max_pending_pages=max_pending_pages,
            max_leased_share=share,
            clock=self.clocks[rank],
            ranks=self.ranks[rank],
            make_copies=SteppedCopies,
            open_tiers=below,
            batch_pages=2,
        )
        self.ranks[rank].may_ask = lambda: (
            real.linker.is_copying or real.engine.is_pending or real.engine.tainted  # a stand-down asks once more
        )
        real.cache._all_reduce_attn_groups = partial(self._sglang_reduces, rank)
        assert isinstance(real.copies, SteppedCopies)
        return Scheduler(real, real.copies)

    def _sglang_reduces(self, rank: int, tensor: torch.Tensor, op: torch.distributed.ReduceOp) -> None:
        """SGLang's own reduction: whether the loads of a batch have landed on all ranks."""
        assert op == torch.distributed.ReduceOp.MIN
        tensor.copy_(torch.tensor(self.meeting.minimum(rank, tensor.tolist())))

    def take(self, step: Step) -> None:
        """Both ranks take the step, and serve the same requests afterwards."""
        self.meeting.take([partial(step.take, scheduler) for scheduler in self.schedulers])
        self.check_requests()

    def check(self) -> None:
        for scheduler in self.schedulers:
            scheduler.check()
        self.check_requests()
        first, second = (scheduler.real.engine for scheduler in self.schedulers)
        for name, column in first.index._columns._asdict().items():
            assert np.array_equal(column, getattr(second.index._columns, name)), f"{name} of the index differs"
        orders = [engine.index._policies[HOST].members() for engine in (first, second)]
        assert orders[0].tolist() == orders[1].tolist(), "the order of eviction differs"
        assert first.digest == second.digest
        assert first.tainted == second.tainted
        assert first.stats == second.stats
        if first.below is not None and second.below is not None:
            for one, other in zip(first.below.spills, second.below.spills, strict=True):
                assert one.stats == other.stats
                given = [spills.given(rows).tolist() for spills, rows in zip((one, other), orders, strict=True)]
                assert given[0] == given[1], "what a tier has been given differs"

    def check_requests(self) -> None:
        """The ranks serve the same requests, and have asked each other equally often."""
        assert self.ranks[0].n_reductions == self.ranks[1].n_reductions
        first, second = ([(r.rid, r.prefix_len) for r in (*s.waiting, *s.live)] for s in self.schedulers)
        assert first == second

    def drain(self) -> None:
        """Serve everybody."""
        self.fail_restores(False)
        for _ in range(100):
            if not self.schedulers[0].waiting and not self.schedulers[0].live:
                break
            self.meeting.take([partial(drain_step, scheduler) for scheduler in self.schedulers])
            self.check_requests()
        assert not self.schedulers[0].waiting
        assert not self.schedulers[0].live

    def fail_restores(self, fail: bool) -> None:
        for scheduler in self.schedulers:
            scheduler.fail_restores(fail)

    def close(self) -> None:
        self.meeting.take([scheduler.real.close for scheduler in self.schedulers])
        self.meeting.close()


def walk(two: TwoRanks, rng: Random, n_steps: int, *, check: Callable[[], None]) -> None:
    """Random steps, the same for both ranks, with `check` after each; copies end on each rank as they like."""
    walk = Walk(rng, two.schedulers[0])
    try:
        for _ in range(n_steps):
            if rng.random() < 0.4:
                rank = rng.randrange(2)
                drawn = copy_step(rng, two.schedulers[rank])
                if drawn:
                    walk.taken.append(f"rank {rank}: {drawn}")
                    drawn.take(two.schedulers[rank])
                continue
            common = walk.next()
            walk.taken.append(str(common))
            two.take(common)
            check()
            two.clocks[0].now_s += rng.choice((0.0, 0.1, 0.1, 5.0, 70.0)) if rng.random() < 0.1 else 0.0
            two.clocks[1].now_s += rng.choice((0.0, 500.0))
    except BaseException as error:
        error.add_note("\n".join(["the last steps were:", *walk.taken]))
        raise


def test_ranks_whose_copies_end_at_other_times_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    for seed in range(N_WALKS):
        monkeypatch.setattr(prefills, "MIN_SHARED_PAGES", (1, 2, 16)[seed % 3])
        rng = Random(seed)
        two = TwoRanks(rng, draw_tiers(rng, seed // 3 % 3))
        walk(two, rng, N_STEPS, check=two.check)
        two.drain()
        two.close()
        seen += two.schedulers[0].seen + stats_of(two.schedulers[0])
        seen["reductions"] += two.ranks[0].n_reductions
    for name in MUST_BE_SEEN:
        assert seen[name] >= 5, f"next to never seen: {name}: {seen}"


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_that_has_diverged_taints_all_and_nobody_hangs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write-back is decided on one rank only: that is our own bug, and it must not cost more than the cache."""
    monkeypatch.setattr(prefills, "MIN_SHARED_PAGES", 1)
    rng = Random(seed)
    two = TwoRanks(rng, draw_tiers(rng, seed % 3))
    walk(two, rng, 150, check=two.check)
    two.drain()
    for scheduler in two.schedulers:
        scheduler.end_weights()
    two.take(step("flush"))
    for scheduler in two.schedulers:
        for tier in scheduler.tiers:
            tier.release()
    lost = two.schedulers[1].real.engine
    with mock.patch.object(lost, "begin_offload", lost.skip_offload):
        two.take(step("arrive", "lost", Prompt(tuple(range(5000, 5040)))))
        two.take(step("prefill", 32, 6))
    assert not lost.tainted
    two.take(step("prefill", 32, 6))
    assert [scheduler.real.engine.tainted for scheduler in two.schedulers] == [True, True]

    # What only one rank holds must not decide who waits for whom.
    two.schedulers[0].copies.quiesce()
    two.take(step("prefill", 1, 1))
    two.take(step("evict", 40))
    for rid in ("leads", "follows"):
        two.take(step("arrive", rid, Prompt(tuple(range(5000, 5040)))))
    for _ in range(3):
        two.take(step("prefill", 1, 6))
    diverged = Walk(rng, two.schedulers[0])
    for _ in range(200):
        drawn = diverged.next()
        if drawn.name not in ("flush", "update_weights"):
            two.take(drawn)
    two.drain()
    for scheduler in two.schedulers:
        scheduler.end_weights()
    two.take(step("flush"))
    _count_on_from(two.schedulers[0].real.engine, lost)
    two.check()
    walk(two, rng, 150, check=two.check)
    two.drain()
    two.close()


def _count_on_from(engine: Engine, lost: Engine) -> None:
    """What was counted while they had diverged differs, and may."""
    counted: list[Stats | SpillStats] = [engine.stats]
    missed: list[Stats | SpillStats] = [lost.stats]
    if engine.below is not None and lost.below is not None:
        counted += [spills.stats for spills in engine.below.spills]
        missed += [spills.stats for spills in lost.below.spills]
    for right, wrong in zip(counted, missed, strict=True):
        for field in fields(right):
            setattr(wrong, field.name, getattr(right, field.name))


@pytest.mark.parametrize("n_tiers", [1, 2])
def test_ranks_that_diverge_while_the_disk_of_one_hangs_are_tainted_for_good_and_nobody_hangs(
    n_tiers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that disk may still write is known to its rank only, so none may use its slots again."""
    monkeypatch.setattr("hicache.engine.STAND_DOWN_S", 0.0)
    rng = Random(8)
    two = TwoRanks(rng, [(slow_tier(1000), "through")] * n_tiers)
    kept, other = Prompt(tuple(range(5000, 5024))), Prompt(tuple(range(6000, 6040)))
    two.take(step("arrive", "kept", kept))
    for _ in range(4):
        for scheduler in two.schedulers:
            drain_step_of_tiers(scheduler)
        two.take(step("prefill", 32, 6))
    two.take(step("flush"))
    two.take(step("arrive", "again", kept))
    for scheduler in two.schedulers:
        drain_step_of_tiers(scheduler)
    two.take(step("prefill", 32, 6))  # its pages are being loaded
    drain_step_of_tiers(two.schedulers[0])  # and on one rank they have come
    two.schedulers[1].real.engine._decided(1)
    two.take(step("arrive", "other", other))
    for _ in range(3):
        two.take(step("prefill", 32, 6))
    engines = [scheduler.real.engine for scheduler in two.schedulers]
    assert [engine.below for engine in engines] == [None, None]
    two.drain()
    two.take(step("flush"))
    assert [engine.tainted for engine in engines] == [True, True]
    for number in range(20):
        two.take(step("arrive", f"late {number}", kept))
        two.take(step("prefill", 32, 6))
    two.drain()
    for engine in engines:
        engine.check_invariants()
    two.close()


def drain_step_of_tiers(scheduler: Scheduler) -> None:
    """Copies end and the tiers answer."""
    scheduler.copies.quiesce()
    scheduler.tiers_answer()
