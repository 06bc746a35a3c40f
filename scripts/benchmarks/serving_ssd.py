#!/usr/bin/env python3
"""What an SSD tier does to a real server: hits after everything above has been dropped, and what it costs the others.

    python scripts/benchmarks/serving_ssd.py ttft   [--tokens 8000] [--rounds 9]
    python scripts/benchmarks/serving_ssd.py spill  [--tokens 2000] [--rounds 15]
    python scripts/benchmarks/serving_ssd.py guard  [--pairs 15]
    python scripts/benchmarks/serving_ssd.py auto   [--tokens 2000] [--rounds 20]

ttft: one prompt, asked when HBM and host memory have been flushed (an SSD hit), and at once again (an HBM hit), in
turns. The store is read with direct I/O, so the page cache does not help. The bound is the HBM hit plus the time in
which fio reads as many bytes from the same folder, at the best of several queue depths; fio runs between the rounds.

spill: host hits while other clients bring new prompts, on two servers that differ in the SSD tier alone: one writes all
that is new to its SSD. Pairs alternate, and the server that is not measured is stopped (SIGSTOP).

guard: the same two servers with prompts of 100 to 900 tokens that share nothing, so that everything is stored and
nothing is ever loaded: time to first token one by one, and a burst for throughput.

auto: the same prompts on two servers, one that loads whatever its SSD has and one with the policy `auto`, whose disks
are slowed down to three speeds; beside them what computing the prompt takes. `auto` should be near the better of the
two.

Ratios of one run only: absolute times on a shared machine are noise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fio import DEPTHS, MISSING, Fio
from benchmarks.serving import (
    PAGE_SIZE,
    TOKEN_NBYTES,
    Prompts,
    generate,
    group_of,
    server,
    show,
    signal_all,
    with_probe,
)
from demo_server import Client

from tests.support.inspection import Faults, ProbeFolder

SETTLE_S = 1.0
"""Long enough for what a prompt leaves behind to be written: not measured, and nothing waits for it."""

Figures = dict[str, float]


def tiers(folder: Path, *, ssd: bool, policy: str = "wait") -> str:
    """A configuration with host memory of 2 GiB."""
    below = f"  - {{type: ssd, path: {folder / 'store'}, capacity: 6GiB}}\n" if ssd else ""
    return f"tiers:\n  - {{type: host, capacity: 2GiB}}\n{below}prefetch: {{policy: {policy}, timeout: 60s}}\n"


def flush(client: Client) -> None:
    """Drop what HBM and host memory have, once it has been written down."""
    time.sleep(SETTLE_S)
    with urlopen(Request(f"{client.url}/flush_cache?timeout=30", b"", method="POST")):
        return


def whole(n_tokens: int) -> int:
    """Tokens of a prompt that can be found: those in whole pages, less the last."""
    return (n_tokens - 1) // PAGE_SIZE * PAGE_SIZE


def fio_s(fio: Fio, nbytes: int) -> float:
    """Seconds that the best of the depths takes to read so many bytes."""
    return nbytes / (1e9 * max(fio.gb_per_s("read", depth) for depth in DEPTHS))


# ---- ttft ----


def run_ttft(n_tokens: int, n_rounds: int, path: Path) -> Figures:
    prompt, nbytes = Prompts(1).make(n_tokens), whole(n_tokens) * TOKEN_NBYTES
    times: dict[str, list[float]] = {"storage": [], "device": [], "fio": []}
    with tempfile.TemporaryDirectory(dir=path) as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "fio").write_bytes(os.urandom(nbytes))
        fio = Fio(folder / "fio")
        print(f"# {fio.described('read')}", file=sys.stderr)
        client = stack.enter_context(
            server(folder, cached=True, pool_tokens=n_tokens * 3 // 2, config=tiers(folder, ssd=True))
        )
        cold_s = generate(client, prompt, 1)[0]
        group = group_of(client)
        for number in range(-1, n_rounds):
            flush(client)
            for kind in ("storage", "device"):
                elapsed_s, found = generate(client, prompt, 1)
                assert found.get(kind) == whole(n_tokens), f"meant as a {kind} hit, found {found}"
                if number >= 0:
                    times[kind].append(elapsed_s)
            signal_all(group, signal.SIGSTOP)
            times["fio"].append(fio_s(fio, nbytes))
            signal_all(group, signal.SIGCONT)
    storage, device, read = (statistics.median(times[kind]) for kind in ("storage", "device", "fio"))
    extra = [in_storage - in_hbm for in_storage, in_hbm in zip(times["storage"], times["device"], strict=True)]
    return {
        "tokens": n_tokens,
        "cold_s": cold_s,
        "device_hit_s": device,
        "ssd_hit_s": storage,
        "ssd_hit_s_min": min(times["storage"]),
        "ssd_hit_s_max": max(times["storage"]),
        "fio_s (same bytes, best depth)": read,
        "cold over SSD hit (at least 30)": cold_s / storage,
        "SSD hit over device hit + fio (at most 1.3)": storage / (device + read),
        "SSD hit less device hit, over fio": statistics.median(extra) / read,
    }


# ---- two servers, one with the tier ----


@dataclass(frozen=True)
class Pair:
    """Servers that differ in the SSD tier alone. `of[True]` has it."""

    of: dict[bool, Client]
    groups: dict[bool, list[int]]

    def measure(self, number: int, work: Callable[[Client], float]) -> dict[bool, float]:
        """`work` on both, one after the other, in turns; the other one is stopped meanwhile."""
        seen: dict[bool, float] = {}
        for has_ssd in (True, False) if number % 2 else (False, True):
            signal_all(self.groups[not has_ssd], signal.SIGSTOP)
            seen[has_ssd] = work(self.of[has_ssd])
            signal_all(self.groups[not has_ssd], signal.SIGCONT)
        return seen


@contextmanager
def pair_of_servers(path: Path, pool_tokens: int) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(dir=path) as name, ExitStack() as stack:
        clients = {}
        for has_ssd in (True, False):
            folder = Path(name, "with" if has_ssd else "without")
            folder.mkdir()
            config = tiers(folder, ssd=has_ssd)
            clients[has_ssd] = stack.enter_context(
                server(folder, cached=True, pool_tokens=pool_tokens, config=config, sleep_on_idle=True)
            )
        yield Pair(clients, {has_ssd: group_of(client) for has_ssd, client in clients.items()})


def summary(name: str, ratios: Sequence[float]) -> Figures:
    ordered = sorted(ratios)
    quarter = len(ordered) // 4
    return {
        f"{name}, median": statistics.median(ordered),
        f"{name}, quartiles": ordered[quarter],
        f"{name}, upper": ordered[-1 - quarter],
    }


def run_spill(n_tokens: int, n_rounds: int, path: Path) -> Figures:
    """Host hits of two prompts in turns, while a client brings new prompts all the time."""
    prompts = Prompts(5)
    hot = [prompts.make(n_tokens) for _ in range(2)]
    ratios = []
    with pair_of_servers(path, n_tokens * 3 // 2) as servers:
        for client in servers.of.values():
            for prompt in (*hot, *hot):
                generate(client, prompt, 1)
        for number in range(-1, n_rounds):
            fresh = [prompts.make(700) for _ in range(4)]

            def host_hits(client: Client, fresh: Sequence[Sequence[int]] = fresh) -> float:
                times = []
                with ThreadPoolExecutor(1) as background:
                    for new, prompt in zip(fresh, hot * 2, strict=True):
                        background.submit(generate, client, new, 1).result()  # its pages are being written now
                        elapsed_s, found = generate(client, prompt, 1)
                        assert found["host"] + found["device"] == whole(n_tokens), found
                        times.append(elapsed_s)
                return statistics.median(times)

            seen = servers.measure(number, host_hits)
            if number >= 0:
                ratios.append(seen[True] / seen[False])
    return summary("TTFT of host hits, spilling over not (at most 1.1)", ratios)


def run_guard(n_pairs: int, path: Path) -> Figures:
    prompts = Prompts(6)
    ttft, throughput = [], []
    with pair_of_servers(path, 8192) as servers:
        for number in range(-1, n_pairs):
            single = [prompts.make(n_tokens) for n_tokens in (100, 300, 600, 900)]
            burst = [prompts.make(400) for _ in range(12)]
            one = servers.measure(number, partial(singly_s, batch=single))
            all_s = servers.measure(number, partial(burst_s, batch=burst))
            if number >= 0:
                ttft.append(one[True] / one[False])
                throughput.append(all_s[False] / all_s[True])
    return {
        **summary("TTFT under 1,000 tokens, with SSD over without (at most 1.02)", ttft),
        **summary("throughput, with SSD over without (at least 0.98)", throughput),
    }


def singly_s(client: Client, batch: Sequence[Sequence[int]]) -> float:
    """Seconds to first tokens, one prompt after another."""
    return sum(generate(client, prompt, 1)[0] for prompt in batch)


def burst_s(client: Client, batch: Sequence[Sequence[int]]) -> float:
    started_s = time.perf_counter()
    with ThreadPoolExecutor(len(batch)) as pool:
        list(pool.map(lambda prompt: generate(client, prompt, 16), batch))
    return time.perf_counter() - started_s


# ---- auto ----


def run_auto(n_tokens: int, n_rounds: int, path: Path) -> Figures:
    """Disks that load the prompt in a fifth of the time that computing it takes, in about the same, and in three times.

    Each round: computed anew (a prompt that nobody has), loaded by the one server, left to `auto` on the other.
    """
    prompts = Prompts(7)
    known = prompts.make(n_tokens)
    nbytes = whole(n_tokens) * TOKEN_NBYTES
    figures: Figures = {}
    with tempfile.TemporaryDirectory(dir=path) as name, ExitStack() as stack:
        clients, probes = {}, {}
        for policy in ("wait", "auto"):
            folder = Path(name, policy)
            folder.mkdir()
            config = tiers(folder, ssd=True, policy=policy)
            clients[policy] = stack.enter_context(
                server(
                    folder,
                    cached=True,
                    pool_tokens=n_tokens * 3 // 2,
                    config=config,
                    sleep_on_idle=True,
                    environment=with_probe(folder),
                )
            )
            probes[policy] = ProbeFolder(folder, 1, check_alive=lambda: None)
            generate(clients[policy], known, 1)
        cold_s = statistics.median(generate(clients["auto"], prompts.make(n_tokens), 1)[0] for _ in range(3))
        for share in (0.2, 1.0, 3.0):
            speed = nbytes / (cold_s * share)
            with ExitStack() as slow:
                for probe in probes.values():
                    slow.enter_context(probe.faults(Faults(disk_nbytes_per_s=speed)))
                times: dict[str, list[float]] = {"compute": [], "wait": [], "auto": []}
                for number in range(-2, n_rounds):
                    seen = {"compute": generate(clients["auto"], prompts.make(n_tokens), 1)[0]}
                    for policy, client in clients.items():
                        flush(client)
                        seen[policy] = generate(client, known, 1)[0]
                    for kind, elapsed_s in seen.items():
                        if number >= 0:
                            times[kind].append(elapsed_s)
            medians = {kind: statistics.median(values) for kind, values in times.items()}
            best = min(medians["compute"], medians["wait"])
            label = f"disk at {speed / 1e6:.0f} MB/s"
            figures |= {f"{label}: {kind} s": value for kind, value in medians.items()}
            figures[f"{label}: auto less the better, s (at most 0.05, or:)"] = medians["auto"] - best
            figures[f"{label}: auto over the better (at most 1.1)"] = medians["auto"] / best
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="A real server with an SSD tier.")
    parser.add_argument("what", choices=("ttft", "spill", "guard", "auto"))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", "--pairs", type=int)
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="where the stores are made (default: here)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "ttft" and shutil.which("fio") is None:
        parser.error(MISSING)
    if arguments.what == "ttft":
        figures = run_ttft(arguments.tokens or 8000, arguments.rounds or 9, arguments.path)
    elif arguments.what == "spill":
        figures = run_spill(arguments.tokens or 2000, arguments.rounds or 15, arguments.path)
    elif arguments.what == "guard":
        figures = run_guard(arguments.rounds or 15, arguments.path)
    else:
        figures = run_auto(arguments.tokens or 1000, arguments.rounds or 20, arguments.path)
    show(figures, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
