"""A tiny model with latent attention (MLA): DeepSeek-V2's shape without experts, random weights, the tiny tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgl_lmcache.cpu.model import TINY, make_model

HIDDEN, N_LAYERS, N_HEADS, INNER = 128, 4, 4, 320
NOPE_DIM, ROPE_DIM, VALUE_DIM, LATENT_DIM = 64, 32, 64, 128


def make_latent_model(folder: Path) -> Path:
    """Writes it into `folder`, which it returns. Its KV takes 1,280 bytes a token."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(make_model(TINY) / name, folder)
    (folder / "config.json").write_text(json.dumps(_config()))
    save_file(dict(_weights()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config() -> dict[str, object]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "first_k_dense_replace": N_LAYERS,  # no layer has experts; what follows about them is not used
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "kv_lora_rank": LATENT_DIM,
        "q_lora_rank": None,
        "max_position_embeddings": 40960,
        "num_attention_heads": N_HEADS,
        "num_hidden_layers": N_LAYERS,
        "num_key_value_heads": N_HEADS,
        "qk_nope_head_dim": NOPE_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": VALUE_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        # SGLang knows no other positions for this family on a CPU.
        "rope_scaling": {
            "type": "yarn",
            "factor": 10,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": TINY.vocab_size,
    }


def _weights() -> Iterator[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(n_out, n_in, generator=random) * gain / n_in**0.5).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", matrix(TINY.vocab_size, HIDDEN, HIDDEN**0.5)
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        yield f"{block}.input_layernorm.weight", ones(HIDDEN)
        yield f"{attention}.q_proj.weight", matrix(N_HEADS * (NOPE_DIM + ROPE_DIM), HIDDEN, 1.6)
        yield f"{attention}.kv_a_proj_with_mqa.weight", matrix(LATENT_DIM + ROPE_DIM, HIDDEN, 1.6)
        yield f"{attention}.kv_a_layernorm.weight", ones(LATENT_DIM)
        yield f"{attention}.kv_b_proj.weight", matrix(N_HEADS * (NOPE_DIM + VALUE_DIM), LATENT_DIM, 1.6)
        yield f"{attention}.o_proj.weight", matrix(HIDDEN, N_HEADS * VALUE_DIM, 2.0)
        yield f"{block}.post_attention_layernorm.weight", ones(HIDDEN)
        yield f"{block}.mlp.gate_proj.weight", matrix(INNER, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", matrix(INNER, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", matrix(HIDDEN, INNER, 1.5)
    yield "model.norm.weight", ones(HIDDEN)
    yield "lm_head.weight", matrix(TINY.vocab_size, HIDDEN, 2.0)
