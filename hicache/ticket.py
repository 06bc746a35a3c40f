"""A ticket: what one waiting request has asked for, and whether it may be admitted.

    open -> WAIT while a page of it is still on its way into host memory, and not in HBM either, or may be below
         -> GO   when all have landed or are known to be missing, or when the ranks agree that its time is up
    closed by admission, abort or reset, whichever comes first

A ticket leases every page of its path that host memory holds or is receiving, those that are in HBM as well: they may
leave HBM while the request waits, and SGLang asks only once. All together may lease a part of host memory. A ticket for
which too little of it is left waits in a line, if tiers below have its pages, and gets leases and pages when others
have been admitted: to bring in pages that nobody keeps would be for nothing. The verdict never goes back from GO to
WAIT; a request whose ticket says GO may still stay in the queue behind the prefill of another (`hicache.prefills`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hicache.fetches import Fetch
from hicache.prefills import Prefill
from radix import Rows


class Verdict(Enum):
    """What a waiting request is told."""

    WAIT = "wait"
    GO = "go"


@dataclass(slots=True, eq=False)
class Ticket:
    """Owned by the engine. `rows` are leased until the engine closes the ticket; empty if it holds no lease."""

    rows: Rows
    prefill: Prefill
    fetch: Fetch | None = None
    """What it wants from a lower tier. Kept when it is over."""
    n_closed_then: int = 0
    """How many tickets had been closed when it was last seen to wait in the line beyond its time."""
    n_overdue: int = 0
    """How often it has been seen so, with none closed since."""
    verdict: Verdict = Verdict.GO

    @property
    def is_fetching(self) -> bool:
        return self.fetch is not None and not self.fetch.is_over

    @property
    def fetched(self) -> tuple[int, int]:
        """The half-open range of pages, from the root, that its fetch has brought so far, and that HBM did not have."""
        if self.fetch is None:
            return 0, 0
        end = self.fetch.start + self.fetch.n_landed
        return min(end, max(self.fetch.start, self.fetch.depth + self.fetch.n_in_hbm)), end
