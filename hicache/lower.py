"""The tiers below host memory, and what is under way between it and them: fetches up, spills down.

A fetch takes pages from whichever tiers have them (`hicache.probe`). Spills are each tier's own: what it is believed to
hold, what it is given and when (`hicache.write_policies`), what is on its way. So a tier that is full, fails or hangs
keeps nothing from the others.

What one rank alone can see of all this goes through `report` and `follow`, like everything that ranks have to agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from hicache.fetches import NO_ROWS, Fetch, Fetches
from hicache.host import HostTier, Slots
from hicache.quotas import QuotaError
from hicache.speed import PrefillSpeed
from hicache.spills import N_REPORTED as N_SPILLS_REPORTED
from hicache.spills import Spills
from hicache.stats import Observed, Stats
from hicache.tier import Tier, total
from hicache.write_policies import make_write_policy
from radix import KEY_NBYTES, Index, Rows

FETCH_SHARE = 0.5
"""How much of host memory may be on its way up at a time. A tier that hangs keeps it."""

SPILL_SHARE = 0.25
"""How much may be on its way down, to all tiers together: each has an equal part."""


@dataclass(frozen=True, slots=True)
class LowerTier:
    """A tier below host memory. write: the name of its write policy (`hicache.write_policies`)."""

    tier: Tier
    write: str = "through"


class Lower:
    """See the module's text. One thread, that of the engine.

    tiers: one or more, fastest first. batch_pages: the most that one call of a tier moves.
    only_if_faster: fetch only what the tiers are expected to load sooner than a prefill would compute it.
    timeout_s, clock: how long a load may take, and by what clock. tenant_of: whose path begins with a page.
    may_start, ended: as `Fetches` has them.
    Raises ValueError for a write policy that does not exist.
    """

    def __init__(
        self,
        tiers: Sequence[LowerTier],
        index: Index,
        host: HostTier,
        stats: Stats,
        observed: Observed,
        speed: PrefillSpeed,
        *,
        batch_pages: int,
        only_if_faster: bool,
        timeout_s: float,
        clock: Callable[[], float],
        tenant_of: Callable[[bytes], str],
        may_start: Callable[[int, int], bool],
        ended: Callable[[Fetch], None],
    ) -> None:
        self._index = index
        self._host = host
        self._speed = speed
        self._only_if_faster = only_if_faster
        up, down = int(host.n_slots * FETCH_SHARE), int(host.n_slots * SPILL_SHARE / len(tiers))
        self.spills = tuple(
            Spills(lower.tier, index, host, max_pages=down, batch_pages=batch_pages, tenant_of=tenant_of)
            for lower in tiers
        )
        self._policies = [
            make_write_policy(lower.write, spills, index, host)
            for lower, spills in zip(tiers, self.spills, strict=True)
        ]
        self.fetches = Fetches(
            self.tiers,
            index,
            host,
            stats,
            observed,
            max_pages=up,
            batch_pages=batch_pages,
            timeout_s=timeout_s,
            clock=clock,
            landed=self._fetched,
            tenant_of=tenant_of,
            may_start=may_start,
            ended=ended,
        )

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Fastest first."""
        return tuple(spills.tier for spills in self.spills)

    # ---- down ----

    def landed(self, row: int) -> None:
        """Pages down to this one have been computed, and have landed in host memory."""
        for policy in self._policies:
            policy.landed(row)

    def touched(self, held: Rows) -> None:
        """A request uses these pages, a path from the root that is in host memory or on its way into it."""
        if len(held):
            for policy in self._policies:
                policy.touched(int(held[-1]))

    def answered(self, row: int) -> None:
        """The request whose prompt ends with this page has its answer."""
        for policy in self._policies:
            policy.answered(row)

    def _fetched(self, rows: Rows) -> None:
        """These have landed, from below. Of several tiers each rank knows for itself only which it was: none counts."""
        if len(self.spills) == 1:
            self.spills[0].mark_given(rows)
        for policy in self._policies:
            policy.fetched(int(rows[-1]))

    # ---- up ----

    def open_fetch(self, keys: bytes, parent: bytes | None, held: Rows, *, is_kept: bool = True) -> Fetch | None:
        """Ask the tiers for what host memory lacks of a path, from the root on: it is closed under prefixes.

        keys: pages below the page `parent` (None: the root). held: the rows, from the root, of what host memory has.
        is_kept: it stays there; if not, the tiers are asked for that as well.
        None: there is nothing to ask for, or the index does not know the parent.
        """
        last_held = self._index.keys_of(held[-1:]) or None
        for spills in self.spills:
            deepest = spills.deepest_given(held) or last_held or parent
            if deepest is not None:
                spills.tier.touch(deepest)
        parent_row = None if parent is None else self._index.row_of(parent)
        if not keys or (parent is not None and parent_row is None):
            return None
        if not is_kept:
            held, last_held = NO_ROWS, None
        above = NO_ROWS if parent_row is None else self._index.path(parent_row)
        n_held, n_above = len(held), len(above)
        missing = self._index.keys_of(above[n_held:]) + keys[max(0, n_held - n_above) * KEY_NBYTES :]
        if not missing:
            return None
        return self.fetches.open(missing, last_held, depth=n_held, n_in_hbm=max(0, n_above - n_held))

    def _is_worth(self, fetch: Fetch, n_found: int) -> bool:
        if not self._only_if_faster:
            return True
        prefill_s = self._speed.predict(fetch.depth + fetch.n_in_hbm, fetch.depth + n_found)
        return prefill_s is None or fetch.probe.expected_load_s(n_found) <= prefill_s

    # ---- what ranks agree on ----

    @property
    def is_pending(self) -> bool:
        """Whether there is something to agree on. The same on all ranks."""
        return bool(len(self.fetches) or any(map(len, self.spills)))

    def report(self) -> list[int]:
        """What this rank sees of each tier's spills, then of the fetches: always equally many numbers. Never blocks."""
        if len(self.fetches):
            for tier in self.tiers:
                tier.health()  # one that hangs is noticed by those who ask
        spills = [state for spills in self.spills for state in spills.report()]
        return spills + self.fetches.report(self._is_worth)

    def follow(self, agreed: Sequence[int]) -> list[Fetch]:
        """Act on the minima over all ranks. Returns the fetches that have started."""
        for position, spills in enumerate(self.spills):
            spills.follow(agreed[position * N_SPILLS_REPORTED : (position + 1) * N_SPILLS_REPORTED])
        return self.fetches.follow(agreed[len(self.spills) * N_SPILLS_REPORTED :])

    # ---- life ----

    def replace(self, tiers: Sequence[Tier]) -> None:
        """From here on others, as many and in the same order. What the old ones have under way ends as ever."""
        for spills, tier in zip(self.spills, tiers, strict=True):
            spills.tier = tier
        self.fetches.tiers = self.tiers
        self._host.departures.forget_below()

    def set_quota(self, name: str, tenant: str, n_pages: int) -> None:
        """Give a tenant a quota on the tier of this name. Raises QuotaError, with nothing changed."""
        tier = next((tier for tier in self.tiers if tier.name == name), None)
        if tier is None:
            raise QuotaError(f"there is no {name} tier; there are: host, {', '.join(tier.name for tier in self.tiers)}")
        tier.set_quotas({tenant: n_pages})

    def clear(self) -> Future[int]:
        """Empty all tiers. Answers how many pages they had together."""
        for spills in self.spills:
            spills.forget()
        self._host.departures.forget_below()
        return total([tier.clear() for tier in self.tiers])

    def detach(self) -> list[Slots]:
        """All pages are dropped. Returns the slots that tiers may still write, then those that each may still read."""
        return [self.fetches.detach(), *(spills.detach() for spills in self.spills)]

    def settle(self, timeout_s: float) -> bool:
        """Block until the tiers have ended with everything, and end it by this rank's own knowledge.

        False: after timeout_s something was still under way, and is.
        """
        lines: tuple[Fetches | Spills, ...] = (self.fetches, *self.spills)
        self.fetches.ask_no_other()
        wait([future for line in lines for future in line.futures()], timeout_s)
        settled = [line.settle() for line in lines]
        return all(settled)

    def close(self) -> None:
        """Close the tiers. Blocks; what they have under way ends or is given up."""
        for tier in self.tiers:
            tier.close()
        self.settle(0)

    def check_invariants(self) -> None:
        self.fetches.check_invariants()
        for spills in self.spills:
            spills.check_invariants()
