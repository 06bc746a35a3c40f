"""The room as a whole: what it imports, and that its benchmark runs."""

import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import transfer

BENCH = Path(__file__).parents[2] / "scripts" / "benchmarks" / "copies.py"
FORBIDDEN = ("sglang", "sgl_kernel", "radix", "hicache", "sgl_lmcache", "flashinfer")


def test_the_room_imports_none_of_ours_and_no_sglang() -> None:
    modules = [f"transfer.{module.name}" for module in pkgutil.iter_modules(transfer.__path__)]
    assert {"transfer.layout", "transfer.cpu", "transfer.cuda"} <= set(modules)
    script = f"import sys, {', '.join(modules)}; print(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "'transfer'" in loaded
    assert not [name for name in FORBIDDEN if repr(name) in loaded]


def test_the_benchmark_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_copies", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    arguments = ["--batches", "1,2", "--threads", "1", "--memcpy-mib", "1", "--rounds", "2"]
    assert bench.main(arguments) == 0
    assert "offload torch" in capsys.readouterr().out
    assert bench.main([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {(r["kind"], r["name"]) for r in results} >= {
        ("memcpy", "libc"),
        ("offload", "2 pages"),
        ("restore", "1 pages"),
    }
    assert all(r["gb_per_s"] > 0 and r["share"] > 0 for r in results)
