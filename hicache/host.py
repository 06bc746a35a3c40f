"""The host tier: which pages lie in which slots of the slab.

The bytes belong to the slab (`transfer`), the page's state to the index (`radix`); this file only moves slots between
the free list and the index, so that at every moment

    free + incoming + resident + lingering == capacity

and no slot has two owners. A slot lingers when its page was dropped, or given up, while a lower tier still read or
wrote it: it is nobody's until that has ended. Evictions happen here and only here, on demand, when slots are asked for:
there is no watermark to poll and no background thread to race with.

Of each page it is kept whether a lower tier is known to have it, or is about to. That is a hint, which the tier's own
evictions make stale; so it is kept with the slot and forgotten with it. The tier knows best.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hicache.stats import Stats
from radix import HOST, Index, Rows, State
from transfer.slots import SlotAllocator

Slots = NDArray[np.int32]


class HostTier:
    """Slots for pages. Owned by one thread (SGLang's scheduler thread); nothing here blocks."""

    def __init__(self, index: Index, n_slots: int, stats: Stats) -> None:
        self._index = index
        self._free = SlotAllocator(n_slots)
        self._stats = stats
        self.n_arrivals = 0
        """Times that pages on their way in have landed or were given up."""
        self._stored_below = np.zeros(n_slots, dtype=np.bool_)
        self._lingering = np.zeros(n_slots, dtype=np.int32)
        """How many reads and writes of a lower tier still hold a slot that has lost its page."""
        self.n_slots = n_slots

    def admit(self, rows: Rows) -> Rows:
        """Give slots to these absent pages and mark them incoming, evicting others where needed.

        Returns the head of `rows` that got slots: all of it, unless leases and the current pass hold the rest.
        Pages touched in the current tick are never evicted, so the caller touches the path it is extending first.
        """
        shortfall = len(rows) - self._free.n_free
        if shortfall > 0:
            evicted = self._index.evict(shortfall, HOST)
            self._free.give(evicted.slots)
            self._stats.evicted += len(evicted.slots)
        admitted = rows[: self._free.n_free]
        slots = self._free.take(len(admitted))
        assert slots is not None
        self._index.begin(admitted, HOST, slots)
        self._stored_below[slots] = False
        return admitted

    def land(self, rows: Rows, *, stored_below: bool = False) -> None:
        """The bytes of these incoming pages are in their slots. stored_below: they came from a lower tier."""
        self.n_arrivals += 1
        self._index.commit(rows, HOST)
        self.mark_stored_below(rows, stored_below)

    def abandon(self, rows: Rows) -> None:
        """The bytes of these incoming pages will not come: their slots are free again."""
        self.n_arrivals += 1
        self._free.give(self._index.abort(rows, HOST))

    def slots(self, rows: Rows) -> Slots:
        """int32[n], where the bytes of these pages are."""
        return self._index.slots(rows)

    def held(self, rows: Rows) -> NDArray[np.bool_]:
        """bool[n]: in host memory, or on its way into it."""
        held: NDArray[np.bool_] = self._index.states(rows, HOST) != State.ABSENT
        return held

    def is_stored_below(self, rows: Rows) -> NDArray[np.bool_]:
        """bool[n], of pages that are held: whether a lower tier has them or has been given them, as far as known."""
        return self._stored_below[self.slots(rows)]

    def mark_stored_below(self, rows: Rows, stored: bool) -> None:
        """Remember that of pages that are held."""
        self._stored_below[self.slots(rows)] = stored

    def linger(self, slots: Slots) -> None:
        """These slots have lost their pages while a lower tier writes them."""
        self.n_arrivals += 1
        self._lingering[slots] += 1

    def forget_what_is_below(self) -> None:
        """The lower tier has been emptied."""
        self._stored_below[:] = False

    def end_lingering(self, slots: Slots) -> None:
        """One read or write of these lingering slots has ended. Those of which it was the last are free."""
        self._lingering[slots] -= 1
        self._free.give(slots[self._lingering[slots] == 0])

    @property
    def n_free(self) -> int:
        return self._free.n_free

    @property
    def n_resident(self) -> int:
        return self._index.count(HOST, State.RESIDENT)

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
        incoming = self._index.count(HOST, State.INCOMING)
        n_lingering = int(np.count_nonzero(self._lingering))
        total = self._free.n_free + incoming + self.n_resident + n_lingering
        assert total == self.n_slots, (
            f"slots are not conserved: {self._free.n_free} free + {incoming} incoming + {self.n_resident} resident + "
            f"{n_lingering} lingering is {total}, capacity is {self.n_slots}"
        )
