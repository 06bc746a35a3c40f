"""The namespace: what makes one server's KV useless to another changes its name, and nothing else does."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_lmcache.namespace import (
    N_SAMPLES,
    SAMPLE_NBYTES,
    Namespace,
    adapters_identity,
    files_identity,
    model_identity,
    scales_identity,
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
    "weight_version": "step 7",
}


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_changes_the_name(field: str) -> None:
    assert replace(BASE, **{field: OTHERS[field]}).digest != BASE.digest


def test_no_field_has_been_forgotten_here() -> None:
    assert {field.name for field in fields(Namespace)} == OTHERS.keys() | {"origin", "n_updates"}


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


def test_new_weights_with_a_version_have_its_name_on_every_server() -> None:
    renewed = BASE.renewed("step 7")
    assert renewed.digest != BASE.digest
    assert replace(BASE, origin="2").renewed("step 7").digest == renewed.digest
    assert renewed.renewed("step 8").digest != renewed.digest
    assert renewed.renewed("step 8").renewed("step 7").digest == renewed.digest, "the same weights again"


def test_new_weights_without_a_version_have_a_name_that_nobody_else_has() -> None:
    first, second = BASE.renewed(None), BASE.renewed(None).renewed(None)
    names = {BASE.digest, first.digest, second.digest, replace(BASE, origin="2").renewed(None).digest}
    assert len(names) == 4
    assert BASE.renewed("").digest == first.digest, "an empty version is none"


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
