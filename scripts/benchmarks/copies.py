#!/usr/bin/env python3
"""How fast pages move between a CPU pool and the slab, beside what this machine's memcpy can do.

    python scripts/benchmarks/copies.py [--rounds 9] [--json]

GB/s is 10^9 payload bytes a second, each byte counted once, not as a read and a write, on every line. One round runs
every candidate once, so that a noisy neighbour hits all alike; medians over the rounds. "share" is the candidate's
median over the best memcpy median of the same run: numpy's and libc's, of every size and number of threads asked for.

The pages are those of a model with 12 layers, 8 KV heads of 64 in bf16 and 16-token pages (393,216 bytes, 24 chunks of
16 KiB), in random order on both sides. A batch's time runs from the call to the end of `wait`.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from transfer.copies import DevicePool
from transfer.cpu import CpuCopies
from transfer.layout import PageLayout
from transfer.slab import Slab

LAYOUT = PageLayout(12, 16, 8, 64, 64, torch.bfloat16, "NHD")
MIB = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """One line of the table: `run` moves `nbytes` and returns when they are there."""

    kind: str
    name: str
    n_threads: int
    nbytes: int
    run: Callable[[], None]


@dataclass(frozen=True)
class Result:
    kind: str
    name: str
    n_threads: int
    nbytes: int
    gb_per_s: float
    gb_per_s_min: float
    gb_per_s_max: float
    share: float


def memcpy_candidates(sizes_nbytes: Sequence[int], threads: Sequence[int]) -> list[Candidate]:
    """One large copy, cut into one range a thread; threads are started within the measured time, as it is small."""
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes, memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    src, dst = (np.ones(max(sizes_nbytes), dtype=np.uint8) for _ in range(2))

    def libc(first: int, end: int) -> None:
        memcpy(dst.ctypes.data + first, src.ctypes.data + first, end - first)

    def numpy(first: int, end: int) -> None:
        np.copyto(dst[first:end], src[first:end])

    return [
        Candidate("memcpy", copy.__name__, n_threads, size, partial(_in_threads, copy, size, n_threads))
        for copy in (libc, numpy)
        for size in sizes_nbytes
        for n_threads in threads
    ]


def _in_threads(copy: Callable[[int, int], None], size: int, n_threads: int) -> None:
    bounds = np.linspace(0, size, n_threads + 1, dtype=np.int64).tolist()
    others = [threading.Thread(target=copy, args=(first, end)) for first, end in itertools.pairwise(bounds[1:])]
    for thread in others:
        thread.start()
    copy(bounds[0], bounds[1])
    for thread in others:
        thread.join()


class Bench:
    """A pool and a slab of `n_pages` each, all of it touched, and one `CpuCopies` for each number of threads."""

    def __init__(self, n_pages: int, threads: Sequence[int]) -> None:
        rows = (n_pages + 1) * LAYOUT.page_size
        shape = (rows, LAYOUT.n_heads, LAYOUT.head_dim)
        k, v = (tuple(torch.ones(shape, dtype=LAYOUT.dtype) for _ in range(LAYOUT.n_layers)) for _ in range(2))
        self.pool = DevicePool(k, v, rows_are_pages=False, page_size=LAYOUT.page_size)
        self.slab = Slab(n_pages, LAYOUT.slot_nbytes)
        self.copies = {n: CpuCopies(self.pool, LAYOUT, self.slab, n_threads=n) for n in threads}
        random = np.random.default_rng(0)
        self.pages = random.permutation(n_pages).astype(np.int64) + 1
        self.slots = random.permutation(n_pages).astype(np.int32)

    def close(self) -> None:
        for copies in self.copies.values():
            copies.close()
        self.slab.close()

    def candidates(self, batches: Sequence[int]) -> list[Candidate]:
        """Ours first, so that the spinning workers that torch leaves behind disturb none of them."""
        found, by_torch = [], []
        for n_pages in batches:
            pages, slots = self.pages[:n_pages], self.slots[:n_pages]
            nbytes = n_pages * LAYOUT.page_nbytes
            for n, copies in self.copies.items():
                for name, start in (("offload", copies.offload), ("restore", copies.restore)):
                    run = partial(_complete, start, pages, slots)
                    found.append(Candidate(name, f"{n_pages} pages", n, nbytes, run))
            for name, index in (("offload", self._offload_by_indexing), ("restore", self._restore_by_indexing)):
                run = partial(index, torch.from_numpy(pages), torch.from_numpy(slots))
                by_torch.append(Candidate(f"{name} torch", f"{n_pages} pages", torch.get_num_threads(), nbytes, run))
        return found + by_torch

    def _planes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of (pool pages, slab slots) of each layer's K and V."""
        view, block = LAYOUT.view(self.slab.tensor), (-1, LAYOUT.page_size, LAYOUT.n_heads, LAYOUT.head_dim)
        buffers = zip(self.pool.k, self.pool.v, strict=True)
        return [
            (buffer.view(block), view[:, layer, half])
            for layer, kv in enumerate(buffers)
            for half, buffer in enumerate(kv)
        ]

    def _offload_by_indexing(self, pages: torch.Tensor, slots: torch.Tensor) -> None:
        for device, slab in self._planes():
            slab[slots] = device[pages]

    def _restore_by_indexing(self, pages: torch.Tensor, slots: torch.Tensor) -> None:
        for device, slab in self._planes():
            device[pages] = slab[slots]


def _complete(start: Callable[..., object], pages: np.ndarray, slots: np.ndarray) -> None:
    start(pages, slots).wait()  # type: ignore[attr-defined]


def measured(candidates: Sequence[Candidate], n_rounds: int) -> list[Result]:
    """Every candidate once a round, after one round that is thrown away. Blocks for all of it."""
    rates: list[list[float]] = [[] for _ in candidates]
    for round_number in range(n_rounds + 1):
        for candidate, of_candidate in zip(candidates, rates, strict=True):
            started = time.perf_counter()
            candidate.run()
            rate = candidate.nbytes / 1e9 / (time.perf_counter() - started)
            if round_number:
                of_candidate.append(rate)
    medians = [statistics.median(of_candidate) for of_candidate in rates]
    best = max(m for m, candidate in zip(medians, candidates, strict=True) if candidate.kind == "memcpy")
    return [
        Result(c.kind, c.name, c.n_threads, c.nbytes, m, min(r), max(r), m / best)
        for c, m, r in zip(candidates, medians, rates, strict=True)
    ]


def show(results: Sequence[Result]) -> None:
    print(f"{'what':<16}{'of':<12}{'threads':>8}{'MB':>9}{'GB/s':>8}{'min':>8}{'max':>8}{'share':>8}")
    for r in results:
        name = f"{r.name}" if r.kind != "memcpy" else r.name
        print(
            f"{r.kind:<16}{name:<12}{r.n_threads:>8}{r.nbytes / 1e6:>9.1f}{r.gb_per_s:>8.2f}"
            f"{r.gb_per_s_min:>8.2f}{r.gb_per_s_max:>8.2f}{r.share:>8.0%}"
        )


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers must be at least 1")
    return numbers


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Page copies beside the machine's memcpy.")
    parser.add_argument("--batches", type=_numbers, default=[1, 16, 128, 512], help="pages a batch")
    parser.add_argument("--threads", type=_numbers, default=[1, 2], help="threads a direction, and for memcpy")
    parser.add_argument("--memcpy-mib", type=_numbers, default=[64, 128, 196, 256, 512], help="sizes of one memcpy")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args(argv)
    bench = Bench(max(options.batches), options.threads)
    sizes_nbytes = [mib * MIB for mib in options.memcpy_mib]
    candidates = memcpy_candidates(sizes_nbytes, options.threads) + bench.candidates(options.batches)
    results = measured(candidates, options.rounds)
    bench.close()
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
