#!/usr/bin/env python3
"""What the Mooncake tier does by itself, beside bare calls of Mooncake's own client, on a real master over TCP.

    python scripts/benchmarks/mooncake_tier.py [--pages 500] [--page-nbytes 393216] [--rounds 15] [--json FILE]
    python scripts/benchmarks/mooncake_tier.py pieces

The same pages are loaded by the tier, checksums included, and by one bare `batch_get_into` of all of them, which
checks nothing; and stored by the tier and by one bare `batch_put_from`. With the pages in the segment of another
process (remote), which shares all cores, or has one to itself as if it were another node (apart); and in that of
whoever loads them (local). Pages lie in random order in the slab, and the tier has them in batches of at most 32 MiB
that are asked for at once, as the engine asks. Bare calls are made by a process of their own, with Mooncake's own
settings. Tier and bare call take turns; a ratio is the median of the rounds' ratios.

pieces: how many pages a call should move: bare calls of so many pages each, one after another, beside one of all.

GB/s is 10^9 bytes of pages a second.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paths import BATCH_NBYTES, NAMESPACE, SWITCH_INTERVAL_S, path, random_slab
from programs import Deadline, mooncake_master

from hicache.mooncake import Geometry, MooncakeTier, Pool
from hicache.tier import Batch, batches
from transfer.slab import Slab

ADDRESS: Final = "127.0.0.1"
_CORES: Final = sorted(os.sched_getaffinity(0))
SEGMENTS: Final = ("remote", "apart", "local")
TARGETS: Final = {"load": {"remote": 0.9, "apart": 0.9, "local": 0.7}, "store": dict.fromkeys(SEGMENTS, 0.9)}
PIECES: Final = (4, 8, 16, 32, 64, 500)
START_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Rate:
    """Medians of rounds. ratio: the tier's rate over that of the bare call of the same round."""

    what: str
    segment: str
    tier_gb_per_s: float
    bare_gb_per_s: float
    ratio: float
    target: float


class Bare:
    """Mooncake's own client in a process of its own: orders go to its standard input, seconds come back."""

    def __init__(
        self, master: str, segment_nbytes: int, n_pages: int, page_nbytes: int, cores: Sequence[int] = ()
    ) -> None:
        arguments = (master, str(segment_nbytes), str(n_pages), str(page_nbytes))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--bare", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"MC_TCP_BIND_ADDRESS": ADDRESS},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        self._read()

    def __call__(self, what: str, seed: str, piece: int = 0) -> float:
        """How long it takes to `get`, `put` or `remove` the pages. piece: pages a call; 0: all in one."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, seed, piece]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> float:
        assert self._process.stdout is not None
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_bare(master: str, segment_nbytes: int, n_pages: int, page_nbytes: int) -> None:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup(ADDRESS, "P2PHANDSHAKE", segment_nbytes, 16 << 20, "tcp", "", master) == 0
    memory = mmap.mmap(-1, n_pages * page_nbytes)
    array = np.frombuffer(memory, np.uint8)
    array[:] = np.random.default_rng(3).integers(0, 256, len(array), dtype=np.uint8)
    start = int(array.ctypes.data)
    assert store.register_buffer(start, len(memory)) == 0
    addresses = [start + at * page_nbytes for at in range(n_pages)]
    print(0.0, flush=True)
    for line in sys.stdin:
        what, seed, piece = json.loads(line)
        names = [f"bare:{seed}:{at}" for at in range(n_pages)]
        began_s = time.perf_counter()
        for at in range(0, n_pages, piece or n_pages):
            part = slice(at, at + (piece or n_pages))
            sizes = [page_nbytes] * len(names[part])
            if what == "get":
                codes = store.batch_get_into(names[part], addresses[part], sizes)
                assert set(codes) == {page_nbytes}, set(codes)
            elif what == "put":
                codes = store.batch_put_from(names[part], addresses[part], sizes)
                assert set(codes) == {0}, set(codes)
            else:
                store.batch_remove(names[part], True)
        print(time.perf_counter() - began_s, flush=True)
    os._exit(0)


class Tier:
    """Our tier over the same amount of pages."""

    def __init__(self, master: str, segment_nbytes: int, n_pages: int, page_nbytes: int) -> None:
        self.slab: Slab = random_slab(n_pages, page_nbytes)
        self._n_pages = n_pages
        self._slots = np.random.default_rng(2).permutation(n_pages)
        self._batch_pages = max(1, BATCH_NBYTES // self.slab.slot_nbytes)
        self.tier = MooncakeTier(
            Pool(master, address=ADDRESS, segment_nbytes=segment_nbytes),
            Geometry(n_pages, self.slab.slot_nbytes, page_nbytes, NAMESPACE),
            self.slab.fd,
            max_queued_nbytes=2 * n_pages * page_nbytes,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.tier.health().available:
            assert time.monotonic() < deadline_s, self.tier.health().reason
            time.sleep(0.05)

    def load(self, seed: int) -> float:
        return self._all(self.tier.load, seed)

    def store(self, seed: int) -> float:
        return self._all(self.tier.store, seed)

    def delete(self, seed: int) -> None:
        assert self.tier.delete(path(seed, self._slots).keys).result() == self._n_pages

    def _all(self, call: Callable[[Batch], Any], seed: int) -> float:
        parts = [batch for _, batch in batches(path(seed, self._slots), self._batch_pages)]
        began_s = time.perf_counter()
        futures = [call(part) for part in parts]
        n_done = sum(future.result() for future in futures)
        took_s = time.perf_counter() - began_s
        assert n_done == self._n_pages, (n_done, self.tier.stats())
        return took_s

    def close(self) -> None:
        self.tier.close()
        self.slab.close()


@contextmanager
def pool(n_pages: int, page_nbytes: int, segment: str) -> Iterator[tuple[Tier, Bare]]:
    """Both on one master. Not local: the only segment is that of a third process."""
    room = 6 * n_pages * page_nbytes + (64 << 20)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-mooncake-")))
        master = stack.enter_context(mooncake_master(folder, Deadline(3600)))
        if segment != "local":
            owner = Bare(master, room, 1, page_nbytes, cores=_CORES[:1] if segment == "apart" else _CORES)
            stack.callback(owner.close)
        if segment == "apart":
            os.sched_setaffinity(0, _CORES[1:])  # and that of what is started from now on
            stack.callback(os.sched_setaffinity, 0, _CORES)
        own = room if segment == "local" else 0
        tier = Tier(master, own, n_pages, page_nbytes)
        stack.callback(tier.close)
        bare = Bare(master, own, n_pages, page_nbytes)
        stack.callback(bare.close)
        yield tier, bare


def measure(n_pages: int, page_nbytes: int, n_rounds: int, segment: str) -> list[Rate]:
    seconds: dict[str, list[tuple[float, float]]] = {"load": [], "store": []}
    with pool(n_pages, page_nbytes, segment) as (tier, bare):
        for n in range(n_rounds + 2):
            stored, put = _in_turns(n, lambda n=n: tier.store(n), lambda n=n: bare("put", str(n)))  # type: ignore[misc]
            loaded, got = _in_turns(n, lambda n=n: tier.load(n), lambda n=n: bare("get", str(n)))  # type: ignore[misc]
            tier.delete(n)
            bare("remove", str(n))
            if n >= 2:  # the first ones touch memory for the first time
                seconds["store"].append((stored, put))
                seconds["load"].append((loaded, got))
    gb = n_pages * page_nbytes / 1e9
    return [
        Rate(
            what,
            segment,
            gb / statistics.median(tier_s for tier_s, _ in pairs),
            gb / statistics.median(bare_s for _, bare_s in pairs),
            statistics.median(bare_s / tier_s for tier_s, bare_s in pairs),
            TARGETS[what][segment],
        )
        for what, pairs in seconds.items()
    ]


def _in_turns(n: int, first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    if n % 2:
        later = second()
        return first(), later
    return first(), second()


def pieces(n_pages: int, page_nbytes: int, n_rounds: int) -> dict[int, float]:
    """GB/s of a bare remote load by so many pages a call, medians."""
    rates: dict[int, list[float]] = {piece: [] for piece in PIECES}
    with pool(n_pages, page_nbytes, "remote") as (_, bare):
        bare("put", "0")
        bare("get", "0")
        for _ in range(n_rounds):
            for piece in PIECES:
                rates[piece].append(n_pages * page_nbytes / 1e9 / bare("get", "0", piece))
    return {piece: statistics.median(found) for piece, found in rates.items()}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The Mooncake tier beside bare calls.")
    parser.add_argument("what", choices=["rates", "pieces"], nargs="?", default="rates")
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--page-nbytes", type=int, default=384 << 10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--bare"]:
        serve_bare(argv[1], *map(int, argv[2:]))
    options = _arguments(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    console = Console()
    if options.what == "pieces":
        for piece, gb_per_s in pieces(options.pages, options.page_nbytes, options.rounds).items():
            console.print(f"{piece:4d} pages a call: {gb_per_s:.2f} GB/s")
        return 0
    rates = [
        rate for segment in SEGMENTS for rate in measure(options.pages, options.page_nbytes, options.rounds, segment)
    ]
    table = Table("", "segment", "tier, GB/s", "bare, GB/s", "tier / bare", "target")
    for rate in rates:
        table.add_row(
            rate.what,
            rate.segment,
            f"{rate.tier_gb_per_s:.2f}",
            f"{rate.bare_gb_per_s:.2f}",
            f"{rate.ratio:.2f}",
            f"{rate.target}",
        )
    console.print(f"{options.pages} pages of {options.page_nbytes:,} bytes, medians of {options.rounds} rounds")
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
