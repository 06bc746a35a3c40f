"""The namespace: a digest of all that makes one server's KV useless, or wrong, to another.

A page key covers tokens, salt, `extra_key` and adapter, and nothing else. A stored object's name is namespace + key, so
whatever changes the bytes behind equal keys has to be in here: the model and its weights, how KV is stored, and which
shard of it a rank holds. Two servers with equal namespaces may load each other's pages.

The model is known by its files: names, sizes, and blocks sampled from all over each of them, which tells two fine-tunes
of one model apart without reading hundreds of gigabytes. A folder of the Hugging Face cache brings its commit as well.
Weights that come from nowhere (`--load-format dummy`) or from where they cannot be looked at have no identity, and
their KV has no name: it may be kept in this process, and nowhere else.

Weights that change while the server runs start a new namespace. It is named by the weights themselves: by sums over all
parameters and buffers, as they lie in the device's memory (`weights_digest`). So it does not matter how they came
there, what they were called, or whether all of them came.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import xxhash

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs
from hicache.logs import get_logger

logger = get_logger(__name__)

FORMAT_VERSION = 1
"""Of the bytes of a stored page: one more whenever an old one could be misread."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
SAMPLE_NBYTES = 64 << 10
N_SAMPLES = 16

N_COLUMNS = 1024
PIECE_ELEMENTS = 1024 * N_COLUMNS
"""What `weights_digest` looks at in one go, as 8-byte numbers: that is the memory it needs on the device."""

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
    weights: str | None = None
    """`weights_digest` of weights that came while the server ran; None: they are the model's files."""

    @property
    def is_persistent(self) -> bool:
        """Whether pages may leave this process: the same name has to mean the same bytes in another."""
        return self.model is not None

    @property
    def digest(self) -> str:
        """32 hex digits."""
        fields = (
            FORMAT_VERSION,
            self.user,
            self.model,
            self.adapters,
            self.layout,
            self.scales,
            self.shard,
            self.is_eagle,
            self.weights,
            self.origin if self.model is None else None,
        )
        return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:32]

    def renewed(self, weights: str) -> Namespace:
        """After new weights. weights: their digest."""
        return replace(self, weights=weights)


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


def weights_digest(model: torch.nn.Module, group: torch.distributed.ProcessGroup | None = None) -> str:
    """32 hex digits that name all parameters and buffers of a live model. Blocks for a pass over them.

    For each tensor there are its name, shape, dtype and three sums of its bits (`_sums`). They are the same in every
    process, and tell trainings apart, not attackers: who chooses the weights can find two models with one digest.

    group: the ranks that hold the rest of the model; its tensors are in CPU memory. The KV of one rank depends on the
    weights of all, so what they hold together is named, the same on all of them. All of them have to call this.

    Weights that cannot be read (they have no memory, or there is none left to sum them in) have a digest that nothing
    else has; nothing is raised for them.
    """
    mine = _shard_digest(model)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return mine
    parts = [""] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def _shard_digest(model: torch.nn.Module) -> str:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digest = hashlib.sha256()
    try:
        with torch.no_grad():
            for name, tensor in sorted(tensors.items()):
                dense, order = _dense(tensor)
                digest.update(
                    msgspec.json.encode((name, list(tensor.shape), str(tensor.dtype), order, *_sums(dense.reshape(-1))))
                )
    except RuntimeError as error:  # PyTorch's, for what has no storage, knows no views, or does not fit
        logger.warning("sgl_lmcache: the new weights cannot be read, so their KV has a name of its own: %s", error)
        return secrets.token_hex(16)
    return digest.hexdigest()[:32]


def _sums(flat: torch.Tensor) -> tuple[int, int, int]:
    """Of its elements, as integers of their size: their sum, and that with a factor by column, and with one by row.

    The tensor is taken for a table of `N_COLUMNS` columns. The first number sees every change of one element. The
    others see every exchange of two: the two differ in column or in row, so in one of their factors, by less than
    2**31; and as elements of up to four bytes differ by less than 2**32, nothing cancels modulo 2**64. For changes of
    more elements, and exchanges of longer ones, it would take a coincidence in all three numbers to go unseen.
    """
    elements = _as_integers(flat)
    columns = torch.zeros(N_COLUMNS, dtype=torch.int64, device=elements.device)
    rows = columns.new_zeros(-(-len(elements) // N_COLUMNS))
    for start in range(0, len(elements), PIECE_ELEMENTS):
        piece = elements[start : start + PIECE_ELEMENTS].to(torch.int64)
        if len(piece) % N_COLUMNS:
            piece = torch.nn.functional.pad(piece, (0, -len(piece) % N_COLUMNS))
        table = piece.view(-1, N_COLUMNS)
        columns += table.sum(0)
        rows[start // N_COLUMNS :][: len(table)] = table.sum(1)
    sums = torch.stack((columns.sum(), (columns * _factors(columns)).sum(), (rows * _factors(rows)).sum()))
    total, by_column, by_row = sums.tolist()
    return total, by_column, by_row


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The tensor without gaps, and the order of its dimensions there: that in which they lie in memory (quantised
    weights are often transposed), so that only what has gaps is copied."""
    tensor = tensor.detach()
    as_named = list(range(tensor.dim()))
    as_stored = sorted(as_named, key=tensor.stride, reverse=True)
    for order in (as_named, as_stored):
        if tensor.permute(order).is_contiguous():
            return tensor.permute(order), order
    return tensor.contiguous(), as_named


def _as_integers(flat: torch.Tensor) -> torch.Tensor:
    """The bits of a flat tensor. Longer elements are several of four bytes."""
    return flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))


def _factors(sums: torch.Tensor) -> torch.Tensor:
    """Numbers of 31 bits, one for each sum, no two alike: each step can be undone."""
    x = torch.arange(len(sums), dtype=torch.int64, device=sums.device)
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * multiplier) & 0x7FFFFFFF
    return x ^ (x >> 15)


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
