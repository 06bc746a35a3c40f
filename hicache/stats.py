"""What the engine has done since its start. Written by the engine's thread; others may read a stale value."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Pages evicted from host memory to make room."""
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
    """Pages that were not given to it because too many were on their way already."""
    failed: int = 0
    """Pages that it did not take, or not all pages of their batch."""
