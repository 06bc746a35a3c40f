"""SGLang's unified radix cache, with tiers below HBM.

SGLang keeps the tree, the allocator and every decision about HBM. This subclass answers the calls that the scheduler
makes for caches with an external store, in the order in which they come:

    prefetch_from_storage       a request arrives: open its ticket, which leases what host memory has of its path
    check_hicache_events        once an iteration: acknowledge write-backs, let fetches and spills go on, decide
                                tickets, tick the logical clock
    check_prefetch_progress     an admission attempt: what was decided about its ticket
    match_prefix, init_load_back (inherited): our wrapper adds the host hit, then queues the restore
    finish_external_linker_loads   its batch has been launched: the ticket has served
    on_release, release_aborted_request   the request is over

What depends on a clock or a thread is looked at in one place, `_agree`, where the ranks take one answer; all else
follows from the order of these calls, which is the same on every rank.

Nothing here may raise for a reason outside our own bugs: an exception in the scheduler ends the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, EvictParams, EvictResult
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_schedule

from hicache import UNKNOWN, Engine, Prefill, Ticket, TierError
from hicache.logs import get_logger
from sgl_lmcache.blocks import block_ends
from sgl_lmcache.explainer import Explainer
from sgl_lmcache.keys import to_blob
from sgl_lmcache.linker import Linker
from sgl_lmcache.namespace import Namespace
from sgl_lmcache.prefill_clock import PrefillClock
from sgl_lmcache.ranks import OneRank, Ranks
from sgl_lmcache.readings import Readings, start_readings
from sgl_lmcache.record import Recorder
from sgl_lmcache.tiers import NextTiers
from sgl_lmcache.traces import RequestTrace, trace_of
from sgl_lmcache.wrapper import Tail, TieredLinkerWrapper

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.cache_action import BackupKV
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId

logger = get_logger(__name__)

CLEAR_TIMEOUT_S = 10.0
"""How long `/hicache/storage-backend/clear` may keep the scheduler. Deleting goes on after it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits in SGLang's queue. A retried request comes back under the same rid with a new handle."""

    handle: CacheRequestHandle
    ticket: Ticket
    trace: RequestTrace | None


class TieredRadixCache(UnifiedRadixCache):
    """See the module's text. Inert until `attach`: SGLang's constructor calls `reset` before there is a linker."""

    linker: TieredLinkerWrapper | None

    def __init__(self, params: CacheInitParams) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._prefills: dict[str, Prefill] = {}
        self._ranks: Ranks = OneRank()
        self._in_weight_session = False
        self.namespace: Namespace | None = None
        self._weights_have_changed = False
        self._weights_digest: Callable[[], str] | None = None
        self._next_tiers: NextTiers | None = None
        self._prefill_clock: PrefillClock | None = None
        self._recorder: Recorder | None = None
        self._has_metrics = params.enable_metrics
        self._metrics: Readings | None = None
        self.explainer: Explainer | None = None
        self._restores_started_ns = 0
        super().__init__(params)

    def attach(
        self,
        linker: Linker,
        namespace: Namespace,
        ranks: Ranks,
        *,
        weights_digest: Callable[[], str],
        next_tiers: NextTiers,
        recorder: Recorder | None = None,
        replica: int = 0,
        has_metrics_port: bool = False,
    ) -> None:
        """Turn the tiers on. ranks: those that hold shards of the same pages. replica: which one they are.

        weights_digest: names the weights as they are now. next_tiers: what goes on below in a new namespace. recorder:
        is told of every request, and closed with the linker. has_metrics_port: metrics are published with SGLang's or
        without.
        """
        self._ranks = ranks
        self._weights_digest = weights_digest
        self._next_tiers = next_tiers
        self._recorder = recorder
        self.explainer = Explainer(
            linker.engine,
            page_size=self.page_size,
            is_eagle=self.tree_core.is_eagle,
            replica=replica,
            speaks=ranks.is_first,
        )
        if not get_schedule().enable_mixed_chunk:  # nobody says how much of such a batch is prefill
            self._prefill_clock = PrefillClock(linker.engine.prefill_speed, self.page_size, time.monotonic)
        if self._has_metrics or has_metrics_port:
            n_hbm_pages = self.token_to_kv_pool_allocator.size // self.page_size
            self._metrics = start_readings(
                linker, page_size=self.page_size, n_hbm_pages=n_hbm_pages, speaks=ranks.is_first
            )
        self.namespace = namespace
        self.init_cache_linker(linker)

    def init_cache_linker(self, cache_linker: Linker) -> None:
        self.linker = TieredLinkerWrapper(self, cache_linker)

    @property
    def _engine(self) -> Engine:
        assert self.linker is not None
        return self.linker.cache_linker.engine

    # ---- arrival and admission ----

    def is_backuped(self, node_id: NodeId) -> bool:
        """SGLang asks before it calls `prefetch_from_storage`. Any node will do: keys chain from any page."""
        return True

    def prefetch_from_storage(
        self,
        request: CacheRequestHandle,
        last_host_node_id: NodeId,
        new_input_tokens: list[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
        matched_prefix_tokens: list[int] | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        storage_hit_end: int | None = None,
    ) -> None:
        """A request has arrived, or has come back after a retraction. Never blocks.

        The tokens given here start behind HBM's and our own hit, and `last_hash` belongs to neither, so they are not
        used: SGLang has matched the request just before, and the wrapper has kept the keys of its whole tail.
        """
        self._close_ticket(request.rid)
        if self.linker is None:
            return
        tail = self.linker.tails.get(request.rid)
        if tail is None:
            return
        self._record(tail)
        if tail.anchor is not None:
            self.linker.offer_again(last_host_node_id, tail.anchor)
        with self.linker.cache_linker.calls.timed("arrival"):
            trace = trace_of(tail.req, self._engine.index, self.page_size)
            if self.explainer is not None:
                self.explainer.arrived(tail)
            ticket = self._engine.open_ticket(tail.keys, tail.anchor, tenant=cache_salt or "")
            if trace is not None:
                trace.looked_up(tail, ticket)
        self._waiting[request.rid] = _Waiting(request, ticket, trace)

    def _record(self, tail: Tail) -> None:
        """Tell the recorder of a request, unless SGLang has made it to see whether all is well.

        One that brings embeddings is left out, too: its tokens do not say what its KV is.
        """
        req = tail.req
        if self._recorder is None or req.rid.startswith(HEALTH_CHECK_RID_PREFIX) or not self._recorder.wants(req.rid):
            return
        if req.positional_embed_overrides is not None:
            return
        ends = block_ends(tail, self._engine.index, self.tree_core, self.page_size)
        self._recorder.arrived(req.rid, len(req.origin_input_ids), ends)

    def check_prefetch_progress(self, request: CacheRequestHandle) -> bool:
        """Whether the request may be admitted in this pass. True for requests that have no ticket."""
        waiting = self._waiting.get(request.rid)
        if waiting is None or waiting.handle != request:
            return True
        admitted = self._engine.admit(waiting.ticket)
        if waiting.trace is not None:
            waiting.trace.asked(waiting.ticket, admitted=admitted)
        return admitted

    def pop_prefetch_loaded_span(self, request: CacheRequestHandle) -> tuple[int, int | None]:
        """What was fetched for the request from below host memory: (tokens, where they start in its prompt).

        SGLang reports these as `storage` in `cached_tokens_details`, as far as they are hit.
        """
        waiting = self._waiting.get(request.rid)
        if waiting is None or waiting.handle != request:
            return 0, None
        start, end = waiting.ticket.fetched
        return (end - start) * self.page_size, start * self.page_size

    def check_hicache_events(self) -> None:
        """Once a scheduler iteration, busy or idle. Constant time when nothing is pending."""
        if self.linker is None:
            return
        with self.linker.cache_linker.calls.timed("iteration"):
            self._engine.tick()
            if self._metrics is not None:
                self._metrics.publish()
            if self.linker.cache_linker.is_copying or self._engine.is_pending:
                self._agree()

    def _agree(self) -> None:
        """One reduction: learn what has ended on every rank and whose time is up, and act on it."""
        assert self.linker is not None
        linker, engine = self.linker.cache_linker, self._engine
        mine = linker.progress()
        digest = engine.digest % UNKNOWN
        report = engine.report(decides=self._ranks.is_first)
        seen = (digest, -digest, mine.n_ended, mine.n_landed, mine.n_restored, *report)
        lowest, highest, n_ended, n_landed, n_restored, *agreed = self._ranks.minimum(seen)
        if lowest != -highest:
            self._stand_down()
            return
        # A write-back that has ended everywhere, but not well everywhere, has failed.
        self.linker.acknowledge(n_landed=n_landed, n_failed=int(n_ended > n_landed))
        linker.end_restores(n_restored)
        engine.follow(agreed)

    def _stand_down(self) -> None:
        """The ranks have taken different decisions, so there is a fault of ours: stop before it does harm.

        Every rank learns it in the same reduction. Each ends for itself what is under way, so that nothing is pending
        any more and nobody reduces alone, and from here to the next flush nothing is promised and nothing is kept.
        """
        assert self.linker is not None
        logger.error("The ranks no longer agree on what is kept: nothing is promised or kept until /flush_cache")
        linker = self.linker.cache_linker
        linker.copies.quiesce()
        mine = linker.progress()
        self.linker.acknowledge(n_landed=0, n_failed=mine.n_ended)
        linker.end_restores(mine.n_restored)
        settled = self._engine.stand_down()
        if self._ranks.minimum([int(settled)]) == [0]:
            logger.error("A tier below host memory hangs as well: nothing is kept until the server is started again")
            self._engine.retire()

    def ready_to_load_host_cache(self) -> int:
        if self._prefill_clock is not None:
            self._prefill_clock.begin()
        self._restores_started_ns = time.time_ns()
        return -1 if self.linker is None else self.linker.start_layer_wise_loading()

    def finish_external_linker_loads(self, reqs: list[Req]) -> list[Req]:
        """A batch was launched. Its restores hold leases of their own, so the tickets of its requests have served."""
        if self._prefill_clock is not None:
            self._prefill_clock.launched(reqs)
        if self._waiting:
            for req in reqs:
                self._launch(req)
        failed: list[Req] = super().finish_external_linker_loads(reqs)
        return failed

    def _launch(self, req: Req) -> None:
        waiting = self._waiting.pop(req.rid, None)
        if waiting is None:
            return
        if self._metrics is not None and not req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self._metrics.hits.launched(req, waiting.ticket)
        if waiting.trace is not None and self.linker is not None:
            slot_nbytes = self.linker.cache_linker.slot_nbytes
            waiting.trace.launched(req, waiting.ticket, since_ns=self._restores_started_ns, slot_nbytes=slot_nbytes)
        if self.linker is not None:
            self.linker.forget(req.rid)
        if req.skip_radix_cache_insert:  # what it computes, nobody else can hit
            self._engine.close_ticket(waiting.ticket)
        else:
            self._prefills[req.rid] = self._engine.launch(waiting.ticket)

    def checkpoint(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        """What the request has computed goes into the tree."""
        if self._prefill_clock is not None:
            self._prefill_clock.computed(req)
        super().checkpoint(req, up_to=up_to, **kwargs)

    # ---- the end of a request ----

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self._end_prefill(req.rid, len(req.output_ids_through_stop) if req.finished() else None)
        self._forget(req.rid)
        if self._recorder is not None and req.finished():
            self._recorder.ended(req.rid, len(req.output_ids_through_stop))

    def release_aborted_request(self, request: CacheRequestHandle) -> None:
        super().release_aborted_request(request)
        if self._recorder is not None:
            tail = None if self.linker is None else self.linker.tails.get(request.rid)
            self._recorder.ended(request.rid, 0 if tail is None else len(tail.req.output_ids_through_stop))
        self._forget(request.rid)

    def _forget(self, rid: str) -> None:
        self._close_ticket(rid)
        if self.linker is not None:
            self.linker.forget(rid)

    def _close_ticket(self, rid: str) -> None:
        waiting = self._waiting.pop(rid, None)
        if waiting is not None:
            if waiting.trace is not None:
                waiting.trace.dropped(waiting.ticket)
            self._engine.close_ticket(waiting.ticket)
        self._end_prefill(rid, None)

    def _end_prefill(self, rid: str, n_answer_tokens: int | None) -> None:
        prefill = self._prefills.pop(rid, None)
        if prefill is not None:
            self._engine.end_prefill(prefill, n_answer_tokens=n_answer_tokens)

    def _close_tickets(self) -> None:
        for rid in (*self._waiting, *self._prefills):
            self._close_ticket(rid)

    # ---- HBM ----

    def evict(self, params: EvictParams) -> EvictResult:
        self._unlock_write_backs(params.num_tokens)
        return super().evict(params)

    def evict_for_alloc(
        self, params: EvictParams, *, allocation_reclaim_satisfied: Callable[[], bool] | None = None
    ) -> EvictResult:
        self._unlock_write_backs(params.num_tokens)
        return super().evict_for_alloc(params, allocation_reclaim_satisfied=allocation_reclaim_satisfied)

    def _unlock_write_backs(self, n_tokens: int) -> None:
        """SGLang needs room that pages locked by their write-back would give: wait for the first of those copies.

        They take milliseconds, and without them SGLang would retract or abort a request whose batch has no other way
        to grow: stock SGLang would find the same pages evictable.
        """
        while self.linker is not None and self.linker.pending_offloads and self.evictable_size() < n_tokens:
            self.linker.cache_linker.wait_write_back()
            self._agree()

    def _evict_device_leaf(self, node_id: NodeId, tracker: dict[ComponentType, int]) -> BackupKV | None:
        """SGLang evicts a leaf from HBM: tell the index before the node is gone."""
        if self.linker is not None:
            self._engine.hbm_evicted(to_blob(self.tree_core.get_hash_values(node_id)))
        backup: BackupKV | None = super()._evict_device_leaf(node_id, tracker)
        return backup

    # ---- life ----

    def release_host_resources(self) -> None:
        super().release_host_resources()
        if self._recorder is not None:
            self._recorder.close()

    def has_pending_cache_operations(self) -> bool:
        """Constant: each rank decides alone whether it is idle enough to flush, and `reset` quiesces by itself."""
        return False

    def clear_storage_backend(self) -> bool:
        """`/hicache/storage-backend/clear` empties the tiers below host memory. False: one failed, or still does it."""
        if self.linker is None:
            return True
        cleared = self._engine.clear_below()
        try:
            return cleared is None or cleared.result(CLEAR_TIMEOUT_S) >= 0
        except (TierError, FutureTimeoutError):
            logger.exception("The tiers below host memory have not all been emptied")
            return False

    def reset(self) -> None:
        """`/flush_cache` and weight updates: drops HBM and host memory. Blocks for copies in flight."""
        self._close_tickets()
        super().reset()
        if self._weights_have_changed and self._in_weight_session:
            self._engine.taint()
        elif self._weights_have_changed:
            self._start_namespace()

    # ---- weights ----

    def taint(self) -> None:
        """New weights are coming in: what is kept is old now, and so is what running requests still compute.

        From here to the next `reset` nothing is promised and nothing is kept.
        """
        if self.linker is not None:
            self._weights_have_changed = True
            self._engine.taint()

    def begin_weight_session(self) -> None:
        """As `taint`, and no `reset` lifts it before `end_weight_session`: weights may change at any time."""
        self._in_weight_session = True
        self.taint()

    def end_weight_session(self) -> None:
        self._in_weight_session = False

    def weights_updated(self, *, is_idle: bool) -> None:
        """The weights are whole again. If no KV of older ones is left anywhere in SGLang, the taint ends here.

        is_idle: no request holds KV.
        """
        if self.linker is None or self._in_weight_session or not self._weights_have_changed:
            return
        if is_idle and self.evictable_size() + self.protected_size() == 0:
            self._close_tickets()
            self.linker.reset()
            self._start_namespace()
        else:
            logger.warning("Weights have changed under cached KV: nothing is kept below HBM until /flush_cache")

    def _start_namespace(self) -> None:
        """The weights are whole, and everything of the old ones has been dropped."""
        assert self.namespace is not None
        assert self._weights_digest is not None
        self._weights_have_changed = False
        self.namespace = self.namespace.renewed(self._weights_digest())
        logger.info("sgl_lmcache: new weights, namespace %s", self.namespace.digest)
        below = self._engine.below
        if below is not None:
            assert self._next_tiers is not None
            if self._metrics is not None:
                self._metrics.publish(now=True)
            self._engine.replace_tiers(self._next_tiers(self.namespace, below.tiers))

    def check_invariants(self) -> None:
        """For tests and debugging: everything of ours that can be broken, named. Scans all of it."""
        if self.linker is not None:
            self._engine.check_invariants()
