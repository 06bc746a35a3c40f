"""Single flight for prefill: pages that one request is computing are not computed by others beside it.

Sixty-four users paste the same document. Each request, alone, finds nothing and computes it. Here the first one
admitted becomes the leader of the pages it lacks, and whoever shares them waits in SGLang's queue until they are in the
tree, then hits them.

A prefill has one moving part, its frontier: the first of its pages that is neither in HBM nor in host memory. What lies
before it can be had, and what lies behind it is what its forward computes. Two requests compute the same pages if and
only if the keys at their frontiers are equal, since a key stands for its whole prefix; so leaders are found by the key
at their frontier, and how far two agree is a binary search over their keys. Several may lead from one frontier: those
that share too little to be worth waiting for, say a system prompt before different documents.

    enter      an admission attempt: lead (compute), or follow (stay in the queue)
    launch     its batch runs: the leader stays one until its pages are all there, or it ends
    end        finished, aborted, retracted: its followers look for another leader, and the first of them becomes it

A request that was let in, but for which SGLang had no room in the batch, leads for that scheduler pass only. So nobody
ever waits for a request that is itself waiting. The frontier is read off the index, which follows the tree: there is
nothing to be told when pages are published. All decisions are functions of the index and of the order of the calls, so
every rank takes the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from radix import HBM, HOST, KEY_NBYTES, Index

MIN_SHARED_PAGES = 16
"""To wait for less than this costs a request more (its place in a batch) than to compute it again, unless it is all
that the request lacks."""


@dataclass(slots=True, eq=False)
class Prefill:
    """One request's computation of what it lacks of `keys`, a run of pages on its path. Belongs to `Prefills`."""

    keys: bytes
    last_key: bytes = b""
    """Of the last whole page of its prompt, which need not be one of `keys`; empty if there is none."""
    frontier: int = 0
    entered_at: int = -1
    running: bool = False
    leader: Prefill | None = None
    follow_end: int = 0
    """In pages of the leader's keys: where what both share ends."""
    refused: Prefill | None = None
    """A leader that was waited for long enough."""

    @property
    def n_pages(self) -> int:
        return len(self.keys) // KEY_NBYTES

    def key_at(self, page: int) -> bytes:
        return self.keys[page * KEY_NBYTES : (page + 1) * KEY_NBYTES]


class Prefills:
    """See the module's text. One thread, SGLang's scheduler thread."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._leaders: dict[bytes, list[Prefill]] = {}
        self._swept_at = -1

    def enter(self, prefill: Prefill) -> bool:
        """Whether to compute `prefill` now. False: another computes a good part of it; stay in the queue, ask again."""
        if self._swept_at != self._index.now:
            self._sweep()
        if prefill.leader is not None and self._still_ahead(prefill):
            return False
        prefill.leader = None
        prefill.frontier = self._frontier(prefill, 0)
        if prefill.frontier == prefill.n_pages:
            return True
        beside = self._leaders.setdefault(prefill.key_at(prefill.frontier), [])
        for leader in beside:
            if leader is prefill or leader is prefill.refused or not self._is_live(leader):
                continue
            n_shared = _n_shared(leader, prefill)
            if n_shared >= MIN_SHARED_PAGES or prefill.frontier + n_shared == prefill.n_pages:
                prefill.leader, prefill.follow_end = leader, leader.frontier + n_shared
                return False
        if prefill not in beside:
            beside.append(prefill)
        prefill.entered_at = self._index.now
        return True

    def launch(self, prefill: Prefill) -> None:
        """The batch that computes it has been launched."""
        prefill.running = True

    def refuse(self, prefill: Prefill) -> None:
        """It has waited long enough for its leader, and will not wait for that one again."""
        prefill.refused, prefill.leader = prefill.leader, None

    def end(self, prefill: Prefill) -> None:
        """Its request has ended, however it did."""
        prefill.running, prefill.entered_at = False, -1

    def clear(self) -> None:
        """Nobody leads any more: what was published is gone."""
        for leader in chain.from_iterable(self._leaders.values()):
            self.end(leader)
        self._leaders.clear()

    def _is_live(self, leader: Prefill) -> bool:
        return leader.running or leader.entered_at == self._index.now

    def _still_ahead(self, prefill: Prefill) -> bool:
        leader = prefill.leader
        return leader is not None and self._is_live(leader) and leader.frontier < prefill.follow_end

    def _sweep(self) -> None:
        """Once a pass: see how far the leaders have come."""
        self._swept_at = self._index.now
        leaders, self._leaders = self._leaders, {}
        for leader in chain.from_iterable(leaders.values()):
            if self._is_live(leader):
                leader.frontier = self._frontier(leader, leader.frontier)
                if leader.frontier < leader.n_pages:
                    self._leaders.setdefault(leader.key_at(leader.frontier), []).append(leader)

    def _frontier(self, prefill: Prefill, start: int) -> int:
        """The first page from `start` on that is neither in HBM nor in host memory."""
        rows = self._index.match(prefill.keys[start * KEY_NBYTES :])
        return start + self._index.resident_prefix(rows, HBM, HOST)


def _n_shared(leader: Prefill, follower: Prefill) -> int:
    """How many pages both have from their frontiers on. Keys chain: where they agree, they agree on all before."""
    low, high = 1, min(leader.n_pages - leader.frontier, follower.n_pages - follower.frontier)
    while low < high:
        middle = (low + high + 1) // 2
        if leader.key_at(leader.frontier + middle - 1) == follower.key_at(follower.frontier + middle - 1):
            low = middle
        else:
            high = middle - 1
    return low
