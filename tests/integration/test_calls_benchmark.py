"""The benchmark of our calls runs, at a tiny size, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts/benchmarks/calls.py"


def test_every_call_of_the_scheduler_is_measured() -> None:
    command = [sys.executable, str(BENCHMARK), "--pages", "32", "--rounds", "1", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    costs = {cost["call"]: cost for cost in json.loads(printed[printed.index("[\n") :])}
    assert {"match", "prefetch_from_storage", "offload_node", "load", "check_hicache_events"} <= costs.keys()
    assert all(cost["calls"] > 0 and cost["median_us"] > 0 for cost in costs.values())
