"""What this version does not do, as one closed list: a server that asks for it does not start.

What is not named here works, or fails to start by `describe_pool`, which takes a KV pool by its exact class. So a new
kind of pool (FP4, MXFP8, DeepSeek-V4, HiSparse) is refused without a row, and a new way of running is not: a release of
SGLang that brings one needs a row here.

The list is ours to keep because of how we plug in. SGLang resolves its arguments before our hook turns its
external-cache flags on, and its own exclusions for `--enable-lmcache` and for its linker look at these flags then. The
rows repeat those that apply to us: native FP4, unified memory, decode context parallelism, streaming sessions,
speculative decoding, disaggregation, diffusion models. Sharding of the KV cache and int8 Mamba checkpoints are not
here: SGLang refuses them beside any backend of one's own.

Each reason is a sentence without its full stop, for the person who started the server, and says what to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.registry import TreeCacheBuildContext
from sglang.srt.runtime_context import (
    get_device,
    get_disagg,
    get_exec,
    get_memory,
    get_parallel,
    get_serving,
    get_spec,
)

from sgl_lmcache.errors import RefusedError, StartError
from sgl_lmcache.page_size import check_page_size


@dataclass(frozen=True, slots=True)
class Setup:
    """What a server was asked for: the factory's context, and SGLang's resolved configuration by its namespaces, whose
    types SGLang makes at run time."""

    ctx: TreeCacheBuildContext
    parallel: Any
    memory: Any
    disagg: Any
    spec: Any
    serving: Any
    execution: Any
    device: Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row: whether it applies, and why a server is then refused."""

    applies: Callable[[Setup], bool]
    reason: str


REFUSALS = (
    Refusal(
        lambda setup: setup.spec.speculative_algorithm is not None,
        "with speculative decoding the draft's KV would be missing after a hit (--speculative-algorithm)",
    ),
    Refusal(
        lambda setup: bool(setup.ctx.params.mtp_draft_device_pools),
        "the draft's layers are packed with the target's, which are kept without them (--speculative-algorithm)",
    ),
    Refusal(
        lambda setup: setup.ctx.params.pp_size > 1,
        "pipeline parallel stages cannot agree on what to restore (--pp-size must be 1)",
    ),
    Refusal(
        lambda setup: setup.ctx.params.attn_cp_size > 1 or setup.parallel.dcp_size > 1,
        "with context parallel a rank holds only a slice of each page (--attn-cp-size and --dcp-size must be 1)",
    ),
    Refusal(
        lambda setup: setup.execution.moe.elastic_ep_backend is not None,
        "ranks that come and go cannot agree on hits; leave --elastic-ep-backend out",
    ),
    Refusal(
        lambda setup: setup.device.device not in ("cuda", "cpu") or torch.version.hip is not None,
        "its copies are written for NVIDIA GPUs and for CPUs, and this is another device (--device)",
    ),
    Refusal(
        lambda setup: setup.ctx.is_hybrid_swa,
        "the model has sliding-window layers with a pool of their own; add --disable-hybrid-swa-memory",
    ),
    Refusal(
        lambda setup: setup.ctx.is_hybrid_ssm,
        "Mamba layers keep states, not pages; serve this model without --radix-cache-backend",
    ),
    Refusal(
        lambda setup: setup.execution.dllm.dllm_algorithm is not None,
        "diffusion language models never start what they ask the cache to restore (--dllm-algorithm)",
    ),
    Refusal(
        lambda setup: setup.memory.enable_hierarchical_cache or setup.memory.hicache_storage_backend is not None,
        "SGLang's HiCache manages host memory itself; leave --enable-hierarchical-cache and --hicache-storage-backend "
        "out",
    ),
    Refusal(
        lambda setup: setup.memory.enable_hisparse,
        "HiSparse moves KV between HBM and host memory itself; leave --enable-hisparse out",
    ),
    Refusal(
        lambda setup: setup.memory.enable_unified_memory,
        "unified memory moves KV in use, and its page numbers are virtual; leave --enable-unified-memory out",
    ),
    Refusal(
        # SGLang's resolved flag is one that our own hook turns on; the argument is what the user gave.
        lambda setup: setup.ctx.server_args.enable_lmcache,
        "LMCache would keep the same pages; leave --enable-lmcache out",
    ),
    Refusal(
        lambda setup: setup.memory.enable_flexkv,
        "FlexKV would keep the same pages; leave --enable-flexkv out",
    ),
    Refusal(
        lambda setup: setup.disagg.disaggregation_mode != "null",
        "disaggregated prefill and decode call a cache in ways not supported yet; leave --disaggregation-mode out",
    ),
    Refusal(
        lambda setup: setup.disagg.enable_pdmux,
        "multiplexed prefill and decode call a cache in ways not supported yet; leave --enable-pdmux out",
    ),
    Refusal(
        lambda setup: setup.serving.enable_streaming_session,
        "streaming sessions keep KV outside the radix cache (--enable-streaming-session)",
    ),
    Refusal(
        lambda setup: setup.memory.enable_session_radix_cache,
        "sessions that pin pages in HBM have not been tried with it; leave --enable-session-radix-cache out",
    ),
)


def refuse_unsupported(ctx: TreeCacheBuildContext) -> None:
    """Raise `RefusedError` for what this version does not do, `StartError` if SGLang would never call the cache."""
    check_page_size(ctx.params.page_size)
    setup = Setup(ctx, get_parallel(), get_memory(), get_disagg(), get_spec(), get_serving(), get_exec(), get_device())
    for refusal in REFUSALS:
        if refusal.applies(setup):
            raise RefusedError(refusal.reason)
    if not (setup.memory.enable_unified_cache_external_linker and setup.memory.enable_lmcache):
        raise StartError(
            "sgl_lmcache: the hook on Scheduler.__init__ has not run, so SGLang would never ask for stored pages; "
            "look above for an error of the plug-in, and run `sgl-lmcache doctor`."
        )
