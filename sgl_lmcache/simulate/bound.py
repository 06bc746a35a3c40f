"""The clairvoyant bound: Belady's policy on whole prefixes, which knows what will be asked for.

After each request all its blocks are held, but for those that are never used again; then, while more are held than
there is room for, the one whose next use is farthest away leaves, and of several that are next used by one request the
deepest first.

What it bounds. A block that a request uses can be found there if and only if it was held ever since the request that
used it last. So each policy chooses intervals between two uses of a block, no more than there is room for at any time,
and one hit is one interval; to let go the interval that ends last is the choice that keeps most of them. Nothing is
lost by asking for whole prefixes: a block is used whenever one below it is, so its next use is never later, and the
block below goes first. So no policy that holds at most `n_pages` blocks between two requests, and no block of a request
still to come, hits more in the whole trace. In a part of the trace one may: this one gives up a late hit for an early.

A block's next use is a position in the sequence of all uses, where a later request comes behind an earlier one and a
deeper block behind one above it. So "farthest, then deepest" is the largest position, and all there is to remember of a
block that is held is that position.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sgl_lmcache.simulate.trace import Trace


def clairvoyant_hits(trace: Trace, n_pages: int) -> NDArray[np.int64]:
    """int64[n]: how many blocks each request hits, with room for `n_pages`. Some microseconds a block."""
    next_uses = _next_uses(trace.blocks).tolist()
    starts = trace.starts.tolist()
    held = bytearray(len(next_uses))
    """By position: whether that use will find its block held."""
    farthest: list[int] = []
    """A heap of the negative positions of those, and of such as have been, which are behind all that are to come."""
    n_held = 0
    hits = np.zeros(len(trace), np.int64)
    for request, (start, end) in enumerate(pairwise(starts)):
        missed = held.find(0, start, end)
        hits[request] = (end if missed < 0 else missed) - start
        n_held -= held.count(1, start, end)
        for position in next_uses[start:end]:
            if position >= 0:
                held[position] = 1
                n_held += 1
                heappush(farthest, -position)
        while n_held > n_pages:
            held[-heappop(farthest)] = 0
            n_held -= 1
    return hits


def _next_uses(blocks: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64[n]: by position, the next one with the same block, or -1."""
    order = np.argsort(blocks, kind="stable")
    next_uses = np.full(len(blocks), -1, np.int64)
    same = blocks[order[1:]] == blocks[order[:-1]]
    next_uses[order[:-1][same]] = order[1:][same]
    return next_uses
