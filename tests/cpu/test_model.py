"""Generated models: the same recipe gives the same bytes, a whole folder or none, and something that is a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgl_lmcache.cpu import model
from sgl_lmcache.cpu.model import RECIPES, SPECIAL_TOKENS, TINY, Recipe, make_model, model_folder

SMALL = replace(TINY, name="small", n_layers=1, vocab_size=300)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(SMALL, tmp_path_factory.mktemp("models"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_process_makes_the_same_bytes(small: Path, tmp_path: Path) -> None:
    code = f"from sgl_lmcache.cpu.model import *; print(make_model({SMALL!r}, Path({str(tmp_path)!r})))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(made.stdout.strip())
    assert folder == tmp_path / small.name
    assert contents(folder) == contents(small)


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_layers": 2}, {"vocab_size": 301}])
def test_whatever_changes_the_bytes_changes_the_name(change: dict[str, Any], tmp_path: Path) -> None:
    assert model_folder(replace(SMALL, **change), tmp_path) != model_folder(SMALL, tmp_path)


def test_a_second_call_makes_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_write", lambda *_: pytest.fail("made again"))
    assert make_model(SMALL, small.parent) == small


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(recipe: Recipe, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError("no space left")

    monkeypatch.setattr(model, "_write", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_model(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def somebody_is_faster(recipe: Recipe, folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        theirs = model_folder(recipe, tmp_path)
        theirs.mkdir()
        (theirs / "config.json").write_text("theirs")

    monkeypatch.setattr(model, "_write", somebody_is_faster)
    folder = make_model(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "config.json").read_text() == "theirs"


def test_the_default_place_is_the_user_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_folder(TINY).parent == tmp_path / "sgl-lmcache" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert model_folder(TINY).parent == tmp_path / "home" / ".cache" / "sgl-lmcache" / "models"


def test_the_weights_are_a_qwen3_checkpoint(small: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(small)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    tensors = load_file(small / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_bfloat16_is_rounded_as_torch_does_it() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    values[:3] = [1.00390625, 1.01171875, -1.00390625]  # halfway between two neighbours
    ours = torch.from_numpy(model._to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(values).bfloat16())


def test_the_tokenizer_chats_and_gives_text_back(small: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    text = "def main(argv):\n    return 'Grüße, 世界' \U0001f600"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    assert tokenizer.eos_token == "<|im_end|>"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_script_prints_the_folder(small: Path, tmp_path: Path) -> None:
    (tmp_path / model_folder(RECIPES["tiny"], tmp_path).name).mkdir()
    script = Path(__file__).parents[2] / "scripts" / "make_model.py"
    made = subprocess.run(
        [sys.executable, script, "tiny", "--out", tmp_path], capture_output=True, text=True, check=True
    )
    assert made.stdout == f"{model_folder(TINY, tmp_path)}\n"
    assert json.loads((small / "config.json").read_text())["num_hidden_layers"] == 1
