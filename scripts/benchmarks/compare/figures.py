"""What the samples of rounds come to: times, hits, ratios to stock SGLang, and answers that differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.compare.load import Round, Sample
from benchmarks.compare.systems import STOCK
from benchmarks.compare.usage import Usage
from benchmarks.compare.workloads import COLD, ON_DEVICE, RESTORED, Tokens, Workload


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one system. n_differ: answers that differ from stock SGLang's to the same prompt in the same round;
    None where stock did not run. gaps: of the first of them, see `Differing`."""

    system: str
    number: int
    round: Round
    usage: Usage
    n_differ: int | None = None
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Differing:
    """Where an answer leaves stock SGLang's: after `prompt`, which ends with what both have answered so far.

    A sum over a batch is rounded by the batch's make-up, so a greedy answer may change where two tokens are equally
    likely. How much likelier stock SGLang holds its own token to be than the other (the gap, in nats) tells that from
    KV that is wrong.
    """

    prompt: Tokens
    token_of_stock: int
    token: int


@dataclass(frozen=True, slots=True)
class Figures:
    """A system in a workload, over all rounds; of the requests that are counted.

    Times in seconds, pooled over rounds. tokens_per_s: prompt and answer, median of rounds. ttft_ratio: stock SGLang's
    mean TTFT over this one's; throughput_ratio: this throughput over stock's; in the same round, medians of rounds.
    device_tokens, host_tokens, storage_tokens, prompt_tokens: of a round. restored_nbytes: of KV that came from below
    HBM, in a round. Bytes of disks and of the network: of a round. memory_nbytes: the most of any. overhead_s: what a
    restore adds to a hit in HBM, median of pairs. longest_tokens: of a prompt.
    """

    system: str
    n_rounds: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tokens_per_s: float
    ttft_ratio: float | None
    throughput_ratio: float | None
    prompt_tokens: float
    device_tokens: float
    host_tokens: float
    storage_tokens: float
    longest_tokens: int
    restored_nbytes: float
    disk_read_nbytes: float
    disk_written_nbytes: float
    network_nbytes: float
    memory_nbytes: int
    n_answers: int
    n_differ: int | None
    worst_gap: float | None
    cold_ttft_s: float | None
    device_ttft_s: float | None
    overhead_s: float | None

    @property
    def avoided(self) -> float:
        """The share of prompt tokens that were not computed."""
        return 1 - self.computed_tokens / self.prompt_tokens

    @property
    def computed_tokens(self) -> float:
        """Of prompts, in a round."""
        return self.prompt_tokens - self.device_tokens - self.host_tokens - self.storage_tokens


def differing(round_: Round, stock: Round) -> list[Differing]:
    """The answers that are not stock SGLang's to the same request of the same round. What follows such an answer in a
    conversation has another prompt, and is not compared."""
    return [
        _first_difference(one.prompt, one.answer, other.answer)
        for one, other in zip(round_.samples, stock.samples, strict=True)
        if one.prompt == other.prompt and one.answer != other.answer
    ]


def _first_difference(prompt: Tokens, answer: Tokens, of_stock: Tokens) -> Differing:
    place = next(place for place, (one, other) in enumerate(zip(answer, of_stock, strict=True)) if one != other)
    return Differing(prompt + answer[:place], of_stock[place], answer[place])


def summarise(workload: Workload, rounds: Sequence[Measured], token_nbytes: int) -> list[Figures]:
    """One for each system that has any round, in the order of the first ones."""
    by_system: dict[str, list[Measured]] = {}
    for measured in rounds:
        by_system.setdefault(measured.system, []).append(measured)
    stock = {measured.number: measured for measured in by_system.get(STOCK, ())}
    return [_figures(workload, system, of_it, stock, token_nbytes) for system, of_it in by_system.items()]


def _figures(
    workload: Workload, system: str, rounds: Sequence[Measured], stock: Mapping[int, Measured], token_nbytes: int
) -> Figures:
    counted = [_counted(workload, measured) for measured in rounds]
    every = [sample for samples in counted for sample in samples]
    ttfts_s = [sample.ttft_s for sample in every]
    p50_s, p90_s, p99_s = (float(value) for value in np.percentile(ttfts_s, (50, 90, 99)))
    n_rounds = len(rounds)
    host, storage = (sum(getattr(s, name) for s in every) / n_rounds for name in ("n_host", "n_storage"))
    device = sum(sample.n_device for sample in every) / n_rounds
    prompt = sum(sample.n_prompt for sample in every) / n_rounds
    n_differ = [measured.n_differ for measured in rounds if measured.n_differ is not None]
    both = [(measured, stock[measured.number]) for measured in rounds if measured.number in stock]
    return Figures(
        system,
        n_rounds,
        statistics.fmean(ttfts_s),
        *(p50_s, p90_s, p99_s),
        statistics.median(_tokens_per_s(workload, measured) for measured in rounds),
        _median(_mean_ttft_s(workload, other) / _mean_ttft_s(workload, one) for one, other in both),
        _median(_tokens_per_s(workload, one) / _tokens_per_s(workload, other) for one, other in both),
        prompt,
        device,
        host,
        storage,
        max(sample.n_prompt for sample in every),
        (host + storage) * token_nbytes,
        statistics.fmean(measured.usage.disk_read_nbytes for measured in rounds),
        statistics.fmean(measured.usage.disk_written_nbytes for measured in rounds),
        statistics.fmean(measured.usage.network_nbytes for measured in rounds),
        max(measured.usage.memory_nbytes for measured in rounds),
        sum(len(measured.round.samples) for measured in rounds),
        sum(n_differ) if n_differ else None,
        max((gap for measured in rounds for gap in measured.gaps), default=None),
        _median(_ttfts_s(rounds, COLD)),
        _median(_ttfts_s(rounds, ON_DEVICE)),
        _median(_overheads_s(rounds)),
    )


def _counted(workload: Workload, measured: Measured) -> list[Sample]:
    return [sample for sample in measured.round.samples if sample.label in workload.counted]


def _mean_ttft_s(workload: Workload, measured: Measured) -> float:
    return statistics.fmean(sample.ttft_s for sample in _counted(workload, measured))


def _tokens_per_s(workload: Workload, measured: Measured) -> float:
    """Of the last phase, which is the one that is counted."""
    samples = [sample for sample in measured.round.samples if sample.label != COLD]
    return sum(sample.n_prompt + len(sample.answer) for sample in samples) / measured.round.phases_s[-1]


def _ttfts_s(rounds: Sequence[Measured], label: str) -> list[float]:
    return [sample.ttft_s for measured in rounds for sample in measured.round.samples if sample.label == label]


def _overheads_s(rounds: Sequence[Measured]) -> Iterable[float]:
    """A hit in HBM comes right after each restore."""
    restored, on_device = _ttfts_s(rounds, RESTORED), _ttfts_s(rounds, ON_DEVICE)
    return [below_s - device_s for below_s, device_s in zip(restored, on_device, strict=True)]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


# ---- in print ----

Show = Callable[[Figures], str]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}"


COLUMNS: Mapping[str, Show] = {
    "TTFT mean s": lambda f: _seconds(f.ttft_mean_s),
    "p50": lambda f: _seconds(f.ttft_p50_s),
    "p90": lambda f: _seconds(f.ttft_p90_s),
    "p99": lambda f: _seconds(f.ttft_p99_s),
    "times faster": lambda f: _ratio(f.ttft_ratio),
    "tokens/s": lambda f: f"{f.tokens_per_s:,.0f}",
    "times stock's": lambda f: _ratio(f.throughput_ratio),
    "HBM": lambda f: f"{f.device_tokens:,.0f}",
    "host": lambda f: f"{f.host_tokens:,.0f}",
    "below": lambda f: f"{f.storage_tokens:,.0f}",
    "computed": lambda f: f"{f.computed_tokens:,.0f}",
    "avoided": lambda f: f"{f.avoided:.1%}",
    "restored MB": lambda f: _mb(f.restored_nbytes),
    "disk r/w MB": lambda f: f"{_mb(f.disk_read_nbytes)}/{_mb(f.disk_written_nbytes)}",
    "network MB": lambda f: _mb(f.network_nbytes),
    "memory MB": lambda f: _mb(f.memory_nbytes),
    "differ": lambda f: "" if f.n_differ is None else f"{f.n_differ}/{f.n_answers}",
    "gap": lambda f: _ratio(f.worst_gap),
    "restore adds s": lambda f: _seconds(f.overhead_s),
}
"""The columns of a workload's table."""
