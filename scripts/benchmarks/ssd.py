#!/usr/bin/env python3
"""What the SSD tier does by itself, without a server: bytes, a restart with a million pages, and what a call costs.

    python scripts/benchmarks/ssd.py read     [--pages 500] [--page-nbytes 393216] [--rounds 9]
    python scripts/benchmarks/ssd.py write    [--pages 500] [--page-nbytes 393216] [--rounds 9]
    python scripts/benchmarks/ssd.py restart  [--pages 1000000] [--rounds 3]
    python scripts/benchmarks/ssd.py calls    [--pages 2048] [--rounds 25]

read, write: pages go between the slab, in random order there, and the store as the engine has them go: batches of at
most 32 MiB, all asked for at once, checksums included, with direct I/O. Each run stands beside one of fio on the same
file, the store's segment (its first, if there are several); they take turns to be first, and a ratio is the median over
such pairs. The target is for the depth at which fio's median is best. A disk or cores that are shared may favour one or
the other for a while: the best run of each is compared as well. A write goes to a segment that exists and has been
written before. GB/s is 10^9 bytes a second.

restart: a store of so many pages of 4 KiB, in paths of 500, is opened by a process of its own, the map not in the page
cache: how long after the call the tier was open, had answered for a path of 500 pages, had loaded and verified it, and
had read the whole map. Meanwhile a loop of small pieces of work runs on the calling thread, as a scheduler does, which
asks for a path every 32nd time: a stall is the longest time from one piece to the next. The same loop runs afterwards,
for as long, with nothing in the background. Net is without the time in which the kernel ran something else, though the
loop, or the thread that reads the map, could have gone on. Also the growth of the process's memory a page.

calls: what the calling thread pays for one call of so many pages of 16 KiB, while loads of others are under way.

All of it happens in a temporary folder below `--path`, or of the current directory, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fio import DEPTHS, Direction, Fio
from benchmarks.paths import BATCH_NBYTES, SWITCH_INTERVAL_S, open_tier, path, path_keys, random_slab
from benchmarks.ssd_restart import STALL_MS, Restart, restarts

from hicache.ssd import SsdTier
from hicache.tier import Batch, batches
from radix import KEY_NBYTES

TARGETS = {"read": 0.80, "write": 0.70}
OPEN_TARGET_S = 1.0
CALL_TARGET_US = 1000.0

CALL_PAGE_NBYTES = 16 << 10


# ---- read and write ----


@dataclass(frozen=True)
class Rate:
    """GB/s of one candidate: median, least and most. ratio: ours over this one, median over pairs; None for ours."""

    who: str
    gb_per_s: float
    gb_per_s_min: float
    gb_per_s_max: float
    ratio: float | None


@dataclass(frozen=True)
class Throughput:
    """One direction. ratio: at fio's best depth. ratio_of_best: our best run over fio's. Both are None without fio.

    beside: GB/s of other cases, for information.
    """

    direction: Direction
    pages: int
    page_nbytes: int
    rates: list[Rate]
    ratio: float | None
    ratio_of_best: float | None
    target: float
    fio_command: str
    beside: dict[str, float]


class Mover:
    """A tier with a full segment for `n_pages`, and a slab that holds them in random order."""

    def __init__(self, folder: Path, n_pages: int, page_nbytes: int) -> None:
        self.folder = folder
        self.page_nbytes = page_nbytes
        self.slab = random_slab(n_pages, page_nbytes)
        slots = np.random.default_rng(2).permutation(n_pages)
        batch_pages = max(1, BATCH_NBYTES // self.slab.slot_nbytes)
        self.run = path(0, slots)
        self.batches = [batch for _, batch in batches(self.run, batch_pages)]
        self.nbytes = n_pages * self.slab.slot_nbytes
        self.tier = self.open("store")
        self.store()
        self.tier.flush().result()
        self.file = next((folder / "store").rglob("data.0"))

    def open(self, name: str) -> SsdTier:
        return open_tier(self.folder / name, self.slab, self.page_nbytes, 16 * len(self.run))

    def close(self) -> None:
        self.tier.close()
        self.slab.close()

    def load(self) -> float:
        return self._gb_per_s(self.tier.load)

    def store(self) -> float:
        return self._gb_per_s(self.tier.store)

    def rewrite(self) -> float:
        """Store what has just been deleted, so into slots of before."""
        self._delete()
        return self.store()

    def rewrite_and_flush(self) -> float:
        """The same, until the bytes are synced and the map names them."""
        self._delete()
        started_s = time.perf_counter()
        self.store()
        self.tier.flush().result()
        return self.nbytes / 1e9 / (time.perf_counter() - started_s)

    def write_anew(self) -> float:
        """Into a segment that is made meanwhile."""
        first, self.tier = self.tier, self.open("fresh")
        try:
            return self.store()
        finally:
            self.tier.close()
            shutil.rmtree(self.folder / "fresh")
            self.tier = first

    def _delete(self) -> None:
        """Nothing is stored, and nothing is left to be done: the second flush waits for the end of the first one's."""
        assert self.tier.delete(self.run.keys).result() == len(self.run)
        for _ in range(2):
            self.tier.flush().result()

    def _gb_per_s(self, call: Callable[[Batch], Future[int]]) -> float:
        started_s = time.perf_counter()
        futures = [call(batch) for batch in self.batches]
        n_moved = sum(future.result() for future in futures)
        elapsed_s = time.perf_counter() - started_s
        assert n_moved == len(self.run), f"only {n_moved} of {len(self.run)} pages were moved"
        return self.nbytes / 1e9 / elapsed_s


def throughput(folder: Path, direction: Direction, n_pages: int, page_nbytes: int, n_rounds: int) -> Throughput:
    with closing(Mover(folder, n_pages, page_nbytes)) as mover:
        try:
            fio = Fio(mover.file)
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            fio = None
        ours = mover.load if direction == "read" else mover.rewrite
        rates = _compared(ours, fio, direction, n_rounds)
        beside = {}
        if direction == "write":
            for name, run in (("synced and in the map", mover.rewrite_and_flush), ("new segment", mover.write_anew)):
                beside[name] = statistics.median(run() for _ in range(n_rounds))
        best = max(rates[1:], key=lambda rate: rate.gb_per_s, default=None)
        return Throughput(
            direction=direction,
            pages=n_pages,
            page_nbytes=page_nbytes,
            rates=rates,
            ratio=best.ratio if best else None,
            ratio_of_best=rates[0].gb_per_s_max / max(rate.gb_per_s_max for rate in rates[1:]) if best else None,
            target=TARGETS[direction],
            fio_command=fio.described(direction) if fio else "",
            beside=beside,
        )


def _compared(ours: Callable[[], float], fio: Fio | None, direction: Direction, n_rounds: int) -> list[Rate]:
    """Ours first, then fio by depth: each run of fio has one of ours beside it, in turns before and after."""
    ours()
    if fio is None:
        return [_rate("tier", [ours() for _ in range(n_rounds)])]
    pairs: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for number in range(n_rounds):
        for depth, of_depth in pairs.items():
            if number % 2:
                theirs = fio.gb_per_s(direction, depth)
                of_depth.append((ours(), theirs))
            else:
                of_depth.append((ours(), fio.gb_per_s(direction, depth)))
    rates = [_rate("tier", [pair[0] for of_depth in pairs.values() for pair in of_depth])]
    for depth, of_depth in pairs.items():
        ratio = statistics.median(mine / theirs for mine, theirs in of_depth)
        rates.append(_rate(f"fio, depth {depth}", [theirs for _, theirs in of_depth], ratio))
    return rates


def _rate(who: str, measured: Sequence[float], ratio: float | None = None) -> Rate:
    return Rate(who, statistics.median(measured), min(measured), max(measured), ratio)


# ---- calls ----


@dataclass(frozen=True)
class Cost:
    """One call: how often it was made, what it took of the calling thread, and how often loads outlasted it."""

    call: str
    calls: int
    median_us: float
    worst_us: float
    beside_io: int


class Calls:
    """A tier with four paths' worth of slots. Two are filled for good: one is timed, one is loaded meanwhile."""

    def __init__(self, folder: Path, n_pages: int) -> None:
        self.n_pages = n_pages
        self.slab = random_slab(4 * n_pages, CALL_PAGE_NBYTES)
        self.tier = open_tier(folder / "store", self.slab, CALL_PAGE_NBYTES, 4 * n_pages)
        self.times_us: dict[str, list[float]] = {}
        self.n_beside_io: dict[str, int] = {}
        self.timed, self.background = (self._path(number, number) for number in range(2))
        for batch in (self.timed, self.background):
            assert self.tier.store(batch).result() == n_pages
        self.tier.flush().result()

    def _path(self, number: int, place: int) -> Batch:
        return path(number, np.arange(place * self.n_pages, (place + 1) * self.n_pages))

    def close(self) -> None:
        self.tier.close()
        self.slab.close()

    def round(self, number: int) -> None:
        """Every call once. Of three new paths two find room, and for the third one the least recently used leaves."""
        tier, timed = self.tier, self.timed
        self._time("exists", lambda: tier.exists(timed.keys))
        self._time("touch", lambda: tier.touch(timed.keys[-KEY_NBYTES:]))
        self._time("expected_load_s", lambda: tier.expected_load_s(len(timed)))
        self._time("load", lambda: tier.load(timed))
        new = [path_keys(10 + 3 * number + i, self.n_pages) for i in range(3)]
        for keys, what in zip(new, ("store", "store", "store, others leave"), strict=True):
            batch = Batch.below(None, keys, self._path(0, 2).slots, 0)
            tier.touch(timed.keys[-KEY_NBYTES:])
            self._time(what, lambda batch=batch: tier.store(batch))  # type: ignore[misc]
        self._time("store, all there", lambda: tier.store(batch))
        tier.delete(b"".join(new)).result()
        tier.flush().result()

    def _time(self, what: str, call: Callable[[], Future[int] | float | None]) -> None:
        """Ends when all that is under way has ended."""
        loads = [self.tier.load(self.background) for _ in range(3)]
        started_ns = time.perf_counter_ns()
        answer = call()
        elapsed_us = (time.perf_counter_ns() - started_ns) / 1e3
        self.times_us.setdefault(what, []).append(elapsed_us)
        self.n_beside_io[what] = self.n_beside_io.get(what, 0) + (not loads[-1].done())
        for future in (*loads, *([answer] if isinstance(answer, Future) else [])):
            assert future.result() == self.n_pages, f"{what}: {future.result()} of {self.n_pages} pages"

    def costs(self) -> list[Cost]:
        return [
            Cost(what, len(times), statistics.median(times), max(times), self.n_beside_io[what])
            for what, times in self.times_us.items()
        ]


def calls(folder: Path, n_pages: int, n_rounds: int) -> list[Cost]:
    with closing(Calls(folder, n_pages)) as bench:
        bench.round(0)
        bench.times_us.clear()
        bench.n_beside_io.clear()
        for number in range(1, n_rounds + 1):
            bench.round(number)
        return bench.costs()


# ---- tables ----


def show_throughput(console: Console, result: Throughput) -> None:
    table = Table(title=f"{result.direction}: {result.pages:,} pages of {result.page_nbytes:,} bytes")
    for column in ("", "GB/s", "min", "max", "ours / this"):
        table.add_column(column, justify="right" if column else "left")
    for rate in result.rates:
        ratio = "" if rate.ratio is None else f"{rate.ratio:.2f}"
        figures = (f"{value:.2f}" for value in (rate.gb_per_s, rate.gb_per_s_min, rate.gb_per_s_max))
        table.add_row(rate.who, *figures, ratio)
    for name, gb_per_s in result.beside.items():
        table.add_row(f"tier, {name}", f"{gb_per_s:.2f}")
    console.print(table)
    if result.ratio is not None:
        console.print(f"ours / fio at its best depth: {result.ratio:.2f}, target {result.target:.2f}")
        console.print(f"our best run / fio's best run: {result.ratio_of_best:.2f}")
        console.print(result.fio_command, soft_wrap=True)


def show_restarts(console: Console, results: Sequence[Restart]) -> None:
    table = Table(title=f"restart with {results[0].pages:,} mapped pages, {len(results)} rounds")
    for column in ("", "median", "worst", "target"):
        table.add_column(column, justify="right" if column else "left")

    def row(what: str, values: Sequence[float], form: str, target: str = "") -> None:
        table.add_row(what, *(form.format(value) for value in (statistics.median(values), max(values))), target)

    row("opened after", [r.opened_s for r in results], "{:.3f} s")
    row("a path answered after", [r.answered_s for r in results], "{:.3f} s", f"{OPEN_TARGET_S:g} s")
    row("the path loaded after", [r.loaded_s for r in results], "{:.3f} s")
    row("all pages known after", [r.filled_s for r in results], "{:.2f} s")
    row("memory a page", [r.rss_nbytes_a_page for r in results], "{:.0f} bytes")
    row("  at its peak, in the fill", [r.peak_nbytes_a_page for r in results], "{:.0f} bytes")
    for name, loops in (("during", [r.during for r in results]), ("after", [r.after for r in results])):
        table.add_section()
        row(f"{name} the fill: longest stall", [x.longest_ms for x in loops], "{:.2f} ms", f"{STALL_MS:g} ms")
        row("  the same, net", [x.longest_net_ms for x in loops], "{:.2f} ms")
        row(f"  stalls over {STALL_MS:g} ms", [x.n_over_2_ms for x in loops], "{:.0f}")
        row("  the same, net", [x.n_net_over_2_ms for x in loops], "{:.0f}")
        row("  a piece of work", [x.median_us for x in loops], "{:.0f} us")
    console.print(table)


def show_calls(console: Console, results: Sequence[Cost], n_pages: int) -> None:
    table = Table(title=f"{n_pages:,} pages a call; target {CALL_TARGET_US:,.0f} us")
    for column in ("call", "calls", "beside I/O", "median us", "worst us"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for cost in results:
        mark = " !" if cost.median_us > CALL_TARGET_US else ""
        figures = f"{cost.median_us:,.1f}{mark}", f"{cost.worst_us:,.1f}"
        table.add_row(cost.call, str(cost.calls), str(cost.beside_io), *figures)
    console.print(table)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{read,write,restart,calls}")
    defaults = {"read": (500, 9), "write": (500, 9), "restart": (1_000_000, 3), "calls": (2048, 25)}
    for what, (n_pages, n_rounds) in defaults.items():
        kind = kinds.add_parser(what, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        kind.add_argument("--path", type=Path, default=Path(), metavar="DIR", help="a temporary folder is made here")
        kind.add_argument("--pages", type=_positive, default=n_pages, help="how many")
        kind.add_argument("--rounds", type=_positive, default=n_rounds, help="how often")
        if what in TARGETS:
            kind.add_argument("--page-nbytes", type=_positive, default=393_216, help="bytes of a page")
        kind.add_argument(
            "--json", nargs="?", const="-", metavar="FILE", help="JSON into this file, or instead of the table"
        )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    console = Console(stderr=options.json == "-")
    results: Sequence[Throughput | Restart | Cost]
    with tempfile.TemporaryDirectory(prefix="bench-ssd-", dir=options.path) as name:
        folder = Path(name).resolve()
        console.print(f"in {folder}", soft_wrap=True)
        if options.what == "restart":
            results = found = list(restarts(folder, options.pages, options.rounds))
            show_restarts(console, found)
        elif options.what == "calls":
            results = costs = calls(folder, options.pages, options.rounds)
            show_calls(console, costs, options.pages)
        else:
            moved = throughput(folder, options.what, options.pages, options.page_nbytes, options.rounds)
            results = [moved]
            show_throughput(console, moved)
    if options.json:
        text = json.dumps([asdict(result) for result in results], indent=2)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
