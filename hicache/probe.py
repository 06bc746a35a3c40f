"""What several tiers have of one run of pages, and who brings which of them.

Tiers are asked in their order, fastest first, each for the pages that those above it are not known to have. One that
answers at once, as an SSD does whose map is in memory, leaves only the rest to the next. Where one has to be waited
for, the next is asked for the same pages at the same time: several stores over a network cost one round trip together,
and a page that two of them have comes from the faster one.

The answers divide the run into shares, one behind the other, a tier each. All are loaded at the same time. What a tier
does not bring of its share (the page was evicted meanwhile, or is damaged, or the store failed) is asked of the tiers
behind it, one after the other. Tiers may be called by the engine's thread only, so nothing here goes on by itself: it
goes on when it is looked at, once a scheduler iteration.

A tier that fails has nothing. One that does not answer holds up for a short time only what others have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hicache.tier import Batch, Tier, answer_of, answered, batches, has_answered
from radix import KEY_NBYTES

Share = tuple[int, int, int]
"""Pages of the run that come from one tier: which tier it is, the first page, and the end."""


@dataclass(slots=True, eq=False)
class Brought:
    """What one tier was asked to bring of a batch: from when to when, and how many pages, of those still missing."""

    tier: str
    started_s: float
    ended_s: float | None = None
    n_pages: int = 0

    def end(self, now_s: float) -> None:
        """The tier has ended with it. Called by its thread, and by the engine's, which may see it first."""
        if self.ended_s is None:
            self.ended_s = now_s


class Load:
    """One batch on its way up. One thread, that of the engine.

    tiers: who is asked for it, one after the other, until all of it is there. clock: seconds, for what is observed.
    """

    def __init__(self, tiers: Sequence[Tier], batch: Batch, clock: Callable[[], float]) -> None:
        self._rest = batch
        self._others = list(tiers)
        self._clock = clock
        self.brought: list[Brought] = []
        """By those that were asked so far, in path order."""
        self.tier: Tier | None = None
        """Who is at it now; None when it has ended."""
        self.future = answered(0)
        """Of the tier that is at it now, or was last."""
        self.n_good = 0
        """Pages at the head of the batch that are in place and verified: of tiers that have ended with it."""
        self._ask_next()

    def _ask_next(self) -> None:
        self.tier = self._others.pop(0) if len(self._rest) and self._others else None
        if self.tier is not None:
            brought = Brought(self.tier.name, self._clock())
            self.brought.append(brought)
            self.future = self.tier.load(self._rest)
            self.future.add_done_callback(lambda _: brought.end(self._clock()))

    def done(self) -> bool:
        """Whether no tier reads or writes a slot of it any more, and none will. Never blocks."""
        while self.tier is not None and self.future.done():
            n_brought = answer_of(self.future)
            self.brought[-1].end(self._clock())
            self.brought[-1].n_pages = n_brought
            self.n_good += n_brought
            self._rest = self._rest.part(n_brought, len(self._rest))
            self._ask_next()
        return self.tier is None

    def ask_no_other(self) -> None:
        """What the tier that is at it does not bring is not wanted any more."""
        self._others.clear()


class Probe:
    """Asks `tiers` what they have of the run `keys`. One thread, that of the engine.

    clock: monotonic seconds. patience_s: how long those that have not answered may hold up what others have.
    """

    def __init__(self, tiers: Sequence[Tier], keys: bytes, *, clock: Callable[[], float], patience_s: float) -> None:
        self._tiers = tuple(tiers)
        self._clock = clock
        self._overdue_at_s = clock() + patience_s
        self._asked: list[tuple[int, Future[int]]] = []
        """Of the first tiers: from which page on each was asked, and its answer."""
        start = 0
        for tier in tiers:
            if start * KEY_NBYTES == len(keys):
                break
            future = tier.exists(keys[start * KEY_NBYTES :])
            self._asked.append((start, future))
            if future.done():
                start += answer_of(future)

    def done(self) -> bool:
        """Whether there is nothing more to wait for. Never blocks."""
        if all(future.done() for _, future in self._asked):
            return True
        return self.n_found > 0 and self._clock() >= self._overdue_at_s

    @property
    def waiting(self) -> list[int]:
        """The tiers that have not answered."""
        return [position for position, (_, future) in enumerate(self._asked) if not future.done()]

    @property
    def n_found(self) -> int:
        """How many pages at the head of the run the tiers have together, by the answers so far. Never grows less."""
        return max((end for _, _, end in self.shares()), default=0)

    def shares(self) -> Iterator[Share]:
        """Who brings what, by the answers so far: in path order, from page 0 to `n_found` without a gap."""
        end = 0
        for position, (start, future) in enumerate(self._asked):
            found_end = start + answer_of(future) if future.done() else start
            if found_end > end:
                yield position, end, found_end
                end = found_end

    def answers(self) -> Iterator[tuple[int, int, int | None]]:
        """Of each tier that was asked: which it is, from which page on, and the first page from there on that it has
        not; None: it has not answered, or has failed."""
        for position, (start, future) in enumerate(self._asked):
            yield position, start, start + future.result() if has_answered(future) else None

    def expected_load_s(self, n_pages: int) -> float:
        """Seconds that loading the first n_pages would take if asked for now; they are found. Never blocks."""
        times = (
            self._tiers[position].expected_load_s(min(end, n_pages) - start)
            for position, start, end in self.shares()
            if start < n_pages
        )
        return max(times, default=0.0)

    def load(
        self, batch: Batch, first: int, *, batch_pages: int, without: Collection[Tier] = ()
    ) -> list[tuple[int, Load]]:
        """Have these pages loaded, which are found: the first of them is page `first` of the run.

        batch_pages: the most that one call of a tier loads. without: tiers that are to be asked for nothing.
        Returns the parts in path order, each with where it ends in the batch.
        """
        loads = []
        for position, share_start, share_end in self.shares():
            start, end = max(share_start - first, 0), min(share_end - first, len(batch))
            if start < end:
                tiers = [tier for tier in self._tiers[position:] if tier not in without]
                parts = batches(batch.part(start, end), batch_pages)
                loads += [(start + part_end, Load(tiers, part, self._clock)) for part_end, part in parts]
        return loads
