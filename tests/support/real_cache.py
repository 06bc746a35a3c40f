"""The real thing without a server: SGLang's tree core, allocator and pool with our cache, linker, engine and copies.

`RealCache` plays the scheduler's part for requests that are prefilled in one step, through the same calls in the same
order: match at arrival, ticket, match at admission, load, layer-wise start, "forward", finish, insert, release. The
forward is a function of the tokens alone (`kv_of`), so the right bytes of every page are known at any time.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from hicache import Engine, LowerTier, Tier
from radix import HBM, HOST, Index, State
from sgl_lmcache.cache import TieredRadixCache
from sgl_lmcache.keys import to_blob
from sgl_lmcache.linker import Linker
from sgl_lmcache.namespace import Namespace
from sgl_lmcache.pool import describe_pool
from sgl_lmcache.ranks import OneRank, Ranks
from sgl_lmcache.record import Recorder
from transfer.copies import Copies, DevicePool
from transfer.cpu import CpuCopies
from transfer.layout import PageLayout
from transfer.slab import Slab

N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 8

OpenTier = Callable[[Slab, Namespace], Tier]


def namespace() -> Namespace:
    """Of a model whose weights came from nowhere."""
    return Namespace("default", None, "", "test", "", (0, 1), is_eagle=False, origin="0")


@dataclass(eq=False)
class Request:
    """As much of SGLang's Req as the cache's calls read and write. Owns the device slots from `prefix_len` on."""

    rid: str
    tokens: list[int]
    cache_salt: str | None = None
    extra_key: str | None = None
    last_node: int = 0
    prefix_len: int = 0
    extend_end: int = 0
    host_hit_length: int = 0
    swa_host_hit_length: int = 0
    mamba_host_hit_length: int = 0
    swa_branching_seqlen: int | None = None
    best_match_node: int = 0
    kv: object = None
    session: None = None
    skip_radix_cache_insert: bool = False
    positional_embed_overrides: None = None
    output_ids_through_stop: tuple[int, ...] = ()
    time_stats: SchedulerReqTimeStats = field(default_factory=SchedulerReqTimeStats)

    @property
    def origin_input_ids(self) -> array[int]:
        return array("q", self.tokens)

    def finished(self) -> bool:
        """Asked when it is released, which `RealCache` does at its end only."""
        return True

    @property
    def full_untruncated_fill_ids(self) -> list[int]:
        return self.tokens

    @property
    def handle(self) -> CacheRequestHandle:
        return CacheRequestHandle(self.rid, 0)


class RealCache:
    """A cache over `n_device_pages` of HBM and `n_slots` of host memory. Call `close`.

    open_tiers: what lies below, fastest first, each with its write policy.
    """

    def __init__(
        self,
        n_device_pages: int,
        n_slots: int,
        *,
        page_size: int = 16,
        tree_core: str | None = None,
        max_len: int = 4096,
        max_pending_pages: int = 1 << 30,
        max_leased_share: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        ranks: Ranks | None = None,
        make_copies: Callable[[DevicePool, PageLayout, Slab], Copies] = CpuCopies,
        open_tiers: Sequence[tuple[OpenTier, str]] = (),
        batch_pages: int = 16,
        fetch_only_if_faster: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        args = ServerArgs(model_path="dummy", device="cpu", page_size=page_size)
        args.resolve_once()
        publish(args, role="scheduler")
        self.page_size = page_size
        n_tokens = n_device_pages * page_size
        self.pool = MHATokenToKVPool(
            n_tokens, page_size, torch.float32, N_HEADS, HEAD_DIM, N_LAYERS, "cpu", enable_memory_saver=False
        )
        self.allocator = PagedTokenToKVPoolAllocator(
            n_tokens, page_size, torch.float32, "cpu", self.pool, need_sort=False
        )
        self.req_to_token_pool = ReqToTokenPool(64, max_len, "cpu", enable_memory_saver=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=tree_core,
        )
        device_pool, layout = describe_pool(self.pool, page_size)
        self.slab = Slab(n_slots, layout.slot_nbytes)
        self.open_tiers = open_tiers
        self.engine = Engine(
            Index(2 * (n_device_pages + n_slots) + 64),
            n_slots,
            clock=clock,
            ticket_timeout_s=60.0,
            max_leased_share=max_leased_share,
            tiers=[LowerTier(open_one(self.slab, namespace()), write) for open_one, write in self.open_tiers],
            batch_pages=batch_pages,
            fetch_only_if_faster=fetch_only_if_faster,
        )
        self.layout = layout
        self.copies = make_copies(device_pool, layout, self.slab)
        self.linker = Linker(
            self.engine,
            self.copies,
            self.slab,
            page_size=page_size,
            num_layers=N_LAYERS,
            max_pending_pages=max_pending_pages,
        )
        self.cache = TieredRadixCache(params)
        self.cache.attach(
            self.linker,
            namespace(),
            ranks or OneRank(),
            weights_digest=partial(next, (f"{number:032x}" for number in count())),
            next_tiers=self._next_tiers,
            recorder=recorder,
        )
        self.pool.register_layer_transfer_counter(self.linker.layer_done_counter)

    # ---- the scheduler's part ----

    def key(self, request: Request) -> RadixKey:
        return RadixKey(array("q", request.tokens), request.extra_key, cache_salt=request.cache_salt)

    def match(self, request: Request) -> MatchResult:
        """SGLang's `init_next_round_input`: at least the last token is always computed."""
        key = self.key(request)[: len(request.tokens) - 1]
        result = self.cache.match_prefix(MatchPrefixParams(key=key, req=request))
        request.prefix_len = result.device_prefix_len
        request.last_node = result.last_device_node
        request.best_match_node = result.best_match_node
        request.host_hit_length = result.host_hit_length
        return result

    def arrive(self, request: Request) -> None:
        self.match(request)
        self.cache.prefetch_from_storage(request.handle, request.last_node, [])

    def iterate(self) -> None:
        """One turn of the scheduler's loop without a batch."""
        self.cache.check_hicache_events()

    def admit(self, request: Request) -> tuple[int, int] | None:
        """Match again, load, allocate, compute, insert and release. (device hit, host hit) in tokens; None: no room."""
        assert self.cache.check_prefetch_progress(request.handle)
        self.match(request)
        lock = self.cache.inc_lock_ref(request.last_node).to_dec_params()
        device_hit, host_hit = request.prefix_len, 0
        loaded = torch.empty(0, dtype=torch.int64)
        if request.host_hit_length:
            host_hit, _ = self.cache.init_load_back(
                InitLoadBackParams(request.best_match_node, request.host_hit_length, req=request)
            )
            assert host_hit in (0, request.host_hit_length)
            if host_hit:
                assert self.cache.linker is not None
                loaded = self.cache.linker.private_load_indices[request.rid]
        n_new = (len(request.tokens) - device_hit - host_hit) // self.page_size * self.page_size
        fresh = self._allocate(n_new)
        if fresh is None and host_hit == 0:
            self.cache.dec_lock_ref(request.last_node, lock)
            self.cache.release_aborted_request(request.handle)
            return None
        request.extend_end = len(request.tokens)
        self._run_batch(request)
        if fresh is None:
            fresh, n_new = torch.empty(0, dtype=torch.int64), 0
        prefix = self.cache.tree_core.collect_full_device_indices(request.last_node, self.cache.root_node_handle())
        value = torch.cat([prefix[:device_hit], loaded, fresh])
        self._forward(request.tokens, device_hit + host_hit, fresh)
        self._check_bytes(request.tokens, value)
        self.cache.insert(InsertParams(key=self.key(request)[: len(value)], value=value, prev_prefix_len=device_hit))
        self.cache.dec_lock_ref(request.last_node, lock)
        self.cache.on_release(request, checkpointed=True)
        return device_hit, host_hit

    def _run_batch(self, request: Request) -> None:
        index = self.cache.ready_to_load_host_cache()
        self.linker.layer_done_counter.set_consumer(index)
        for layer in range(N_LAYERS):
            self.pool.get_key_buffer(layer)
        assert self.cache.finish_external_linker_loads([request]) == []

    def _allocate(self, n_tokens: int) -> torch.Tensor | None:
        shortfall = n_tokens - self.allocator.available_size()
        if shortfall > 0:
            self.cache.evict(EvictParams(num_tokens=shortfall))
        if n_tokens > self.allocator.available_size():
            return None
        if n_tokens == 0:
            return torch.empty(0, dtype=torch.int64)
        slots = self.allocator.alloc(n_tokens)
        return None if slots is None else slots.to(torch.int64)

    # ---- keys and bytes ----

    def page_keys(self, tokens: Sequence[int]) -> bytes:
        """SGLang's keys of the whole pages of a prompt."""
        return to_blob(
            get_storage_hash_str(array("q", tokens), page_size=self.page_size)[: len(tokens) // self.page_size]
        )

    def kv_of(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """float32[len - start]: what a forward computes for tokens[start:], a function of each whole prefix."""
        positions = np.arange(1, len(tokens) + 1, dtype=np.int64)
        values = np.cumsum((np.asarray(tokens, dtype=np.int64) + 1) * (positions * 7919 % 65_521)) % 65_521
        return values[start:].astype(np.float32)

    def _forward(self, tokens: Sequence[int], start: int, slots: torch.Tensor) -> None:
        values = torch.from_numpy(self.kv_of(tokens, start)[: len(slots)])[:, None, None]
        for layer in range(N_LAYERS):
            self.pool.k_buffer[layer][slots] = values + layer
            self.pool.v_buffer[layer][slots] = -values - layer

    def _check_bytes(self, tokens: Sequence[int], slots: torch.Tensor) -> None:
        """The whole prefix, wherever it came from, is what the forward of these tokens would have written."""
        values = torch.from_numpy(self.kv_of(tokens, 0)[: len(slots)])[:, None, None]
        for layer in range(N_LAYERS):
            assert torch.equal(self.pool.k_buffer[layer][slots], (values + layer).expand(-1, N_HEADS, HEAD_DIM))
            assert torch.equal(self.pool.v_buffer[layer][slots], (-values - layer).expand(-1, N_HEADS, HEAD_DIM))

    # ---- checks ----

    def _next_tiers(self, namespace: Namespace, before: Sequence[Tier]) -> Sequence[Tier]:
        for tier in before:
            tier.close()
        return [open_tier(self.slab, namespace) for open_tier, _ in self.open_tiers]

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """What lies below host memory now: new weights bring others."""
        return () if self.engine.below is None else self.engine.below.tiers

    def settle(self) -> None:
        """Let all copies land and SGLang acknowledge them."""
        self.copies.quiesce()
        self.iterate()

    def check(self) -> None:
        """Everything that must hold when no request is in flight."""
        self.cache.check_invariants()
        held = self.allocator.available_size() + self.cache.evictable_size() + self.cache.protected_size()
        assert held == self.allocator.size, f"{held} of {self.allocator.size} device tokens are accounted for"
        index = self.engine.index
        n_tree_pages = len(self.cache.all_values_flatten()) // self.page_size
        assert index.count(HBM, State.RESIDENT) == n_tree_pages

    def close(self) -> None:
        self.cache.release_host_resources()
        assert self.engine.host.n_free == self.engine.host.n_slots
        assert self.engine.index.count(HOST, State.RESIDENT) == 0


def request(rid: str, tokens: Sequence[int], *, cache_salt: str | None = None, extra_key: str | None = None) -> Request:
    """A request that has not arrived yet."""
    return Request(rid, list(tokens), cache_salt, extra_key)
