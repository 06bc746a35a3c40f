"""The main job, seen from outside: real SGLang servers on real text, without and with KV cache below HBM.

Servers run, one after the other, and get the same requests with the same arguments, but for one flag:

1. stock SGLang, whose prefix cache is HBM alone ("HBM"; without a GPU a pool in ordinary memory);
2. SGLang with `--radix-cache-backend sgl_lmcache`.

HBM has room for one of the two documents, so each pushes the other out, and the chat with it. Stock SGLang then
computes it again; with the cache it comes back from host memory. Then the second server is ended and started again, and
asked once more: nothing is left of HBM and host memory then, and the documents come from its SSD. At last a third
server starts, as on another machine, with no SSD and nothing of its own: it shares a Valkey with the second, and loads
what that has computed.

The answers of the second server are held to what the first one answers while HBM still has everything: each document
the first time, the chat in one go. (Not to what stock SGLang answers after computing a chat again: KV that decoding has
written and the same KV computed by prefill are rounded differently, so that stock SGLang may differ from itself.)

Where a prompt's KV was found is what a server says about each request (`cached_tokens_details`), never guessed from
times. The exit code is 0 only if the story holds: the documents left HBM, came back from host memory, from the SSD
after the restart, and from Valkey on the other server, and not one token of any answer differs.

With `--cluster` the third server shares a Mooncake Store with the second instead: a pool of memory that both make up,
so the second goes on running beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

from demo_server import Client, Message, Reply, running
from demo_text import CHAT_TURNS, Document, documents
from programs import Deadline, ProgramError, check_port, free_port, mooncake_master, valkey
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sgl_lmcache import BACKEND, cpu, serve
from sgl_lmcache.cpu.model import RECIPES, make_model
from sgl_lmcache.mooncake import why_unusable

POOL_ROOM_TOKENS = 1536
"""What the KV pool holds besides one document: a question, its answer, the chat."""

MIN_DOCUMENT_TOKENS = 2000

TOO_SLOW = (
    "On a slow or busy machine, give the demo a shorter text (--document-tokens 3000) or more time (--time-limit 900)."
)

PAGE_SIZE = 16
"""For both servers, so that they hit the same tokens. With the flag it would be chosen; SGLang's own default is 1."""

Prompts = Mapping[str, tuple[Message, ...]]
Ids = tuple[int, ...]
Advance = Callable[[str], None]


class Row(Enum):
    """A row of the table: what a request is meant to show."""

    NEW = "document, new"
    IN_HBM = "document, in HBM"
    LEFT_HBM = "document, left HBM"
    CHAT = "chat"
    RESTARTED = "document, restart"
    SHARED = "document, shared"


SCHEDULE = (
    *(("A 1", Row.NEW), ("A 2", Row.IN_HBM), ("A 3", Row.IN_HBM), ("chat 1", Row.CHAT)),
    *(("B 1", Row.NEW), ("B 2", Row.IN_HBM), ("B 3", Row.IN_HBM), ("chat 2", Row.CHAT)),
    *(("A 2", Row.LEFT_HBM), ("chat 3", Row.CHAT)),
)
"""The requests to both servers, in order."""

MORE = (("B 2", Row.LEFT_HBM), ("A 3", Row.LEFT_HBM), ("chat 4", Row.CHAT), ("B 3", Row.LEFT_HBM))
"""What the server with the cache is asked after that. Stock SGLang would compute each document again, and has shown
once how long that takes."""

RESTARTED = (("A 3", Row.RESTARTED), ("B 3", Row.RESTARTED))
"""What it is asked when it has been started again. Stock SGLang would compute both, as when they were new."""

SHARED = (("A 2", Row.SHARED), ("B 2", Row.SHARED))
"""What a server is asked that has nothing of its own. Stock SGLang would compute both."""

N_STEPS = 4 + len(CHAT_TURNS) + 2 * len(SCHEDULE) + len(MORE) + len(RESTARTED) + len(SHARED)
"""Of the progress bar: starts of servers, and requests."""

Schedule = Sequence[tuple[str, Row]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, and whether its answer differs from the one that it is held to."""

    name: str
    row: Row
    reply: Reply
    differs: bool


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table. Tokens are sums over its requests, with the cache."""

    row: str
    requests: int
    ttft_without_s: float
    ttft_with_s: float
    prompt_tokens: int
    from_hbm: int
    from_host: int
    from_below: int
    answers_differ: int
    answers_differ_without: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console, progress_console = Console(), Console(stderr=True)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        deadline = Deadline(arguments.time_limit, TOO_SLOW)
        if arguments.cluster and (missing := why_unusable()):
            raise ProgramError(f"--cluster needs Mooncake: {missing}.")
        if arguments.port is not None:
            check_port(arguments.port)
        without, cached = tell(arguments, deadline, progress_console)
    except ProgramError as error:
        progress_console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        progress_console.print("Interrupted; the server has been ended.")
        return 130
    lines, failures = summarize(without, cached), broken(without, cached)
    if arguments.json:
        print(json.dumps(report(arguments.model, lines, failures, deadline.elapsed_s), indent=2))
    else:
        present(console, lines, failures, deadline.elapsed_s)
    return 1 if failures else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/demo", description="SGLang with KV cache below HBM, shown.")
    parser.add_argument("--model", default="bench", help="a local model, or one to generate: bench (default), tiny")
    parser.add_argument("--document-tokens", type=int, default=6000, help="length of each document (default 6000)")
    parser.add_argument("--answer-tokens", type=int, default=8, help="length of each answer (default 8)")
    parser.add_argument("--host-capacity", default="1GiB", help="size of the host tier (default 1GiB)")
    parser.add_argument("--ssd-capacity", default="1GiB", help="size of the SSD tier, in a temporary folder (1GiB)")
    parser.add_argument("--cluster", action="store_true", help="share a Mooncake Store instead of a Valkey")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds after which it gives up (default 600)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.document_tokens < MIN_DOCUMENT_TOKENS:
        parser.error(f"--document-tokens must be at least {MIN_DOCUMENT_TOKENS}: HBM would hold both documents")
    return arguments


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Leave through every `finally` on the way, which is what ends the server."""
    sys.exit(128 + number)


# ---- the story ----


def tell(arguments: argparse.Namespace, deadline: Deadline, console: Console) -> tuple[list[Outcome], list[Outcome]]:
    """Run both servers: what came of the schedule without the cache, and with it. Raises `ProgramError`."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with tempfile.TemporaryDirectory(prefix="sgl-lmcache-demo-") as name, Progress(*columns, console=console) as bar:
        task = bar.add_task("making the model", total=N_STEPS)

        def show(step: str) -> None:
            bar.update(task, description=step)
            if not console.is_terminal:
                console.print(f"{deadline.elapsed_s:6.1f} s  {step}", highlight=False)

        def advance(done: str) -> None:
            bar.advance(task)
            show(done)

        folder, n_answer = Path(name), arguments.answer_tokens
        port = free_port() if arguments.port is None else arguments.port
        recipe = RECIPES.get(arguments.model)
        model = arguments.model if recipe is None else str(make_model(recipe))
        common = ["--model-path", model, "--host", "127.0.0.1", "--page-size", str(PAGE_SIZE)]
        common += ["--sleep-on-idle"] if arguments.cluster else []  # two servers share the cores then
        common += ["--max-total-tokens", str(arguments.document_tokens + POOL_ROOM_TOKENS)]

        show("starting stock SGLang")
        with running(
            stock_server([*common, "--port", str(port)]), port=port, log=folder / "server.log", deadline=deadline
        ) as client:
            advance("stock SGLang is ready")
            prompts, answers = chat(client, n_answer, advance)
            prompts |= questions(documents(client.count_tokens, arguments.document_tokens))
            client.flush()
            without = follow(client, SCHEDULE, prompts, answers, n_answer, advance)

        cached: list[Outcome] = []
        with shared_store(arguments, folder, deadline) as shared, ExitStack() as stack:
            tiers = [
                f"{{type: host, capacity: {arguments.host_capacity}}}",
                f'{{type: ssd, path: "{folder / "store"}", capacity: {arguments.ssd_capacity}}}',
                shared,
            ]

            def run(which: str, tiers: Sequence[str], schedule: Schedule, stack: ExitStack, port: int = port) -> None:
                show(f"starting {which}")
                log = folder / f"{which}.log"
                launch = cached_server([*common, "--port", str(port)], folder, which, tiers)
                client = stack.enter_context(running(launch, port=port, log=log, deadline=deadline))
                advance(f"{which} is ready")
                cached.extend(follow(client, schedule, prompts, answers, n_answer, advance))

            with ExitStack() as alone:
                run("SGLang with the cache", tiers, SCHEDULE + MORE, alone)
            if arguments.cluster:
                run("SGLang with the cache again", tiers, RESTARTED, stack)
                run("another SGLang beside it", tiers[::2], SHARED, stack, free_port())
            else:
                with ExitStack() as alone:
                    run("SGLang with the cache again", tiers, RESTARTED, alone)
                run("another SGLang with the same store", tiers[::2], SHARED, stack)
    return without, cached


@contextmanager
def shared_store(arguments: argparse.Namespace, folder: Path, deadline: Deadline) -> Iterator[str]:
    """The store that servers share, and its tier in YAML."""
    if arguments.cluster:
        with mooncake_master(folder, deadline) as master:
            yield f'{{type: mooncake, master: "{master}", segment: 1GiB}}'
    else:
        with valkey(folder, deadline, "--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru") as (host, port):
            yield f'{{type: valkey, url: "valkey://{host}:{port}"}}'


def stock_server(arguments: Sequence[str]) -> serve.Launch:
    """SGLang without our flag."""
    command, environment = list(arguments), dict(os.environ)
    if not cpu.has_gpu():
        command, environment = cpu.cpu_arguments(command), cpu.cpu_environment(environment)
    return serve.Launch([sys.executable, "-m", "sglang.launch_server", *command], environment)


def cached_server(arguments: Sequence[str], folder: Path, name: str, tiers: Sequence[str]) -> serve.Launch:
    """What `sgl-lmcache serve --cache-config FILE ...` starts. tiers: each in YAML, on one line."""
    config = folder / f"{name}.yaml"
    config.write_text("tiers:\n" + "".join(f"  - {tier}\n" for tier in tiers), encoding="utf-8")
    return serve.plan(["--cache-config", str(config), *arguments], os.environ, gpu=cpu.has_gpu())


def chat(client: Client, n_answer: int, advance: Advance) -> tuple[dict[str, tuple[Message, ...]], dict[str, Ids]]:
    """A chat in one go: the prompt and the answer of each turn."""
    prompts, answers = {}, {}
    history: tuple[Message, ...] = ()
    for number, turn in enumerate(CHAT_TURNS, 1):
        history = (*history, Message("user", turn))
        reply = client.ask(history, max_tokens=n_answer)
        prompts[f"chat {number}"], answers[f"chat {number}"] = history, reply.token_ids
        history = (*history, Message("assistant", reply.text))
        advance(f"the chat in one go, turn {number}: {reply.ttft_s:.2f} s")
    return prompts, answers


def questions(texts: Sequence[Document]) -> Prompts:
    """Each question behind its document, so that those about one document share a prefix."""
    return {
        f"{document.name} {number}": (Message("system", document.text), Message("user", question))
        for document in texts
        for number, question in enumerate(document.questions, 1)
    }


def follow(
    client: Client, schedule: Schedule, prompts: Prompts, answers: dict[str, Ids], n_answer: int, advance: Advance
) -> list[Outcome]:
    """Ask in order. `answers` is what answers are held to; the first one to a prompt that is not in it is added."""
    # What a process does once (compiling, first allocations) is not to count for the first question.
    client.ask((Message("user", "Hello."),), max_tokens=4)
    outcomes = []
    for name, row in schedule:
        reply = client.ask(prompts[name], max_tokens=n_answer)
        differs = reply.token_ids != answers.setdefault(name, reply.token_ids)
        outcomes.append(Outcome(name, row, reply, differs))
        found = f"HBM {reply.n_device}, host {reply.n_host}, below {reply.n_storage} of {reply.n_prompt} tokens"
        advance(f"{row.value}: {name}: {reply.ttft_s:.2f} s, {found}")
    return outcomes


# ---- what came of it ----


def summarize(without: Sequence[Outcome], cached: Sequence[Outcome]) -> list[Line]:
    """The rows of the table, in the order of `Row`."""
    lines = []
    for row in Row:
        like = Row.NEW if row in (Row.RESTARTED, Row.SHARED) else row  # stock SGLang has nothing then
        stock = [outcome for outcome in without if outcome.row is like]
        ours = [outcome for outcome in cached if outcome.row is row]
        lines.append(
            Line(
                row=row.value,
                requests=len(ours),
                ttft_without_s=statistics.median(outcome.reply.ttft_s for outcome in stock),
                ttft_with_s=statistics.median(outcome.reply.ttft_s for outcome in ours),
                prompt_tokens=sum(outcome.reply.n_prompt for outcome in ours),
                from_hbm=sum(outcome.reply.n_device for outcome in ours),
                from_host=sum(outcome.reply.n_host for outcome in ours),
                from_below=sum(outcome.reply.n_storage for outcome in ours),
                answers_differ=sum(outcome.differs for outcome in ours),
                answers_differ_without=sum(outcome.differs for outcome in stock if outcome.row is row),
            )
        )
    return lines


def broken(without: Sequence[Outcome], cached: Sequence[Outcome]) -> list[str]:
    """What of the story did not hold, one sentence each; empty when all did."""
    sentences = []
    for outcome in without:
        if outcome.row is Row.LEFT_HBM and outcome.reply.n_device * 2 > outcome.reply.n_prompt:
            sentences.append(f"{outcome.name} was to have left HBM, and stock SGLang still found it there.")
    for outcome in cached:
        reply, name = outcome.reply, outcome.name
        if outcome.row is Row.NEW and (reply.n_device + reply.n_host) * 2 > reply.n_prompt:
            sentences.append(f"{name} was to be new, and was found.")
        if outcome.row is Row.IN_HBM and reply.n_device * 2 < reply.n_prompt:
            sentences.append(f"{name} was to be found in HBM: {reply.n_device} of {reply.n_prompt} tokens were.")
        if outcome.row is Row.LEFT_HBM and reply.n_host * 2 < reply.n_prompt:
            sentences.append(f"{name} was to come from host memory: {reply.n_host} of {reply.n_prompt} tokens did.")
        if outcome.row is Row.RESTARTED and reply.n_storage * 2 < reply.n_prompt:
            sentences.append(f"{name} was to come from the SSD: {reply.n_storage} of {reply.n_prompt} tokens did.")
        if outcome.row is Row.SHARED and reply.n_storage * 2 < reply.n_prompt:
            sentences.append(f"{name} was to be shared: {reply.n_storage} of {reply.n_prompt} tokens were.")
        if outcome.differs:
            sentences.append(f"The answer to {name} ({outcome.row.value}) differs from that without the cache.")
    return sentences


def report(model: str, lines: Sequence[Line], failures: Sequence[str], elapsed_s: float) -> dict[str, object]:
    return {
        "ok": not failures,
        "failures": list(failures),
        "model": model,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "gpu": cpu.has_gpu()},
        "elapsed_s": round(elapsed_s, 1),
        "rows": [asdict(line) for line in lines],
    }


def present(console: Console, lines: Sequence[Line], failures: Sequence[str], elapsed_s: float) -> None:
    title = "SGLang with KV cache in host memory, on SSD and in a store that servers share"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("requests", no_wrap=True)
    headings = ("TTFT s\nstock", "TTFT s\nwith", "prompt\ntokens", "in\nHBM", "in\nhost", "below\nhost", "differ")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        times = (f"{line.ttft_without_s:.2f}", f"{line.ttft_with_s:.2f}")
        counts = (line.prompt_tokens, line.from_hbm, line.from_host, line.from_below, line.answers_differ)
        table.add_row(f"{line.requests} x {line.row}", *times, *(f"{n:,}" for n in counts))
    console.print(table)
    for sentence in failures:
        console.print(f"NOT AS PROMISED: {sentence}", markup=False, highlight=False, soft_wrap=True)
    told = (Row.LEFT_HBM.value, Row.RESTARTED.value, Row.SHARED.value)
    left, restarted, shared = (line.ttft_without_s / line.ttft_with_s for line in lines if line.row in told)
    n_stock = sum(line.answers_differ_without for line in lines)
    stock = f" Stock SGLang answered {n_stock} of the requests differently after computing again." if n_stock else ""
    console.print(
        "TTFT: median time to first token, of stock SGLang and with the cache. Tokens: sums, with the cache, by where\n"
        "they were found. Differ: answers that are not those without the cache.\n"
        f"A document that had left HBM was answered {left:.1f} times sooner than by stock SGLang, which computed it "
        f"again. Sooner than a new one by stock SGLang: after a restart {restarted:.1f} times, on another server "
        f"{shared:.1f} times.{stock}\n"
        f"It took {elapsed_s:.0f} s, and nothing is left running.\n\n"
        "Next, on your own server, one flag:\n"
        f"    python -m sglang.launch_server --model-path MODEL --radix-cache-backend {BACKEND}\n"
        "and, to choose the size, SGL_LMCACHE_CONFIG=tiers.yaml with\n"
        "    tiers:\n"
        "      - {type: host, capacity: 64GiB}\n"
        "      - {type: ssd, path: /var/lib/sgl-lmcache, capacity: 500GiB}\n"
        "      - {type: valkey, url: 'valkey://127.0.0.1:6379/0'}\n"
        "Without a GPU, `sgl-lmcache serve --model-path MODEL` sets up the rest. Read on in docs/quick-start.md.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
