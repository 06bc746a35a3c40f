"""The namespace: what makes one server's KV useless to another changes its name, and nothing else does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sgl_lmcache import namespace
from sgl_lmcache.namespace import (
    N_COLUMNS,
    N_SAMPLES,
    SAMPLE_NBYTES,
    Namespace,
    adapters_identity,
    files_identity,
    model_identity,
    scales_identity,
    weights_digest,
)

BASE = Namespace("default", "model", "adapters", "NHD/fp16", "scales", (0, 2), is_eagle=False, origin="1")
OTHERS: dict[str, Any] = {
    "user": "team",
    "model": "another model",
    "adapters": "",
    "layout": "NHD/fp8",
    "scales": "",
    "shard": (1, 2),
    "is_eagle": True,
    "weights": "digest of updated weights",
}


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_changes_the_name(field: str) -> None:
    assert replace(BASE, **{field: OTHERS[field]}).digest != BASE.digest


def test_no_field_has_been_forgotten_here() -> None:
    assert {field.name for field in fields(Namespace)} == OTHERS.keys() | {"origin"}


def test_fields_do_not_run_into_each_other() -> None:
    assert replace(BASE, user="a", model="bc").digest != replace(BASE, user="ab", model="c").digest
    assert replace(BASE, shard=(0, 12)).digest != replace(BASE, shard=(0, 1)).digest


def test_two_servers_of_one_model_have_one_name() -> None:
    assert replace(BASE, origin="2").digest == BASE.digest
    assert BASE.is_persistent


def test_weights_from_nowhere_are_this_servers_own() -> None:
    own = replace(BASE, model=None)
    assert not own.is_persistent
    assert replace(own, origin="2").digest != own.digest
    assert replace(own, shard=(1, 2)).digest != own.digest


def test_new_weights_have_one_name_on_every_server() -> None:
    renewed = BASE.renewed("a")
    assert renewed.digest != BASE.digest
    assert replace(BASE, origin="2").renewed("a").digest == renewed.digest
    assert renewed.renewed("b").digest != renewed.digest
    assert renewed.renewed("b").renewed("a").digest == renewed.digest, "the same weights again"
    assert renewed.is_persistent


def test_new_weights_of_a_model_from_nowhere_are_this_servers_own_too() -> None:
    own = replace(BASE, model=None)
    names = {own.digest, own.renewed("a").digest, own.renewed("b").digest, BASE.renewed("a").digest}
    assert len(names | {replace(own, origin="2").renewed("a").digest}) == 5
    assert not own.renewed("a").is_persistent


# ---- updated weights ----

DTYPES = [
    *(torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
]


def module(**tensors: torch.Tensor) -> torch.nn.Module:
    """A model with these parameters; what can have no gradient is a buffer, as in SGLang's models."""
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            model.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            model.register_buffer(name, tensor)
    return model


def some(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Any bits."""
    size = torch.empty((), dtype=dtype).element_size()
    limit = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(limit, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements, flat, as integers; writing to them changes it."""
    return tensor.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_weights_have_equal_digests_and_other_bits_another(dtype: torch.dtype) -> None:
    digest = weights_digest(module(a=some(dtype, 3, 700)))
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert weights_digest(module(a=some(dtype, 3, 700))) == digest
    changed = some(dtype, 3, 700)
    bits(changed)[1234] ^= 1
    assert weights_digest(module(a=changed)) != digest


def test_the_digest_is_the_same_in_every_process() -> None:
    """And in every version: a store outlives the server, so this value may not change."""
    weights = torch.arange(5000, dtype=torch.float32).view(50, 100)
    program = """if True:
        import torch
        from sgl_lmcache.namespace import weights_digest
        model = torch.nn.Module()
        model.register_buffer("a", torch.arange(5000, dtype=torch.float32).view(50, 100))
        print(weights_digest(model))
    """
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [weights_digest(module(a=weights)), other.stdout.strip()] == ["faf6d4b2db149504a1c59dba76221f70"] * 2


SHAPES = st.sampled_from([(1,), (2, 3), (5, N_COLUMNS), (N_COLUMNS,), (3 * N_COLUMNS + 7,)])
ANY_DTYPE = st.sampled_from(DTYPES)


@given(ANY_DTYPE, SHAPES, st.data())
def test_every_change_of_one_element_is_seen(dtype: torch.dtype, shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = some(dtype, *shape)
    before = weights_digest(module(a=tensor))
    index = data.draw(st.integers(0, tensor.numel() - 1))
    bit = 0 if dtype == torch.bool else data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    mask = torch.tensor(1).bitwise_left_shift(bit).to(bits(tensor).dtype)
    bits(tensor)[index] ^= mask
    assert weights_digest(module(a=tensor)) != before


@given(ANY_DTYPE, st.data())
def test_every_exchange_of_two_elements_is_seen(dtype: torch.dtype, data: st.DataObject) -> None:
    """Also where only a sign differs, in one column, in one row, and over the end of a piece."""
    tensor = some(dtype, 4 * N_COLUMNS + 1)
    flat = bits(tensor)
    first = data.draw(st.integers(0, len(flat) - 1))
    step = data.draw(st.sampled_from([1, 7, N_COLUMNS, N_COLUMNS + 1, 2 * N_COLUMNS, 2 * N_COLUMNS - 1]))
    second = (first + step) % len(flat)
    if dtype != torch.bool and data.draw(st.booleans()):
        top = 8 * tensor.element_size() - 1
        flat[second] = flat[first] ^ torch.tensor(1).bitwise_left_shift(top).to(flat.dtype)
    assume(flat[first] != flat[second])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(namespace, "PIECE_ELEMENTS", 2 * N_COLUMNS)
        before = weights_digest(module(a=tensor))
        flat[[first, second]] = flat[[second, first]]
        assert weights_digest(module(a=tensor)) != before


@given(st.permutations(range(6)))
def test_rows_and_columns_that_change_places_are_seen(order: list[int]) -> None:
    assume(order != sorted(order))
    tensor = some(torch.bfloat16, 6, 6)
    names = {weights_digest(module(a=t.contiguous())) for t in (tensor, tensor[order], tensor[:, order], tensor.T)}
    assert len(names) == 4


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(a=some(torch.bfloat16, 7, N_COLUMNS), b=some(torch.float32, 9 * N_COLUMNS + 5))
    whole = weights_digest(model)
    monkeypatch.setattr(namespace, "PIECE_ELEMENTS", 2 * N_COLUMNS)
    assert weights_digest(model) == whole


def test_names_shapes_and_dtypes_count() -> None:
    zeros = torch.zeros(6)
    others = [
        module(),
        module(a=zeros),
        module(b=zeros),
        module(a=zeros, b=zeros.clone()),
        module(a=zeros.view(2, 3)),
        module(a=zeros.view(3, 2)),
        module(a=torch.zeros(7)),
        module(a=torch.zeros(6, dtype=torch.int32)),
        module(a=torch.zeros(6, dtype=torch.bfloat16)),
        module(a=torch.zeros(())),
        module(a=torch.zeros(0)),
        module(a=torch.zeros(0, 3)),
        module(a=torch.zeros(3, 0)),
    ]
    assert len({weights_digest(model) for model in others}) == len(others)


def test_the_order_of_registration_does_not_count() -> None:
    a, b = some(torch.float32, 5), some(torch.bfloat16, 5)
    assert weights_digest(module(a=a, b=b)) == weights_digest(module(b=b, a=a))
    assert weights_digest(module(a=a, b=b)) != weights_digest(module(a=b, b=a))


def test_what_two_tensors_exchange_is_seen() -> None:
    a, b = some(torch.float32, 5), some(torch.float32, 5, seed=1)
    assert weights_digest(module(a=a, b=b)) != weights_digest(module(a=b, b=a))


def test_tied_weights_count_once_and_where_they_are_first() -> None:
    def tied() -> torch.nn.Module:
        model = torch.nn.ModuleDict({"embed": module(w=some(torch.bfloat16, 4, 8)), "head": torch.nn.Module()})
        model["head"].w = model["embed"].w
        return model

    model = tied()
    before = weights_digest(model)
    assert weights_digest(tied()) == before
    bits(model["head"].w.data)[3] ^= 1
    assert weights_digest(model) != before


def test_how_a_tensor_lies_in_memory_is_no_obstacle() -> None:
    """Transposed, as quantised weights are; with gaps; one element for all; in the middle of another tensor."""
    plain = some(torch.float8_e4m3fn, 30, 40)
    transposed = module(a=plain.t())
    assert weights_digest(transposed) == weights_digest(module(a=plain.clone().t()))
    bits(plain)[77] ^= 1
    assert weights_digest(transposed) != weights_digest(module(a=some(torch.float8_e4m3fn, 30, 40).t()))

    wide = some(torch.bfloat16, 30, 40)
    for view in (wide[:, 3:20], wide[3:20], wide.view(-1)[3:], wide[:, ::2], wide[:1].expand(5, 40)):
        assert weights_digest(module(a=view)) == weights_digest(
            module(a=view.clone(memory_format=torch.contiguous_format))
        )


def test_a_transposed_tensor_is_not_copied() -> None:
    plain = some(torch.float8_e4m3fn, 30, 40)
    dense, order = namespace._dense(plain.t())
    assert (dense.data_ptr(), dense.is_contiguous(), order) == (plain.data_ptr(), True, [1, 0])


def test_weights_that_cannot_be_read_have_a_name_that_nobody_else_has(caplog: pytest.LogCaptureFixture) -> None:
    model = module(a=torch.empty(3, device="meta"))
    first, second = weights_digest(model), weights_digest(model)
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second
    assert "cannot be read" in caplog.text


def test_reading_leaves_the_weights_as_they_are() -> None:
    model = torch.nn.Linear(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights_digest(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def _digests_of_rank(rank: int, folder: str) -> None:
    """With the weights as they are, with others on rank 0, and with others on rank 1."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    models = [module(a=some(torch.float32, 5, seed=10 if rank == changed else rank)) for changed in (None, 0, 1)]
    Path(folder, str(rank)).write_text(" ".join(weights_digest(model, group) for model in models))
    torch.distributed.destroy_process_group()


def test_ranks_have_one_digest_of_all_their_weights(tmp_path: Path) -> None:
    """KV of a rank changes with the weights of any other, even if its own stay as they were."""
    torch.multiprocessing.spawn(_digests_of_rank, (str(tmp_path),), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first == second
    assert len(set(first)) == 3


# ---- files ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two weight files, the second longer than all of its samples, and something that is none."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 16)
    big = bytearray(SAMPLE_NBYTES * N_SAMPLES * 2)
    big[::4099] = bytes(i % 251 for i in range(len(big[::4099])))
    (folder / "b.safetensors").write_bytes(bytes(big))
    (folder / "README.md").write_text("a model")
    return folder


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


def test_equal_files_elsewhere_are_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    assert files_identity(copy) == files_identity(model)
    assert [name for name, _, _ in files_identity(model)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("position", [0, SAMPLE_NBYTES - 1, -SAMPLE_NBYTES, -1])
@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors"])
def test_a_flipped_byte_in_a_sampled_block_is_another_model(model: Path, name: str, position: int) -> None:
    before, file = files_identity(model), model / name
    flip(file, position % file.stat().st_size)
    assert files_identity(model) != before


def test_blocks_from_all_over_a_file_are_sampled(model: Path) -> None:
    """The start of each sample is known here: they are spread evenly, the first and last blocks among them."""
    file, before = model / "b.safetensors", files_identity(model)
    stride = (file.stat().st_size - SAMPLE_NBYTES) // (N_SAMPLES - 1)
    for i in range(N_SAMPLES):
        flip(file, i * stride + SAMPLE_NBYTES // 2)
        assert files_identity(model) != before, f"sample {i}"
        flip(file, i * stride + SAMPLE_NBYTES // 2)
    assert files_identity(model) == before


def test_another_size_or_name_is_another_model(model: Path) -> None:
    before = files_identity(model)
    with (model / "b.safetensors").open("ab") as file:
        file.write(b"\0")
    longer = files_identity(model)
    assert longer != before
    (model / "b.safetensors").rename(model / "c.safetensors")
    assert files_identity(model) not in (before, longer)


def test_what_is_no_weight_file_does_not_count(model: Path) -> None:
    before = files_identity(model)
    (model / "README.md").write_text("something else")
    assert files_identity(model) == before


# ---- the model ----


def identity(path: Path | str, load_format: str = "auto", dtype: str = "bfloat16", config: str = "{}") -> str | None:
    server_args = SimpleNamespace(load_format=load_format, model_path=str(path), revision=None, quantization=None)
    model_config = SimpleNamespace(dtype=dtype, hf_config=SimpleNamespace(to_json_string=lambda: config))
    return model_identity(server_args, model_config)


def test_the_model_is_its_files_its_dtype_and_its_configuration(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert identity(model) is not None
    assert identity(copy) == identity(model)
    assert identity(model, dtype="float16") != identity(model)
    assert identity(model, config='{"rope_theta": 1}') != identity(model)


@pytest.mark.parametrize("load_format", ["dummy", "remote", "remote_instance", "rdma", "ipc_cache"])
def test_weights_that_do_not_come_from_files_have_no_identity(model: Path, load_format: str) -> None:
    assert identity(model, load_format=load_format) is None


def test_a_model_that_is_not_on_this_machine_has_no_identity(tmp_path: Path) -> None:
    assert identity(tmp_path / "no such folder") is None


def test_a_snapshot_of_the_hub_is_known_by_its_commit_too(model: Path, tmp_path: Path) -> None:
    first = shutil.copytree(model, tmp_path / "one" / "snapshots" / "0a1b")
    second = shutil.copytree(model, tmp_path / "two" / "snapshots" / "2c3d")
    same = shutil.copytree(model, tmp_path / "three" / "snapshots" / "0a1b")
    assert identity(first) not in (identity(second), identity(model))
    assert identity(same) == identity(first)


# ---- adapters and scales ----


def test_adapters_are_known_by_path_and_content(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    assert adapters_identity([]) == ""
    both = adapters_identity([str(model), str(other)])
    assert both == adapters_identity([str(other), str(model)]), "in any order"
    assert len({both, adapters_identity([str(model)]), adapters_identity([str(other)])}) == 3
    flip(other / "a.safetensors", 0)
    assert adapters_identity([str(model), str(other)]) != both
    assert adapters_identity(["not/here"]) != adapters_identity(["not/there"])


def test_scales_of_quantised_kv_count() -> None:
    def model_with(*layers: tuple[str, float | None, float | None]) -> SimpleNamespace:
        modules = [(name, SimpleNamespace(k_scale_float=k, v_scale_float=v)) for name, k, v in layers]
        return SimpleNamespace(named_modules=lambda: [("", SimpleNamespace()), *modules])

    assert scales_identity(model_with(("0", None, None))) == ""
    one = scales_identity(model_with(("0", 0.5, 0.25)))
    assert one not in ("", scales_identity(model_with(("0", 0.5, 0.5))), scales_identity(model_with(("1", 0.5, 0.25))))
