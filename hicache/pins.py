"""Pins: prefixes that are kept in host memory as long as somebody asks for them from time to time.

A pin holds leases on the pages of its prefix: on those that host memory has when it is set, and on the others as they
land. It ends when nobody has asked for the whole prefix for its time to live, or when it is taken back. Pins outlast a
flush: what is computed again is pinned again.

When a time to live is over is decided by one rank's clock: `overdue` names a pin by its number, the ranks take the
least number that any reports, and all `follow` it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from radix import HOST, KEY_NBYTES, Index, Rows

MAX_PINS = 64
"""Each is looked at whenever a request arrives or pages land."""

MAX_SHARE = 0.5
"""Of host memory that pins may hold together."""

CHECK_TICKS = 256
"""Scheduler iterations from one look at the clock to the next, where nothing else makes the ranks talk."""

_NO_ROWS: Rows = np.empty(0, np.int32)


class PinError(ValueError):
    """A pin that cannot be set. The sentence says why, and what can."""


@dataclass(slots=True, eq=False)
class _Pin:
    number: int
    keys: bytes
    ttl_s: float
    deadline_s: float
    rows: Rows = field(default_factory=lambda: _NO_ROWS)
    """Leased: a prefix of the path."""

    @property
    def n_pages(self) -> int:
        return len(self.keys) // KEY_NBYTES


class Pins:
    """See the module's text. n_slots: of host memory. clock: monotonic seconds. One thread, that of the engine."""

    def __init__(self, index: Index, n_slots: int, clock: Callable[[], float]) -> None:
        self._index = index
        self._max_pages = int(n_slots * MAX_SHARE)
        self._clock = clock
        self._pins: dict[bytes, _Pin] = {}
        self._n_set = 0
        self._n_arrivals = 0

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def n_pages(self) -> int:
        """Of all prefixes that are pinned, here or not."""
        return sum(pin.n_pages for pin in self._pins.values())

    def set(self, keys: bytes, ttl_s: float) -> None:
        """Pin the path `keys`, from the root; again: with another time to live. Raises PinError, nothing changed."""
        known = self._pins.get(keys)
        n_pages = len(keys) // KEY_NBYTES
        if not n_pages or len(keys) % KEY_NBYTES:
            raise PinError(f"a pin is of whole pages, one at least, not of {len(keys)} bytes of keys")
        if not ttl_s > 0:
            raise PinError(f"a pin's time to live is above 0 seconds, not {ttl_s}")
        if known is None:
            if len(self._pins) >= MAX_PINS:
                raise PinError(f"{MAX_PINS} prefixes are pinned already; take one back first")
            if self.n_pages + n_pages > self._max_pages:
                raise PinError(
                    f"{n_pages:,} pages more would pin over half of host memory, of which {self._max_pages:,} pages "
                    f"may be pinned and {self.n_pages:,} are; pin less, or give host memory more"
                )
            self._n_set += 1
            known = self._pins[keys] = _Pin(self._n_set, keys, ttl_s, 0.0)
        known.ttl_s = ttl_s
        known.deadline_s = self._clock() + ttl_s
        self._lease(known)

    def take_back(self, keys: bytes) -> bool:
        """End a pin. False: there is none of exactly this path."""
        pin = self._pins.pop(keys, None)
        if pin is None:
            return False
        self._index.release(pin.rows)
        return True

    def asked(self, keys: bytes) -> None:
        """A request asks for the path `keys`, from the root: the pins on it live on."""
        for pin in self._pins.values():
            if keys.startswith(pin.keys):
                pin.deadline_s = self._clock() + pin.ttl_s

    def _lease(self, pin: _Pin) -> None:
        rows = self._index.match(pin.keys)
        new = rows[len(pin.rows) : self._index.resident_prefix(rows, HOST)]
        if len(new):
            self._index.lease(new)
            pin.rows = np.concatenate([pin.rows, new])

    # ---- what ranks agree on ----

    @property
    def is_due(self) -> bool:
        """Whether to look at the clock in this iteration. The same on all ranks."""
        return bool(self._pins) and self._index.now % CHECK_TICKS == 0

    def overdue(self) -> int | None:
        """The number of a pin whose time is over, by this process's clock."""
        now_s = self._clock()
        return min((pin.number for pin in self._pins.values() if pin.deadline_s <= now_s), default=None)

    def follow(self, overdue: int, n_arrivals: int) -> None:
        """End the pin that the ranks have agreed to be overdue, if any; lease what has landed since the last call.

        n_arrivals: of host memory, so far.
        """
        for pin in tuple(self._pins.values()):
            if pin.number == overdue:
                self.take_back(pin.keys)
            elif n_arrivals != self._n_arrivals and len(pin.rows) < pin.n_pages:
                self._lease(pin)
        self._n_arrivals = n_arrivals

    # ---- life ----

    def let_go(self) -> None:
        """Everything is about to be dropped: end the leases, and keep the pins."""
        for pin in self._pins.values():
            self._index.release(pin.rows)
            pin.rows = _NO_ROWS

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken."""
        for pin in self._pins.values():
            rows = self._index.match(pin.keys)[: len(pin.rows)]
            assert np.array_equal(rows, pin.rows), f"pin {pin.number} leases other pages than its own"
            assert self._index.resident_prefix(rows, HOST) == len(rows), f"a page of pin {pin.number} was evicted"
