"""LoRA adapters for the tiny model: random, small, and strong enough that every one changes the answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgl_lmcache.cpu.model import TINY

RANK = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, seed: int) -> None:
    """In the format of the `peft` library. What is in the folder is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(TINY.n_layers):
        for module in MODULES:
            n_in, n_out = _sizes(module)
            block = "self_attn" if module in ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            a = torch.randn(RANK, n_in, generator=random) / n_in**0.5
            b = torch.randn(n_out, RANK, generator=random) / RANK**0.5
            tensors[f"{name}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{name}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config |= {"lora_dropout": 0.0, "target_modules": list(MODULES), "base_model_name_or_path": TINY.name}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _sizes(module: str) -> tuple[int, int]:
    """Rows of the module's input and output."""
    q_size, kv_size = TINY.n_heads * TINY.head_dim, TINY.n_kv_heads * TINY.head_dim
    return {
        "q_proj": (TINY.hidden_size, q_size),
        "k_proj": (TINY.hidden_size, kv_size),
        "v_proj": (TINY.hidden_size, kv_size),
        "o_proj": (q_size, TINY.hidden_size),
        "down_proj": (TINY.intermediate_size, TINY.hidden_size),
    }.get(module, (TINY.hidden_size, TINY.intermediate_size))
