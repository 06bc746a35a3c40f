"""What a simulation says: tables for a person, records for a program, and each request's hits for a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from sgl_lmcache.config import Config
from sgl_lmcache.simulate.runs import Result, Setup

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 160
"""Of the tables, at least: a narrow terminal breaks their lines, and loses nothing."""


@dataclass(frozen=True, slots=True)
class TtftRecord:
    """Seconds to the first token."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class TierRecord:
    """One tier's part. read_nbytes: moved from it towards HBM. written_nbytes: moved into it. evicted_pages: have left
    it for others. skipped_pages: there was no room for them."""

    name: str
    hit_tokens: int
    read_nbytes: int
    written_nbytes: int
    evicted_pages: int
    skipped_pages: int


@dataclass(frozen=True, slots=True)
class Record:
    """One policy and capacity. Only requests that count are counted.

    capacity: of host memory, as a share of the trace's distinct blocks. total_tokens: of all prompts. hit_tokens: found
    in full blocks, on any tier. bound_hit_tokens: what the clairvoyant policy hits with as much room as all tiers have
    together. is_default: the policy is the one that a server without a configuration has.
    """

    policy: str
    capacity: float
    capacity_pages: int
    is_default: bool
    requests: int
    total_tokens: int
    hit_tokens: int
    bound_hit_tokens: int
    ttft_s: TtftRecord
    tiers: tuple[TierRecord, ...]

    @property
    def hit_rate(self) -> float:
        return share(self.hit_tokens, self.total_tokens)

    @property
    def bound_hit_rate(self) -> float:
        return share(self.bound_hit_tokens, self.total_tokens)


def share(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0


def record_of(setup: Setup, result: Result) -> Record:
    trace, counted = setup.trace, slice(setup.count_from, None)
    outcome, plan = result.outcome, result.plan
    ttft_s = outcome.ttft_s[counted]
    hits = outcome.hits[counted].sum(axis=0) * trace.block_tokens
    page_nbytes = trace.block_tokens * setup.machine.token_nbytes
    tiers = tuple(
        TierRecord(name, int(hit), moved.read * page_nbytes, moved.written * page_nbytes, moved.evicted, moved.skipped)
        for name, hit, moved in zip(plan.tiers, hits, outcome.traffic, strict=True)
    )
    return Record(
        policy=plan.policy,
        capacity=float(result.capacity.share),
        capacity_pages=result.capacity.n_pages,
        is_default=plan.policy == Config().eviction,
        requests=len(ttft_s),
        total_tokens=int(trace.input_tokens[counted].sum()),
        hit_tokens=int(hits.sum()),
        bound_hit_tokens=int(result.bound_hits[counted].sum()) * trace.block_tokens,
        ttft_s=TtftRecord(float(ttft_s.mean()), *(float(q) for q in np.quantile(ttft_s, (0.5, 0.9, 0.99)))),
        tiers=tiers,
    )


def write_json(path: Path, records: Sequence[Record]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(records), indent=2) + b"\n")


def write_hits(path: Path, setup: Setup, results: Sequence[Result], policy: str) -> None:
    """Hit tokens of each request of the whole trace, a line each; the capacities with this policy side by side."""
    columns = [result.outcome.hits.sum(axis=1) for result in results if result.plan.policy == policy]
    table = np.stack(columns, axis=1) * setup.trace.block_tokens
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in table.tolist()), encoding="utf-8")


def print_tables(setup: Setup, records: Sequence[Record]) -> None:
    """One line a run, then one a run and tier."""
    from rich.console import Console

    console = Console(width=max(WIDTH, Console().width))
    for line in _summary(setup):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_runs_table(records))
    console.print(_tiers_table(records))


def _summary(setup: Setup) -> Iterator[str]:
    trace = setup.trace
    yield (
        f"{trace.name}: {len(trace):,} requests, {int(trace.input_tokens.sum()):,} prompt tokens, "
        f"{len(trace.blocks):,} full blocks of {trace.block_tokens} tokens, {trace.n_blocks:,} of them distinct"
    )
    if setup.count_from:
        yield f"Only the last {len(trace) - setup.count_from:,} requests count."
    if trace.n_repeated:
        yield (
            f"{trace.n_repeated:,} blocks have the id of another block, behind another prefix. Each was taken as a "
            "block of its own: where ids stand for whole prefixes, none has two."
        )


def _runs_table(records: Sequence[Record]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for heading in ("capacity", "pages", "policy"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for heading in ("hit tokens", "of prompts", "bound", "of bound", "TTFT mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        ttft = record.ttft_s
        table.add_row(
            f"{100 * record.capacity:.3g}%",
            f"{record.capacity_pages:,}",
            f"{record.policy} (default)" if record.is_default else record.policy,
            f"{record.hit_tokens:,}",
            f"{100 * record.hit_rate:.1f}%",
            f"{record.bound_hit_tokens:,}",
            f"{share(record.hit_tokens, record.bound_hit_tokens):.3f}",
            *(f"{seconds:.2f} s" for seconds in (ttft.mean, ttft.p50, ttft.p90, ttft.p99)),
        )
    return table


def _tiers_table(records: Sequence[Record]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for heading in ("capacity", "policy", "tier"):
        table.add_column(heading, justify="right" if heading == "capacity" else "left", no_wrap=True)
    for heading in ("hit tokens", "read", "written", "evicted pages", "skipped pages"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        for tier in record.tiers:
            table.add_row(
                f"{100 * record.capacity:.3g}%",
                record.policy,
                tier.name,
                f"{tier.hit_tokens:,}",
                *(f"{nbytes / 1e9:,.1f} GB" for nbytes in (tier.read_nbytes, tier.written_nbytes)),
                f"{tier.evicted_pages:,}",
                f"{tier.skipped_pages:,}",
            )
    return table
