"""One run: every request of a trace, one after the other, through the engine that a server runs.

What the server's cache does for a request is done here in the same order (`sgl_lmcache.cache`): its ticket is opened,
and waits until what the tiers below have is in host memory; it is admitted, looked up and restored; what it has
computed is offered for write-back, which takes it down to host memory and on to the tiers below. The index, the
policies, the write policies and all decisions are the server's own. Nothing is copied, and what takes time on a server
ends at once.

HBM keeps nothing from one request to the next: each page leaves it when its request is over. So the figures are those
of a server whose HBM is taken by others, and what HBM alone would have hit is among the host tier's hits.

The time to the first token is what the request would take on an idle machine:

    fetching from the tiers below, behind what they are reading already
    + restoring from host memory into HBM
    + computing what was not found, one token at least

Nothing waits for the accelerator, and a fetch that takes longer than `prefetch.timeout` is waited for all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hicache import Engine, LowerTier, Prefill, Ticket, Verdict
from radix import HOST, KEY_NBYTES, Index
from sgl_lmcache.config import Prefetch
from sgl_lmcache.simulate.machine import Machine
from sgl_lmcache.simulate.tier import SimulatedTier, TierCounters
from sgl_lmcache.simulate.trace import MAX_PROMPT_TOKENS, Trace

BATCH_PAGES = 256
"""At most so many pages go to or from a lower tier in one call."""

SPARE_ROWS = 1024
"""Of the index, beside those for all of host memory and for the longest prompt in HBM."""

PROGRESS_EVERY = 256
"""Requests."""

Progress = Callable[[int], None]
"""Told from time to time how many requests are done."""


@dataclass(frozen=True, slots=True)
class LowerPlan:
    """A tier below host memory. name: its type in the configuration. endurance_nbytes: the most that is written a
    day; None: as much as comes."""

    name: str
    n_pages: int
    write: str
    eviction: str
    endurance_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. n_slots: of host memory. policy: of host memory, a name of `radix.POLICIES`."""

    policy: str
    n_slots: int
    lower: tuple[LowerPlan, ...] = ()
    prefetch: Prefetch = field(default_factory=Prefetch)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Their names, fastest first."""
        return ("host", *(lower.name for lower in self.lower))

    @property
    def n_pages(self) -> int:
        """Of all tiers together."""
        return self.n_slots + sum(lower.n_pages for lower in self.lower)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run has come to. hits: int64[n, n_tiers], the blocks of each request that came from each tier. ttft_s:
    float64[n]. traffic: of each tier, for the requests that count."""

    hits: NDArray[np.int64]
    ttft_s: NDArray[np.float64]
    traffic: tuple[TierCounters, ...]


def replay(trace: Trace, plan: Plan, machine: Machine, *, count_from: int = 0, progress: Progress) -> Outcome:
    """Run the whole trace. The traffic of the requests from `count_from` on counts."""
    run = Replay(trace, plan, machine)
    hits = np.zeros((len(trace), len(plan.tiers)), np.int64)
    ttft_s = np.zeros(len(trace))
    before = run.traffic()
    for request in range(len(trace)):
        if request == count_from:
            before = run.traffic()
        hits[request], ttft_s[request] = run.serve(request)
        if request % PROGRESS_EVERY == 0:
            progress(request)
    progress(len(trace))
    traffic = tuple(_less(*counters) for counters in zip(run.traffic(), before, strict=True))
    return Outcome(hits, ttft_s, traffic)


def _less(now: TierCounters, before: TierCounters) -> TierCounters:
    return TierCounters(
        now.read - before.read,
        now.written - before.written,
        now.evicted - before.evicted,
        now.skipped - before.skipped,
    )


class Replay:
    """See the module's text. Requests are served in their order, each once."""

    def __init__(self, trace: Trace, plan: Plan, machine: Machine) -> None:
        self._trace = trace
        self._machine = machine
        self._keys = trace.keys()
        self._page_nbytes = machine.token_nbytes * trace.block_tokens
        self._now_s = 0.0
        self.tiers = [self._tier(lower) for lower in plan.lower]
        n_hbm_pages = MAX_PROMPT_TOKENS // trace.block_tokens
        self.engine = Engine(
            Index(
                plan.n_slots + n_hbm_pages + SPARE_ROWS,
                policies={HOST: plan.policy},
                n_pages=plan.n_slots,
                page_tokens=trace.block_tokens,
            ),
            plan.n_slots,
            clock=self._clock,
            ticket_timeout_s=0.0 if plan.prefetch.policy == "best_effort" else plan.prefetch.timeout,
            max_leased_share=1.0,
            tiers=[LowerTier(tier, lower.write) for tier, lower in zip(self.tiers, plan.lower, strict=True)],
            batch_pages=BATCH_PAGES,
            fetch_only_if_faster=plan.prefetch.policy == "auto",
            fetch_timeout_s=plan.prefetch.timeout,
        )

    def _tier(self, plan: LowerPlan) -> SimulatedTier:
        return SimulatedTier(
            plan.name,
            plan.n_pages,
            page_nbytes=self._page_nbytes,
            eviction=plan.eviction,
            model=self._machine.tiers[plan.name],
            clock=self._clock,
            endurance_nbytes=plan.endurance_nbytes,
        )

    def _clock(self) -> float:
        return self._now_s

    def serve(self, request: int) -> tuple[Sequence[int], float]:
        """How many blocks of the request came from each tier, and the seconds to its first token."""
        trace = self._trace
        self._now_s = float(trace.times_s[request])
        blocks = trace.blocks[trace.starts[request] : trace.starts[request + 1]]
        n_tokens = int(trace.input_tokens[request])
        if not len(blocks):
            return [0] * (1 + len(self.tiers)), self._machine.prefill_s(0, max(1, n_tokens))
        keys = self._keys[blocks].tobytes()
        n_read_before = [tier.counters.read for tier in self.tiers]
        ticket = self._wait(keys)
        n_read = [tier.counters.read - before for tier, before in zip(self.tiers, n_read_before, strict=True)]
        n_hit, prefill = self._restore(ticket, keys)
        fetched = _shares(n_read, min(n_hit, ticket.fetched[1]) - ticket.fetched[0])
        computing_s = self._compute(n_hit, n_tokens)
        self._write_back(keys, n_hit)
        self.engine.tick()
        self.engine.end_prefill(prefill, n_answer_tokens=int(trace.output_tokens[request]))
        self._settle()
        self.engine.hbm_evicted(keys)
        restoring_s = self._machine.restore_s(n_hit * self._page_nbytes)
        return [n_hit - sum(fetched), *fetched], self._fetching_s(fetched) + restoring_s + computing_s

    def traffic(self) -> tuple[TierCounters, ...]:
        """Of each tier, since the start. Host memory is read by restores, and written by write-back and by fetches."""
        stats = self.engine.stats
        host = TierCounters(
            read=stats.restored,
            written=stats.offloaded + stats.fetched,
            evicted=stats.evicted,
            skipped=stats.skipped_full,
        )
        below = () if self.engine.below is None else self.engine.below.spills
        lower = [
            TierCounters(
                tier.counters.read,
                tier.counters.written,
                tier.counters.evicted,
                tier.counters.skipped + spills.stats.skipped,
            )
            for tier, spills in zip(self.tiers, below, strict=True)
        ]
        return (host, *lower)

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything: for tests."""
        self.engine.check_invariants()
        for tier in self.tiers:
            tier.check_invariants()

    # ---- what a request goes through ----

    def _wait(self, keys: bytes) -> Ticket:
        """It arrives, and waits for what is fetched for it."""
        ticket = self.engine.open_ticket(keys, None)
        while ticket.verdict is Verdict.WAIT:
            self._agree()
        return ticket

    def _restore(self, ticket: Ticket, keys: bytes) -> tuple[int, Prefill]:
        """It is admitted, and what host memory has goes into HBM. Returns how many pages that are, and its prefill."""
        is_admitted = self.engine.admit(ticket)
        assert is_admitted, "a request waits for another, and there is none beside it"
        n_hit = self.engine.lookup(keys)
        restore = self.engine.begin_restore(keys[: n_hit * KEY_NBYTES]) if n_hit else None
        prefill = self.engine.launch(ticket)
        if restore is not None:
            self.engine.finish_restore(restore, copied=True)
        return n_hit, prefill

    def _compute(self, n_hit: int, n_tokens: int) -> float:
        """The seconds that the rest of the prompt takes; the engine learns from them what a fetch has to beat."""
        block_tokens = self._trace.block_tokens
        seconds = self._machine.prefill_s(min(n_hit * block_tokens, n_tokens - 1), n_tokens)
        if self.tiers:
            self.engine.prefill_speed.observe([(n_hit, -(-n_tokens // block_tokens))], seconds)
        return seconds

    def _write_back(self, keys: bytes, n_hit: int) -> None:
        """What was computed is offered to host memory, and from there to the tiers below."""
        at = n_hit * KEY_NBYTES
        if at < len(keys):
            offload = self.engine.begin_offload(keys[at:], keys[at - KEY_NBYTES : at] or None)
            if offload is not None:
                self.engine.finish_offload(offload, landed=True)
        self._settle()

    def _settle(self) -> None:
        """What has been asked of the tiers below ends."""
        while self.engine.is_pending:
            self._agree()

    def _agree(self) -> None:
        """Once a scheduler iteration, the one rank there is does what it has seen."""
        self.engine.follow(self.engine.report(decides=True))

    def _fetching_s(self, fetched: Sequence[int]) -> float:
        """Until the tiers from which it came have read what it waited for."""
        ends = [tier.read_until_s for tier, n_pages in zip(self.tiers, fetched, strict=True) if n_pages]
        return max(ends, default=self._now_s) - self._now_s


def _shares(n_read: Sequence[int], n_fetched: int) -> list[int]:
    """How many pages each tier brought of those that a request hit. Faster tiers bring what is nearer to the root."""
    shares = []
    for n_pages in n_read:
        shares.append(min(n_pages, max(0, n_fetched)))
        n_fetched -= shares[-1]
    return shares
