"""SGLang with and without this project, and with its peers, on one machine and one model, side by side in one run.

Each workload is run in rounds, and each round by every system in turn, so that what changes on the machine hits all
alike; every other round goes through the systems backwards. A system that cannot run here is told with its own words.
Servers stay up between rounds as far as memory allows (`--alive`); an idle one sleeps. Everything goes to
`results.json` in the folder of `--output` after each round, and to plots at the end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from types import FrameType

import psutil
from benchmarks.compare import systems, workloads
from benchmarks.compare.figures import Measured, differing
from benchmarks.compare.load import LoadError, Server, run_round
from benchmarks.compare.report import Results, plot, print_settings, print_tables, write_json
from benchmarks.compare.systems import CannotRunError, Place, Running, System
from benchmarks.compare.usage import Meter
from benchmarks.compare.workloads import Request, Workload
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sgl_lmcache import cpu
from sgl_lmcache.cpu.model import RECIPES, make_model

SERVER_NBYTES = 4 << 30
"""What a server takes, its cache included."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

MAX_CHECKED = 8
"""Of the answers that differ, in each round: stock SGLang computes the prompt of each once more."""

TOKEN_NBYTES = {name: 4 * recipe.n_layers * recipe.n_kv_heads * recipe.head_dim for name, recipe in RECIPES.items()}


class Fleet:
    """The servers that are up, the one used longest ago first. Those that did not start are not tried again."""

    def __init__(self, results: Results, folder: Path, model: Path, n_alive: int) -> None:
        self._results = results
        self._folder = folder
        self._model = model
        self._n_alive = n_alive
        self._n_started = 0
        self._up: dict[tuple[str, int], tuple[Running, ExitStack]] = {}

    def get(self, system: System, pool_tokens: int) -> Running:
        """A server that is up with this HBM pool, started if need be. Raises `CannotRunError`."""
        if (error := self._results.errors.get(system.name)) is not None:
            raise CannotRunError(error)
        key = (system.name, system.pool_tokens or pool_tokens)
        found = self._up.pop(key, None) or self._start(system, key[1])
        self._up[key] = found
        return found[0]

    def _start(self, system: System, pool_tokens: int) -> tuple[Running, ExitStack]:
        while len(self._up) >= self._n_alive:
            self.stop(next(iter(self._up)))
        self._n_started += 1
        folder = self._folder / f"{self._n_started}-{system.name}"
        folder.mkdir()
        with ExitStack() as stack:
            place = Place(folder, self._model, cpu.has_gpu(), pool_tokens * self._results.token_nbytes)
            running = stack.enter_context(systems.running(system, place, pool_tokens))
            self._results.settings[system.name] = running.settings
            warm_up(running)
            return running, stack.pop_all()

    def stop(self, key: tuple[str, int]) -> None:
        _, stack = self._up.pop(key)
        stack.close()

    def stop_all(self) -> None:
        """Nothing interrupts it: servers would be left."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        try:
            for key in tuple(self._up):
                self.stop(key)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def drop(self, system: System, error: Exception) -> None:
        """A system that failed a request: it is not asked again."""
        self._results.errors[system.name] = str(error)
        for key in [key for key in self._up if key[0] == system.name]:
            self.stop(key)


def warm_up(running: Running) -> None:
    """What a first prompt costs once, such as memory that is touched for the first time, is nobody's figure."""
    rng = Random("warm-up")
    server = Server(running.url)
    for n_tokens in (64, 1000):
        server.ask(Request(workloads.COLD, (), 4), workloads.words(rng, n_tokens), 0.0)


def measure(fleet: Fleet, system: System, workload: Workload, number: int, progress: Progress) -> Measured:
    """One round. Raises `CannotRunError`, `LoadError` or `OSError`."""
    running = fleet.get(system, workload.pool_tokens)
    n_requests = sum(map(len, workload.of_round(number)))
    task = progress.add_task(f"{workload.name}, round {number + 1}: {system.name}", total=n_requests)
    try:
        meter = Meter(running.processes)
        found = run_round(workload, number, Server(running.url).ask, lambda: progress.advance(task))
        return Measured(system.name, number, found, meter.read())
    finally:
        progress.remove_task(task)


def run(results: Results, fleet: Fleet, output: Path, progress: Progress) -> None:
    """All rounds of all workloads. What fails is noted, and the others go on."""
    overall = progress.add_task("all", total=len(results.systems) * sum(work.n_rounds for work in results.workloads))
    for workload in results.workloads:
        rounds = results.rounds.setdefault(workload.name, [])
        for number in range(workload.n_rounds):
            measured: dict[str, Measured] = {}
            for system in results.systems[:: -1 if number % 2 else 1]:
                what = f"{workload.name}, round {number + 1} of {workload.n_rounds}: {system.name}"
                try:
                    measured[system.name] = measure(fleet, system, workload, number, progress)
                    took_s = sum(measured[system.name].round.phases_s)
                    progress.console.print(f"{what}: {took_s:.0f} s", markup=False, highlight=False)
                except (CannotRunError, LoadError, OSError) as error:
                    if system.name not in results.errors:
                        progress.console.print(f"{what}: {error}", markup=False, highlight=False)
                    fleet.drop(system, error)
                progress.advance(overall)
            rounds += compared(fleet, workload, measured)
            write_json(output / "results.json", results)


def compared(fleet: Fleet, workload: Workload, measured: dict[str, Measured]) -> list[Measured]:
    """A round of all systems, with how many answers are not stock SGLang's, and by how much."""
    if systems.STOCK not in measured:
        return list(measured.values())
    by_system = {name: differing(one.round, measured[systems.STOCK].round) for name, one in measured.items()}
    gaps: dict[str, tuple[float, ...]] = {}
    try:
        if any(by_system.values()):
            stock = Server(fleet.get(systems.SYSTEMS[0], workload.pool_tokens).url)
            for name, places in by_system.items():
                checked = (stock.gap(one.prompt, one.token_of_stock, one.token) for one in places[:MAX_CHECKED])
                gaps[name] = tuple(map(abs, checked))
    except (CannotRunError, LoadError, OSError) as error:
        fleet.drop(systems.SYSTEMS[0], error)
    return [replace(one, n_differ=len(by_system[name]), gaps=gaps.get(name, ())) for name, one in measured.items()]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if arguments.list:
        for one in (*systems.SYSTEMS, *arguments.workloads):
            console.print(f"{one.name:16} {one.about}", markup=False, highlight=False, soft_wrap=True)
        return 0
    for number in STOP_SIGNALS:  # also where a shell has had the first ignored
        signal.signal(number, _interrupt)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.systems, arguments.workloads, TOKEN_NBYTES[arguments.model])
    was_interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="sgl-lmcache-bench-") as folder:
        fleet = Fleet(results, Path(folder), make_model(RECIPES[arguments.model]), arguments.alive)
        try:
            with Progress(*columns, console=Console(stderr=True)) as progress:
                run(results, fleet, arguments.output, progress)
        except KeyboardInterrupt:
            console.print("Interrupted: what follows is of the rounds that were over.")
            was_interrupted = True
        finally:
            fleet.stop_all()
    print_settings(console, results)
    print_tables(console, results)
    for path in (arguments.output / "results.json", *plot(arguments.output, results)):
        console.print(f"written: {path}", markup=False, highlight=False)
    return 1 if was_interrupted or not any(results.rounds.values()) else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three systems, three small workloads: within 10 minutes")
    parser.add_argument("--systems", metavar="NAME,...", help="only these, and stock SGLang (default: all)")
    parser.add_argument("--workloads", metavar="NAME,...", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, help="of each workload (default: 3, and 9 where a percent matters)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="a folder (default: %(default)s)")
    parser.add_argument("--model", choices=RECIPES, default="bench", help="one to generate (default: %(default)s)")
    parser.add_argument("--alive", type=int, default=_n_alive(), help="servers at a time (default here: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list systems and workloads, and run nothing")
    arguments = parser.parse_args(argv)
    names = systems.QUICK if arguments.quick else tuple(system.name for system in systems.SYSTEMS)
    named = (systems.STOCK, *arguments.systems.split(",")) if arguments.systems else names
    known = {system.name: system for system in systems.SYSTEMS}
    arguments.systems = [system for name, system in known.items() if name in named]
    catalogue = {workload.name: workload for workload in (workloads.QUICK if arguments.quick else workloads.FULL)}
    asked = arguments.workloads.split(",") if arguments.workloads else list(catalogue)
    for name in (*named, *asked):
        if name not in known and name not in catalogue:
            parser.error(f"{name}: there is no such system or workload; --list names them")
    if (arguments.rounds is not None and arguments.rounds < 1) or arguments.alive < 1:
        parser.error("--rounds and --alive have to be at least 1")
    arguments.workloads = [
        replace(workload, n_rounds=arguments.rounds or workload.n_rounds)
        for name, workload in catalogue.items()
        if name in asked
    ]
    return arguments


def _n_alive() -> int:
    return max(1, int(psutil.virtual_memory().available // SERVER_NBYTES) - 1)


if __name__ == "__main__":
    sys.exit(main())
