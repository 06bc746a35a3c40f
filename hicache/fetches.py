"""Pages on their way up: what waiting requests lack in host memory, and lower tiers may have.

A fetch goes through three lines, each in the order in which requests arrived:

    probing    the tiers have been asked how many of the pages they hold (`hicache.probe`); nothing is reserved yet
    found      they have told; the fetch waits for its turn, for room, and until its request may keep what it brings
    loading    slots are taken and leased, their pages INCOMING, and the tiers fill them

The answers come from threads and disks, so each rank of a server sees them at another time, and a disk may answer one
rank less than another. Nothing follows from them here. A rank reports what it sees of the first and of the last line
as pairs of numbers, (settled, good); the minimum of each over the ranks is what all of them follow. So every rank
starts the same fetches at the same call, in the same slots, and takes the same pages as landed. The lines change by
calls that all ranks make, so a pair means the same fetch on all of them.

Two fetches never load one page: a page that is INCOMING is held, and a fetch starts behind what is held. It starts
below a page that is resident only, so that what has landed can be reached from the root.

A load that takes too long is given up: its pages are as if they had never been there, so that they can be computed and
kept. Slots that a disk may still write are nobody's until it is done, whatever has happened to their pages: they linger
with their fetch, in a line of their own, and are given back when the tier says so. Until then that tier is asked for
nothing more, on this rank. So one that hangs keeps what it was loading, half of host memory at most, and is not in the
way of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from hicache.host import HostTier, Slots
from hicache.probe import Load, Probe
from hicache.stats import Movement, Observed, Stats
from hicache.tier import Batch, Tier, true_prefix
from hicache.waits import Waits
from radix import HOST, INCOMING, KEY_NBYTES, ROOT, Index, IndexFull, Rows

N_REPORTED = 8
"""Of the probing, the first so many are reported; of the loading, there are no more."""

N_LINGERING_REPORTED = 24
"""Of the lingering, the first so many are reported: all that were loading when each of three tiers began to hang."""

REPORT_SIZE = 1 + 2 * 2 * N_REPORTED + N_LINGERING_REPORTED
"""Numbers in a report: how many loads are overdue, a pair for each place in both lines, and one for the lingering."""

PATIENCE_SHARE = 0.1
"""Of the time that a load may take: how long a tier that does not answer holds up what others have found."""

NO_ROWS: Rows = np.empty(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Fetch:
    """One request's fetch. `keys`: pages in path order below the page `parent` (None: the root). Belongs to `Fetches`.

    Once it is loading, `rows` are what is loaded: a run that begins at page `start`, counted from the root.
    """

    keys: bytes
    parent: bytes | None
    depth: int
    """How many pages lie above the first of `keys`."""
    n_in_hbm: int
    """How many of the first pages HBM has now: not worth a fetch by themselves."""
    probe: Probe
    n_found: int = 0
    """How many pages all ranks are to fetch, of those that the tiers have."""
    is_declined: bool = False
    """On this rank: all or some of it are not worth it."""
    start: int = 0
    rows: Rows = field(default_factory=lambda: NO_ROWS)
    slots: Slots = field(default_factory=lambda: NO_ROWS)
    loads: Sequence[tuple[int, Load]] = ()
    """The batches, each with where it ends in `rows`."""
    n_landed: int = 0
    is_over: bool = False
    is_given_up: bool = False
    """It took too long."""
    lingering: Slots = field(default_factory=lambda: NO_ROWS)
    """Slots that a tier may still write, of pages that have been dropped."""
    _n_seen: int = 0
    _n_settled: int = 0
    _n_good: int = 0

    def seen(self) -> tuple[int, int]:
        """Of the pages that are loaded: how many, from the first, the tiers have ended with, and how many are good."""
        while self._n_seen < len(self.loads) and self.loads[self._n_seen][1].done():
            end, load = self.loads[self._n_seen]
            if self._n_good == self._n_settled:
                self._n_good += load.n_good
            self._n_settled = end
            self._n_seen += 1
        return self._n_settled, self._n_good

    def origins(self, first: int, end: int) -> Iterator[tuple[str, int]]:
        """Which tiers have brought pages `first` to `end` from the root, in path order: (tier, how many)."""
        at = self.start
        for _, load in self.loads:
            for brought in load.brought:
                n_pages = min(at + brought.n_pages, end) - max(at, first)
                at += brought.n_pages
                if n_pages > 0:
                    yield brought.tier, n_pages

    def movements(self) -> Iterator[Movement]:
        """What each tier has brought."""
        brought = [one for _, load in self.loads for one in load.brought if one.n_pages]
        for tier in dict.fromkeys(one.tier for one in brought):
            own = [one for one in brought if one.tier == tier]
            started_s, ended_s = min(one.started_s for one in own), max(one.ended_s or 0.0 for one in own)
            yield Movement(tier, sum(one.n_pages for one in own), ended_s - started_s)

    def has_been_left(self) -> bool:
        """Whether no tier is at a slot of it any more."""
        return all(load.done() for _, load in self.loads)

    def ask_no_other(self) -> None:
        """What the tiers that are at it now do not bring is not wanted any more."""
        for _, load in self.loads:
            load.ask_no_other()


class Fetches:
    """See the module's text. One thread, that of the engine.

    max_pages: how many slots may be on their way up at a time. batch_pages: the most that one call of a tier loads.
    timeout_s, clock: how long a load may take, and by what clock. landed: told of rows whose pages have landed.
    tenant_of: whose path begins with a page (`quotas.Tenants`). may_start: whether so many pages may be brought in now
    below a row (`ROOT`: none); the same on all ranks. ended: told of each fetch that is over, at once.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        index: Index,
        host: HostTier,
        stats: Stats,
        observed: Observed,
        *,
        max_pages: int,
        batch_pages: int,
        timeout_s: float,
        clock: Callable[[], float],
        landed: Callable[[Rows], None],
        tenant_of: Callable[[bytes], str],
        may_start: Callable[[int, int], bool],
        ended: Callable[[Fetch], None],
    ) -> None:
        self.tiers = tiers
        self._index = index
        self._host = host
        self._stats = stats
        self._observed = observed
        self._max_pages = max(1, max_pages)
        self._batch_pages = batch_pages
        self._patience_s = timeout_s * PATIENCE_SHARE
        self._clock = clock
        self._tell_landed = landed
        self._tenant_of = tenant_of
        self._may_start = may_start
        self._tell_ended = ended
        self._must_wait = False
        self._probing: dict[Fetch, None] = {}
        self._found: dict[Fetch, None] = {}
        self._loading: dict[Fetch, None] = {}
        self._lingering: dict[Fetch, None] = {}
        self._ageing: Waits[Fetch] = Waits(timeout_s, clock)
        self._n_loading_pages = 0
        self.n_ended = 0

    def __len__(self) -> int:
        return len(self._probing) + len(self._found) + len(self._loading) + len(self._lingering)

    def open(self, keys: bytes, parent: bytes | None, depth: int, n_in_hbm: int) -> Fetch:
        """Ask the tiers for these pages. The fetch `is_over` when there is nothing more to wait for."""
        stuck = self._stuck_tiers()
        tiers = [tier for tier in self.tiers if tier not in stuck]
        probe = Probe(tiers, keys, clock=self._clock, patience_s=self._patience_s)
        fetch = Fetch(keys, parent, depth, n_in_hbm, probe)
        self._probing[fetch] = None
        return fetch

    @property
    def n_probing(self) -> int:
        """Fetches whose tiers have not all told what they have."""
        return len(self._probing)

    @property
    def n_found(self) -> int:
        """Fetches that wait for their turn and for room."""
        return len(self._found)

    @property
    def has_line(self) -> bool:
        """Whether those that have been found have to wait until the first of them may start."""
        return self._must_wait and bool(self._found)

    def is_in_line(self, fetch: Fetch) -> bool:
        """Whether it is one of them."""
        return self._must_wait and fetch in self._found

    @property
    def n_loading(self) -> int:
        return len(self._loading)

    @property
    def n_loading_pages(self) -> int:
        return self._n_loading_pages

    def drop(self, fetch: Fetch) -> None:
        """Nobody waits for it any more: forget it, unless it is loading, which others may profit from."""
        if not fetch.is_over and fetch not in self._loading:
            self._end(fetch)

    def drop_all(self) -> None:
        """As `drop`, for all."""
        for fetch in (*self._probing, *self._found):
            self._end(fetch)

    # ---- what ranks agree on ----

    def report(self, is_worth: Callable[[Fetch, int], bool]) -> list[int]:
        """What this rank sees, as `REPORT_SIZE` numbers. Never blocks.

        is_worth: whether this rank would fetch so many pages. If one of the ranks would not, none does.
        """
        probes = [self._seen_of_probe(fetch, is_worth) for fetch in islice(self._probing, N_REPORTED)]
        loads = [fetch.seen() for fetch in self._loading]
        numbers = [self._ageing.n_overdue()]
        for line in (probes, loads):
            padded = line + [(0, 0)] * (N_REPORTED - len(line))
            numbers.extend(number for pair in padded for number in pair)
        ended = [int(fetch.has_been_left()) for fetch in islice(self._lingering, N_LINGERING_REPORTED)]
        return numbers + ended + [0] * (N_LINGERING_REPORTED - len(ended))

    def follow(self, agreed: Sequence[int]) -> list[Fetch]:
        """Act on the minima over all ranks of their reports. Returns the fetches that have started to load."""
        n_overdue, *numbers = agreed[:-N_LINGERING_REPORTED]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        for fetch, has_ended in zip(tuple(self._lingering), agreed[-N_LINGERING_REPORTED:], strict=False):
            if has_ended:
                self._end_lingering(fetch)
        for fetch, (n_settled, n_good) in zip(tuple(self._loading), pairs[N_REPORTED:], strict=False):
            self._advance(fetch, n_settled, n_good)
        for fetch in self._ageing.expire(n_overdue):
            self._give_up(fetch)
        for fetch, (settled, n_found) in zip(tuple(self._probing), pairs[:N_REPORTED], strict=False):
            if settled:
                self._count_decision(fetch, n_found)
            if settled and n_found == 0:
                self._end(fetch)
            elif settled:
                del self._probing[fetch]
                self._found[fetch] = None
                fetch.n_found = n_found
        return self._start_found()

    def _seen_of_probe(self, fetch: Fetch, is_worth: Callable[[Fetch, int], bool]) -> tuple[int, int]:
        if not fetch.probe.done():
            return 0, 0
        ends = [end for _, _, end in fetch.probe.shares()]
        n_worth = next((end for end in reversed(ends) if is_worth(fetch, end)), 0)
        if n_worth < fetch.probe.n_found and not fetch.is_declined:
            self._stats.fetches_declined += 1
            fetch.is_declined = True
        return 1, n_worth

    def _count_decision(self, fetch: Fetch, n_found: int) -> None:
        """The ranks have agreed to load so many pages of what its tiers have."""
        if fetch.probe.n_found == 0:
            self._observed.fetches_absent += 1
        elif n_found == 0:
            self._observed.fetches_recomputed += 1
        elif n_found < fetch.probe.n_found:
            self._observed.fetches_shortened += 1
        else:
            self._observed.fetches_loaded += 1

    def futures(self) -> list[Future[int]]:
        """Of the loads that are under way."""
        return [load.future for fetch in (*self._loading, *self._lingering) for _, load in fetch.loads]

    def ask_no_other(self) -> None:
        """What the tiers that are at it now do not bring is not wanted any more."""
        for fetch in self._loading:
            fetch.ask_no_other()

    def settle(self) -> bool:
        """End by this rank's own knowledge what the tiers have ended. Returns whether that is everything."""
        self.drop_all()
        for fetch in tuple(self._loading):
            self._advance(fetch, *fetch.seen())
        for fetch in tuple(self._lingering):
            if fetch.has_been_left():
                self._end_lingering(fetch)
        return not self._loading and not self._lingering

    def _start_found(self) -> list[Fetch]:
        """Start those whose turn it is, until one has no room or may not start yet. Returns them."""
        started = []
        self._must_wait = False
        for fetch in tuple(self._found):
            rows = self._index.match(fetch.keys[: fetch.n_found * KEY_NBYTES])
            is_held = self._host.held(rows)
            n_held = true_prefix(is_held)
            above = self._row_above(fetch, rows[:n_held])
            if fetch.n_found <= fetch.n_in_hbm or above is None:
                self._end(fetch)
                continue
            n_pages = min(max(0, fetch.n_found - n_held), self._max_pages)
            if n_pages and self._is_arriving(above):
                continue
            if not self._may_start(above, n_pages):
                self._must_wait = True
                break
            if not n_pages:
                self._end(fetch)
                continue
            if not self._has_room(n_pages):
                break
            held_again = np.flatnonzero(is_held[n_held:])
            if self._start(fetch, n_held, min([n_pages, *held_again[:1].tolist()]), above):
                started.append(fetch)
        return started

    # ---- a fetch ----

    def _is_arriving(self, row: int) -> bool:
        return row != ROOT and bool(self._index.states(np.array([row], np.int32), HOST)[0] == INCOMING)

    def _has_room(self, n_pages: int) -> bool:
        if not self._loading:
            return True
        return len(self._loading) < N_REPORTED and n_pages <= self._max_pages - self._n_loading_pages

    def _row_above(self, fetch: Fetch, held: Rows) -> int | None:
        """The row below which loading would begin; None if it is not in host memory."""
        if len(held):
            return int(held[-1])
        if fetch.parent is None:
            return ROOT
        row = self._index.row_of(fetch.parent)
        return row if row is not None and self._host.held(np.array([row], np.int32))[0] else None

    def _start(self, fetch: Fetch, first: int, n_pages: int, above_row: int) -> bool:
        """Take slots for pages `first` to `first + n_pages` of the fetch, as far as there are any; have them filled."""
        keys = fetch.keys[first * KEY_NBYTES : (first + n_pages) * KEY_NBYTES]
        above = fetch.keys[(first - 1) * KEY_NBYTES : first * KEY_NBYTES] if first else fetch.parent
        try:
            rows = self._index.insert(keys, above_row)
        except IndexFull:
            self._end(fetch)
            return False
        self._index.touch_path(int(rows[-1]))  # what lies above must not make room for what lies below
        self._index.lease(rows)
        admitted = self._host.admit(rows)
        self._index.release(rows[len(admitted) :])
        if not len(admitted):
            self._end(fetch)
            return False
        del self._found[fetch]
        self._loading[fetch] = None
        self._ageing.add(fetch)
        self._n_loading_pages += len(admitted)
        fetch.start = fetch.depth + first
        fetch.rows, fetch.slots = admitted, self._host.slots(admitted)
        tenant = self._tenant_of(self._index.keys_of(self._index.path(int(admitted[0]))[:1]))
        run = Batch.below(above, keys[: len(admitted) * KEY_NBYTES], fetch.slots, fetch.start, tenant)
        fetch.loads = fetch.probe.load(run, first, batch_pages=self._batch_pages, without=self._stuck_tiers())
        return True

    def _stuck_tiers(self) -> set[Tier]:
        """On this rank: those that are still at slots of a load that was given up."""
        loads = (load for fetch in self._lingering if fetch.is_given_up for _, load in fetch.loads)
        return {load.tier for load in loads if not load.done() and load.tier is not None}

    def _advance(self, fetch: Fetch, n_settled: int, n_good: int) -> None:
        if n_good > fetch.n_landed:
            landed = fetch.rows[fetch.n_landed : n_good]
            self._host.land(landed, is_passing=True)
            self._index.set_backed(landed, True)
            self._stats.fetched += len(landed)
            fetch.n_landed = n_good
            self._tell_landed(landed)
        if n_settled < len(fetch.slots):
            return
        self._stats.fetch_missed += len(fetch.rows) - fetch.n_landed
        self._host.abandon(fetch.rows[fetch.n_landed :])
        self._index.release(fetch.rows)
        self._observed.movements.extend(fetch.movements())
        self._end(fetch)

    def _give_up(self, fetch: Fetch) -> None:
        """What has not landed will not; nobody waits for it any more."""
        self._stats.fetch_missed += len(fetch.rows) - fetch.n_landed
        fetch.is_given_up = True
        self._detach(fetch)
        self._host.linger(fetch.lingering)

    def _detach(self, fetch: Fetch) -> None:
        """Drop the pages that have not landed; no other tier is asked for them. Their slots begin to linger."""
        self._index.abort(fetch.rows[fetch.n_landed :], HOST)
        self._index.release(fetch.rows)
        fetch.ask_no_other()
        fetch.lingering = fetch.slots[fetch.n_landed :]
        self._end(fetch)
        self._lingering[fetch] = None

    def _end_lingering(self, fetch: Fetch) -> None:
        del self._lingering[fetch]
        self._host.end_lingering(fetch.lingering)

    def _end(self, fetch: Fetch) -> None:
        """Nobody waits for it any more."""
        self._probing.pop(fetch, None)
        self._found.pop(fetch, None)
        if fetch in self._loading:
            del self._loading[fetch]
            self._n_loading_pages -= len(fetch.slots)
        self._ageing.discard(fetch)
        fetch.is_over = True
        self.n_ended += 1
        self._tell_ended(fetch)

    # ---- life ----

    def detach(self) -> Slots:
        """The pages of all fetches are dropped. Returns the slots that tiers may still write, which linger."""
        self.drop_all()
        for fetch in tuple(self._loading):
            self._detach(fetch)
        return np.concatenate([NO_ROWS, *(fetch.lingering for fetch in self._lingering)])

    def check_invariants(self) -> None:
        """Raises AssertionError that names what is broken."""
        n_pages = sum(len(fetch.slots) for fetch in self._loading)
        assert n_pages == self._n_loading_pages, f"{n_pages} pages are loading, counted {self._n_loading_pages}"
        assert len(self._loading) <= N_REPORTED, "more fetches are loading than can be reported"
