"""The benchmark of the SSD tier runs, at a tiny size, so that it cannot rot; without fio, which it does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(tmp_path: Path, what: str, *options: str) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """The results, and what was printed. No program is found, so fio is not either."""
    found = tmp_path / "results.json"
    command = [
        sys.executable,
        str(ROOT / "scripts/benchmarks/ssd.py"),
        what,
        "--path",
        str(tmp_path),
        "--json",
        str(found),
    ]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert not list(tmp_path.glob("bench-ssd-*")), "it has left its folder behind"
    results: list[dict[str, Any]] = json.loads(found.read_text())
    return results, done


@pytest.mark.parametrize("direction", ["read", "write"])
def test_bytes(tmp_path: Path, direction: str) -> None:
    (result,), done = run(tmp_path, direction, "--pages", "8", "--page-nbytes", "5000", "--rounds", "2")
    assert "apt-get install fio" in done.stderr
    assert [rate["who"] for rate in result["rates"]] == ["tier"]
    assert result["rates"][0]["gb_per_s"] > 0
    assert result["ratio"] is None
    assert len(result["beside"]) == (2 if direction == "write" else 0)


def test_restart(tmp_path: Path) -> None:
    results, _ = run(tmp_path, "restart", "--pages", "2000", "--rounds", "2")
    assert len(results) == 2
    for result in results:
        assert result["pages"] == 2000
        assert 0 < result["opened_s"] < result["answered_s"] < result["loaded_s"] < result["filled_s"]
        assert result["during"]["pieces"] > 0
        assert result["after"]["pieces"] > 0


def test_calls(tmp_path: Path) -> None:
    results, done = run(tmp_path, "calls", "--pages", "32", "--rounds", "2")
    costs = {cost["call"]: cost for cost in results}
    assert {"exists", "touch", "load", "store", "store, others leave", "store, all there"} <= costs.keys()
    assert costs["store"]["calls"] == 4
    assert all(0 < cost["median_us"] <= cost["worst_us"] for cost in results)
    assert "median us" in done.stdout


def test_the_help_names_every_part() -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/ssd.py"), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(f"ssd.py {what}" in printed for what in ("read", "write", "restart", "calls"))
