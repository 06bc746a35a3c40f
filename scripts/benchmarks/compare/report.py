"""The report: tables in the terminal, everything as JSON, and plots."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from benchmarks.compare.figures import COLUMNS, Figures, Measured, summarise
from benchmarks.compare.systems import Settings, System
from benchmarks.compare.workloads import Workload
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass
class Results:
    """All that was measured so far. rounds: by the workload's name. errors: of systems that do not run here, in their
    own words. settings: of those that do."""

    systems: Sequence[System]
    workloads: Sequence[Workload]
    token_nbytes: int
    rounds: dict[str, list[Measured]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)

    def figures(self, workload: Workload) -> list[Figures]:
        """In the order of the systems, whichever came first."""
        order = [system.name for system in self.systems]
        found = summarise(workload, self.rounds.get(workload.name, ()), self.token_nbytes)
        return sorted(found, key=lambda figures: order.index(figures.system))


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": psutil.virtual_memory().total,
        "versions": {package: version(package) for package in ("sglang", "torch", "sgl-lmcache")},
    }


def print_tables(console: Console, results: Results) -> None:
    for workload in results.workloads:
        figures = results.figures(workload)
        if figures:
            _print_table(console, workload, figures)
            for sentence in doubts(results.systems, figures):
                console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for system, error in results.errors.items():
        console.print(f"{system} does not run here: {error}", markup=False, highlight=False, soft_wrap=True)


def doubts(systems: Sequence[System], figures: Sequence[Figures]) -> list[str]:
    """What makes a row of a `restore` workload another than it is taken for."""
    below = {system.name for system in systems if system.restores_from_below}
    return [
        f"{row.system}: the tier below host memory gave no token; this row is of host memory."
        for row in figures
        if row.system in below and row.overhead_s is not None and not row.storage_tokens
    ]


def _print_table(console: Console, workload: Workload, figures: Sequence[Figures]) -> None:
    table = Table(box=SIMPLE_HEAD, title=f"{workload.name}: {workload.about}", title_justify="left")
    table.add_column("system")
    shown = {head: show for head, show in COLUMNS.items() if any(show(row) for row in figures)}
    for head in shown:
        table.add_column(head, justify="right")
    for row in figures:
        table.add_row(row.system, *(show(row) for show in shown.values()))
    console.print(table)


def print_settings(console: Console, results: Results) -> None:
    """How each system was started the last time, to be run by hand."""
    for name, settings in results.settings.items():
        lines = [f"{name}:", *(shlex.join(command) for command in settings.commands)]
        lines += [f"{variable}={value}" for variable, value in settings.environment.items()]
        for file, text in settings.files.items():
            lines += [f"{file}:", *text.splitlines()]
        console.print("\n    ".join(lines), markup=False, highlight=False, soft_wrap=True)


def write_json(path: Path, results: Results) -> None:
    """Replaced as a whole, so that an interrupted run leaves what it has measured."""
    text = json.dumps(
        {
            "machine": machine(),
            "systems": {system.name: system.about for system in results.systems},
            "workloads": {workload.name: _described(workload) for workload in results.workloads},
            "errors": results.errors,
            "settings": {name: asdict(settings) for name, settings in results.settings.items()},
            "figures": {
                workload.name: [_row(figures) for figures in results.figures(workload)]
                for workload in results.workloads
            },
            "rounds": {name: [_round(measured) for measured in of_it] for name, of_it in results.rounds.items()},
        },
        indent=1,
    )
    draft = path.with_suffix(".new")
    draft.write_text(text + "\n")
    draft.replace(path)


def _described(workload: Workload) -> dict[str, object]:
    return {
        "about": workload.about,
        "pool_tokens": workload.pool_tokens,
        "users": workload.n_users,
        "arrivals_per_s": workload.rate,
        "rounds": workload.n_rounds,
    }


def _row(figures: Figures) -> dict[str, object]:
    return asdict(figures) | {"avoided": figures.avoided, "computed_tokens": figures.computed_tokens}


def _round(measured: Measured) -> dict[str, object]:
    """Without the tokens, of which `n_differ` is what matters."""
    found = asdict(measured)
    for sample in found["round"]["samples"]:
        sample["n_answer"] = len(sample.pop("answer"))
        sample["n_prompt"] = len(sample.pop("prompt"))
    return found


def plot(folder: Path, results: Results) -> list[Path]:
    """`ttft.png`: mean TTFT of each system in each workload. `restore.png`: of a restore, by the prompt's length."""
    from matplotlib.figure import Figure

    paths = []
    rows = {workload.name: results.figures(workload) for workload in results.workloads}
    rows = {name: figures for name, figures in rows.items() if figures}
    if rows:
        figure = Figure(figsize=(2 + 1.6 * len(rows), 4.5), layout="constrained")
        _bars(figure.add_subplot(), rows, [system.name for system in results.systems])
        paths.append(_save(figure, folder / "ttft.png"))
    restores = {name: figures for name, figures in rows.items() if figures[0].device_ttft_s is not None}
    if len(restores) > 1:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _lines(figure.add_subplot(), restores)
        paths.append(_save(figure, folder / "restore.png"))
    return paths


def _bars(axes, rows: Mapping[str, Sequence[Figures]], order: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    systems = [name for name in order if any(row.system == name for figures in rows.values() for row in figures)]
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        points = [
            (place + number * width, row.ttft_mean_s)
            for place, figures in enumerate(rows.values())
            for row in figures
            if row.system == system
        ]
        axes.bar([x for x, _ in points], [y for _, y in points], width, label=system)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], list(rows))
    axes.set_yscale("log")
    axes.set_ylabel("mean time to first token, s")
    axes.legend(fontsize="small")


def _lines(axes, restores: Mapping[str, Sequence[Figures]]) -> None:  # type: ignore[no-untyped-def]
    tokens: dict[str, list[tuple[float, float]]] = {}
    for figures in restores.values():
        for row in figures:
            tokens.setdefault(row.system, []).append((row.longest_tokens, row.ttft_p50_s))
    for system, points in tokens.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=system)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("median time to first token of a restore, s")
    axes.set_yscale("log")
    axes.legend(fontsize="small")


def _save(figure, path: Path) -> Path:  # type: ignore[no-untyped-def]
    figure.savefig(path, dpi=120)
    return path
