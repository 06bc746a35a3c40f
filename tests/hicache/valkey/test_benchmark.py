"""The benchmark of the Valkey tier runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "scripts/benchmarks/valkey_tier.py"), *arguments, "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("direction", ["load", "store"])
def test_bytes(direction: str) -> None:
    rates = run(direction, "--pages", "9", "--page-nbytes", "5000")
    assert [rate["who"] for rate in rates] == [
        "tier",
        "bare socket",
        "valkey-py",
        *(["bare socket, discarding"] if direction == "load" else []),
    ]
    assert all(rate["gb_per_s"] > 0 for rate in rates)
    assert all(rate["ratio"] > 0 for rate in rates[1:])


def test_lookup() -> None:
    (lookup,) = run("lookup", "--pages", "32")
    assert 0 < lookup["call_us"] < lookup["answer_us"]
    assert lookup["ping_us"] > 0
