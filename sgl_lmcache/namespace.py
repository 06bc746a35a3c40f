"""The namespace: a digest of all that makes one server's KV useless, or wrong, to another.

A page key covers tokens, salt, `extra_key` and adapter, and nothing else. A stored object's name is namespace + key, so
whatever changes the bytes behind equal keys has to be in here: the model and its weights, how KV is stored, and which
shard of it a rank holds. Two servers with equal namespaces may load each other's pages.

The model is known by its files: names, sizes, and blocks sampled from all over each of them, which tells two fine-tunes
of one model apart without reading hundreds of gigabytes. A folder of the Hugging Face cache brings its commit as well.
Weights that come from nowhere (`--load-format dummy`) or from where they cannot be looked at have no identity, and
their KV has no name: it may be kept in this process, and nowhere else.

Weights that change while the server runs start a new namespace. Its name is the `weight_version` that came with them,
or else a number that no other server uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

FORMAT_VERSION = 1
"""Of the bytes of a stored page: one more whenever an old one could be misread."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
SAMPLE_NBYTES = 64 << 10
N_SAMPLES = 16

_NOT_LOADED_FROM_FILES = ("dummy", "remote", "remote_instance", "rdma", "ipc_cache")


@dataclass(frozen=True)
class Namespace:
    """What pages of one rank have in common. `digest` names it."""

    user: str
    """The configuration's `namespace`."""
    model: str | None
    """`model_identity`; None if the weights have none."""
    adapters: str
    """Identity of the LoRA adapters given at the start, whose ids SGLang makes from their names and paths."""
    layout: str
    """Dtype, page size, layers, heads and dimensions, as `PageLayout.describe` puts them."""
    scales: str
    """Digest of the scales of quantised KV; empty without."""
    shard: tuple[int, int]
    """(rank, ranks) of the attention tensor parallel group; (0, 1) where all ranks hold the same bytes (MLA)."""
    is_eagle: bool
    """Whether page keys are of pairs of tokens (SGLang's EAGLE)."""
    origin: str
    """A number of this server's own, the same on all its ranks."""
    n_updates: int = 0
    weight_version: str | None = None
    """None: the weights are the model's files'; empty: updated without a version."""

    @property
    def is_persistent(self) -> bool:
        """Whether pages may leave this process: the same name has to mean the same bytes in another."""
        return self.model is not None

    @property
    def digest(self) -> str:
        """32 hex digits."""
        own = self.model is None or self.weight_version == ""
        unique = (self.origin, self.n_updates) if own else None
        fields = (
            FORMAT_VERSION,
            self.user,
            self.model,
            self.adapters,
            self.layout,
            self.scales,
            self.shard,
            self.is_eagle,
            self.weight_version,
            unique,
        )
        return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:32]

    def renewed(self, weight_version: str | None) -> Namespace:
        """After new weights. weight_version: what came with them; None: nothing did."""
        return replace(self, n_updates=self.n_updates + 1, weight_version=weight_version or "")


def model_identity(server_args: ServerArgs, model_config: ModelConfig) -> str | None:
    """What the model's KV is a function of, as a digest. None if its weights cannot be looked at.

    Reads at most 1 MiB of each weight file. Raises nothing for files that vanish meanwhile: there is no identity then.
    """
    if server_args.load_format in _NOT_LOADED_FROM_FILES:
        return None
    folder = _local_folder(server_args.model_path, server_args.revision)
    if folder is None:
        return None
    settings = (
        str(model_config.dtype),
        server_args.quantization,
        model_config.hf_config.to_json_string(),
    )
    try:
        files = files_identity(folder)
    except OSError:
        return None
    return hashlib.sha256(msgspec.json.encode((settings, _commit(folder), files))).hexdigest()


def files_identity(path: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, digest of sampled blocks) of each weight file of a model or adapter. `path`: folder or file."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    return [(file.name, file.stat().st_size, _sampled_digest(file)) for file in files]


def adapters_identity(paths: Iterable[str]) -> str:
    """Digest of the adapters' weight files. An adapter that is not on this machine is known by its path only."""
    adapters = [(path, files_identity(Path(path)) if Path(path).exists() else []) for path in sorted(paths)]
    return hashlib.sha256(msgspec.json.encode(adapters)).hexdigest() if adapters else ""


def scales_identity(model: Any) -> str:
    """Digest of the KV scales that the model's attention layers hold (`RadixAttention`); empty if none has any."""
    scales = [(name, layer.k_scale_float, layer.v_scale_float) for name, layer in _scaled_layers(model)]
    return hashlib.sha256(msgspec.json.encode(scales)).hexdigest() if scales else ""


def _scaled_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if getattr(layer, "k_scale_float", None) is not None:
            yield name, layer


def _local_folder(model_path: str, revision: str | None) -> Path | None:
    path = Path(model_path)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _commit(folder: Path) -> str:
    """The commit in a path of the Hugging Face cache (`.../snapshots/<commit>`), or an empty string."""
    parts = folder.parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else ""


def _sampled_digest(file: Path) -> str:
    """xxh3 of `N_SAMPLES` blocks spread evenly over the file, its first and last among them."""
    nbytes = file.stat().st_size
    last = max(0, nbytes - SAMPLE_NBYTES)
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        for offset in sorted({last * i // (N_SAMPLES - 1) for i in range(N_SAMPLES)}):
            stream.seek(offset)
            digest.update(stream.read(SAMPLE_NBYTES))
    return digest.hexdigest()
