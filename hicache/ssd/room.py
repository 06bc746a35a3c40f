"""Room for pages: what quotas see of a store (`hicache.quotas`), and what leaves because of them.

A store grows before anything leaves, and a page that leaves gives its slot up only when the map has forgotten it. So
the slots that quotas go by are those that are there or can still be had, and free are also those of pages that have
left. Where the directory refuses to grow, the pages of tenants without a quota make do with what is there.

All of this but `keep_quotas` is under the volume's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hicache.quotas import OTHERS, Room
from hicache.ssd.volume import Volume

MAX_EVICTED: Final = 4096
"""Pages that leave in one hold of the lock: a millisecond or two."""


class _Slots:
    """A store's slots, as `quotas.Books`."""

    def __init__(self, volume: Volume) -> None:
        self._pages = volume.pages
        self._counters = volume.counters
        self.n_evicted = 0
        self._n_to_come = volume.n_to_come

    @property
    def n_slots(self) -> int:
        return self._pages.n_live - self._pages.n_bad + self._n_to_come

    @property
    def n_free(self) -> int:
        return self._pages.n_free + self._pages.n_dying + self._n_to_come

    def n_held(self, group: int) -> int:
        return self._pages.n_held(group)

    def evict(self, n_pages: int, group: int, *, for_quota: bool = False) -> None:
        if n_pages <= 0:
            return
        n_evicted = self._pages.evict(min(n_pages, MAX_EVICTED), group, for_quota=for_quota)
        self.n_evicted += n_evicted
        if for_quota:
            self._counters.evicted_quota += n_evicted
        else:
            self._counters.evicted += n_evicted


def make_room(volume: Volume, group: int, n_wanted: int) -> Room:
    """Have pages leave until so many of a group may be stored, or until no more can.

    Of the pages that the answer allows, those for which no slot is free yet have to wait: for a segment, or a commit.
    """
    return volume.quotas.make_room(group, n_wanted, _Slots(volume))


def keep_quotas(volume: Volume, n_pages: int) -> Iterator[None]:
    """Let what is above a quota leave, up to so many pages a step, each shortly under the lock, which this takes."""
    n_left = 1
    while n_left:
        with volume.lock:
            n_left = evict_above_quotas(volume, n_pages)
        yield


def evict_above_quotas(volume: Volume, n_pages: int) -> int:
    """Let up to so many pages leave that are above a quota, which has become smaller. Returns how many have left."""
    slots = _Slots(volume)
    for group in volume.quotas.groups:
        n_above = slots.n_held(group) - volume.quotas.limit(group)
        if group != OTHERS and n_above > 0:
            volume.pages.let_pass()
            slots.evict(min(n_above, n_pages - slots.n_evicted), group, for_quota=True)
    return slots.n_evicted
