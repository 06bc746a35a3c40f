"""The tier-aware radix index: which page of KV is on which tier. Pure logic over key blobs; no I/O, no threads.

`index.py` is the door. Behind it: `residency.py` (states and transitions), `columns.py` (memory), `kernels.py`
(compiled loops), `audit.py` (the invariants). Who goes first: `policy.py` (the contract), `queues.py` (what policies
are made of), `policies.py` (the register), and a file a policy.
"""

from radix.columns import ROOT, Rows
from radix.errors import IllegalTransition, IndexFull, NotLeased, RadixError, StillHeld
from radix.index import KEY_NBYTES, MAX_GROUPS, Evicted, Index
from radix.policies import POLICIES
from radix.policy import Policy
from radix.residency import ABSENT, HBM, HOST, INCOMING, MAX_TIERS, RESIDENT, State

__all__ = [
    "ABSENT",
    "HBM",
    "HOST",
    "INCOMING",
    "KEY_NBYTES",
    "MAX_GROUPS",
    "MAX_TIERS",
    "POLICIES",
    "RESIDENT",
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
