"""The tier below host memory, and what is under way between the two: fetches up, spills down.

What one rank alone can see of it goes through `report` and `follow`, like everything that ranks have to agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Final

from hicache.fetches import NO_ROWS, Fetch, Fetches
from hicache.fetches import REPORT_SIZE as FETCH_REPORT_SIZE
from hicache.host import HostTier, Slots
from hicache.speed import PrefillSpeed
from hicache.spills import N_REPORTED as N_SPILLS_REPORTED
from hicache.spills import Spills
from hicache.stats import Stats
from hicache.tier import Tier
from radix import KEY_NBYTES, Index, Rows

REPORT_SIZE: Final = N_SPILLS_REPORTED + FETCH_REPORT_SIZE
"""Numbers in a report: those of the spills, then those of the fetches."""

FETCH_SHARE = 0.5
"""How much of host memory may be on its way up at a time. A disk that hangs keeps it."""

SPILL_SHARE = 0.25
"""How much may be on its way down."""


class Lower:
    """See the module's text. One thread, that of the engine.

    batch_pages: the most that one call of the tier moves.
    only_if_faster: fetch only what the tier is expected to load sooner than a prefill would compute it.
    timeout_s, clock: how long a load may take, and by what clock.
    """

    def __init__(
        self,
        tier: Tier,
        index: Index,
        host: HostTier,
        stats: Stats,
        speed: PrefillSpeed,
        *,
        batch_pages: int,
        only_if_faster: bool,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self._index = index
        self._speed = speed
        self._only_if_faster = only_if_faster
        up, down = int(host.n_slots * FETCH_SHARE), int(host.n_slots * SPILL_SHARE)
        self.fetches = Fetches(
            tier, index, host, stats, max_pages=up, batch_pages=batch_pages, timeout_s=timeout_s, clock=clock
        )
        self.spills = Spills(tier, index, host, stats, max_pages=down, batch_pages=batch_pages)

    def open_fetch(self, keys: bytes, parent: bytes | None, held: Rows) -> Fetch | None:
        """Ask the tier for what host memory lacks of a path, from the root on: host memory is closed under prefixes.

        keys: pages below the page `parent` (None: the root). held: the rows, from the root, of what host memory has.
        None: there is nothing to ask for, or the index does not know the parent.
        """
        last_held = self._index.keys_of(held[-1:]) or None
        deepest = last_held or parent
        if deepest is not None:
            self.tier.touch(deepest)
        parent_row = None if parent is None else self._index.row_of(parent)
        if not keys or (parent is not None and parent_row is None):
            return None
        above = NO_ROWS if parent_row is None else self._index.path(parent_row)
        n_held, n_above = len(held), len(above)
        missing = self._index.keys_of(above[n_held:]) + keys[max(0, n_held - n_above) * KEY_NBYTES :]
        if not missing:
            return None
        return self.fetches.open(missing, last_held, depth=n_held, n_in_hbm=max(0, n_above - n_held))

    @property
    def is_pending(self) -> bool:
        """Whether there is something to agree on. The same on all ranks."""
        return bool(len(self.fetches) or len(self.spills))

    def report(self) -> list[int]:
        """`REPORT_SIZE` numbers. Never blocks."""
        if len(self.fetches):
            self.tier.health()  # a disk that hangs is noticed by those who ask
        return [*self.spills.report(), *self.fetches.report(self._is_worth)]

    def follow(self, agreed: Sequence[int]) -> list[Fetch]:
        """Act on the minima over all ranks. Returns the fetches that have started."""
        self.spills.follow(agreed[:N_SPILLS_REPORTED])
        return self.fetches.follow(agreed[N_SPILLS_REPORTED:])

    def _is_worth(self, fetch: Fetch, n_found: int) -> bool:
        if not self._only_if_faster:
            return True
        prefill_s = self._speed.predict(fetch.depth + fetch.n_in_hbm, fetch.depth + n_found)
        return prefill_s is None or self.tier.expected_load_s(n_found) <= prefill_s

    # ---- life ----

    def replace(self, tier: Tier) -> None:
        """From here on another tier. What the old one has under way ends as ever."""
        self.tier = self.fetches.tier = self.spills.tier = tier

    def detach(self) -> list[Slots]:
        """All pages are dropped. Returns the slots that the tier may still read or write."""
        return [self.fetches.detach(), self.spills.detach()]

    def settle(self, timeout_s: float) -> bool:
        """Block until the tier has ended with everything, and end it by this rank's own knowledge.

        False: after timeout_s something was still under way, and is.
        """
        wait([*self.fetches.futures(), *self.spills.futures()], timeout_s)
        settled = [self.fetches.settle(), self.spills.settle()]
        return all(settled)

    def check_invariants(self) -> None:
        self.fetches.check_invariants()
        self.spills.check_invariants()
