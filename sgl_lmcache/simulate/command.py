"""The command line of `sgl-lmcache simulate`: what is asked for, checked, run, and written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_lmcache.errors import StartError

if TYPE_CHECKING:
    from sgl_lmcache.config import Config
    from sgl_lmcache.simulate.machine import Machine
    from sgl_lmcache.simulate.replay import Plan, Progress
    from sgl_lmcache.simulate.report import Record
    from sgl_lmcache.simulate.runs import Capacity, Setup
    from sgl_lmcache.simulate.trace import Trace

CAPACITIES = "1%,2%,5%,10%,25%,100%"

_DESCRIPTION = """\
Replays a trace of requests through the cache's own index and policies, and says what would have been hit.

TRACE has one request a line: {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]},
with one id for each block of the prompt, of 512 tokens or as many as "block_size" says. Only full blocks count.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="replay a trace of requests, and say what each policy would have hit",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument("trace", type=Path, metavar="TRACE", help="the requests, as JSON lines in order of time")
    simulate.add_argument("--config", type=Path, metavar="FILE", help="the tiers (default: host memory alone)")
    simulate.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME[,NAME...]",
        help="eviction policies of host memory, and of an SSD that names none; may be repeated (default: all)",
    )
    simulate.add_argument(
        "--capacity",
        type=_shares,
        metavar="SHARE[,SHARE...]",
        help="of host memory, as shares of the trace's distinct blocks, in place of the configured one "
        f"(without that: {CAPACITIES.replace('%', '%%')})",
    )
    simulate.add_argument(
        "--count-from",
        type=_part,
        default=Fraction(0),
        metavar="SHARE",
        help="run the whole trace, and count only the requests behind this share of them (such as 50%%)",
    )
    _add_outputs(simulate)
    _add_assumptions(simulate)
    simulate.set_defaults(run=_simulate)


def _add_outputs(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument("--json", type=Path, metavar="FILE", help="write a record for each policy and capacity")
    simulate.add_argument(
        "--hits",
        type=Path,
        metavar="FILE",
        help="write the hit tokens of each request, one line a request, with the configured policy if it runs, else "
        "the first; several capacities side by side, with tabs between",
    )
    simulate.add_argument(
        "--plot", type=Path, metavar="FILE", help="the PNG of hit rate against capacity (default: TRACE's name + .png)"
    )


def _add_assumptions(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument(
        "--bytes-per-token", type=_nbytes, metavar="SIZE", help="the KV of one token (default 128KiB: Llama 3.1 8B)"
    )
    simulate.add_argument(
        "--prefill-tokens-per-s", type=_rate, metavar="N", help="of a prefill at short context (default 10000)"
    )
    simulate.add_argument(
        "--assume",
        type=_assumption,
        action="append",
        default=[],
        metavar="TIER.WHAT=VALUE",
        help="of a tier: read or write (bytes a second), latency, or capacity, such as ssd.read=6GB; may be repeated",
    )


# ---- values of options ----


def _share(text: str) -> Fraction:
    """`5%` or `0.05`, above 0."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = Fraction(number) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if rest or share < 0 or (share > 1 and not percent):
        raise argparse.ArgumentTypeError(f"{text} is not a share; write it like 5% or 0.05")
    return share


def _shares(text: str) -> list[Fraction]:
    shares = [_share(part) for part in text.split(",")]
    if 0 in shares:
        raise argparse.ArgumentTypeError(f"{text} has a capacity of nothing; write shares above 0")
    return list(dict.fromkeys(shares))


def _part(text: str) -> Fraction:
    part = _share(text)
    if part >= 1:
        raise argparse.ArgumentTypeError(f"{text} leaves no request that counts; write less than 100%")
    return part


def _nbytes(text: str) -> int:
    from sgl_lmcache.simulate.machine import nbytes

    return nbytes(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens above 0")
    return rate


def _assumption(text: str) -> object:
    from sgl_lmcache.simulate.machine import assumption

    return assumption(text)


# ---- what is done ----


def _simulate(options: argparse.Namespace) -> int:
    from sgl_lmcache.config import Config
    from sgl_lmcache.config_file import load
    from sgl_lmcache.simulate.report import print_tables, record_of, write_hits, write_json
    from sgl_lmcache.simulate.runs import Setup, n_cores, run_all
    from sgl_lmcache.simulate.trace import read

    for path in filter(None, (options.json, options.hits, options.plot)):
        if not path.absolute().parent.is_dir():
            raise StartError(f"{path} cannot be written: the folder {path.parent} is not there.")
    can_plot = _can_plot(options.plot is not None)
    config = Config() if options.config is None else load(options.config)
    policies = _policies(options.policy)
    trace = read(options.trace)
    setup = Setup(trace, _machine(options), int(options.count_from * len(trace)))
    runs = _plans(config, policies, options.capacity, setup)
    with _progress(len(runs) * len(trace)) as progress:
        results = run_all(setup, runs, n_processes=n_cores(), progress=progress)
    records = [record_of(setup, result) for result in results]
    print_tables(setup, records)
    with _writing():
        if options.json is not None:
            write_json(options.json, records)
        if options.hits is not None:
            own = config.eviction_of(config.host)
            write_hits(options.hits, setup, results, own if own in policies else policies[0])
        if can_plot:
            _plot(options.plot or Path(f"{trace.name}.png"), trace, records)
    return 0


def _policies(said: Sequence[str]) -> list[str]:
    """Those to run, each once, in the order in which they were said. Raises `StartError`."""
    from radix import POLICIES

    names = [name.strip() for part in said for name in part.split(",")]
    for name in names:
        if name not in POLICIES and name != "all":
            raise StartError(
                f"--policy: {name or 'nothing'} is not an eviction policy; there are: {', '.join(POLICIES)}, or all."
            )
    if not names or "all" in names:
        return list(POLICIES)
    return list(dict.fromkeys(names))


def _machine(options: argparse.Namespace) -> Machine:
    from sgl_lmcache.simulate.machine import TOKEN_NBYTES, TOKENS_PER_S, Machine, assume

    return Machine(
        token_nbytes=options.bytes_per_token or TOKEN_NBYTES,
        tokens_per_s=options.prefill_tokens_per_s or TOKENS_PER_S,
        tiers=assume(options.assume),
    )


def _plans(
    config: Config, policies: Sequence[str], shares: Sequence[Fraction] | None, setup: Setup
) -> list[tuple[Capacity, Plan]]:
    """The runs: of each capacity, all policies."""
    from sgl_lmcache.simulate.runs import Capacity, pages_in, plan_of

    n_blocks, page_nbytes = setup.trace.n_blocks, setup.trace.block_tokens * setup.machine.token_nbytes
    if shares is None and config.host.capacity is not None:
        capacities = [Capacity.of_pages(pages_in("host", config.host.capacity, page_nbytes), n_blocks)]
    else:
        capacities = [Capacity.of_share(share, n_blocks) for share in shares or _shares(CAPACITIES)]
    return [
        (capacity, plan_of(config, policy, capacity, setup.machine, page_nbytes, n_blocks))
        for capacity in capacities
        for policy in policies
    ]


@contextmanager
def _progress(n_requests: int) -> Iterator[Progress]:
    """A bar on stderr, where somebody is looking."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=n_requests)
        yield lambda n_done: bar.update(task, completed=n_done)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartError(f"{error.filename} cannot be written: {error.strerror}.") from error


def _can_plot(asked_for: bool) -> bool:
    """Whether matplotlib is there. Raises `StartError` where it is not and a plot was asked for."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        how = f'matplotlib is not installed ({error}); pip install "sgl-lmcache[simulate]".'
        if asked_for:
            raise StartError(f"--plot: {how}") from error
        print(f"There will be no plot: {how}", file=sys.stderr)
        return False
    return True


def _plot(path: Path, trace: Trace, records: Sequence[Record]) -> None:
    from sgl_lmcache.simulate.plot import write_plot

    title = f"{trace.name}: {records[0].requests:,} requests, {records[0].total_tokens:,} prompt tokens"
    write_plot(path, title, records)
