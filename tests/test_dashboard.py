"""The Grafana dashboard: in the form that Grafana takes, and made of metrics and labels that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sgl_lmcache.metrics import COUNTERS, GAUGES, HISTOGRAMS

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/sgl-lmcache.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
GRAFANAS_OWN = {"__rate_interval"}

LABELS = {
    **{f"{metric.name}_total": set(metric.labels) for metric in COUNTERS},
    **{metric.name: set(metric.labels) for metric in GAUGES},
    **{f"{metric.name}_bucket": {*metric.labels, "le"} for metric in HISTOGRAMS},
}
"""By what a query calls the metric."""


def expressions() -> list[tuple[str, str, str]]:
    """(panel, query, legend)."""
    return [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]


def test_it_has_what_grafana_asks_of_a_dashboard() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"} <= DASHBOARD.keys()
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_whole(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"timeseries", "stat", "heatmap"}
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert {"defaults", "overrides"} <= panel["fieldConfig"].keys()
    assert panel["targets"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert (target.get("format") == "heatmap") == (panel["type"] == "heatmap")


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells


@pytest.mark.parametrize(("panel", "query", "legend"), expressions())
def test_a_query_asks_for_what_there_is(panel: str, query: str, legend: str) -> None:
    asked = re.findall(r"sgl_lmcache_\w+", query)
    assert asked
    assert set(asked) <= LABELS.keys()
    known = set.union(*(LABELS[name] for name in asked))
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known
    grouped = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
    assert grouped <= known
    selected = {label for labels in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)!?=", labels)}
    assert selected <= {*known, "instance"}
    assert set(re.findall(r"\$(\w+)", query)) <= VARIABLES.keys() | GRAFANAS_OWN
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize(("panel", "query", "legend"), expressions())
def test_counters_are_asked_for_as_rates_and_gauges_as_they_are(panel: str, query: str, legend: str) -> None:
    for name in re.findall(r"sgl_lmcache_\w+", query):
        is_rate = f"rate({name}{{" in query
        assert is_rate == name.endswith(("_total", "_bucket")), name


def test_every_metric_is_on_it() -> None:
    asked = {name for _, query, _ in expressions() for name in re.findall(r"sgl_lmcache_\w+", query)}
    assert asked == LABELS.keys()


def test_servers_are_listed_by_a_metric_that_there_is() -> None:
    (listed,) = re.findall(r"label_values\((\w+), instance\)", VARIABLES["instance"]["query"]["query"])
    assert listed in LABELS
