"""SGLang's scheduler, played: real requests and SGLang's own functions on them, over a `RealCache`, without a model.

It keeps the order of calls that the real one keeps (events, stash, admissions, loads, forward, ends), with one prefill
that may be cut into chunks at a time and a batch that decodes. Everything that happens at a time of its own (a copy
ends, a client goes, weights change, HBM is short) is a method, so that a test says when.

Every forward checks the KV that it reads, and `check` states the laws of conservation after any step.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome, InitLoadBackParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.sampling.sampling_params import SamplingParams

from radix import HBM, HOST, State
from sgl_lmcache import weights
from sgl_lmcache.keys import to_blob
from tests.support.forward import Forward, Values, kv_of, page_values
from tests.support.real_cache import N_LAYERS, RealCache
from tests.support.stepped_copies import SteppedCopies
from tests.support.tiers import FaultyTier, MemoryTier, split


@dataclass(frozen=True)
class Prompt:
    """What a client sends."""

    tokens: tuple[int, ...]
    n_output: int = 1
    extra_key: str | None = None
    cache_salt: str | None = None
    is_kept: bool = True
    """False: what it computes is not to be inserted into the tree."""


class Scheduler:
    """See the module's text. `seen` counts what has happened, so that a test can tell that it was not vacuous."""

    def __init__(self, real: RealCache, copies: SteppedCopies) -> None:
        self.real = real
        self.cache = real.cache
        self.copies = copies
        self.forward = Forward(real.pool)
        self.waiting: list[Req] = []
        self.chunked: Req | None = None
        self.running: list[Req] = []
        self.seen: Counter[str] = Counter()
        self._key_of_device_page: dict[int, bytes] = {}
        self._right_page: dict[bytes, tuple[array[int], str, int]] = {}
        self.in_weight_session = False
        self._n_reserved = 0
        """Device tokens that the batch being built will allocate."""

    @property
    def live(self) -> list[Req]:
        """Requests that hold device pages."""
        return self.running + ([] if self.chunked is None else [self.chunked])

    # ---- requests come and go ----

    def arrive(self, rid: str, prompt: Prompt) -> None:
        parameters = SamplingParams(max_new_tokens=prompt.n_output)
        tokens = array("q", prompt.tokens)
        req = Req(rid, "", tokens, parameters, extra_key=prompt.extra_key, cache_salt=prompt.cache_salt)
        req.skip_radix_cache_insert = not prompt.is_kept
        self._queue(req)

    def _queue(self, req: Req) -> None:
        req.init_next_round_input(self.cache, cow_mamba=False)
        self._note_pages(req)
        self.cache.prefetch_from_storage(req.cache_request_handle, req.last_host_node, [])
        self.waiting.append(req)

    def abort_waiting(self, i: int) -> None:
        self.cache.finish(self.waiting.pop(i).cache_request_handle, CacheRequestOutcome.ABORT)

    def abort_running(self, i: int) -> None:
        self._end(self.running.pop(i), FINISH_ABORT("the client has gone"))

    def abort_chunked(self) -> None:
        req, self.chunked = self.chunked, None
        assert req is not None
        self._abort_prefill(req)

    def _abort_prefill(self, req: Req) -> None:
        req.finished_reason = FINISH_ABORT("the client has gone")
        self.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)
        release_kv_cache(req, self.cache, checkpoint=False)

    def retract(self, i: int) -> None:
        """HBM is short: a running request gives up its pages and goes back to the queue."""
        req = self.running.pop(i)
        release_kv_cache(req, self.cache, checkpoint=False)
        evict_from_tree_cache(self.cache, self.real.page_size)
        req.reset_for_retract()
        self.seen["retracted"] += 1
        self._queue(req)

    def _end(self, req: Req, reason: object) -> None:
        req.finished_reason = reason
        release_kv_cache(req, self.cache, checkpoint=True)

    # ---- one turn of the loop ----

    def prefill(self, n_pages: int, max_requests: int, *, abort_loading: bool = False) -> None:
        """A scheduler pass. n_pages: how much a batch may compute. abort_loading: the first that restores is."""
        self.cache.check_hicache_events()
        budget = n_pages * self.real.page_size
        batch = self._continue_chunked(budget)
        for req in batch:
            budget -= self._whole_pages(req.extend_len)
            self._n_reserved += self._whole_pages(req.extend_len)
        for req in tuple(self.waiting):
            if not self.cache.check_prefetch_progress(req.cache_request_handle):
                self.seen["told to wait"] += 1
                continue
            n_fetched, _ = self.cache.pop_prefetch_loaded_span(req.cache_request_handle)
            self.seen["admitted with fetched pages"] += n_fetched > 0
            req.init_next_round_input(self.cache)
            if budget <= 0 or len(batch) >= max_requests:
                self.seen["no room in the batch"] += 1
                continue
            if self._admit(req, budget):
                self.waiting.remove(req)
                budget -= self._whole_pages(req.extend_len)
                self._n_reserved += self._whole_pages(req.extend_len)
                batch.append(req)
        if abort_loading:
            self._abort_first_loading(batch)
        self._n_reserved = 0
        self._launch(batch)

    def _continue_chunked(self, budget: int) -> list[Req]:
        req = self.chunked
        if req is None:
            return []
        checkpoint_kv_cache(req, self.cache)
        req.init_next_round_input()
        end = min(len(req.full_untruncated_fill_ids), req.prefix_len + budget)
        if not self._fits(end - req.prefix_len):
            self.seen["chunk without room"] += 1
            return []
        self.chunked = None
        req.extend_end = end
        return [req]

    def _admit(self, req: Req, budget: int) -> bool:
        n_tokens = len(req.full_untruncated_fill_ids)
        passing = self.cache.lock(req.last_node)
        try:
            end = min(n_tokens, req.prefix_len + req.host_hit_length + budget)
            if not self._fits(end - req.prefix_len):
                return False
            req.host_loaded_length = 0
            if req.host_hit_length:
                assert not self.real.engine.tainted, "a hit is promised while the weights are changing"
                promised = InitLoadBackParams(req.best_match_node, req.host_hit_length, req=req)
                req.host_loaded_length, req.last_node = self.cache.init_load_back(promised)
                assert req.host_loaded_length in (0, req.host_hit_length)
                req.prefix_len += req.host_loaded_length
            req.extend_end = min(n_tokens, req.prefix_len + budget)
            if not self._fits(req.extend_len):
                return False  # only where nothing was loaded: what was loaded had been counted
            req.lock = self.cache.lock(req.last_node)
            return True
        finally:
            self.cache.unlock(passing)

    def _fits(self, n_tokens: int) -> bool:
        room = self.real.allocator.available_size() + self.cache.evictable_size() - self._n_reserved
        return bool(self._whole_pages(n_tokens) <= room)

    def _whole_pages(self, n_tokens: int) -> int:
        """In tokens, rounded up."""
        return -(-n_tokens // self.real.page_size) * self.real.page_size

    def _abort_first_loading(self, batch: list[Req]) -> None:
        assert self.cache.linker is not None
        for req in batch:
            pages = self.cache.linker.private_load_indices.get(req.rid)
            if pages is not None and not req.kv.holds_kv and req.host_loaded_length:
                self.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)
                self.real.allocator.free(pages)
                self.cache.unlock(req.lock)
                batch.remove(req)
                self.seen["aborted with a queued load"] += 1
                return

    def _launch(self, batch: list[Req]) -> None:
        index = self.cache.ready_to_load_host_cache()
        if not batch:
            return
        for req in batch:
            self._extend_row(req)
        self._read_layers(index)
        failed = self.cache.finish_external_linker_loads(batch)
        for req in batch:
            if req in failed:
                self.seen["failed restores"] += 1
                self._abort_prefill(req)
                continue
            self._compute(req)
            if req.extend_end < len(req.full_untruncated_fill_ids):
                assert self.chunked is None
                self.chunked = req
                self.seen["chunks"] += 1
            else:
                self._sampled(req)

    def _read_layers(self, index: int) -> None:
        """The forward asks for every layer before it uses it."""
        self.real.linker.layer_done_counter.set_consumer(index)
        for layer in range(N_LAYERS):
            self.real.pool.get_key_buffer(layer)

    def _extend_row(self, req: Req) -> None:
        """SGLang's allocation for an extend: the row of the request names the rows of its tokens up to extend_end."""
        page_size, held = self.real.page_size, req.kv.kv_allocated_len
        if not req.kv.holds_kv:
            prefix = self.cache.prefix_device_indices(req)
            held = len(prefix)
            assert self.real.req_to_token_pool.alloc([req]) is not None
            self.real.req_to_token_pool.write((req.kv.req_pool_idx, slice(0, held)), prefix.to(torch.int32))
        free = -held % page_size
        n_new = self._whole_pages(max(0, req.extend_end - held - free))
        evict_from_tree_cache(self.cache, n_new)
        fresh = self.real.allocator.alloc(n_new) if n_new else torch.empty(0, dtype=torch.int64)
        assert fresh is not None, "what was counted as evictable has not been evicted"
        last_row = int(self._rows(req, held)[-1]) if free else 0
        rows = torch.cat([torch.arange(last_row + 1, last_row + 1 + free), fresh.to(torch.int64)])
        rows = rows[: req.extend_end - held].to(torch.int32)
        self.real.req_to_token_pool.write((req.kv.req_pool_idx, slice(held, req.extend_end)), rows)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end

    def _rows(self, req: Req, n_tokens: int) -> Values:
        rows: Values = self.real.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :n_tokens].numpy().astype(np.int64)
        return rows

    def _compute(self, req: Req) -> None:
        """The forward of [prefix_len, extend_end), behind KV from wherever it came."""
        tokens, tenant = req.full_untruncated_fill_ids[: req.extend_end], _tenant(req)
        rows = self._rows(req, req.extend_end)
        loaded = req.host_loaded_length if req.extend_batch_idx == 0 else 0
        req.extend_batch_idx += 1
        if loaded:
            self.forward.restored(tokens, tenant, rows, req.prefix_len - loaded, req.prefix_len)
            self.seen["host hits"] += 1
            self.seen["host hits of new weights"] += self.forward.version > 0
            self.seen["tenants' host hits"] += tenant != ""
        pure = not self.real.engine.tainted
        self.forward.check(tokens, tenant, rows[: req.prefix_len], pure=bool(loaded) or pure)
        self.forward.compute(tokens, tenant, rows, req.prefix_len)
        for page, key in zip(rows[:: self.real.page_size] // self.real.page_size, split(self._keys(req)), strict=False):
            self._key_of_device_page[int(page)] = key

    def _sampled(self, req: Req) -> None:
        """A token comes out. The same prompt gives the same answer, so that answers are shared too."""
        req.output_ids.append(900 + int(sum(req.full_untruncated_fill_ids)) % 3)
        req.refresh_fill_ids()
        self._note_pages(req)
        if len(req.output_ids) >= req.sampling_params.max_new_tokens:
            self._end(req, FINISH_LENGTH(len(req.output_ids)))
        elif req not in self.running:
            self.running.append(req)

    def decode(self) -> None:
        """One token for each running request; those for which HBM has no room are retracted."""
        self.cache.check_hicache_events()
        for i in reversed(range(len(self.running))):
            if not self._fits(1) and self.running[i].kv.kv_allocated_len % self.real.page_size == 0:
                self.retract(i)
        batch = list(self.running)
        for req in batch:
            if not self._fits(1) and req.kv.kv_allocated_len % self.real.page_size == 0:
                self.retract(self.running.index(req))
                continue
            req.prefix_len, req.extend_end = req.kv.kv_committed_len, req.kv.kv_committed_len + 1
            self._extend_row(req)
        batch = [req for req in batch if req in self.running]
        self._read_layers(-1)
        assert self.cache.finish_external_linker_loads(batch) == []
        for req in batch:
            self._compute(req)
            self._sampled(req)
            if req.finished():
                self.running.remove(req)

    # ---- what happens at a time of its own ----

    def end_offload(self, i: int, *, landed: bool) -> None:
        self.seen["write-backs ended out of order"] += i > 0
        self.seen["write-backs failed"] += not landed
        self.copies.end_offload(i, landed=landed)

    def end_restore(self, i: int) -> None:
        self.copies.end_restore(i)

    def fail_restores(self, fail: bool) -> None:
        self.copies.fail_restores = fail

    @property
    def tiers(self) -> list[FaultyTier]:
        """What lies below host memory now, if it is of the kind that answers when told to."""
        return [tier for tier in self.real.tiers if isinstance(tier, FaultyTier)]

    def tier_answers(self, position: int, n_calls: int, *, n_failing: int = 0, n_missing: int = 0) -> None:
        """One of the tiers does."""
        tier = self.tiers[position]
        tier.fail_next(n_failing)
        tier.miss_next(n_missing)
        tier.release(min(n_calls, tier.n_held))
        self.seen["a tier failed"] += n_failing

    def tiers_answer(self) -> None:
        """All of them, to whatever they have been asked."""
        for tier in self.tiers:
            if tier.n_held:
                tier.release(tier.n_held)

    def tier_forgets(self, position: int, n_kept: int) -> None:
        """All but the first n_kept pages that a tier has are lost: evicted, or found damaged."""
        inner = self.tiers[position].inner
        assert isinstance(inner, MemoryTier)
        inner.forget_all_but(n_kept)

    def evict(self, n_pages: int) -> None:
        """Room in HBM for n_pages, if that many can go."""
        evict_from_tree_cache(self.cache, n_pages * self.real.page_size)

    def flush(self, *, paused: bool = False) -> bool:
        """`/flush_cache`. paused: generation is, so that waiting requests do not count as work."""
        if self.live or (self.waiting and not paused):
            return False
        self.cache.reset()
        self.real.req_to_token_pool.clear()
        self.real.allocator.clear()
        self.seen["flushes"] += 1
        return True

    def update_weights(self, *, flush: bool) -> None:
        """From disk or by IPC: one call."""
        weights.before_update(self._updater)
        self.forward.version += 1
        if flush:
            self.flush(paused=True)
        weights.after_update(None, self._updater)
        self.seen["weight updates"] += 1

    def begin_weights(self) -> None:
        weights.before_session(self._updater)
        self.in_weight_session = True

    def load_weights(self, *, flush: bool = False) -> None:
        """Tensors of a session arrive. SGLang refuses them outside of one."""
        if self.in_weight_session:
            self.forward.version += 1
            if flush:
                self.flush(paused=True)
            self.seen["weight sessions"] += 1

    def end_weights(self) -> None:
        weights.after_session(SimpleNamespace(success=self.in_weight_session), self._updater)
        self.in_weight_session = False

    @property
    def _updater(self) -> SimpleNamespace:
        """As much of SGLang's weight updater as the hooks look at."""
        return SimpleNamespace(
            scheduler=SimpleNamespace(tree_cache=self.cache), is_fully_idle=lambda ignore_waiting: not self.live
        )

    # ---- checks ----

    def _keys(self, req: Req) -> bytes:
        tokens = req.full_untruncated_fill_ids
        key = RadixKey(tokens[: len(tokens) // self.real.page_size * self.real.page_size], req.extra_key)
        key = RadixKey(key.token_ids, req.extra_key, cache_salt=req.cache_salt)
        return to_blob(get_storage_hash_str(key, None, page_size=self.real.page_size)) if len(key) else b""

    def _note_pages(self, req: Req) -> None:
        """Remember which text each page of the request is of."""
        for number, key in enumerate(split(self._keys(req))):
            self._right_page.setdefault(key, (req.full_untruncated_fill_ids[:], _tenant(req), number))

    def check(self) -> None:
        """What holds after every step."""
        self.cache.check_invariants()
        self._check_device_tokens()
        self._check_mirror()
        self._check_leases()
        self._check_host_pages()
        self._check_rids()
        self.seen["steps without a taint"] += not self.real.engine.tainted

    def _check_device_tokens(self) -> None:
        owned = sum(self._whole_pages(req.kv.kv_allocated_len) - req.kv.cache_protected_len for req in self.live)
        free, allocator = self.real.allocator.available_size(), self.real.allocator
        evictable, locked = self.cache.evictable_size(), self.cache.protected_size()
        assert free + evictable + locked + owned == allocator.size, (
            f"{free} free + {evictable} evictable + {locked} locked + {owned} owned of {allocator.size} device tokens"
        )

    def _check_mirror(self) -> None:
        """The index knows exactly the pages in SGLang's tree."""
        rows = self.cache.all_values_flatten()[:: self.real.page_size].tolist()
        tree = {self._key_of_device_page[row // self.real.page_size] for row in rows}
        index = self.real.engine.index
        used = np.flatnonzero(index._columns.residency).astype(np.int32)
        mirror = set(split(index.keys_of(used[index.states(used, HBM) == State.RESIDENT])))
        assert mirror == tree, f"{len(mirror - tree)} pages too many and {len(tree - mirror)} too few in the mirror"

    def _check_leases(self) -> None:
        """Every lease belongs to a ticket, to a write-back or to a restore that is open."""
        engine, linker = self.real.engine, self.real.linker
        claims = [ticket.rows for ticket in engine._tickets]
        claims += [entry.offload.rows for entry in linker._write_backs if entry.offload is not None]
        claims += [load.restore.rows for load in linker._queued.values()]
        claims += [restore.rows for load in linker._running for restore in load.restores]
        if engine.below is not None:
            claims += [fetch.rows for fetch in engine.below.fetches._loading]
            for spills in engine.below.spills:
                claims += [spill.rows for spill in spills._line if not spill.is_detached]
        leases = engine.index._columns.leases
        expected = np.zeros_like(leases)
        for rows in claims:
            np.add.at(expected, rows, 1)
        assert np.array_equal(leases, expected), "a lease was lost or left behind"

    def _check_host_pages(self) -> None:
        """Whatever host memory would promise is KV of the present weights, of the right text and tenant."""
        engine = self.real.engine
        if engine.tainted:
            return
        index = engine.index
        rows = np.flatnonzero(index._columns.residency).astype(np.int32)
        rows = rows[index.states(rows, HOST) == State.RESIDENT]
        found = page_values(self.real.slab, self.real.layout, index.slots(rows))
        for key, values in zip(split(index.keys_of(rows)), found, strict=True):
            tokens, tenant, page = self._right_page[key]
            first, end = page * self.real.page_size, (page + 1) * self.real.page_size
            right = kv_of(tokens, tenant, self.forward.version)[first:end]
            assert np.array_equal(values, right), "host memory promises KV of other weights, another text or tenant"

    def _check_rids(self) -> None:
        """Nothing is kept for a request that has ended."""
        assert self.cache.linker is not None
        waiting = {req.rid for req in self.waiting}
        live = {req.rid for req in self.live}
        assert self.cache._waiting.keys() <= waiting
        assert self.real.engine._tickets == {entry.ticket for entry in self.cache._waiting.values()}
        assert self.cache._prefills.keys() <= live
        assert self.cache.linker.tails.keys() <= waiting | live
        assert self.cache.linker.hit_markers.keys() <= waiting
        assert not self.cache.linker.private_load_indices


def _tenant(req: Req) -> str:
    return "" if req.extra_key is req.cache_salt is None else f"{req.extra_key}/{req.cache_salt}"
