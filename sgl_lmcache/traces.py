"""Our part of a request's path, in SGLang's own trace of it.

With `--enable-trace` SGLang keeps a span for each request, below it one for each process that has a part in it, and
below those one for each stage. Ours are stages as well, made through the context that the request brings along, and go
where SGLang's go. Nothing here knows an exporter, a sampler or OpenTelemetry.

    sgl_lmcache.lookup    its arrival: what it asks for, and what HBM and host memory have of it
    sgl_lmcache.wait      why it is not admitted: pages are on their way into host memory, or another request computes
                          what it lacks. Until they are there, or it is told not to wait any longer
    sgl_lmcache.restore   within SGLang's prefill: what comes from host memory, from the start of its batch's restores
                          to the launch of its forward. On a GPU the copies may go on behind that

Each rank traces its own requests, as SGLang does: all of them see the same tokens, and each its own times and bytes.
Attributes are counts and words of ours. No token, text, key or salt is among them.

A request without a trace has no object of ours either: what it costs is to see that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from sglang.srt.observability.trace import TraceSliceContext

from hicache import Ticket, Verdict
from radix import HOST
from sgl_lmcache.hits import found

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.observability.trace import TraceReqContext

    from hicache.fetches import Fetch
    from radix import Index
    from sgl_lmcache.wrapper import Tail

LEVEL: Final = 2
"""SGLang leaves out what lies above its trace level, which is 3 if nobody sets it and 0 for nothing."""

Attributes = dict[str, int | str]

PAGES: Final = "pages"
PREFILL: Final = "prefill"
"""What a request may wait for, named as in our metrics."""


def trace_of(req: Req, index: Index, page_size: int) -> RequestTrace | None:
    """For a request that has just arrived. None: it is not traced."""
    context = req.time_stats.trace_ctx
    return RequestTrace(context, index, page_size) if context.tracing_enable else None


def decision(fetch: Fetch) -> str:
    """What became of the question what the tiers below have, in the words of `sgl_lmcache_fetch_decisions_total`.

    `undecided`: the wait for the answer ended first.
    """
    n_there = fetch.probe.n_found
    if not fetch.probe.done() or (n_there and not fetch.n_found and not fetch.is_declined):
        return "undecided"
    if not n_there:
        return "absent"
    if not fetch.n_found:
        return "recompute"
    return "load" if fetch.n_found == n_there else "load_part"


class RequestTrace:
    """Of one request, from an arrival to the launch of its batch. Scheduler thread only.

    context: SGLang's, of this request. index: tells which pages have come. page_size: tokens a page.
    """

    __slots__ = ("_context", "_frontier", "_index", "_n_promised", "_page_size", "_since_ns", "_waits_for")

    def __init__(self, context: TraceReqContext, index: Index, page_size: int) -> None:
        self._context = context
        self._index = index
        self._page_size = page_size
        self._since_ns = time.time_ns()
        self._waits_for: str | None = None
        self._frontier = 0
        self._n_promised = 0

    def looked_up(self, tail: Tail, ticket: Ticket) -> None:
        """It has arrived, and has its ticket."""
        self._slice(
            "lookup",
            {
                "tokens.asked": len(tail.req.full_untruncated_fill_ids),
                "tokens.hbm": tail.device_hit_len,
                "tokens.host": tail.req.host_hit_length,
            },
        )
        if ticket.verdict is Verdict.WAIT:
            self._waits_for = PAGES

    def asked(self, ticket: Ticket, *, admitted: bool) -> None:
        """SGLang has asked whether to admit it."""
        waits_for = None if admitted else PAGES if ticket.verdict is Verdict.WAIT else PREFILL
        if waits_for == self._waits_for:
            return
        self._end_wait(ticket)
        self._since_ns, self._waits_for = time.time_ns(), waits_for
        leader = ticket.prefill.leader
        if leader is not None:
            self._frontier = ticket.prefill.frontier
            self._n_promised = ticket.prefill.follow_end - leader.frontier

    def dropped(self, ticket: Ticket) -> None:
        """Its ticket is closed without a launch: the request has gone, or everything was flushed."""
        self._end_wait(ticket, is_dropped=True)

    def launched(self, req: Req, ticket: Ticket, *, since_ns: int, slot_nbytes: int) -> None:
        """Its first batch was launched. since_ns: when that batch's restores were started, by the wall clock."""
        n_tokens = req.host_loaded_length
        if not n_tokens:
            return
        attributes: Attributes = {"tokens": n_tokens, "bytes": n_tokens // self._page_size * slot_nbytes}
        if not req.retracted_stain:  # SGLang says it of the first time only
            tiers = (one for one in found(req, ticket, self._page_size) if one[0] != "hbm")
            for tier, n_found in tiers:
                _add(attributes, f"tokens.{tier}", n_found)
        self._since_ns = since_ns
        self._slice("restore", attributes)

    # ---- a wait ----

    def _end_wait(self, ticket: Ticket, *, is_dropped: bool = False) -> None:
        if self._waits_for is None:
            return
        attributes: Attributes = {"waiting_for": self._waits_for}
        n_promised = n_there = 0
        if self._waits_for == PREFILL:
            n_promised, n_there = self._n_promised, ticket.prefill.frontier - self._frontier
        elif ticket.fetch is None:
            attributes["decision"] = "coming"
            n_promised, n_there = len(ticket.rows), self._index.resident_prefix(ticket.rows, HOST)
        else:
            fetch = ticket.fetch
            attributes["decision"] = decision(fetch)
            n_promised = fetch.n_found
            n_there = self._index.resident_prefix(self._index.match(fetch.keys), HOST)
            for tier, n_pages in fetch.origins(*ticket.fetched):
                _add(attributes, f"tokens.{tier}", n_pages * self._page_size)
        n_there = min(n_there, n_promised)
        attributes["tokens.promised"] = n_promised * self._page_size
        attributes["tokens.there"] = n_there * self._page_size
        attributes["ended"] = "dropped" if is_dropped else _end_of(attributes, n_promised, n_there)
        self._slice("wait", attributes)
        self._waits_for = None

    def _slice(self, name: str, attributes: Attributes) -> None:
        """A stage that ends now, and began at `_since_ns`. The next begins where it ends."""
        now_ns = max(time.time_ns(), self._since_ns)  # a clock that is set back makes no stage end before it began
        self._context.trace_slice(
            TraceSliceContext(
                slice_name=f"sgl_lmcache.{name}",
                start_time_ns=self._since_ns,
                end_time_ns=now_ns,
                level=LEVEL,
                attrs={f"sgl_lmcache.{key}": value for key, value in attributes.items()},
            )
        )
        self._since_ns = now_ns


def _end_of(attributes: Attributes, n_promised: int, n_there: int) -> str:
    """How a wait has ended, of a request that is still there."""
    if n_promised == 0 and attributes.get("decision") != "undecided":
        return "nothing"
    if n_there == 0:
        return "in_vain"
    return "there" if n_there == n_promised else "part"


def _add(attributes: Attributes, name: str, n: int) -> None:
    attributes[name] = int(attributes.get(name, 0)) + n
