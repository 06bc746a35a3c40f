"""The tier-aware radix index: which page of KV is on which tier. Pure logic over key blobs; no I/O, no threads.

`index.py` is the door. Behind it: `residency.py` (states and transitions), `columns.py` (memory), `kernels.py`
(compiled loops), `policy.py` and `lru.py` (who goes first), `audit.py` (the invariants).
"""

from radix.columns import ROOT, Rows
from radix.errors import IllegalTransition, IndexFull, NotLeased, RadixError, StillHeld
from radix.index import KEY_NBYTES, Evicted, Index
from radix.policy import POLICIES, Policy
from radix.residency import HBM, HOST, MAX_TIERS, State

__all__ = [
    "HBM",
    "HOST",
    "KEY_NBYTES",
    "MAX_TIERS",
    "POLICIES",
    "ROOT",
    "Evicted",
    "IllegalTransition",
    "Index",
    "IndexFull",
    "NotLeased",
    "Policy",
    "RadixError",
    "Rows",
    "State",
    "StillHeld",
]
