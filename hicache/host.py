"""The host tier: which pages lie in which slots of the slab.

The bytes belong to the slab (`transfer`), the page's state to the index (`radix`); this file only moves slots between
the free list and the index, so that at every moment

    free + incoming + resident + lingering == capacity

and no slot has two owners. A slot lingers when its page was dropped, or given up, while a lower tier still read or
wrote it: it is nobody's until that has ended. Evictions happen here and only here, on demand, when slots are asked for:
there is no watermark to poll and no background thread to race with.

What others remember of a page while it is in host memory (`SlotFlags`) is kept with its slot and forgotten with it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hicache.stats import Stats
from radix import HOST, Index, Rows, State
from transfer.slots import SlotAllocator

Slots = NDArray[np.int32]


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

    def clear(self) -> None:
        self._flags[:] = False

    def forget(self, slots: Slots) -> None:
        """These slots get other pages."""
        self._flags[slots] = False


class HostTier:
    """Slots for pages. Owned by one thread (SGLang's scheduler thread); nothing here blocks."""

    def __init__(self, index: Index, n_slots: int, stats: Stats) -> None:
        self._index = index
        self._free = SlotAllocator(n_slots)
        self._stats = stats
        self.n_arrivals = 0
        """Times that pages on their way in have landed or were given up."""
        self._flags: list[SlotFlags] = []
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
        for flags in self._flags:
            flags.forget(slots)
        return admitted

    def land(self, rows: Rows) -> None:
        """The bytes of these incoming pages are in their slots."""
        self.n_arrivals += 1
        self._index.commit(rows, HOST)

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
