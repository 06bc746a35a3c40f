"""What CPU mode changes in a scheduler: nobody has to pin memory, and latent rows are always absorbed."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, while it is imported
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    from sgl_lmcache.cpu.features import enable_features


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that it changes is put back."""
    monkeypatch.setattr(layers, "torch", torch)
    monkeypatch.setattr(torch_backend, "torch", torch)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.pin_memory)
    monkeypatch.setattr(handlers.AttentionBackendRegistry, "_handlers", {})
    enable_features()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("module", [layers, torch_backend], ids=["layers", "backend"])
def test_lora_gets_ordinary_memory_where_it_asks_for_pinned(module: object) -> None:
    seen = module.torch  # type: ignore[attr-defined]
    offsets = seen.tensor([0, 4, 9], dtype=torch.int32, device="cpu", pin_memory=True)
    zeros = seen.zeros((3,), dtype=torch.int32, pin_memory=True)
    assert (offsets.tolist(), zeros.tolist()) == ([0, 4, 9], [0, 0, 0])
    assert offsets.dtype == zeros.dtype == torch.int32
    assert not offsets.is_pinned()
    assert seen.unique_consecutive is torch.unique_consecutive
    assert offsets.pin_memory() is offsets


@pytest.mark.usefixtures("enabled")
def test_latent_attention_is_absorbed_for_cold_prompts_too() -> None:
    handler = handlers.AttentionBackendRegistry.get_handler("torch_native")
    assert handler(None, None) is handlers.AttnForwardMethod.MLA
