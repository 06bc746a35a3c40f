"""What the engine has done since its start. Written by the engine's thread; others may read a stale value.

`Stats` follow from the calls alone, so they are the same on every rank of a server. `Observed` is what this rank has
seen of clocks and tiers: nothing is decided by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

TIME_BOUNDS_S: Final = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 7 * 86400)
"""From a second to a week: what lives and comes back in a cache."""

MAX_MOVEMENTS: Final = 1024
"""Of which nobody has asked: the oldest are forgotten first."""


@dataclass(slots=True)
class Stats:
    """Counters in pages unless said otherwise."""

    offered: int = 0
    """Pages that SGLang offered for write-back."""
    deduplicated: int = 0
    """Offered pages that host memory held already, or that were on their way into it."""
    offloaded: int = 0
    """Pages whose copy into host memory has landed."""
    failed: int = 0
    """Pages whose copy into host memory failed: they stay in HBM only."""
    skipped_full: int = 0
    """Offered pages for which no slot could be had: all were leased or in use by the current pass."""
    skipped_pressure: int = 0
    """Offered pages that were not queued because too many bytes were waiting to be copied."""
    skipped_tainted: int = 0
    """Offered pages that were not kept because new weights had come in and nothing had been dropped yet."""
    evicted: int = 0
    """Pages evicted from host memory to make room, those of `evicted_quota` included."""
    evicted_quota: int = 0
    """Pages that were evicted though there was room, because a quota was theirs or took it from them."""
    flushed: int = 0
    """Pages that host memory dropped in a reset."""
    hbm_evicted: int = 0
    """Pages that SGLang evicted from HBM."""
    hbm_flushed: int = 0
    """Pages that HBM dropped in a reset."""
    restored: int = 0
    """Pages promised to SGLang and copied back into HBM."""
    fetched: int = 0
    """Pages that came from a lower tier into host memory, verified."""
    fetch_missed: int = 0
    """Pages that a lower tier said it had, and that none has brought: damaged, gone, or the tier failed."""
    fetches_declined: int = 0
    """Times that pages were computed, all or some, because loading them would have taken longer (not pages)."""
    lookups: int = 0
    """Calls of lookup (not pages)."""
    tickets: int = 0
    """Tickets opened (not pages)."""
    tickets_expired: int = 0
    """Tickets whose deadline passed before their pages had landed (not pages)."""
    tickets_unleased: int = 0
    """Tickets opened without leases because waiting requests already held their share of host memory (not pages)."""
    followers: int = 0
    """Times that a request began to wait for pages that another was computing (not pages)."""
    followers_expired: int = 0
    """Times that such a wait took too long and was given up (not pages)."""
    resets: int = 0
    """Times that everything was dropped (not pages)."""


@dataclass(slots=True)
class SpillStats:
    """What has been given to one lower tier. In pages."""

    spilled: int = 0
    """Pages that the tier has taken."""
    skipped: int = 0
    """Pages that were not given to it because too many were on their way, for as long as host memory had them."""
    failed: int = 0
    """Pages that it did not take, or not all pages of their batch."""


class Distribution:
    """How many values were up to each of some bounds, and their sum. bounds: ascending. One thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = np.array(bounds, np.float64)
        self.counts = np.zeros(len(bounds) + 1, np.int64)
        """`counts[i]`: of values above `bounds[i - 1]` and up to `bounds[i]`; the last of those above all."""
        self.total = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        self.counts += np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts))
        self.total += float(values.sum())


@dataclass(frozen=True, slots=True)
class Movement:
    """Pages that came up from a tier (`host`: into HBM) together, and the seconds from the first's start to their end.

    Other pages may have come at the same time.
    """

    tier: str
    n_pages: int
    seconds: float


def _times() -> Distribution:
    return Distribution(TIME_BOUNDS_S)


@dataclass(slots=True, eq=False)
class Observed:
    """See the module's text. Times of pages are counted page by page, in seconds."""

    age_s: Distribution = field(default_factory=_times)
    """How long pages had been in host memory when they were evicted."""
    idle_s: Distribution = field(default_factory=_times)
    """How long nobody had asked for pages when they were evicted from host memory."""
    reuse_gap_s: Distribution = field(default_factory=_times)
    """Of pages in host memory that a request asked for: how long before it another had, or they had come."""
    movements: deque[Movement] = field(default_factory=lambda: deque(maxlen=MAX_MOVEMENTS))
    """New ones at the right. Whoever reads them takes them out."""
    fetches_absent: int = 0
    """Times that the tiers were asked and had nothing (these and the next are not pages)."""
    fetches_loaded: int = 0
    """Times that everything that the tiers had was to be loaded."""
    fetches_shortened: int = 0
    """Times that only the head of what they had was to be loaded: computing the rest was expected to be faster."""
    fetches_recomputed: int = 0
    """Times that nothing of what they had was to be loaded, because computing it was expected to be faster."""
