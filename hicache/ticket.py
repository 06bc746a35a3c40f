"""A ticket: what one waiting request has asked for, and how long it may wait for it.

    open -> WAIT while a page of it is still on its way into host memory, and not in HBM either
         -> GO   when all have landed or are known to be missing, or when the deadline has passed
    closed by admission, abort or reset, whichever comes first

A ticket leases every page of its path that host memory holds or is receiving, those that are in HBM as well: they may
leave HBM while the request waits, and SGLang asks only once. The verdict never goes back from GO to WAIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from radix import Rows


class Verdict(Enum):
    """What a waiting request is told."""

    WAIT = "wait"
    GO = "go"


@dataclass(slots=True, eq=False)
class Ticket:
    """Owned by the engine. `rows` are leased until the engine closes the ticket; empty if it holds no lease."""

    rows: Rows
    deadline_s: float
    verdict: Verdict
