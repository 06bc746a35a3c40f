"""The index in dictionaries, as slowly and plainly as it can be said, and keys made to collide."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from radix import HOST, IllegalTransition, NotLeased, State

N_TIERS = 4
LEGAL = {
    "begin": ({State.ABSENT}, State.INCOMING),
    "commit": ({State.INCOMING}, State.RESIDENT),
    "abort": ({State.INCOMING}, State.ABSENT),
    "drop": ({State.RESIDENT}, State.ABSENT),
    "put": ({State.ABSENT, State.RESIDENT}, State.RESIDENT),
}


def page_keys(path: str, n_homes: int = 2**64) -> list[bytes]:
    """A key for each page of a path, covering all pages before it. Few homes make the hash table collide."""
    keys = []
    for end in range(1, len(path) + 1):
        digest = hashlib.sha256(path[:end].encode()).digest()
        home = int.from_bytes(digest[:8], "little") % n_homes
        keys.append(home.to_bytes(8, "little") + digest[8:])
    return keys


@dataclass
class Page:
    parent: bytes | None
    last_use: int
    states: list[State] = field(default_factory=lambda: [State.ABSENT] * N_TIERS)
    slot: int = -1
    leases: int = 0


class Model:
    """Pages by key. `order` holds the resident pages of each tier that is evicted by `lru`, oldest first.

    `parked` are those that were met in that order and had children.
    """

    def __init__(self, capacity: int, policy_tiers: tuple[int, ...]) -> None:
        self.capacity = capacity
        self.now = 0
        self.pages: dict[bytes, Page] = {}
        self.order: dict[int, list[bytes]] = {tier: [] for tier in policy_tiers}
        self.parked: dict[int, list[bytes]] = {tier: [] for tier in policy_tiers}

    def known_prefix(self, keys: list[bytes]) -> list[bytes]:
        n = next((i for i, key in enumerate(keys) if key not in self.pages), len(keys))
        return keys[:n]

    def insert(self, keys: list[bytes], parent: bytes | None) -> bool:
        """False if there is no room, and then nothing has changed."""
        if len([key for key in keys if key not in self.pages]) > self.capacity - len(self.pages):
            return False
        for key in keys:
            self.pages.setdefault(key, Page(parent, self.now))
            parent = key
        return True

    def change(self, name: str, keys: list[bytes], tier: int, slots: list[int] | None = None) -> list[int]:
        """Raises IllegalTransition with nothing changed; returns the host slots that came free."""
        sources, target = LEGAL[name]
        twice = len(set(keys)) < len(keys) and target not in sources
        if twice or any(self.pages[key].states[tier] not in sources for key in keys):
            raise IllegalTransition
        freed = [self.pages[key].slot for key in keys] if target is State.ABSENT and tier == HOST else []
        admitted = [key for key in keys if self.pages[key].states[tier] is not State.RESIDENT]
        for i, key in enumerate(keys):
            self.pages[key].states[tier] = target
            if tier == HOST and target is State.ABSENT:
                self.pages[key].slot = -1
            elif slots is not None:
                self.pages[key].slot = slots[i]
        if tier in self.order:
            if target is State.RESIDENT:
                self._to_newest(admitted, tier)
            else:
                self._take_out(keys, tier)
        if target is State.ABSENT:
            self.forget(keys)
        return freed

    def _to_newest(self, keys: list[bytes], tier: int) -> None:
        for key in reversed(keys):
            for line in (self.order[tier], self.parked[tier]):
                if key in line:
                    line.remove(key)
            self.order[tier].append(key)

    def _take_out(self, keys: list[bytes], tier: int) -> None:
        """These have left or have not come. What was parked and has no child on the tier now is first in line."""
        for key in keys:
            for line in (self.order[tier], self.parked[tier]):
                if key in line:
                    line.remove(key)
            parent = self.pages[key].parent
            if parent in self.parked[tier] and not self._has_children(parent, tier, []):
                self.parked[tier].remove(parent)
                self.order[tier].insert(0, parent)

    def touch(self, keys: list[bytes]) -> None:
        for key in keys:
            self.pages[key].last_use = self.now
        for tier, order in self.order.items():
            self._to_newest([key for key in keys if key in order or key in self.parked[tier]], tier)

    def lease(self, keys: list[bytes]) -> None:
        for key in keys:
            self.pages[key].leases += 1

    def release(self, keys: list[bytes]) -> None:
        if any(self.pages[key].leases < keys.count(key) for key in keys):
            raise NotLeased
        for key in keys:
            self.pages[key].leases -= 1
        self.forget(keys)

    def forget(self, keys: list[bytes]) -> None:
        """Free what nothing holds, and what only that held."""
        above: bytes | None
        for above in reversed(keys):
            while above in self.pages and not self._held(above):
                above = self.pages.pop(above).parent

    def _held(self, key: bytes) -> bool:
        page = self.pages[key]
        return bool(page.leases or any(page.states) or any(other.parent == key for other in self.pages.values()))

    def evict(self, n: int, tier: int) -> tuple[list[bytes], list[int]]:
        """The oldest page that may go, n times over; what may not is dealt with when it is met."""
        victims: list[bytes] = []
        order, parked = self.order[tier], self.parked[tier]
        met: list[bytes] = []
        for key in tuple(order):
            if len(victims) == n:
                break
            if self._has_children(key, tier, victims):
                order.remove(key)
                parked.append(key)
            elif self.pages[key].leases:
                order.remove(key)
                order.append(key)
            else:
                met.append(key)
                if self.pages[key].last_use != self.now and key not in victims:
                    self._take_up(key, tier, n, victims, met)
        return victims, self.change("drop", victims, tier)

    def _take_up(self, key: bytes, tier: int, n: int, victims: list[bytes], met: list[bytes]) -> None:
        """Take a page, and those above it that nothing but it has kept."""
        victims.append(key)
        above = self.pages[key].parent
        while above is not None and len(victims) < n:
            page = self.pages[above]
            waits = above in met or above in self.parked[tier]
            if not waits or page.leases or page.last_use == self.now or self._has_children(above, tier, victims):
                return
            victims.append(above)
            above = page.parent

    def _has_children(self, key: bytes, tier: int, gone: list[bytes]) -> bool:
        children = [k for k, other in self.pages.items() if other.parent == key and k not in gone]
        return any(self.pages[child].states[tier] for child in children)

    def path(self, key: bytes | None) -> list[bytes]:
        keys: list[bytes] = []
        while key is not None:
            keys.append(key)
            key = self.pages[key].parent
        return keys[::-1]
