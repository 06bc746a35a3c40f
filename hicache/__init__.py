"""Tiers below HBM and the policy that joins them: sees keys, slots and numbers, never tensors or SGLang objects."""

from hicache.engine import UNKNOWN, Engine, Offload, Restore
from hicache.host import HostTier
from hicache.lower import LowerTier
from hicache.null import NullTier
from hicache.pins import PinError
from hicache.prefills import Prefill
from hicache.quotas import QuotaError
from hicache.speed import PrefillSpeed
from hicache.ssd import SsdTier, StoreError
from hicache.stats import TIME_BOUNDS_S, Distribution, Movement, Observed, SpillStats, Stats
from hicache.ticket import Ticket, Verdict
from hicache.tier import Batch, Capacity, Health, Tier, TierError
from hicache.whereabouts import BELOW, Fate, Inquiry, Whereabouts
from hicache.write_policies import WRITE_POLICIES

__all__ = [
    "BELOW",
    "TIME_BOUNDS_S",
    "UNKNOWN",
    "WRITE_POLICIES",
    "Batch",
    "Capacity",
    "Distribution",
    "Engine",
    "Fate",
    "Health",
    "HostTier",
    "Inquiry",
    "LowerTier",
    "Movement",
    "NullTier",
    "Observed",
    "Offload",
    "PinError",
    "Prefill",
    "PrefillSpeed",
    "QuotaError",
    "Restore",
    "SpillStats",
    "SsdTier",
    "Stats",
    "StoreError",
    "Ticket",
    "Tier",
    "TierError",
    "Verdict",
    "Whereabouts",
]
