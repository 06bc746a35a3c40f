"""Builds the cache of one scheduler process: checks, sizes, memory, engine, linker, in that order.

Everything that can go wrong goes wrong here, before the server takes a request, and with one sentence that says what to
change. What this returns cannot fail a request later.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.runtime_context import get_context, get_lora, get_parallel

from hicache import UNKNOWN, Engine, LowerTier, QuotaError
from hicache.logs import get_logger
from radix import HOST, MAX_GROUPS, Index
from sgl_lmcache import BACKEND, record
from sgl_lmcache.cache import TieredRadixCache
from sgl_lmcache.config import Config
from sgl_lmcache.config_file import from_environment
from sgl_lmcache.errors import StartError
from sgl_lmcache.linker import Linker
from sgl_lmcache.memory import host_capacity
from sgl_lmcache.namespace import (
    Namespace,
    adapters_identity,
    model_identity,
    scales_identity,
    weights_digest,
)
from sgl_lmcache.pins import apply_pins
from sgl_lmcache.pool import describe_pool
from sgl_lmcache.ranks import Ranks, ranks_of
from sgl_lmcache.refusals import refuse_unsupported
from sgl_lmcache.tiers import Place, TierOpener, next_tiers, tier_openers
from transfer.copies import Copies, DevicePool
from transfer.layout import PageLayout
from transfer.slab import Slab

logger = get_logger(__name__)

SWITCH_INTERVAL_S = 2e-4
"""How long a Python-bound background thread may keep the GIL from the scheduler; the interpreter's default is 25 times
as long."""

MAX_PENDING_SHARE = 0.5
"""Write-backs may lock at most about this share of HBM's KV while they wait to be copied."""

BATCH_NBYTES = 32 << 20
"""At most this much goes to or from a lower tier in one call: many pages share what a call costs the scheduler, and a
batch that fails, or comes late, is not the whole prompt."""

SMALL_PAGE_NBYTES = 64 << 10
"""Below this a page's fixed costs (a key, a slot, two copies a layer) weigh more than its bytes."""


def build(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """SGLang's factory for `--radix-cache-backend sgl_lmcache`. Raises `StartError` with one sentence."""
    if ctx.disable_radix_cache:
        logger.warning("sgl_lmcache: the radix cache is disabled, so nothing is kept below HBM")
        return default_radix_cache_factory(ctx)
    refuse_unsupported(ctx)
    config = from_environment()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _compile_hash_extension()

    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    ranks = ranks_of(ctx.params.attn_tp_cache_group)
    device_pool, layout = describe_pool(pool, ctx.params.page_size)
    n_slots, origin = _agree_on_start(ranks_of(ctx.tp_group.cpu_group), _n_slots(config, layout, device_pool))
    slab = _allocate_slab(n_slots, layout, device_pool)
    namespace = _namespace(ctx, config, layout, origin)
    openers = _tier_openers(ctx, config, layout, slab)
    tiers = [LowerTier(opener.open(namespace), opener.write) for opener in openers]
    engine = _engine(config, n_slots, device_pool.n_pages, tiers, layout)
    _apply_quotas(engine, config, n_slots * layout.slot_nbytes, layout.slot_nbytes)
    apply_pins(engine, config, page_size=layout.page_size, is_eagle=ctx.params.is_eagle)
    linker = Linker(
        engine,
        _copies(ctx, device_pool, layout, slab),
        slab,
        page_size=layout.page_size,
        num_layers=layout.n_layers,
        max_pending_pages=int(device_pool.n_pages * MAX_PENDING_SHARE),
    )
    cache = _create_cache(ctx)
    cache.attach(
        linker,
        namespace,
        ranks,
        weights_digest=partial(weights_digest, ctx.tp_worker.model_runner.model, ctx.params.attn_tp_cache_group),
        next_tiers=partial(next_tiers, openers),
        recorder=_recorder(config, layout.page_size),
        replica=get_parallel().dp_rank or 0,
        has_metrics_port=config.metrics is not None,
    )
    pool.register_layer_transfer_counter(linker.layer_done_counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(linker.layer_done_counter)
    _log_start(layout, slab, device_pool, namespace)
    return cache


def _compile_hash_extension() -> None:
    """Compile and load SGLang's page-hash extension now, not in the middle of the first request."""
    # PyTorch runs `ninja`, which lies beside the interpreter of an environment that nobody has activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        get_native_hash([1], None, 1)
    except RuntimeError as error:
        raise StartError(
            f"sgl_lmcache: SGLang's page-hash extension cannot be compiled ({error.__cause__ or error}); it needs a "
            "C++ compiler and OpenSSL's headers (Debian: apt-get install g++ libssl-dev)."
        ) from error


def _n_slots(config: Config, layout: PageLayout, pool: DevicePool) -> int:
    """How many slots this rank would take: its share of the server's host memory on this node."""
    parallel = get_parallel()
    n_local_ranks = _n_local_ranks()
    # A pool in ordinary memory, or a segment, is touched page by page as it fills, so it is still counted as free.
    reserved = sum(buffer.nbytes for buffer in (*pool.k, *pool.v)) if pool.k[0].device.type == "cpu" else 0
    reserved = reserved * n_local_ranks + (config.mooncake.segment if config.mooncake is not None else 0)
    capacity = host_capacity(
        config,
        n_local_ranks=n_local_ranks,
        n_replicas=parallel.dp_size,
        reserved_nbytes=reserved // parallel.dp_size,
    )
    n_slots = capacity // layout.slot_nbytes
    if n_slots < 1:
        raise StartError(
            f"sgl_lmcache: tiers[0].capacity, {capacity:,} bytes a rank, holds no page of {layout.slot_nbytes:,} bytes;"
            " give it more."
        )
    return n_slots


def _n_local_ranks() -> int:
    """Of the whole server on this node, data-parallel replicas included."""
    parallel = get_parallel()
    return max(1, int(parallel.tp_size * parallel.dp_size // parallel.nnodes))


def _tier_openers(ctx: TreeCacheBuildContext, config: Config, layout: PageLayout, slab: Slab) -> tuple[TierOpener, ...]:
    parallel, n_local_ranks = get_parallel(), _n_local_ranks()
    rank = (parallel.dp_rank or 0) * parallel.tp_size + ctx.tp_rank
    return tier_openers(config, Place(rank % n_local_ranks, n_local_ranks, slab.array, slab.fd, layout.page_nbytes))


def _recorder(config: Config, page_size: int) -> record.Recorder | None:
    """One for each replica: the first of the ranks that share its requests."""
    parallel = get_parallel()
    if config.record is None or parallel.attn_tp_rank != 0:
        return None
    return record.start(
        Path(config.record.path),
        replica=(parallel.dp_rank or 0, parallel.dp_size * parallel.attn_dp_size),
        page_size=page_size,
        limit_nbytes=config.record.limit,
        clock=time.monotonic,
    )


def _agree_on_start(ranks: Ranks, n_slots: int) -> tuple[int, str]:
    """The least number of slots that any rank would take, and a number of this server's own.

    No rank allocates before all have measured what is free: this is where they wait for each other.
    """
    agreed, origin = ranks.minimum([n_slots, secrets.randbelow(UNKNOWN)])
    return agreed, f"{origin:016x}"


def _allocate_slab(n_slots: int, layout: PageLayout, pool: DevicePool) -> Slab:
    slab = Slab(n_slots, layout.slot_nbytes)
    if pool.k[0].device.type != "cpu":
        slab.pin()
    return slab


def _namespace(ctx: TreeCacheBuildContext, config: Config, layout: PageLayout, origin: str) -> Namespace:
    parallel = get_parallel()
    return Namespace(
        user=config.namespace,
        model=model_identity(ctx.server_args, ctx.model_config),
        adapters=adapters_identity(adapter.lora_path for adapter in get_lora().lora_paths or ()),
        layout=layout.describe(),
        scales=scales_identity(ctx.tp_worker.model_runner.model),
        shard=(0, 1) if layout.order == "MLA" else (parallel.attn_tp_rank, parallel.attn_tp_size),
        is_eagle=ctx.params.is_eagle,
        origin=origin,
    )


def _copies(ctx: TreeCacheBuildContext, pool: DevicePool, layout: PageLayout, slab: Slab) -> Copies:
    if pool.k[0].device.type == "cpu":
        from transfer.cpu import CpuCopies

        return CpuCopies(pool, layout, slab)
    from sgl_lmcache.cuda import cuda_copies

    return cuda_copies(pool, layout, slab, forward_stream=ctx.tp_worker.model_runner.forward_stream)


def _engine(
    config: Config, n_slots: int, n_device_pages: int, tiers: Sequence[LowerTier], layout: PageLayout
) -> Engine:
    """Every row of the index is a page in HBM or in host memory, or is kept by a lease or a child: a few more."""
    capacity = n_slots + n_device_pages + max(1024, n_device_pages // 4)
    index = Index(
        capacity,
        policies={HOST: config.eviction_of(config.host)},
        n_groups=MAX_GROUPS,
        n_pages=n_slots,
        page_tokens=layout.page_size,
    )
    return Engine(
        index,
        n_slots,
        clock=time.monotonic,
        ticket_timeout_s=_ticket_timeout_s(config),
        tiers=tiers,
        batch_pages=max(1, BATCH_NBYTES // layout.slot_nbytes),
        fetch_only_if_faster=config.prefetch.policy == "auto",
        fetch_timeout_s=config.prefetch.timeout,
        tenants=config.ssd.quotas if config.ssd is not None else (),
    )


def _apply_quotas(engine: Engine, config: Config, rank_nbytes: int, slot_nbytes: int) -> None:
    """Of host memory: each rank gives a tenant an equal part of its quota. An SSD has been opened with its own."""
    n_local_ranks = _n_local_ranks()
    for tenant, quota in config.host.quotas.items():
        n_pages = quota.of(rank_nbytes * n_local_ranks) // n_local_ranks // slot_nbytes
        try:
            engine.set_quota(tenant, n_pages)
        except QuotaError as error:
            raise StartError(f"sgl_lmcache: tiers[0].quotas.{tenant}: {error}.") from error


def _create_cache(ctx: TreeCacheBuildContext) -> TieredRadixCache:
    with _without_builtin_linker():
        cache = create_unified_radix_cache(ctx, cache_class=TieredRadixCache)
    assert isinstance(cache, TieredRadixCache)
    return cache


@contextmanager
def _without_builtin_linker() -> Iterator[None]:
    """SGLang's factory function would attach its own linker while the flag that our hook has set is up."""
    get_context().override(BACKEND, enable_unified_cache_external_linker=False)
    try:
        yield
    finally:
        get_context().override(BACKEND, enable_unified_cache_external_linker=True)


def _ticket_timeout_s(config: Config) -> float:
    return 0.0 if config.prefetch.policy == "best_effort" else config.prefetch.timeout


def _log_start(layout: PageLayout, slab: Slab, pool: DevicePool, namespace: Namespace) -> None:
    logger.info(
        "sgl_lmcache: host tier of %.2f GiB, %d pages of %d tokens (%s, slots of %d bytes); HBM holds %d pages; "
        "namespace %s",
        slab.nbytes / 2**30,
        slab.n_slots,
        layout.page_size,
        layout.describe(),
        slab.slot_nbytes,
        pool.n_pages,
        namespace.digest,
    )
    if layout.page_nbytes < SMALL_PAGE_NBYTES:
        logger.warning(
            "sgl_lmcache: a page is only %d bytes; a larger --page-size would cost less for each byte kept",
            layout.page_nbytes,
        )
