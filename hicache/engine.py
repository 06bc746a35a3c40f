"""The engine joins the index, the host tier, the tiers below it and the tickets: every decision about KV is taken here.

It never moves a byte. A caller that has a page in HBM says `begin_offload` and is told which slots to fill, copies, and
says `finish_offload`; a caller that wants pages back says `lookup`, then `begin_restore`, is told which slots to read,
copies, and says `finish_restore`. Between a begin and its finish the rows are leased, so that no slot that a copy reads
or writes is evicted or given away. That is the whole protocol:

    begin_offload   ABSENT -> INCOMING, leased        begin_restore    RESIDENT, leased
    finish_offload  INCOMING -> RESIDENT or ABSENT    finish_restore   lease ends

Three rules make the host tier usable as a promise to SGLang:

- It is closed under prefixes: a page is admitted only below a parent that is held. Eviction is leaf-first, so it stays
  closed, and a lookup is one walk that stops at the first page that is not resident. Pages of lower tiers are brought
  in (`hicache.fetches`) before they are promised, while their request waits in the queue.
- What a lookup has reported cannot be evicted in the same tick, because SGLang evicts and allocates between its lookup
  and its load. The caller ticks once a scheduler iteration.
- Every decision is a function of the calls and their order. So the ranks of a server, which make the same calls, hold
  the same pages in the same slots without asking each other. What they cannot know alike (that a copy has ended, what a
  disk has answered, that time is up) they agree on before they act on it: `report` says what this rank sees, `follow`
  takes the minimum over all. `digest` condenses all decisions into one number, by which ranks can see that they still
  agree; `has_decided` says that there is something to compare, and is set by the calls, which are the same on all ranks
  even if their decisions are not.

All methods run on the one thread that owns the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hicache.fetches import NO_ROWS, Fetch
from hicache.host import HostTier, Slots
from hicache.lower import Lower, LowerTier
from hicache.pins import Pins
from hicache.prefills import Prefill, Prefills
from hicache.quotas import QuotaError, Tenants
from hicache.speed import PrefillSpeed
from hicache.stats import Observed, Stats
from hicache.ticket import Ticket, Verdict
from hicache.tier import Tier, true_prefix
from hicache.waits import Waits
from hicache.whereabouts import Inquiry
from radix import HBM, HOST, INCOMING, KEY_NBYTES, RESIDENT, ROOT, Index, IndexFull, Rows
from radix.departures import CAPACITY, DISAGREEMENT, FLUSH, WEIGHTS

UNKNOWN: Final = 2**62
"""What a rank reports of a thing that is another's to know: no minimum is greater."""

FOLLOW_TIMEOUT_S = 60.0
"""How long a request may wait for pages that another is computing. A request that runs makes progress or ends, and both
release its followers; this bounds what a fault in that reasoning could cost."""

MAX_OVERDUE = 12
"""How many times its time-out a request may wait in the line for leases while no other is admitted or ends: 60 s."""

STAND_DOWN_S = 5.0
"""How long ranks that have come to disagree wait for the tiers to end what they have under way."""


@dataclass(frozen=True, slots=True, eq=False)
class Offload:
    """Pages to copy from HBM into the slab: page `positions[i]` of the offered run goes into slot `slots[i]`."""

    rows: Rows
    positions: NDArray[np.int64]
    slots: Slots


@dataclass(frozen=True, slots=True, eq=False)
class Restore:
    """Pages to copy from the slab into HBM, in path order: page i of the run comes from `slots[i]`."""

    rows: Rows
    slots: Slots


class Engine:
    """Decides where pages live. All methods belong to one thread and none of them blocks.

    index: the radix index, with a policy for the host tier. The engine is its only writer.
    n_slots: host slots, 1 or more.
    ticket_timeout_s: how long a request may wait for pages on their way into host memory; the time in which it waits
        for leases does not count. 0: it waits for neither.
    max_leased_share: how much of the host tier waiting requests may pin together, from 0 to 1. Beyond it a ticket opens
        without leases. If tiers below have its pages, it waits in a line until others have been admitted. If not, its
        request still hits what is there when it is admitted, but the pages may leave before that.
    clock: monotonic seconds, for deadlines and for what is observed.
    tiers: what lies below host memory, fastest first; the engine closes them. batch_pages: the most that one call of a
        tier moves.
    fetch_only_if_faster: compute what the tiers would take longer to load, by what was measured of both.
    fetch_timeout_s: how long a load may take before its pages are given up, whether somebody waits for it or not.
    tenants: cache salts that have a quota on a tier below from the start.

    Raises ValueError for a write policy that does not exist.
    """

    def __init__(
        self,
        index: Index,
        n_slots: int,
        *,
        clock: Callable[[], float],
        ticket_timeout_s: float = 5.0,
        max_leased_share: float = 0.5,
        tiers: Sequence[LowerTier] = (),
        batch_pages: int = 16,
        fetch_only_if_faster: bool = False,
        fetch_timeout_s: float = 5.0,
        tenants: Collection[str] = (),
    ) -> None:
        self.stats = Stats()
        self.observed = Observed()
        self.clock = clock
        self.index = index
        self.host = HostTier(index, n_slots, self.stats, self.observed, clock)
        self.prefill_speed = PrefillSpeed()
        self._tenants = Tenants(tenants)
        self.below: Lower | None = None
        if tiers:
            self.below = Lower(
                tiers,
                index,
                self.host,
                self.stats,
                self.observed,
                self.prefill_speed,
                batch_pages=batch_pages,
                only_if_faster=fetch_only_if_faster,
                timeout_s=fetch_timeout_s,
                clock=clock,
                tenant_of=self._tenants.of,
                may_start=self._may_fetch,
                ended=self._fetch_ended,
            )
        self.tainted = False
        self.taint_reason = FLUSH
        """Why it is tainted, or was last."""
        self._is_retired = False
        self.digest = 0
        self.has_decided = False
        self._max_leased = int(n_slots * max_leased_share)
        self._n_leased = 0
        self._n_closed = 0
        self._n_tickets_on = np.zeros(index.capacity, np.int32)
        """By row: how many tickets lease it."""
        self._polled_at = (0, 0)
        self._tickets: set[Ticket] = set()
        self._fetching: dict[Fetch, Ticket] = {}
        self._may_wait = ticket_timeout_s > 0
        self._arriving: Waits[Ticket] = Waits(ticket_timeout_s, clock)
        self._following: Waits[Ticket] = Waits(FOLLOW_TIMEOUT_S, clock)
        self._prefills = Prefills(index)
        self._pins = Pins(index, n_slots, clock)
        self._n_copying = 0

    # ---- write-back ----

    def holds(self, key: bytes | None) -> bool:
        """Whether host memory holds or receives this page and all above it, so that pages below it may be admitted."""
        if key is None:
            return True
        row = self.index.row_of(key)
        return row is not None and bool(self.host.held(self.index.path(row)).all())

    def begin_offload(self, keys: bytes, parent: bytes | None = None) -> Offload | None:
        """SGLang holds these pages in HBM: which of them are to be copied into which slots.

        keys: 32n bytes, a run in path order below the page `parent` (None: below the root).
        Returns None when there is nothing to copy: all are held, or none may be admitted now (counted in `stats`).
        A run below a parent that is not held is mirrored but not admitted; offer it again with its path from the root.
        """
        n_pages = len(keys) // KEY_NBYTES
        self.has_decided = True
        self.stats.offered += n_pages
        rows = self._mirror(keys, parent)
        if self.tainted:
            self.stats.skipped_tainted += n_pages
            return None
        if rows is None:
            self.stats.skipped_full += n_pages
            return None
        self.index.touch_path(int(rows[-1]))
        absent = ~self.host.held(rows)
        positions = np.flatnonzero(absent)
        self.stats.deduplicated += len(rows) - len(positions)
        if not len(positions) or not self.holds(parent):
            self.stats.skipped_full += len(positions)
            return None
        admitted = self.host.admit(rows[positions])
        self.stats.skipped_full += len(positions) - len(admitted)
        if not len(admitted):
            return None
        self.index.lease(admitted)
        self._n_copying += 1
        offload = Offload(admitted, positions[: len(admitted)], self.host.slots(admitted))
        self._decided(len(offload.slots), int(offload.slots[0]), int(offload.slots[-1]))
        return offload

    def skip_offload(self, keys: bytes, parent: bytes | None = None) -> None:
        """As `begin_offload`, for pages that the caller cannot copy now: they are known to be in HBM, and counted."""
        n_pages = len(keys) // KEY_NBYTES
        self.has_decided = True
        self.stats.offered += n_pages
        self.stats.skipped_pressure += n_pages
        self._mirror(keys, parent)

    def finish_offload(self, offload: Offload, *, landed: bool) -> None:
        """The copy of `offload` has ended, with all its bytes in the slab or with none to be trusted."""
        self._n_copying -= 1
        if landed:
            self.host.land(offload.rows)
            self.stats.offloaded += len(offload.rows)
            if self.below is not None and not self.tainted:
                self.below.landed(int(offload.rows[-1]))
        else:
            self.host.abandon(offload.rows)
            self.stats.failed += len(offload.rows)
        self.index.release(offload.rows)

    def _mirror(self, keys: bytes, parent: bytes | None) -> Rows | None:
        """Rows of pages that are in HBM now; None when the index has no room or does not know the parent."""
        self.host.departures.came(keys, HBM, self.clock())
        parent_row: int | None = ROOT
        if parent is not None:
            parent_row = self.index.row_of(parent)
        if parent_row is None:
            return None
        try:
            rows = self.index.insert(keys, parent_row)
        except IndexFull:
            return None
        self.index.put(rows, HBM)
        return rows

    # ---- what is in HBM ----

    def hbm_evicted(self, keys: bytes) -> None:
        """SGLang has dropped these pages, a run in path order, from HBM."""
        rows = self.index.match(keys)
        in_hbm = rows[self.index.states(rows, HBM) == RESIDENT]
        self.stats.hbm_evicted += len(in_hbm)
        gone = in_hbm[~self.host.held(in_hbm)]
        if len(gone):
            self.host.departures.left(self.index.keys_of(gone), HBM, CAPACITY, self.clock())
        self.index.drop(in_hbm, HBM)

    def hbm_used(self, key: bytes) -> None:
        """A request hit HBM down to this page: keep the host copies of its path as recent as HBM's."""
        row = self.index.row_of(key)
        if row is not None:
            self.index.touch_path(row)

    # ---- restore ----

    def lookup(self, keys: bytes) -> int:
        """How many pages at the head of `keys` can be restored now. They stay until the tick after this one."""
        self.stats.lookups += 1
        if self.tainted:
            return 0
        rows = self.index.match(keys)
        n_pages = self.index.resident_prefix(rows, HOST)
        if n_pages:
            self.index.touch_path(int(rows[n_pages - 1]))
        self._decided(n_pages)
        return n_pages

    def begin_restore(self, keys: bytes) -> Restore | None:
        """Lease pages that a lookup of this tick has reported. None if one of them is not there: nothing is leased."""
        rows = self.index.match(keys)
        if self.tainted or self.index.resident_prefix(rows, HOST) * KEY_NBYTES != len(keys):
            return None
        self.index.lease(rows)
        self._n_copying += 1
        return Restore(rows, self.host.slots(rows))

    def finish_restore(self, restore: Restore, *, copied: bool) -> None:
        """Nothing reads the slots of `restore` any more; `copied` is False if it was cancelled before it began."""
        self._n_copying -= 1
        self.index.release(restore.rows)
        if copied:
            self.stats.restored += len(restore.rows)

    # ---- tickets ----

    def open_ticket(self, keys: bytes, parent: bytes | None, *, tenant: str = "") -> Ticket:
        """A request waits for these pages below `parent`: lease what host memory has of its path, fetch the rest.

        tenant: the request's cache salt, empty for none.
        """
        self.has_decided = True
        self.stats.tickets += 1
        self._hear(keys, parent, tenant)
        held = NO_ROWS if self.tainted else self._held_path(keys, parent)
        self.host.asked(held)
        ticket = Ticket(NO_ROWS, Prefill(keys, last_key=(keys or parent or b"")[-KEY_NBYTES:]))
        self._tickets.add(ticket)
        is_kept = self._lease_at_first(ticket, held)
        if self.below is not None and not self.tainted:
            self.below.touched(held)
            ticket.fetch = self.below.open_fetch(keys, parent, held, is_kept=is_kept)
            if ticket.fetch is not None:
                self._fetching[ticket.fetch] = ticket
        if not is_kept and ticket.fetch is None:
            self.stats.tickets_unleased += 1
        if self._is_arriving(ticket):
            ticket.verdict = Verdict.WAIT
            self._arriving.add(ticket)
        return ticket

    def _hear(self, keys: bytes, parent: bytes | None, tenant: str) -> None:
        """Note whose path a request asks for, and tell policies and pins, if the index knows what lies above."""
        above = NO_ROWS
        if parent is not None:
            row = self.index.row_of(parent)
            if row is None:
                return
            above = self.index.path(row)
        path = self.index.keys_of(above) + keys
        if path and self._tenants.knows(tenant):
            self._tenants.begins(tenant, path[:KEY_NBYTES])
            if parent is None:
                self.index.assign(path[:KEY_NBYTES], self.host.quotas.group_of(tenant))
        if not self.tainted:
            self.index.asked(path)
            self._pins.asked(path)

    def _lease_at_first(self, ticket: Ticket, rows: Rows) -> bool:
        """`_lease_for`, behind all who wait for leases, and leaving enough for what is being loaded."""
        if self.below is None or not len(rows):
            return self._lease_for(ticket, rows)
        fetches = self.below.fetches
        return not fetches.has_line and self._lease_for(ticket, rows, n_others=fetches.n_loading_pages)

    def _lease_for(self, ticket: Ticket, rows: Rows, *, n_others: int = 0) -> bool:
        """Give the ticket leases on these rows in place of those it has. Returns whether waiting requests may lease so
        much, with `n_others` more. A page that several wait for counts once.
        """
        n_new = int(np.count_nonzero(self._n_tickets_on[rows] == 0))
        if n_new and self._n_leased + n_others + n_new > self._max_leased:
            return False
        self.index.lease(rows)
        self._n_tickets_on[rows] += 1
        self._n_leased += n_new
        self._end_leases(ticket)
        ticket.rows = rows
        return True

    def _may_fetch(self, above: int, n_pages: int) -> bool:
        """Whether a request may have so many pages brought in below the row `above`.

        It may if it can lease its path then, or if no leases will end by waiting: all who have any are in the line too.
        """
        assert self.below is not None
        fetches = self.below.fetches
        path = NO_ROWS if above == ROOT else self.index.path(above)
        is_new = (self._n_tickets_on[path] == 0) & (self.index.states(path, HOST) == RESIDENT)
        n_new = fetches.n_loading_pages + n_pages + int(np.count_nonzero(is_new))
        if not n_new or self._n_leased + n_new <= self._max_leased:
            return True
        return not fetches.n_loading and all(ticket.is_fetching or not len(ticket.rows) for ticket in self._tickets)

    def _end_leases(self, ticket: Ticket) -> None:
        rows, ticket.rows = ticket.rows, NO_ROWS
        self._n_tickets_on[rows] -= 1
        self._n_leased -= int(np.count_nonzero(self._n_tickets_on[rows] == 0))
        self.index.release(rows)

    def admit(self, ticket: Ticket) -> bool:
        """An admission attempt: whether the request of `ticket` may go into a batch of this pass.

        Not while a page of it arrives in host memory, nor while another request computes what it lacks.
        """
        if self.tainted:
            return True
        if ticket.verdict is Verdict.WAIT:
            return False
        if self._prefills.enter(ticket.prefill):
            self._following.discard(ticket)
            return True
        if ticket not in self._following:
            self.stats.followers += 1
            self._following.add(ticket)
        return False

    def launch(self, ticket: Ticket) -> Prefill:
        """The request's batch has been launched: its ticket is closed. `end_prefill` what this returns, once."""
        if self.below is not None and not self.tainted:  # what others have computed while it waited, it uses as well
            self.below.touched(self._held_path(ticket.prefill.keys, None))
        self.close_ticket(ticket)
        self._prefills.launch(ticket.prefill)
        return ticket.prefill

    def end_prefill(self, prefill: Prefill, *, n_answer_tokens: int | None = None) -> None:
        """The request has ended, however it did; whoever waits for its pages goes on without it.

        n_answer_tokens: of a whole answer, which says something about the next turn; None: there is none.
        """
        self._prefills.end(prefill)
        if n_answer_tokens is None or not prefill.last_key:
            return
        row = self.index.row_of(prefill.last_key)
        if row is None:
            return
        self.index.answered(row, n_answer_tokens)
        if self.below is not None and not self.tainted:
            self.below.answered(row)

    def close_ticket(self, ticket: Ticket) -> None:
        """End a ticket's leases. A ticket is closed once; the prefill of one that was never launched ends with it."""
        self._tickets.remove(ticket)
        self._n_closed += 1
        if self.below is not None and ticket.fetch is not None:
            self._fetching.pop(ticket.fetch, None)
            self.below.fetches.drop(ticket.fetch)
        self._arriving.discard(ticket)
        self._following.discard(ticket)
        self._prefills.end(ticket.prefill)
        self._end_leases(ticket)

    def poll_tickets(self) -> None:
        """Let go whose pages have all arrived. Cheap when nothing has arrived since the last call."""
        arrived = (self.host.n_arrivals, 0 if self.below is None else self.below.fetches.n_ended)
        if arrived == self._polled_at:
            return
        self._polled_at = arrived
        for ticket in self._arriving.waiting():
            if not self._is_arriving(ticket):
                self._arriving.discard(ticket)
                ticket.verdict = Verdict.GO

    def _fetch_ended(self, fetch: Fetch) -> None:
        """It is over, and has ended its own leases: its ticket takes what has come, by itself or by another's."""
        ticket = self._fetching.pop(fetch, None)
        if ticket is None or self.tainted:
            return
        rows = self.index.match(fetch.keys)
        rows = rows[: true_prefix(self.host.held(rows))]
        if len(rows):
            path = self.index.path(int(rows[-1]))
            if len(path) > len(ticket.rows) and not self._lease_for(ticket, path):
                self.stats.tickets_unleased += 1

    def _expire(self, n_arriving: int, n_following: int) -> None:
        """Let those go whom the ranks have agreed to be overdue, as `report` counts them."""
        for ticket in self._arriving.expire(n_arriving):
            if self._may_wait_on(ticket):
                self._arriving.add(ticket)
                continue
            self._let_go(ticket)
            self.stats.tickets_expired += 1
        for ticket in self._following.expire(n_following):
            self._prefills.refuse(ticket.prefill)
            self.stats.followers_expired += 1

    def _may_wait_on(self, ticket: Ticket) -> bool:
        """Whether it waits in the line for leases, behind others who go on."""
        if self.below is None or ticket.fetch is None or not self.below.fetches.is_in_line(ticket.fetch):
            return False
        if not self._may_wait:
            return False
        if ticket.n_closed_then != self._n_closed:
            ticket.n_closed_then, ticket.n_overdue = self._n_closed, 0
        ticket.n_overdue += 1
        return ticket.n_overdue <= MAX_OVERDUE

    def _let_go(self, ticket: Ticket) -> None:
        """It waits no longer; what is loading for it goes on."""
        ticket.verdict = Verdict.GO
        if self.below is not None and ticket.fetch is not None:
            self.below.fetches.drop(ticket.fetch)

    def _is_arriving(self, ticket: Ticket) -> bool:
        """Whether a page of it is on its way into host memory, or may be. Pages that HBM has are not waited for."""
        if ticket.is_fetching:
            return True
        arriving = self.index.states(ticket.rows, HOST) == INCOMING
        return bool((arriving & (self.index.states(ticket.rows, HBM) != RESIDENT)).any())

    def _held_path(self, keys: bytes, parent: bytes | None) -> Rows:
        """The rows from the root to the deepest page that host memory holds or receives on this path."""
        rows = self.index.match(keys)
        rows = rows[: true_prefix(self.host.held(rows))]
        if len(rows):
            return self.index.path(int(rows[-1]))
        row = None if parent is None else self.index.row_of(parent)
        if row is None:
            return NO_ROWS
        path = self.index.path(row)
        return path[: true_prefix(self.host.held(path))]

    # ---- what users ask for ----

    def inquire(self, keys: bytes) -> Inquiry:
        """Ask where the pages of the path `keys`, from the root, are, and what became of them. Decides nothing."""
        n_held = true_prefix(self.host.held(self.index.match(keys)))
        return Inquiry(() if self.below is None else self.below.tiers, keys, n_held)

    def pin(self, keys: bytes, ttl_s: float) -> None:
        """Keep the path `keys`, from the root, in host memory until nobody has asked for it for ttl_s.

        Pages that are not there now are kept once they are. The same call on all ranks. Raises PinError.
        """
        self._pins.set(keys, ttl_s)

    def unpin(self, keys: bytes) -> bool:
        """End the pin of exactly this path. False: there is none. The same call on all ranks."""
        return self._pins.take_back(keys)

    def set_quota(self, tenant: str, n_pages: int, *, tier: str = "host") -> None:
        """Let the pages of a tenant hold so many slots of host memory, or of the tier below of this name, on each rank.

        tenant: a cache salt. The same call on all ranks. Raises QuotaError (`hicache.quotas`), with nothing changed.
        """
        if tier == "host":
            self.host.set_quota(tenant, n_pages)
        elif self.below is None:
            raise QuotaError(f"there is no {tier} tier; there is only host memory")
        else:
            self.below.set_quota(tier, tenant, n_pages)
        self._tenants.add(tenant)

    # ---- what ranks agree on ----

    @property
    def is_pending(self) -> bool:
        """Whether there is something to agree on. The same on all ranks."""
        is_below = self.below is not None and self.below.is_pending
        return bool(self.n_waiting or self.has_decided or self._pins.is_due or is_below)

    @property
    def n_waiting(self) -> int:
        """How many requests have a deadline now: pages of theirs are to arrive, or another computes them."""
        return self.n_awaiting_pages + self.n_awaiting_prefills

    @property
    def n_awaiting_pages(self) -> int:
        return len(self._arriving)

    @property
    def n_awaiting_prefills(self) -> int:
        """How many requests wait for pages that another computes."""
        return len(self._following)

    @property
    def n_leased(self) -> int:
        """How many pages waiting requests lease together."""
        return self._n_leased

    @property
    def n_pinned(self) -> int:
        """How many pages are pinned, in host memory or not."""
        return self._pins.n_pages

    def report(self, *, decides: bool) -> list[int]:
        """What this rank sees for itself, always equally many numbers from 0 to `UNKNOWN`. Never blocks.

        decides: whether this rank's clock counts for those who wait. If it does, it says how many have waited their
        time for pages to arrive, and for another's prefill, and which pin has ended.
        """
        overdue = [UNKNOWN] * 3
        if decides:
            pin = self._pins.overdue()
            overdue = [self._arriving.n_overdue(), self._following.n_overdue(), UNKNOWN if pin is None else pin]
        return overdue if self.below is None else overdue + self.below.report()

    def follow(self, agreed: Sequence[int]) -> None:
        """Act on the minima over all ranks of their reports."""
        self.has_decided = False
        if self.below is not None:
            for fetch in self.below.follow(agreed[3:]):
                self._decided(len(fetch.slots), int(fetch.slots[0]), int(fetch.slots[-1]))
        self._expire(*agreed[:2])
        self._pins.follow(agreed[2], self.host.n_arrivals)
        self.poll_tickets()

    # ---- life ----

    def taint(self, reason: int = WEIGHTS) -> None:
        """What is in HBM or in host memory may be wrong: promise nothing and keep nothing until the next `reset`.

        Nobody waits any more either: there is nothing to wait for, and ranks that have come to disagree about what is
        kept would disagree about who waits. reason: of a flush (`radix.departures`), for people.
        """
        self.tainted = True
        self.taint_reason = reason
        for ticket in self._arriving.expire(len(self._arriving)):
            self._let_go(ticket)
        self._following.expire(len(self._following))

    def _decided(self, *numbers: int) -> None:
        self.digest = hash((self.digest, *numbers))

    def tick(self) -> None:
        """A new scheduler iteration: what the last one looked up may be evicted again."""
        self.index.tick()

    def reset(self) -> None:
        """Drop everything, in HBM's mirror and in host memory, and a taint with it. Tiers below keep what they have.

        No copy may be running: the caller quiesces first. What a disk still reads or writes keeps its slots until it
        has ended, however long that takes. Prefills that run go on, and lead nobody any more.
        """
        assert self._n_copying == 0, f"{self._n_copying} copies have begun and not finished"
        for ticket in tuple(self._tickets):
            self.close_ticket(ticket)
        self._prefills.clear()
        self._pins.let_go()
        lingering = [] if self.below is None else self.below.detach()
        self.stats.flushed += self.host.n_resident
        self.stats.hbm_flushed += self.index.count(HBM, RESIDENT)
        self.host.departures.flushed(self.taint_reason if self.tainted else FLUSH, self.clock())
        self.index.clear()
        self.host.clear(np.concatenate([NO_ROWS, *lingering]))
        self.tainted = self._is_retired
        self.digest = 0
        self.stats.resets += 1

    def replace_tiers(self, tiers: Sequence[Tier]) -> None:
        """Go on with as many other tiers below, in the same order, for other names. The caller closes the old ones."""
        assert self.below is not None
        self.below.replace(tiers)

    def clear_below(self) -> Future[int] | None:
        """Empty the tiers below. The future tells when, and how many pages they had; None: there is no such tier."""
        return None if self.below is None else self.below.clear()

    def stand_down(self) -> bool:
        """The ranks have come to disagree: taint, and end what is under way below by this rank's own knowledge.

        Blocks until the tiers have ended it. False: one hangs as well. If one does on any rank, all have to `retire`.
        """
        self.taint(DISAGREEMENT)
        self.has_decided = False
        self.digest = 0
        return self.below is None or self.below.settle(STAND_DOWN_S)

    def retire(self) -> None:
        """Slots are lost to all agreement: tainted for good, and nothing is asked of the tiers below any more."""
        self._is_retired = True
        if self.below is not None:
            written, *_ = self.below.detach()
            self.host.linger(written)
            self.below = None

    def close(self) -> None:
        """Close the tiers below. Blocks; what they have under way ends or is given up."""
        if self.below is not None:
            self.below.close()

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken. Scans everything: for tests and debugging."""
        self.index.check_invariants()
        self.host.check_invariants()
        leased = len(set().union(*(ticket.rows.tolist() for ticket in self._tickets)))
        assert leased == self._n_leased, f"tickets lease {leased} rows, counted {self._n_leased}"
        self._pins.check_invariants()
        if self.below is not None:
            self.below.check_invariants()
