"""Whose pages a store has, as far as that is known: of tenants that have, or had, a quota when their pages came.

It is kept with the first page of a path, here and in the map, as the digest of the tenant's name (`quotas.digest_of`),
and not as a number of the running server's: after a restart other tenants may have quotas, and old pages are to count
for those that have. All pages below a first page are of its group in the index, which is what quotas go by.

Who calls this holds the volume's lock.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from hicache.quotas import NOBODY, OTHERS, Quotas
from hicache.ssd.map import PageRows
from radix import HOST, KEY_NBYTES, RESIDENT, ROOT, Index, Rows

Slots = NDArray[np.int32]

_NO_SLOTS: Slots = np.empty(0, np.int32)


class Owners:
    """See the module's text. index, quotas: those of the books, which others change. n_slots: of the files."""

    def __init__(self, index: Index, quotas: Quotas, n_slots: int) -> None:
        self._index = index
        self._quotas = quotas
        self._digests = np.zeros((n_slots, 2), np.uint64)
        """By slot, of those that hold first pages; the system supplies memory for those that have one."""

    def expect(self, first_key: bytes, tenant: bytes) -> None:
        """A path of this tenant begins with this page: its pages get their group when they get a row."""
        self._index.assign(first_key, self._quotas.group_of_digest(tenant))

    def put(self, rows: Rows, slots: Slots, tenant: bytes) -> None:
        """These pages of one path of the tenant are given slots."""
        if len(rows) and self._index.parents(rows[:1])[0] == ROOT:
            self._digests[slots[0]] = np.frombuffer(tenant, np.uint64)

    def learn(self, rows: Rows, tenant: bytes) -> Slots:
        """These pages, of one path, are the tenant's. Returns the slot of its first page if that was not known.

        They stay in their group; in that of the tenant they are when the store is opened again.
        """
        if tenant == NOBODY or not len(rows):
            return _NO_SLOTS
        first = self._index.path(int(rows[0]))[:1]
        slot = self._index.slots(first)
        if self._index.states(first, HOST)[0] != RESIDENT or self._digests[slot].any():
            return _NO_SLOTS
        self._digests[slot] = np.frombuffer(tenant, np.uint64)
        return slot

    def of(self, slots: NDArray[np.int64], above: Rows) -> bytes:
        """16 bytes a page in these slots, zeros where there is none. above: the rows of their parents."""
        is_first = (above == ROOT)[:, np.newaxis]
        return np.where(is_first, self._digests[slots], np.uint64(0)).tobytes()

    # ---- what the map names ----

    def insert_first_pages(self, found: PageRows) -> None:
        """Give those of tenants that have a quota a row in their group. `Index.forget` those that get no slot then."""
        parents = np.frombuffer(found.parents, np.uint64).reshape(-1, 4)
        tenants = found.tenant_words()
        for at in np.flatnonzero(tenants.any(axis=1) & ~parents.any(axis=1)).tolist():
            group = self._quotas.group_of_digest(tenants[at].tobytes())
            if group != OTHERS:
                key = found.keys[KEY_NBYTES * at : KEY_NBYTES * (at + 1)]
                self._index.assign(key, group)
                with suppress(ValueError):  # it is known below another page, so its row in the map is wrong
                    self._index.insert(key)

    def adopt(self, found: PageRows, good: NDArray[np.bool_]) -> None:
        """Those pages that are good have been taken over."""
        tenants = found.tenant_words()
        named = good & tenants.any(axis=1)
        self._digests[found.slots[named]] = tenants[named]
