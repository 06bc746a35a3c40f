"""The ways to give a running server other weights, as a trainer would, over HTTP.

Each replaces all weights by those of a folder. `Session` ways are accepted by SGLang only between
`/begin_weight_update` and `/end_weight_update`.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.processes import free_port
from tests.support.server import Server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, while it is imported
    from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group

Way = Callable[..., None]
"""(server, folder of the model, flush_cache=...)"""

GROUP = "trainer"


def from_disk(server: Server, model: Path, *, flush_cache: bool) -> None:
    assert server.ask("/update_weights_from_disk", model_path=str(model), flush_cache=flush_cache)["success"]


def from_tensors(server: Server, model: Path, *, flush_cache: bool) -> None:
    begin(server)
    load_tensors(server, model, flush_cache=flush_cache)
    end(server)


def from_a_group(server: Server, model: Path, *, flush_cache: bool) -> None:
    begin(server)
    broadcast(server, model, flush_cache=flush_cache)
    end(server)


def begin(server: Server) -> None:
    assert server.ask("/begin_weight_update")["success"]


def end(server: Server) -> None:
    assert server.ask("/end_weight_update")["success"]


def load_tensors(server: Server, model: Path, *, flush_cache: bool, halves: int = 2) -> None:
    """In two calls, as trainers send them; only the second flushes. halves: how many of them the trainer gets to."""
    named = sorted(load_file(model / "model.safetensors").items())
    half = len(named) // 2
    for part, flush in ((named[:half], False), (named[half:], flush_cache))[:halves]:
        payloads = [base64.b64encode(_serialize(part)).decode() for _ in range(server.setup.n_ranks)]
        answer = server.ask("/update_weights_from_tensor", serialized_named_tensors=payloads, flush_cache=flush)
        assert answer["success"]


def _serialize(tensors: list[tuple[str, torch.Tensor]]) -> bytes:
    """By name of a shared file: the server is no child of this process, so it cannot be handed a descriptor."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(MultiprocessingSerializer.serialize(tensors))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def broadcast(server: Server, model: Path, *, flush_cache: bool) -> None:
    """This process is rank 0 of a group and sends every tensor; the server's ranks come after it."""
    tensors = load_file(model / "model.safetensors")
    described = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }
    port = free_port()
    world_size = 1 + server.setup.n_ranks
    where = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": world_size}
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(server.ask, "/init_weights_update_group", group_name=GROUP, backend="gloo", **where)
        group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=world_size, rank=0, group_name=GROUP
        )
        assert joined.result()["success"]
        try:
            answer = thread.submit(
                server.ask, "/update_weights_from_distributed", group_name=GROUP, flush_cache=flush_cache, **described
            )
            for tensor in tensors.values():
                torch.distributed.broadcast(tensor, src=0, group=group)
            assert answer.result()["success"]
        finally:
            assert server.ask("/destroy_weights_update_group", group_name=GROUP)["success"]
            torch.distributed.destroy_process_group(group)
