"""`sgl-lmcache serve`: what process it becomes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sgl_lmcache import serve
from sgl_lmcache.cpu.mode import STAND_IN
from sgl_lmcache.errors import StartError
from sgl_lmcache.serve import main, plan

SERVER = [sys.executable, "-m", "sglang.launch_server"]
OUR_FLAG = ["--radix-cache-backend", "sgl_lmcache"]


def test_with_a_gpu_one_flag_is_added() -> None:
    launch = plan(["--model-path", "m", "--tp", "2"], {"A": "b"}, gpu=True)
    assert launch.command == [*SERVER, *OUR_FLAG, "--model-path", "m", "--tp", "2"]
    assert launch.environment == {"A": "b"}


@pytest.mark.parametrize("given", [OUR_FLAG, ["--radix-cache-backend=sgl_lmcache"]])
def test_the_flag_is_not_added_twice(given: list[str]) -> None:
    assert plan(given, {}, gpu=True).command == [*SERVER, *given]


@pytest.mark.parametrize(("argv", "gpu"), [([], False), (["--device", "cpu"], False), (["--device=cpu"], True)])
def test_cpu_mode_without_a_gpu_or_when_asked_for(argv: list[str], gpu: bool) -> None:
    launch = plan(argv, {}, gpu=gpu)
    assert launch.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert launch.environment["PYTHONPATH"] == str(STAND_IN)
    assert ("--device" in launch.command) is ("--device=cpu" not in argv)
    assert launch.command.count("--device") <= 1
    assert "torch_native" in launch.command


@pytest.mark.parametrize(
    ("argv", "n_ranks"),
    [
        ([], 1),
        (["--tp", "2"], 2),
        (["--tensor-parallel-size=2", "--dp-size", "3"], 6),
        (["--tp", "two"], 1),
        (["--tp", "0"], 1),
    ],
)
def test_each_rank_gets_its_share_of_the_cores(argv: list[str], n_ranks: int) -> None:
    bind = plan(argv, {}, gpu=False).environment.get("SGLANG_CPU_OMP_THREADS_BIND", "all")
    assert bind.count("|") == n_ranks - 1


@pytest.mark.parametrize("form", ["--cache-config {}", "--cache-config={}"])
def test_the_configuration_goes_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    (tmp_path / "tiers.yaml").touch()
    monkeypatch.chdir(tmp_path)
    launch = plan([*form.format("tiers.yaml").split(), "--port", "1"], {"SGL_LMCACHE_CONFIG": "old"}, gpu=True)
    assert launch.environment["SGL_LMCACHE_CONFIG"] == str(tmp_path / "tiers.yaml")
    assert launch.command == [*SERVER, *OUR_FLAG, "--port", "1"]


def test_without_config_the_variable_stays(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.touch()
    assert plan([], {"SGL_LMCACHE_CONFIG": str(old)}, gpu=True).environment["SGL_LMCACHE_CONFIG"] == str(old)


def test_a_configuration_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("teirs: []")
    with pytest.raises(StartError, match=r"wrong\.yaml: teirs is not a known key; did you mean tiers\?"):
        plan([], {"SGL_LMCACHE_CONFIG": str(wrong)}, gpu=True)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cache-config", "no.yaml"], r"^--cache-config needs a file, and there is none at 'no\.yaml'\.$"),
        (["--cache-config"], r"^--cache-config needs a file, and there is none at '\.'\.$"),
        (["--radix-cache-backend", "lmcache"], r"^--radix-cache-backend lmcache is another cache; leave it out, or "),
    ],
)
def test_what_cannot_start_is_refused_in_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(StartError, match=sentence):
        plan(argv, {}, gpu=True)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    monkeypatch.setattr(serve, "has_gpu", lambda: True)
    return []


def test_main_becomes_the_server(
    executed: list[tuple[str, list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSED_ON", "yes")
    assert main(["--port", "1"], execute=lambda *call: executed.append(call)) == 0
    [(program, command, environment)] = executed
    assert program == sys.executable
    assert command == [*SERVER, *OUR_FLAG, "--port", "1"]
    assert environment["PASSED_ON"] == "yes"


def test_main_says_what_is_wrong_and_starts_nothing(
    executed: list[tuple[str, list[str], dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cache-config", "no.yaml"], execute=lambda *call: executed.append(call)) == 2
    assert main(["--help"], execute=lambda *call: executed.append(call)) == 0
    assert executed == []
    captured = capsys.readouterr()
    assert captured.err == "sgl-lmcache serve: --cache-config needs a file, and there is none at 'no.yaml'.\n"
    assert captured.out == serve.USAGE
