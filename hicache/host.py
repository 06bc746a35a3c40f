"""The host tier: which pages lie in which slots of the slab.

The bytes belong to the slab (`transfer`), the page's state to the index (`radix`); this file only moves slots between
the free list and the index, so that at every moment

    free + incoming + resident + lingering == capacity

and no slot has two owners. A slot lingers when its page was dropped, or given up, while a lower tier still read or
wrote it: it is nobody's until that has ended. Evictions happen here and only here, on demand, when slots are asked for:
there is no watermark to poll and no background thread to race with.

What others remember of a page while it is in host memory (`SlotFlags`) is kept with its slot and forgotten with it. So
are two times, when the page came and when it was last asked for: they decide nothing, and are what operators see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.quotas import Quotas
from hicache.stats import Observed, Stats
from radix import ABSENT, HOST, INCOMING, RESIDENT, Index, Rows
from radix.departures import CAPACITY, QUOTA, Departures
from transfer.slots import SlotAllocator

Slots = NDArray[np.int32]

MAX_GIVEN: Final = 8
"""So many tiers below are told apart in what is remembered of pages that have left."""


MIN_REMEMBERED: Final = 2048
"""Of so many pages it is remembered what became of them, however few are held."""


class SlotFlags:
    """One flag for each page that is held, forgotten when its slot gets another page. Made by `HostTier.new_flags`."""

    def __init__(self, index: Index, n_slots: int) -> None:
        self._index = index
        self._flags = np.zeros(n_slots, dtype=np.bool_)

    def of(self, rows: Rows) -> NDArray[np.bool_]:
        """bool[n]: the flags; False for pages that are not held."""
        slots = self._index.slots(rows)
        flags: NDArray[np.bool_] = self._flags[slots] & (slots >= 0)
        return flags

    def put(self, rows: Rows, value: bool) -> None:
        """Set the flags of those of these pages that are held."""
        slots = self._index.slots(rows)
        self._flags[slots[slots >= 0]] = value

    def at(self, slots: Slots) -> NDArray[np.bool_]:
        """bool[n]: the flags of the pages that are in these slots, or were last."""
        return self._flags[slots]

    def clear(self) -> None:
        self._flags[:] = False

    def forget(self, slots: Slots) -> None:
        """These slots get other pages."""
        self._flags[slots] = False


class HostTier:
    """Slots for pages. Owned by one thread (SGLang's scheduler thread); nothing here blocks.

    clock: seconds, for what is observed; nothing is decided by it.
    """

    def __init__(
        self, index: Index, n_slots: int, stats: Stats, observed: Observed, clock: Callable[[], float]
    ) -> None:
        self._index = index
        self._free = SlotAllocator(n_slots)
        self._stats = stats
        self._observed = observed
        self._clock = clock
        self._came_s = np.zeros(n_slots)
        self._asked_s = np.zeros(n_slots)
        self.n_arrivals = 0
        """Times that pages on their way in have landed or were given up."""
        self._flags: list[SlotFlags] = []
        self._lingering = np.zeros(n_slots, dtype=np.int32)
        """How many reads and writes of a lower tier still hold a slot that has lost its page."""
        self.n_slots = n_slots
        self.quotas = Quotas(n_slots)
        self.departures = Departures(max(n_slots, MIN_REMEMBERED))
        self.given: list[SlotFlags] = []
        """By tier below, fastest first: the pages that it has been given."""

    def admit(self, rows: Rows) -> Rows:
        """Give slots to these absent pages of one path and mark them incoming, evicting others where needed.

        Returns the head of `rows` that got slots: all of it, unless leases, the current pass and quotas hold the rest.
        Pages touched in the current tick are never evicted, so the caller touches the path it is extending first.
        """
        if not len(rows):
            return rows
        group = int(self._index.groups(rows[:1])[0])
        admitted = rows[: self.quotas.make_room(group, len(rows), self).n_pages]
        slots = self._free.take(len(admitted))
        assert slots is not None
        self._index.begin(admitted, HOST, slots)
        for flags in self._flags:
            flags.forget(slots)
        self._came_s[slots] = self._asked_s[slots] = self._clock()
        return admitted

    def asked(self, rows: Rows) -> None:
        """A request asks for these pages, which are held."""
        if not len(rows):
            return
        slots, now_s = self.slots(rows), self._clock()
        self._observed.reuse_gap_s.add(now_s - self._asked_s[slots])
        self._asked_s[slots] = now_s

    def evict(self, n_pages: int, group: int, *, for_quota: bool = False) -> None:
        """Take up to so many pages of a group out, in the order of the policy (`quotas.Books`)."""
        if n_pages <= 0:
            return
        evicted = self._index.evict(n_pages, HOST, group=group)
        slots, now_s = evicted.slots, self._clock()
        self.departures.left(evicted.keys, HOST, QUOTA if for_quota else CAPACITY, now_s, self._given_to(slots))
        self._free.give(slots)
        self._stats.evicted += len(slots)
        self._stats.evicted_quota += len(slots) if for_quota else 0
        self._observed.age_s.add(now_s - self._came_s[slots])
        self._observed.idle_s.add(now_s - self._asked_s[slots])

    def set_quota(self, tenant: str, n_pages: int) -> None:
        """Let a tenant's pages hold so many slots; what it has above that is evicted. Raises QuotaError."""
        group = self.quotas.set(tenant, n_pages)
        self.evict(self.n_held(group) - n_pages, group, for_quota=True)

    def _given_to(self, slots: Slots) -> NDArray[np.uint8]:
        """uint8[n]: bit i is set if the tier that is i-th below has been given the page that was in the slot."""
        below = np.zeros(len(slots), np.uint8)
        for position, given in enumerate(self.given[:MAX_GIVEN]):
            below |= given.at(slots).view(np.uint8) << np.uint8(position)
        return below

    def land(self, rows: Rows, *, is_passing: bool = False) -> None:
        """The bytes of these incoming pages are in their slots. is_passing: from below, for one request (`Index`)."""
        self.n_arrivals += 1
        self._index.commit(rows, HOST, is_passing=is_passing)
        if is_passing:  # others have been in HBM, where the engine has seen them
            self.departures.came(self._index.keys_of(rows), HOST, self._clock())

    def abandon(self, rows: Rows) -> None:
        """The bytes of these incoming pages will not come: their slots are free again."""
        self.n_arrivals += 1
        self._free.give(self._index.abort(rows, HOST))

    def slots(self, rows: Rows) -> Slots:
        """int32[n], where the bytes of these pages are."""
        return self._index.slots(rows)

    def held(self, rows: Rows) -> NDArray[np.bool_]:
        """bool[n]: in host memory, or on its way into it."""
        held: NDArray[np.bool_] = self._index.states(rows, HOST) != ABSENT
        return held

    def new_flags(self) -> SlotFlags:
        """Something to remember of each page, False at first; for as long as this object lives."""
        flags = SlotFlags(self._index, self.n_slots)
        self._flags.append(flags)
        return flags

    def linger(self, slots: Slots) -> None:
        """These slots have lost their pages while a lower tier writes them."""
        self.n_arrivals += 1
        self._lingering[slots] += 1

    def end_lingering(self, slots: Slots) -> None:
        """One read or write of these lingering slots has ended. Those of which it was the last are free."""
        self._lingering[slots] -= 1
        self._free.give(slots[self._lingering[slots] == 0])

    @property
    def n_free(self) -> int:
        return self._free.n_free

    @property
    def n_resident(self) -> int:
        return self._index.count(HOST, RESIDENT)

    @property
    def n_incoming(self) -> int:
        return self._index.count(HOST, INCOMING)

    @property
    def n_lingering(self) -> int:
        return self.n_slots - self.n_free - self.n_incoming - self.n_resident

    def n_held(self, group: int) -> int:
        """How many slots the pages of a group hold."""
        return self._index.held(HOST, group)

    def clear(self, lingering: Slots) -> None:
        """All slots are free but these, of which one is named once for each read or write that holds it.

        The index must have been cleared: nothing may be leased or incoming.
        """
        self._lingering[:] = 0
        np.add.at(self._lingering, lingering, 1)
        self._free = SlotAllocator(self.n_slots, taken=np.flatnonzero(self._lingering))

    def check_invariants(self) -> None:
        """The conservation law of this file; raises AssertionError that names the sum."""
        self._free.check_invariants()
        incoming = self._index.count(HOST, INCOMING)
        n_lingering = int(np.count_nonzero(self._lingering))
        total = self._free.n_free + incoming + self.n_resident + n_lingering
        assert total == self.n_slots, (
            f"slots are not conserved: {self._free.n_free} free + {incoming} incoming + {self.n_resident} resident + "
            f"{n_lingering} lingering is {total}, capacity is {self.n_slots}"
        )
