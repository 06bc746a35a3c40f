"""Every run of a simulation: which there are, and all of them on as many cores as there are.

The runs know nothing of each other, so what comes out does not depend on how many go at a time, nor on which ends
first. Each process is started anew and shares nothing with this one: it is given the trace once, then one plan after
the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sgl_lmcache.config import Config, LowerTier, MooncakeTier, SsdTier, ssd_eviction
from sgl_lmcache.errors import StartError
from sgl_lmcache.simulate.bound import clairvoyant_hits
from sgl_lmcache.simulate.machine import Machine
from sgl_lmcache.simulate.replay import LowerPlan, Outcome, Plan, Progress, replay
from sgl_lmcache.simulate.trace import Trace

SMALL: Final = 200_000
"""Uses of a block, in all runs together: below it starting a process takes longer than it saves."""

POLL_S: Final = 0.2
"""How often the progress of other processes is looked at."""

MAX_PAGES: Final = 2**28
"""Of one tier."""

ROUNDING: Final = Fraction(1, 1000)
"""Of a page. A share is written with a few digits: so much less than a whole page is a page."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of host memory: a share of the distinct blocks of the trace, and the pages that it is."""

    share: Fraction
    n_pages: int

    @classmethod
    def of_share(cls, share: Fraction, n_blocks: int) -> Capacity:
        """At least one page."""
        return cls(share, max(1, int(share * n_blocks + ROUNDING)))

    @classmethod
    def of_pages(cls, n_pages: int, n_blocks: int) -> Capacity:
        return cls(Fraction(n_pages, max(1, n_blocks)), n_pages)


@dataclass(frozen=True, eq=False)
class Setup:
    """What all runs have in common. count_from: the first request that counts."""

    trace: Trace
    machine: Machine
    count_from: int


@dataclass(frozen=True, eq=False)
class Result:
    """One run, and the clairvoyant policy beside it, which has one tier as large as all of this run's together."""

    capacity: Capacity
    plan: Plan
    outcome: Outcome
    bound_hits: NDArray[np.int64]
    """int64[n], blocks."""


def plan_of(config: Config, policy: str, capacity: Capacity, machine: Machine, page_nbytes: int, n_blocks: int) -> Plan:
    """One run. Raises `StartError` where a tier has no room for a page."""
    lower = tuple(_lower_plan(config, tier, policy, machine, page_nbytes, n_blocks) for tier in config.lower)
    return Plan(policy, pages_in("host", capacity.n_pages * page_nbytes, page_nbytes), lower, config.prefetch)


def _lower_plan(
    config: Config, tier: LowerTier, policy: str, machine: Machine, page_nbytes: int, n_blocks: int
) -> LowerPlan:
    """A store that servers share is taken to be this one's alone, and to evict as `lru` does."""
    name = str(tier.__struct_config__.tag)
    limit_nbytes: int | None = machine.tiers[name].capacity
    eviction, endurance_nbytes = "lru", None
    if isinstance(tier, SsdTier):
        limit_nbytes = limit_nbytes or tier.capacity
        eviction, endurance_nbytes = tier.eviction or ssd_eviction(policy), tier.endurance
    elif isinstance(tier, MooncakeTier) and limit_nbytes is None:
        if not tier.segment:
            raise StartError(
                "The mooncake tier's segment is 0, so the size of its pool is not known; give it with "
                "--assume mooncake.capacity=SIZE."
            )
        limit_nbytes = tier.segment
    n_pages = n_blocks if limit_nbytes is None else pages_in(name, limit_nbytes, page_nbytes)
    return LowerPlan(name, max(1, min(n_pages, n_blocks)), tier.write, eviction, endurance_nbytes)


def pages_in(name: str, limit_nbytes: int, page_nbytes: int) -> int:
    """How many pages the tier has room for. Raises `StartError`."""
    n_pages = limit_nbytes // page_nbytes
    if n_pages < 1:
        raise StartError(
            f"The {name} tier, {limit_nbytes:,} bytes, holds no page of {page_nbytes:,} bytes; give it more, or say "
            "with --bytes-per-token how large the KV of a token is."
        )
    if n_pages > MAX_PAGES:
        raise StartError(
            f"The {name} tier has room for {n_pages:,} pages of {page_nbytes:,} bytes, and {MAX_PAGES:,} are the most "
            "that can be simulated; give it less."
        )
    return n_pages


def n_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(
    setup: Setup, runs: Sequence[tuple[Capacity, Plan]], *, n_processes: int, progress: Progress
) -> list[Result]:
    """The results, in the order of `runs`. progress: told how many requests are done, of all runs together.

    One process: this one. Raises `StartError` if another process was killed.
    """
    plans = [plan for _, plan in runs]
    n_processes = min(n_processes, len(plans))
    if n_processes > 1 and len(setup.trace.blocks) * len(plans) >= SMALL:
        outcomes = _run_beside(setup, plans, n_processes, progress)
    else:
        outcomes = [
            _run(setup, plan, _shifted(progress, number * len(setup.trace))) for number, plan in enumerate(plans)
        ]
    bounds = {n: clairvoyant_hits(setup.trace, n) for n in {plan.n_pages for plan in plans}}
    return [
        Result(capacity, plan, outcome, bounds[plan.n_pages])
        for (capacity, plan), outcome in zip(runs, outcomes, strict=True)
    ]


def _run(setup: Setup, plan: Plan, progress: Progress) -> Outcome:
    return replay(setup.trace, plan, setup.machine, count_from=setup.count_from, progress=progress)


def _shifted(progress: Progress, n_before: int) -> Progress:
    return lambda n_done: progress(n_before + n_done)


# ---- in other processes ----

_of_process: tuple[Setup, Any] | None = None
"""What a process has been given at its start: the setup, and an array of how many requests each run has done."""


def _begin(setup: Setup, done: Any) -> None:
    global _of_process
    _of_process = setup, done


def _run_here(number: int, plan: Plan) -> Outcome:
    assert _of_process is not None
    setup, done = _of_process

    def tell(n_done: int) -> None:
        done[number] = n_done

    return _run(setup, plan, tell)


def _run_beside(
    setup: Setup, plans: Sequence[Plan], n_processes: int, progress: Callable[[int], None]
) -> list[Outcome]:
    context = get_context("spawn")
    done = context.RawArray("q", len(plans))
    try:
        with ProcessPoolExecutor(n_processes, context, initializer=_begin, initargs=(setup, done)) as pool:
            running = [pool.submit(_run_here, number, plan) for number, plan in enumerate(plans)]
            pending = set(running)
            while pending:
                _, pending = wait(pending, POLL_S)
                progress(sum(done))
            return [future.result() for future in running]
    except BrokenProcessPool as error:
        raise StartError(
            "A process of the simulation was killed, probably for its memory; simulate fewer blocks, or a smaller tier."
        ) from error
