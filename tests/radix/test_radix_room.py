"""The room as a whole: what it brings with it, and that its benchmark runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import radix

BENCH = Path(__file__).parents[2] / "scripts" / "benchmarks" / "index.py"
ALLOWED = {"numpy", "numba", "radix", *sys.stdlib_module_names}
NOT_HERE = {"socket", "threading", "asyncio", "multiprocessing", "time", "datetime", "random", "os", "io"}


def test_the_room_imports_only_numpy_numba_and_pure_parts_of_the_standard_library() -> None:
    for file in Path(radix.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            for name in names:
                top = name.split(".")[0]
                assert top in ALLOWED - NOT_HERE, f"{file.name} imports {name}"


def test_importing_it_brings_neither_torch_nor_another_room() -> None:
    """In a fresh process, because this one has imported everything."""
    source = "import sys, radix; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=120)
    assert not {"torch", "sglang", "transfer", "hicache", "sgl_lmcache"} & set(done.stdout.split())


def test_the_benchmark_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_index", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    arguments = ["--pages", "2000", "--rounds", "1"]
    assert bench.main(arguments) == 0
    assert "match, one-page edges" in capsys.readouterr().out
    assert bench.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {call["held_pages"] for call in report["calls"]} == {2000}
    assert report["memory"][0]["columns_nbytes_a_page"] < 2000  # of which the history's least size is 1,100
