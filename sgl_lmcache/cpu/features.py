"""Two features of SGLang for which a CPU lacks very little: LoRA and multi-head latent attention.

LoRA's torch-native backend runs on any device, but asks for page-locked memory on its way, which torch gives only where
there is a GPU's driver. Pinned memory is memory that a GPU may read by itself: without a GPU, ordinary memory is the
same thing.

A model with latent attention (MLA) keeps one latent row a token. It can attend to the rows as they are, with queries
that have absorbed the up-projection, or expand them to keys and values for each head. The choice goes by the name of
the attention backend, and torch-native has no entry of its own: it would expand for cold prompts, which it cannot
compute, because it reads keys from the pool. Always absorbing makes the rows plain keys with one KV head, which is what
every attention here takes, and a hit repeats the cold run's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.lora import layers as lora_layers
from sglang.srt.lora.backend import torch_backend as lora_backend
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod


def enable_features() -> None:
    """For the process of a scheduler, before it builds its model. Calling it again changes nothing."""
    AttentionBackendRegistry.register("torch_native", _absorb)
    lora_layers.torch = lora_backend.torch = Unpinned()
    torch.Tensor.pin_memory = _as_it_is


def _absorb(_attention: object, _batch: object) -> AttnForwardMethod:
    return AttnForwardMethod.MLA


def _as_it_is(tensor: torch.Tensor, *_device: object) -> torch.Tensor:
    return tensor


class Unpinned:
    """What SGLang's LoRA modules see as `torch`: the same, but that memory is never pinned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.tensor(*arguments, **options)

    def zeros(self, *arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*arguments, **options)
