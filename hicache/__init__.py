"""Tiers below HBM and the policy that joins them: sees keys, slots and numbers, never tensors or SGLang objects."""

from hicache.engine import UNKNOWN, Engine, Offload, Restore
from hicache.host import HostTier
from hicache.lower import LowerTier
from hicache.null import NullTier
from hicache.prefills import Prefill
from hicache.speed import PrefillSpeed
from hicache.ssd import SsdTier, StoreError
from hicache.stats import SpillStats, Stats
from hicache.ticket import Ticket, Verdict
from hicache.tier import Batch, Capacity, Health, Tier, TierError
from hicache.write_policies import WRITE_POLICIES

__all__ = [
    "UNKNOWN",
    "WRITE_POLICIES",
    "Batch",
    "Capacity",
    "Engine",
    "Health",
    "HostTier",
    "LowerTier",
    "NullTier",
    "Offload",
    "Prefill",
    "PrefillSpeed",
    "Restore",
    "SpillStats",
    "SsdTier",
    "Stats",
    "StoreError",
    "Ticket",
    "Tier",
    "TierError",
    "Verdict",
]
