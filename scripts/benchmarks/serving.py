#!/usr/bin/env python3
"""What the cache does to a real server: time to first token by where the prefix was found, and the cost without reuse.

    python scripts/benchmarks/serving.py ttft      [--tokens 8000] [--rounds 9]
    python scripts/benchmarks/serving.py overhead  [--pairs 9]
    python scripts/benchmarks/serving.py thread
    python scripts/benchmarks/serving.py ranks     [--tokens 2000] [--rounds 9]

ttft: two prompts that do not fit into HBM together take turns: each is found in host memory when its turn comes, and
in HBM when it is asked again at once. They are measured in alternation. "overhead" is host hit minus device hit; it
is compared with the time that this machine's memcpy would take for the same bytes, measured in the same run.

overhead: a workload in which no prompt shares anything with another, on two servers that differ in our flag alone.
Pairs of runs alternate; the server that is not being measured is stopped (SIGSTOP) meanwhile, so that it takes no time.

thread: what our calls take of SGLang's scheduler thread while it serves prompts that share nothing, by the tests' probe
in the server's process: for each 1,000 prompt tokens, and for each turn of the scheduler's loop (as a decode step is).

ranks: two ranks that agree by a small reduction whenever something is under way: how many there are for each 1,000
prompt tokens and each 1,000 decode steps, how long they take, and `ttft` on such a server.

Ratios of one run only: absolute times on a shared machine are noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_server import Client, running
from programs import Deadline, free_port

from sgl_lmcache import cpu, serve
from sgl_lmcache.cpu.model import RECIPES, make_model
from tests.support.inspection import ProbeFolder

PAGE_SIZE = 16
TOKEN_NBYTES = 12 * 2 * 8 * 64 * 2
"""KV of the generated bench model: 12 layers, K and V, 8 heads of 64, bf16."""


HOST_ONLY = "tiers:\n  - {type: host, capacity: 2GiB}\n"


class Prompts:
    """Prompts of random tokens that share no page with one another."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def make(self, n_tokens: int) -> list[int]:
        return [self._rng.randrange(10, 4000) for _ in range(n_tokens)]


def generate(client: Client, prompt: Sequence[int], max_new_tokens: int) -> tuple[float, dict[str, int]]:
    """Seconds until the whole answer is there, and where the prompt's tokens were found."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    request = Request(f"{client.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started_s = time.perf_counter()
    with urlopen(request) as response:
        answer = json.load(response)
    elapsed_s = time.perf_counter() - started_s
    return elapsed_s, answer["meta_info"].get("cached_tokens_details") or {"device": 0, "host": 0}


@contextmanager
def server(
    folder: Path,
    *,
    cached: bool,
    pool_tokens: int,
    n_ranks: int = 1,
    config: str = HOST_ONLY,
    sleep_on_idle: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Client]:
    """A server on the bench model. Both kinds get the same arguments but for our flag. config: the text of its file."""
    port = free_port()
    common = ["--model-path", str(make_model(RECIPES["bench"])), "--host", "127.0.0.1", "--port", str(port)]
    common += ["--max-total-tokens", str(pool_tokens), "--page-size", str(PAGE_SIZE)]
    if n_ranks > 1:
        common += ["--tp", str(n_ranks)]
    if sleep_on_idle:
        common += ["--sleep-on-idle"]
    config_file = folder / "tiers.yaml"
    config_file.write_text(config)
    if cached:
        launch = serve.plan(["--cache-config", str(config_file), *common], environment, gpu=cpu.has_gpu())
    else:
        launch = serve.Launch(
            [sys.executable, "-m", "sglang.launch_server", *cpu.cpu_arguments(common)], cpu.cpu_environment(environment)
        )
    log = folder / ("cached.log" if cached else "stock.log")
    with running(launch, port=port, log=log, deadline=Deadline(3600)) as client:
        generate(client, Prompts(0).make(64), 4)
        yield client


def memcpy_s(nbytes: int) -> float:
    """Seconds that the best of several plain copies of this many bytes takes, on one thread or two."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    halves = [(source[: nbytes // 2], target[: nbytes // 2]), (source[nbytes // 2 :], target[nbytes // 2 :])]
    best_s = float("inf")
    with ThreadPoolExecutor(2) as pool:
        for parts in ([(source, target)], halves):
            for _ in range(7):
                started_s = time.perf_counter()
                list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
                best_s = min(best_s, time.perf_counter() - started_s)
    return best_s


def run_ttft(n_tokens: int, n_rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        client = stack.enter_context(server(Path(name), cached=True, pool_tokens=n_tokens * 3 // 2))
        return ttft(client, n_tokens, n_rounds)


def ttft(client: Client, n_tokens: int, n_rounds: int) -> dict[str, float]:
    """Of a server whose HBM holds one and a half prompts of `n_tokens`."""
    prompts = Prompts(1)
    first, second = prompts.make(n_tokens), prompts.make(n_tokens)
    whole_pages = (n_tokens - 1) // PAGE_SIZE * PAGE_SIZE
    times: dict[str, list[float]] = {"cold": [], "device": [], "host": []}
    for prompt in (first, second):
        times["cold"].append(generate(client, prompt, 1)[0])
    for number in range(-1, n_rounds):
        for prompt in (first, second):
            for kind in ("host", "device"):
                elapsed_s, found = generate(client, prompt, 1)
                assert found[kind] == whole_pages, f"meant as a {kind} hit, found {found}"
                if number >= 0:
                    times[kind].append(elapsed_s)
    copy_s = memcpy_s(whole_pages * TOKEN_NBYTES)
    cold, device, host = (statistics.median(times[kind]) for kind in ("cold", "device", "host"))
    pairs = list(zip(times["host"], times["device"], strict=True))
    overheads = [in_host - in_device for in_host, in_device in pairs]
    return {
        "tokens": n_tokens,
        "cold_s": cold,
        "device_hit_s": device,
        "host_hit_s": host,
        "host_over_device": host / device,
        "host_over_device_paired": statistics.median(in_host / in_device for in_host, in_device in pairs),
        "cold_over_host": cold / host,
        "overhead_s": statistics.median(overheads),
        "memcpy_s": copy_s,
        "overhead_over_memcpy": statistics.median(overheads) / copy_s,
    }


def run_ranks(n_tokens: int, n_rounds: int) -> dict[str, float]:
    """Two ranks; see the module's text."""
    prompts = Prompts(4)
    n_prompts, n_steps = 16, 1000
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        pool_tokens = n_tokens * 3 // 2
        client = stack.enter_context(
            server(folder, cached=True, pool_tokens=pool_tokens, n_ranks=2, environment=with_probe(folder))
        )
        probe = ProbeFolder(folder, 2, check_alive=lambda: None)
        seen = [probe.inspect()[0]]
        for _ in range(n_prompts):
            generate(client, prompts.make(512), 1)
        seen.append(probe.inspect()[0])
        generate(client, prompts.make(64), n_steps)
        seen.append(probe.inspect()[0])
        figures = ttft(client, n_tokens, n_rounds)
        seen.append(probe.inspect()[0])
    counts = [one.n_reductions for one in seen]
    calls = [one.times["minimum"] for one in seen]
    spent_us = (calls[-1]["total_ns"] - calls[0]["total_ns"]) / 1e3
    return {
        "reductions a 1,000 prompt tokens": (counts[1] - counts[0]) / (n_prompts * 512 / 1000),
        "reductions a 1,000 decode steps": (counts[2] - counts[1]) / (n_steps / 1000),
        "reductions in the rest": counts[3] - counts[2],
        "us a reduction (rank 0, with waiting)": spent_us / max(1, calls[-1]["count"] - calls[0]["count"]),
        **figures,
    }


def run_overhead(n_pairs: int) -> dict[str, float]:
    """Tokens a second with our flag over those without, pair by pair."""
    prompts = Prompts(2)
    ratios = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        clients = {
            cached: stack.enter_context(server(Path(name), cached=cached, pool_tokens=6144)) for cached in (True, False)
        }
        groups = {cached: group_of(client) for cached, client in clients.items()}
        for pair in range(-1, n_pairs):
            batch = [prompts.make(512) for _ in range(8)]
            seconds: dict[bool, float] = {}
            order = (True, False) if pair % 2 else (False, True)
            for cached in order:
                signal_all(groups[not cached], signal.SIGSTOP)
                seconds[cached] = burst_s(clients[cached], batch)
                signal_all(groups[not cached], signal.SIGCONT)
            if pair >= 0:
                ratios.append(seconds[False] / seconds[True])
    ratios.sort()
    return {
        "pairs": n_pairs,
        "throughput_ratio_median": statistics.median(ratios),
        "throughput_ratio_min": ratios[0],
        "throughput_ratio_max": ratios[-1],
        "throughput_ratio_q1": ratios[len(ratios) // 4],
        "throughput_ratio_q3": ratios[-1 - len(ratios) // 4],
    }


def run_thread(n_prompts: int = 24, n_tokens: int = 512, n_new: int = 32) -> dict[str, float]:
    """Microseconds of the scheduler thread, by call."""
    prompts = Prompts(3)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        environment = with_probe(Path(name))
        client = stack.enter_context(server(Path(name), cached=True, pool_tokens=6144, environment=environment))
        probe = ProbeFolder(Path(name), 1, check_alive=lambda: None)
        before = probe.inspect()[0].times
        for _ in range(n_prompts):
            generate(client, prompts.make(n_tokens), n_new)
        after = probe.inspect()[0].times
    figures: dict[str, float] = {"prompt_tokens": n_prompts * n_tokens}
    events = "check_hicache_events"
    per_turn_us = (after[events]["total_ns"] - before[events]["total_ns"]) / 1e3
    per_turn_us /= after[events]["count"] - before[events]["count"]
    total_us = 0.0
    for call in sorted(after):
        if call != events:
            spent_us = (after[call]["total_ns"] - before[call]["total_ns"]) / 1e3
            figures[f"{call} us/1,000 tokens"] = 1000 * spent_us / (n_prompts * n_tokens)
            total_us += spent_us
    figures["all of these us/1,000 tokens"] = 1000 * total_us / (n_prompts * n_tokens)
    figures[f"{events} us/turn"] = per_turn_us
    return figures


def with_probe(folder: Path) -> dict[str, str]:
    """Of a server that the tests' probe looks into and measures, by files in this folder."""
    probe = Path(__file__).resolve().parents[2] / "tests/support/probe"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(probe), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "SGL_LMCACHE_PROBE_DIR": str(folder),
        "SGL_LMCACHE_PROBE_TIMES": "1",
    }


def burst_s(client: Client, batch: Sequence[Sequence[int]]) -> float:
    """Seconds for a burst of concurrent requests, 32 new tokens each."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(len(batch)) as pool:
        for _, found in pool.map(lambda prompt: generate(client, prompt, 32), batch):
            assert found["device"] == found["host"] == 0, f"this workload must not hit, found {found}"
    return time.perf_counter() - started_s


def group_of(client: Client) -> list[int]:
    """The processes of a server: those whose command line or parent names its port."""
    import psutil

    port = client.url.rsplit(":", 1)[1]
    leaders = [
        process
        for process in psutil.process_iter(["cmdline"])
        if port in (process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]
    return [member.pid for leader in leaders for member in (leader, *leader.children(recursive=True))]


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def show(figures: Mapping[str, float], *, as_json: bool) -> None:
    """Print them, one a line."""
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:64}{value:>12,.4f}" if isinstance(value, float) else f"{name:64}{value:>12,}")


def main() -> int:
    parser = argparse.ArgumentParser(description="TTFT by tier, and the cost without reuse.")
    parser.add_argument("what", choices=("ttft", "overhead", "thread", "ranks"))
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "ttft":
        figures = run_ttft(arguments.tokens, arguments.rounds)
    elif arguments.what == "overhead":
        figures = run_overhead(arguments.pairs)
    elif arguments.what == "ranks":
        figures = run_ranks(arguments.tokens, arguments.rounds)
    else:
        figures = run_thread()
    show(figures, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
