"""Quotas: how many slots of a tier the pages of one tenant may hold.

A quota is a limit and a guarantee at once. A tenant that would go over it evicts pages of its own, so its burst costs
nobody else a page. While it stays below, its pages are not evicted for others': when a tier is full, those go who have
no quota and hold more than the quotas leave them. What a quota leaves idle, tenants without one may use; they give it
back when its tenant wants it. So quotas may not be more together than there is.

Tenants without a quota are one group, number 0. Whose a page is follows from the first page of its path: a tenant's
salt is part of every key, so no two tenants share a page.

Host memory and an SSD each have quotas of their own, and the same rule (`Quotas.make_room`), which sees a tier as
`Books`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from radix import MAX_GROUPS

OTHERS = 0
"""The group of all tenants without a quota."""

DIGEST_NBYTES: Final = 16
NOBODY: Final = bytes(DIGEST_NBYTES)
"""Stands for the digest of a tenant that is not known."""

MAX_PATHS: Final = 1 << 16
"""First pages whose tenant is remembered. The one that no request has begun with for longest is forgotten first."""


class QuotaError(ValueError):
    """A quota that cannot be given. The sentence says why, and what can."""


def digest_of(tenant: str) -> bytes:
    """What stands for a tenant where its salt, which may be a secret, must not: 16 bytes; `NOBODY` for none."""
    if not tenant:
        return NOBODY
    return hashlib.blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=DIGEST_NBYTES).digest()


class Share(NamedTuple):
    """What the pages of a group have and may have, in slots."""

    n_held: int
    limit: int


class Books(Protocol):
    """What the rule asks of a tier, and has it do."""

    @property
    def n_slots(self) -> int:
        """How many there are, or can be had."""

    @property
    def n_free(self) -> int:
        """How many of them hold no page, or will hold none without another eviction."""

    def n_held(self, group: int) -> int:
        """How many the pages of a group hold, or are to be written to."""

    def evict(self, n_pages: int, group: int, *, for_quota: bool = False) -> None:
        """Let up to so many pages of a group leave, none if that is below 0.

        for_quota: not for want of room, but because a quota is theirs, or takes its own back.
        """


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for some pages of one group.

    n_pages: so many may have slots. n_within_quota: so many its quota, if it has one, allows.
    """

    n_pages: int
    n_within_quota: int


class Quotas:
    """See the module's text. n_slots: of the whole tier. It moves nothing by itself; one thread at a time."""

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._groups: dict[str, int] = {}
        self._group_of_digest: dict[bytes, int] = {}
        self._limits = [n_slots]

    def set(self, tenant: str, n_pages: int) -> int:
        """As `update`, for one tenant. Returns its group."""
        self.update({tenant: n_pages})
        return self._groups[tenant]

    def update(self, quotas: Mapping[str, int]) -> None:
        """Give tenants quotas, in pages, or change them. Raises QuotaError, with nothing changed.

        Pages that a tenant had before its first quota stay with the others' until they leave.
        """
        all_pages = {**self.tenants, **quotas}
        n_free = self._n_slots - sum(n for tenant, n in all_pages.items() if tenant not in quotas)
        for tenant, n_pages in quotas.items():
            if not tenant:
                raise QuotaError("requests without a cache_salt have no tenant, and so no quota; name a cache_salt")
            if n_pages < 0:
                raise QuotaError(f"a quota is 0 pages or more, not {n_pages:,}")
            if n_pages > n_free:
                raise QuotaError(
                    f"a quota of {n_pages:,} pages is more than the {n_free:,} that other quotas leave; give less, or "
                    "make others smaller first"
                )
            n_free -= n_pages
        if len(all_pages) >= MAX_GROUPS:
            raise QuotaError(f"{MAX_GROUPS - 1} tenants have a quota already, and no more can")
        for tenant, n_pages in quotas.items():
            if tenant not in self._groups:
                self._groups[tenant] = self._group_of_digest[digest_of(tenant)] = len(self._limits)
                self._limits.append(0)
            self._limits[self._groups[tenant]] = n_pages

    def resize(self, n_slots: int) -> None:
        """The tier has so many slots from now on. Each quota stays the same part of it."""
        self._limits = [limit * n_slots // self._n_slots for limit in self._limits]
        self._n_slots = n_slots

    def group_of(self, tenant: str) -> int:
        return self._groups.get(tenant, OTHERS)

    def group_of_digest(self, digest: bytes) -> int:
        """The group of the tenant that `digest_of` gives this for."""
        return self._group_of_digest.get(digest, OTHERS)

    def limit(self, group: int) -> int:
        """How many slots the pages of a group may hold."""
        return self._limits[group]

    @property
    def rest(self) -> int:
        """How many slots are no tenant's quota."""
        return self._rest_of(self._n_slots)

    def _rest_of(self, n_slots: int) -> int:
        return max(0, n_slots - sum(self._limits[1:]))

    @property
    def tenants(self) -> Mapping[str, int]:
        """Pages by tenant."""
        return {tenant: self._limits[group] for tenant, group in self._groups.items()}

    @property
    def groups(self) -> range:
        """All there are."""
        return range(len(self._limits))

    def shares(self, n_held: Callable[[int], int]) -> list[Share]:
        """By group, that of the others first. n_held: as in `Books`."""
        return [Share(n_held(group), limit) for group, limit in enumerate(self._limits)]

    def make_room(self, group: int, n_wanted: int, books: Books) -> Room:
        """Have pages leave until so many of a group may have slots, by its quota and the others', or until no more can.

        Of a group with a quota: first its own, as far as they would be above the quota; then those of tenants without
        one, as far as they have borrowed; then its own again. The others evict their own only.
        """
        if group == OTHERS:
            books.evict(n_wanted - books.n_free, OTHERS)
            return Room(min(n_wanted, books.n_free), n_wanted)
        limit = self._limits[group]
        books.evict(books.n_held(group) + n_wanted - limit, group, for_quota=True)
        n_within = max(0, min(n_wanted, limit - books.n_held(group)))
        n_borrowed = books.n_held(OTHERS) - self._rest_of(books.n_slots)
        books.evict(min(n_within - books.n_free, n_borrowed), OTHERS, for_quota=True)
        books.evict(n_within - books.n_free, group)
        return Room(min(n_within, books.n_free), n_within)


class Tenants:
    """Whose path begins with which page, of the tenants that have a quota on any tier; of others nothing is kept.

    A request names its tenant; what moves later between host memory and the tiers below knows its pages only. One
    thread, that of the engine.
    """

    def __init__(self, tenants: Iterable[str]) -> None:
        self._tenants = set(tenants)
        self._paths: dict[bytes, str] = {}

    def add(self, tenant: str) -> None:
        """It has a quota now."""
        self._tenants.add(tenant)

    def knows(self, tenant: str) -> bool:
        """Whether it has a quota anywhere."""
        return tenant in self._tenants

    def begins(self, tenant: str, first_key: bytes) -> None:
        """A path of this tenant, which has a quota, begins with this page."""
        self._paths.pop(first_key, None)
        self._paths[first_key] = tenant
        if len(self._paths) > MAX_PATHS:
            del self._paths[next(iter(self._paths))]

    def of(self, first_key: bytes) -> str:
        """Whose path begins with this page; empty if that is not known."""
        return self._paths.get(first_key, "")
