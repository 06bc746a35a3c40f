"""Models made here, so that tests, the demo and benchmarks need no download and give the same figures everywhere.

They have Qwen3's shape, random weights and a tokenizer trained on Python's standard library. They know nothing, but
they behave: the scales below keep the residual stream and the scores in the range of a trained model, attention picks
out a few tokens even of a long prompt, and the rows of the output matrix differ in length, so that the best token is
mostly well ahead of the next. Greedy output then depends on the whole prompt, and varies: about 50 different tokens
among the 64 that follow a random prompt.

A model is named by the digest of all that decides its bytes, this file included, and made once. Folders appear whole:
they are written beside their final place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All sizes of a model. Its KV takes `4 * n_layers * n_kv_heads * head_dim` bytes a token."""

    name: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 8192
    max_positions: int = 40960
    seed: int = 0


BENCH = Recipe("bench", n_layers=12, hidden_size=1024, n_heads=16, n_kv_heads=8, head_dim=64, intermediate_size=2816)
"""Large enough that prefill costs seconds and a cache is worth having: 24 KiB of KV a token, 0.3 GB of weights."""

TINY = Recipe("tiny", n_layers=4, hidden_size=128, n_heads=4, n_kv_heads=2, head_dim=64, intermediate_size=320)
"""For tests of behaviour: 2 KiB of KV a token."""

RECIPES = {recipe.name: recipe for recipe in (BENCH, TINY)}


def model_folder(recipe: Recipe, root: Path | None = None) -> Path:
    """The folder that holds, or will hold, the model under `root` (default: in the user's cache)."""
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "sgl-lmcache" / "models"
    return root / f"{recipe.name}-{_digest(recipe)}"


def make_model(recipe: Recipe, root: Path | None = None) -> Path:
    """The model's folder, made if it is not there: seconds the first time, milliseconds then.

    Several processes may ask at once: each makes its own copy, and the first to finish provides it. Raises `OSError`
    if it cannot be written.
    """
    folder = model_folder(recipe, root)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(recipe, draft)
        draft.chmod(0o755)
        _provide(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _provide(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # Somebody else was first: a folder that is not empty is not replaced, and it holds the same bytes.
        if not folder.is_dir():
            raise


def _digest(recipe: Recipe) -> str:
    made_by = {package: version(package) for package in ("numpy", "tokenizers")}
    digest = hashlib.sha256(json.dumps([asdict(recipe), made_by], sort_keys=True).encode())
    for path in (Path(__file__), *_corpus()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _corpus() -> list[Path]:
    """Text that every Python has: the standard library's top-level modules, some 5 MB of prose and code."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _write(recipe: Recipe, folder: Path) -> None:
    _write_tokenizer(recipe, folder)
    _write_json(folder / "config.json", _config(recipe))
    end = [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(END_OF_TEXT)]
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": end})
    _write_weights(recipe, folder / "model.safetensors")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(recipe: Recipe) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
        "head_dim": recipe.head_dim,
        "hidden_act": "silu",
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "max_position_embeddings": recipe.max_positions,
        "num_attention_heads": recipe.n_heads,
        "num_hidden_layers": recipe.n_layers,
        "num_key_value_heads": recipe.n_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": recipe.vocab_size,
    }


def _write_tokenizer(recipe: Recipe, folder: Path) -> None:
    # Not at the top: a model that is there already is then found without loading it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in _corpus()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": TURN_END,
        "model_max_length": recipe.max_positions,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(recipe: Recipe, path: Path) -> None:
    """A safetensors file: the length of a JSON header, the header, and all tensors without gaps."""
    tensors = {name: _to_bfloat16(value) for name, value in _weights(recipe)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in tensors.items():
        first, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [first, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for bits in tensors.values():
            file.write(bits.data)


Weight = npt.NDArray[np.float32]


def _weights(recipe: Recipe) -> Iterator[tuple[str, Weight]]:
    """Every tensor by its name in a Qwen3 checkpoint. The order is part of the recipe: all draw from one stream."""
    random = np.random.default_rng(recipe.seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> Weight:
        """An input of unit variance gives an output of standard deviation `gain`."""
        return random.standard_normal((n_out, n_in), dtype=np.float32) * np.float32(gain / np.sqrt(n_in))

    def constant(size: int, value: float = 1.0) -> Weight:
        return np.full(size, value, dtype=np.float32)

    hidden, inner = recipe.hidden_size, recipe.intermediate_size
    q_size, kv_size = recipe.n_heads * recipe.head_dim, recipe.n_kv_heads * recipe.head_dim
    yield "model.embed_tokens.weight", random.standard_normal((recipe.vocab_size, hidden), dtype=np.float32)
    for layer in range(recipe.n_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", constant(hidden)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(q_size, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(kv_size, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(kv_size, hidden)
        # Scores get a standard deviation of 1.6 * 1.6: a few of thousands of tokens stand out.
        yield f"{prefix}.self_attn.q_norm.weight", constant(recipe.head_dim, 1.6)
        yield f"{prefix}.self_attn.k_norm.weight", constant(recipe.head_dim, 1.6)
        # An average of many values is small; the gain gives it a say in the residual stream.
        yield f"{prefix}.self_attn.o_proj.weight", matrix(hidden, q_size, 2.0)
        yield f"{prefix}.post_attention_layernorm.weight", constant(hidden)
        yield f"{prefix}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", matrix(hidden, inner, 1.5)
    yield "model.norm.weight", constant(hidden)
    lengths = np.exp(0.2 * random.standard_normal((recipe.vocab_size, 1), dtype=np.float32))
    yield "lm_head.weight", matrix(recipe.vocab_size, hidden, 2.0) * lengths


def _to_bfloat16(value: Weight) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. All values are finite."""
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
