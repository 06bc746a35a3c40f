"""When a tier below host memory is given pages: its write policy, and the register of those there are.

    through      as soon as they are in host memory
    selective    when a second request uses them, or is expected to by what the eviction policy has learned
    back         before host memory evicts them

A policy is told what happens to pages in host memory and decides what is offered to its tier. Everything it decides
follows from the engine's calls, so all ranks of a server offer the same pages in the same order (`hicache.engine`).
What is offered goes down in the background, and nothing waits for it: eviction least of all.

To add one: a class that keeps this contract, and a line in `WRITE_POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from hicache.host import HostTier
from hicache.quotas import OTHERS
from hicache.spills import Spills
from hicache.tier import true_prefix
from radix import HOST, Index

EXPECTED: Final = 0.5
"""From this chance on, `selective` does not wait for the second use."""

CLEAN_SHARE: Final = 0.125
"""How much of host memory `back` keeps free, or ready to be dropped because its tier has been given it."""

MAX_CLEAN_PAGES: Final = 4096
"""The most of it: looking at so many pages takes some hundred microseconds."""

MAX_CLEANED: Final = 8
"""Paths that `back` offers in one call: more than a call brings into host memory."""


class WritePolicy(Protocol):
    """One tier's. The row is the deepest page of what it is about, and that path is in host memory, or on its way."""

    def landed(self, row: int) -> None:
        """Pages down to here have been computed, and have landed in host memory."""

    def fetched(self, row: int) -> None:
        """Pages down to here have been brought from one of the tiers below into host memory."""

    def touched(self, row: int) -> None:
        """A request uses the pages down to here, which others have brought into host memory."""

    def answered(self, row: int) -> None:
        """The request whose prompt ends with this page has its answer: all that is known of the page is known now."""


class Through:
    """See the module's text. Fetched pages are offered as well: that brings them from slower tiers into faster ones."""

    def __init__(self, spills: Spills, index: Index, host: HostTier) -> None:
        self._spills = spills

    def landed(self, row: int) -> None:
        self._spills.offer(row)

    def fetched(self, row: int) -> None:
        self._spills.offer(row)

    def touched(self, row: int) -> None:
        pass

    def answered(self, row: int) -> None:
        pass


class Selective:
    """See the module's text. A page that was fetched is used for a second time, since somebody has kept it.

    That a page was used is forgotten when it leaves host memory.
    """

    def __init__(self, spills: Spills, index: Index, host: HostTier) -> None:
        self._spills = spills
        self._index = index
        self._touched = host.new_flags()

    def landed(self, row: int) -> None:
        """Of these pages, those that were used while they were on their way."""
        path = self._index.path(row)
        n_touched = true_prefix(self._touched.of(path))
        if n_touched:
            self._spills.offer(int(path[n_touched - 1]))

    def fetched(self, row: int) -> None:
        self.touched(row)

    def touched(self, row: int) -> None:
        self._touched.put(self._index.path(row), True)
        self._spills.offer(row)

    def answered(self, row: int) -> None:
        if self._index.chance_of_reuse(row) >= EXPECTED:
            self._spills.offer(row)


class Back:
    """See the module's text. When pages come into host memory and it is nearly full, those next to be evicted go down.

    Host memory that takes in more at once than is kept clean drops the rest unwritten.
    """

    def __init__(self, spills: Spills, index: Index, host: HostTier) -> None:
        self._spills = spills
        self._index = index
        self._host = host

    def landed(self, row: int) -> None:
        self._clean()

    def fetched(self, row: int) -> None:
        self._clean()

    def touched(self, row: int) -> None:
        pass

    def answered(self, row: int) -> None:
        pass

    def _clean(self) -> None:
        for group in self._host.quotas.groups:
            self._clean_group(group)

    def _clean_group(self, group: int) -> None:
        """Tenants with a quota evict their own pages, so of each some are to be ready."""
        limit = self._host.quotas.limit(group)
        n_free = self._host.n_free if group == OTHERS else limit - self._index.held(HOST, group)
        n_next = max(1, min(int(limit * CLEAN_SHARE), MAX_CLEAN_PAGES)) - n_free
        if n_next <= 0:
            return
        dirty = self._index.eviction_order(n_next, HOST, group=group)
        for _ in range(MAX_CLEANED):
            dirty = dirty[~self._spills.given(dirty)]
            if not len(dirty) or not self._spills.n_room:
                return
            self._spills.offer(int(dirty[0]))
            dirty = dirty[1:]


WRITE_POLICIES: Final[Mapping[str, Callable[[Spills, Index, HostTier], WritePolicy]]] = {
    "through": Through,
    "selective": Selective,
    "back": Back,
}
"""By the name in the configuration; called with what stores pages in the tier."""


def make_write_policy(name: str, spills: Spills, index: Index, host: HostTier) -> WritePolicy:
    """Raises ValueError, naming the known policies, for any other."""
    if name not in WRITE_POLICIES:
        raise ValueError(f"unknown write policy {name!r}; there are: {', '.join(WRITE_POLICIES)}")
    return WRITE_POLICIES[name](spills, index, host)
