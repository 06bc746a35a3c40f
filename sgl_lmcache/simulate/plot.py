"""The picture of a simulation: hit rate against capacity, a curve for each policy, and the bound above them.

The only module that imports matplotlib, which is an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sgl_lmcache.simulate.report import Record

MARKERS = "osD^vPX*"


def write_plot(path: Path, title: str, records: Sequence[Record]) -> None:
    """A PNG. Needs no display."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    policies = list(dict.fromkeys(record.policy for record in records))
    bound = {100 * record.capacity: 100 * record.bound_hit_rate for record in records}
    axes.plot(*_sorted(bound), "k--", marker=".", label="clairvoyant bound")
    for number, policy in enumerate(policies):
        rates = {100 * r.capacity: 100 * r.hit_rate for r in records if r.policy == policy}
        is_default = any(record.is_default for record in records if record.policy == policy)
        label = f"{policy} (default)" if is_default else policy
        axes.plot(*_sorted(rates), marker=MARKERS[number % len(MARKERS)], linewidth=2 if is_default else 1, label=label)
    axes.set_xscale("log")
    axes.set_xticks(sorted(bound), [f"{capacity:.3g}%" for capacity in sorted(bound)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity of host memory, % of the trace's distinct blocks")
    axes.set_ylabel("hit rate, % of prompt tokens")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def _sorted(points: dict[float, float]) -> tuple[list[float], list[float]]:
    xs = sorted(points)
    return xs, [points[x] for x in xs]
