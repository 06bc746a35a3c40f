"""Every refusal by its reason, alone; the pools that are refused by their class; and the order of the list."""

from __future__ import annotations

import warnings
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns while it is imported
    from sgl_lmcache import refusals
    from sgl_lmcache.pool import describe_pool

from sgl_lmcache.errors import RefusedError, StartError


def plain() -> SimpleNamespace:
    """A server that is not refused: one rank of an ordinary model on a CPU, after our hook."""
    return SimpleNamespace(
        ctx=SimpleNamespace(
            params=SimpleNamespace(page_size=16, pp_size=1, attn_cp_size=1, mtp_draft_device_pools=()),
            server_args=SimpleNamespace(enable_lmcache=False),
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
        ),
        parallel=SimpleNamespace(dcp_size=1),
        memory=SimpleNamespace(
            enable_hierarchical_cache=False,
            hicache_storage_backend=None,
            enable_hisparse=False,
            enable_unified_memory=False,
            enable_flexkv=False,
            enable_session_radix_cache=False,
            enable_unified_cache_external_linker=True,
            enable_lmcache=True,
        ),
        disagg=SimpleNamespace(disaggregation_mode="null", enable_pdmux=False),
        spec=SimpleNamespace(speculative_algorithm=None),
        serving=SimpleNamespace(enable_streaming_session=False),
        exec=SimpleNamespace(dllm=SimpleNamespace(dllm_algorithm=None), moe=SimpleNamespace(elastic_ep_backend=None)),
        device=SimpleNamespace(device="cpu"),
    )


CASES: tuple[tuple[str, object, str], ...] = (
    ("spec.speculative_algorithm", "EAGLE", "the draft's KV would be missing"),
    ("ctx.params.mtp_draft_device_pools", ("pool",), "the draft's layers are packed with the target's"),
    ("ctx.params.pp_size", 2, "--pp-size must be 1"),
    ("ctx.params.attn_cp_size", 2, "with context parallel a rank holds only a slice"),
    ("parallel.dcp_size", 2, "with context parallel a rank holds only a slice"),
    ("exec.moe.elastic_ep_backend", "nixl", "leave --elastic-ep-backend out"),
    ("device.device", "npu", "written for NVIDIA GPUs and for CPUs"),
    ("ctx.is_hybrid_swa", True, "add --disable-hybrid-swa-memory"),
    ("ctx.is_hybrid_ssm", True, "Mamba layers keep states"),
    ("exec.dllm.dllm_algorithm", "LowConfidence", "diffusion language models"),
    ("memory.enable_hierarchical_cache", True, "leave --enable-hierarchical-cache"),
    ("memory.hicache_storage_backend", "file", "and --hicache-storage-backend out"),
    ("memory.enable_hisparse", True, "leave --enable-hisparse out"),
    ("memory.enable_unified_memory", True, "leave --enable-unified-memory out"),
    ("ctx.server_args.enable_lmcache", True, "leave --enable-lmcache out"),
    ("memory.enable_flexkv", True, "leave --enable-flexkv out"),
    ("disagg.disaggregation_mode", "decode", "leave --disaggregation-mode out"),
    ("disagg.disaggregation_mode", "prefill", "leave --disaggregation-mode out"),
    ("disagg.enable_pdmux", True, "leave --enable-pdmux out"),
    ("serving.enable_streaming_session", True, "streaming sessions keep KV outside"),
    ("memory.enable_session_radix_cache", True, "leave --enable-session-radix-cache out"),
    ("ctx.params.page_size", 8, "--page-size 8 is below 16 tokens"),
)


def refuse(monkeypatch: pytest.MonkeyPatch, server: SimpleNamespace) -> None:
    for namespace in ("parallel", "memory", "disagg", "spec", "serving", "exec", "device"):
        value = getattr(server, namespace)
        monkeypatch.setattr(refusals, f"get_{namespace}", lambda value=value: value)
    refusals.refuse_unsupported(server.ctx)


def change(server: Any, path: str, value: object) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        server = getattr(server, owner)
    assert hasattr(server, name)
    setattr(server, name, value)


def test_a_plain_server_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, plain())
    on_a_gpu = plain()
    on_a_gpu.device.device = "cuda"
    refuse(monkeypatch, on_a_gpu)


@pytest.mark.parametrize(("path", "value", "reason"), CASES, ids=[f"{path}={value}" for path, value, _ in CASES])
def test_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch, path: str, value: object, reason: str) -> None:
    server = plain()
    change(server, path, value)
    with pytest.raises(RefusedError) as raised:
        refuse(monkeypatch, server)
    message = str(raised.value)
    assert message.startswith("sgl_lmcache does not run here: ")
    assert message.endswith(".")
    assert not message.endswith("..")
    assert reason in message


def test_every_row_of_the_list_has_a_case() -> None:
    untested = [row.reason for row in refusals.REFUSALS if not any(reason in row.reason for _, _, reason in CASES)]
    assert untested == []


def test_a_gpu_of_another_maker_is_refused_though_its_device_is_called_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RefusedError, match="written for NVIDIA GPUs"):
        refuse(monkeypatch, plain())


@pytest.mark.parametrize("flag", ["enable_unified_cache_external_linker", "enable_lmcache"])
def test_a_hook_that_has_not_run_is_named(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    server = plain()
    change(server, f"memory.{flag}", False)
    with pytest.raises(StartError, match=r"the hook on Scheduler.__init__ has not run"):
        refuse(monkeypatch, server)


@pytest.mark.parametrize(
    "path",
    [
        "memory_pool.MHATokenToKVPoolFP4",
        "memory_pool.MHATokenToKVPoolMXFP8",
        "memory_pool.MLATokenToKVPoolFP4",
        "memory_pool.PageMajorMHATokenToKVPool",
        "memory_pool.DSATokenToKVPool",
        "memory_pool.HybridLinearKVPool",
        "memory_pool.MiniMaxSparseKVPool",
        "swa_memory_pool.SWAKVPool",
        "deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool",
        "hisparse_memory_pool.HiSparseDSATokenToKVPool",
        "page_interleave_pool.PageInterleaveMHATokenToKVPool",
        "unified_memory_pool.UnifiedMHATokenToKVPool",
        "unified_memory_pool.UnifiedMLATokenToKVPool",
    ],
)
def test_a_pool_of_another_class_is_refused_by_its_name(path: str) -> None:
    """Also where it extends a class that is taken: it lays the same names out differently."""
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool_class = getattr(import_module(f"sglang.srt.mem_cache.{module}"), name)
    pool = object.__new__(pool_class)
    with pytest.raises(RefusedError, match=f"keeps its KV in a {name} "):
        describe_pool(pool, 16)


def test_a_plain_pool_of_another_layout_is_refused() -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = object.__new__(MHATokenToKVPool)
    pool.kv_cache_layout = "vectorized_5d"
    with pytest.raises(RefusedError, match=r"MHATokenToKVPool \(layout vectorized_5d\)"):
        describe_pool(pool, 16)
