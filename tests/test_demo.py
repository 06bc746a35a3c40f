"""The demo and the examples: what they conclude, what they leave behind, and that they run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from sgl_lmcache.mooncake import explain_unusable
from sgl_lmcache.serve import Launch
from tests.support.server import Server, Setup, wait_for

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402
import demo_server  # noqa: E402
import demo_text  # noqa: E402
import programs  # noqa: E402
from demo import Outcome, Row  # noqa: E402
from demo_server import Client, Message, Reply  # noqa: E402
from programs import Deadline, ProgramError  # noqa: E402

WAIT_S = 60.0

CONFIG = "tiers: [{type: host, capacity: 64MiB}]\n"

HEALTHY = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""Answers as a server does, and has a child that does not end by itself."""


def outcome(
    row: Row, *, device: int = 0, host: int = 0, below: int = 0, differs: bool = False, ttft_s: float = 0.5
) -> Outcome:
    return Outcome("A 1", row, Reply("text", (1, 2), ttft_s, 1000, device, host, below), differs)


def stock_outcomes() -> list[Outcome]:
    return [
        outcome(Row.NEW, ttft_s=5.0),
        outcome(Row.IN_HBM, device=900),
        outcome(Row.LEFT_HBM, ttft_s=5.0),
        outcome(Row.CHAT, differs=True),
    ]


def good_outcomes() -> list[Outcome]:
    return [
        outcome(Row.NEW),
        outcome(Row.IN_HBM, device=900),
        outcome(Row.LEFT_HBM, host=900),
        outcome(Row.CHAT, device=100, host=300),
        outcome(Row.RESTARTED, below=900),
        outcome(Row.SHARED, below=900),
    ]


# ---- what it concludes ----


def test_a_story_that_holds_has_no_complaints() -> None:
    assert demo.broken(stock_outcomes(), good_outcomes()) == []


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (outcome(Row.LEFT_HBM, device=900), "was to come from host memory"),
        (outcome(Row.LEFT_HBM, host=900, differs=True), "differs"),
        (outcome(Row.IN_HBM, host=900), "was to be found in HBM"),
        (outcome(Row.NEW, host=900), "was to be new"),
        (outcome(Row.CHAT, differs=True), "differs"),
        (outcome(Row.RESTARTED, host=900), "was to come from the SSD"),
        (outcome(Row.SHARED, below=400), "was to be shared"),
    ],
)
def test_a_story_that_does_not_hold_is_told(bad: Outcome, complaint: str) -> None:
    (sentence,) = demo.broken(stock_outcomes(), [*good_outcomes(), bad])
    assert complaint in sentence


def test_a_document_that_never_left_hbm_is_told() -> None:
    (sentence,) = demo.broken([*stock_outcomes(), outcome(Row.LEFT_HBM, device=900)], good_outcomes())
    assert "stock SGLang still found it there" in sentence


def test_the_table_sums_tokens_and_compares_answers_of_each_row() -> None:
    ours = [*good_outcomes(), outcome(Row.LEFT_HBM, host=8)]
    lines = {line.row: line for line in demo.summarize(stock_outcomes(), ours)}
    assert list(lines) == [row.value for row in Row]
    left = lines[Row.LEFT_HBM.value]
    assert (left.requests, left.prompt_tokens, left.from_hbm, left.from_host) == (2, 2000, 0, 908)
    assert (left.ttft_without_s, left.ttft_with_s) == (5.0, 0.5)
    assert (lines[Row.CHAT.value].answers_differ, lines[Row.CHAT.value].answers_differ_without) == (0, 1)
    for row in (Row.RESTARTED, Row.SHARED):
        line = lines[row.value]
        assert (line.from_below, line.ttft_without_s) == (900, 5.0), "stock SGLang would find nothing"


@pytest.mark.parametrize("differs", [False, True])
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], differs: bool
) -> None:
    outcomes = [*good_outcomes(), outcome(Row.LEFT_HBM, host=900, differs=differs)]
    monkeypatch.setattr(demo, "tell", lambda *_: (stock_outcomes(), outcomes))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main(option) == int(differs)
    printed = capsys.readouterr().out
    if option:
        assert json.loads(printed)["ok"] is not differs
    else:
        assert "--radix-cache-backend sgl_lmcache" in printed
        assert ("NOT AS PROMISED" in printed) is differs


def test_the_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [outcome(row, device=20_000, host=20_000, below=20_000, ttft_s=25.5) for row in Row]
    demo.present(Console(width=80), demo.summarize(outcomes, outcomes), [], 1.0)
    table = capsys.readouterr().out.partition("TTFT: median")[0]
    assert "…" not in table
    assert all(row.value in table for row in Row)


# ---- what it asks ----


class Scripted:
    """A server's client that answers from what it is asked, and remembers it."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.asked: list[tuple[Message, ...]] = []

    def ask(self, messages: tuple[Message, ...], *, max_tokens: int) -> Reply:
        self.asked.append(messages)
        ids = tuple(f"{self.answer} {messages[-1].content}".encode()[:max_tokens])
        return Reply(self.answer, ids, 0.1, 10, 0, 0, 0)


def follow(answer: str, answers: dict[str, demo.Ids]) -> list[Outcome]:
    """The whole schedule, asked of a server that begins each answer with `answer`."""
    prompts, _ = demo.chat(cast(Client, Scripted("stock")), 99, lambda _: None)
    prompts |= demo.questions(demo_text.documents(lambda text: len(text) // 3, 2000))
    schedule = demo.SCHEDULE + demo.MORE + demo.RESTARTED + demo.SHARED
    return demo.follow(cast(Client, Scripted(answer)), schedule, prompts, answers, 99, lambda _: None)


def test_every_prompt_of_the_schedule_is_there_and_answers_are_held_to_the_first() -> None:
    answers: dict[str, demo.Ids] = {}
    assert not any(outcome.differs for outcome in follow("stock", answers))
    assert not any(outcome.differs for outcome in follow("stock", answers))
    assert all(outcome.differs for outcome in follow("wrong", answers))


def test_documents_come_first_and_chats_grow() -> None:
    prompts, answers = demo.chat(cast(Client, Scripted("stock")), 99, lambda _: None)
    assert [len(prompts[f"chat {turn}"]) for turn in (1, 2, 3, 4)] == [1, 3, 5, 7]
    assert prompts["chat 2"][1] == Message("assistant", "stock")
    assert prompts.keys() == answers.keys()
    texts = demo_text.documents(lambda text: len(text) // 3, 2000)
    asked = demo.questions(texts)
    assert {asked[f"A {number}"][0].content for number in (1, 2, 3)} == {texts[0].text}
    assert len({asked[name][1].content for name in asked}) == 6


def test_both_servers_get_the_same_arguments_but_for_the_cache(tmp_path: Path) -> None:
    arguments = ["--model-path", "m", "--port", "1"]
    stock = demo.stock_server(arguments).command
    cached = demo.cached_server(arguments, tmp_path, "first", ["{type: host, capacity: 1GiB}"]).command
    assert set(stock) - set(cached) == set()
    assert set(cached) - set(stock) == {"--radix-cache-backend", "sgl_lmcache"}


# ---- what it reads and sends ----


def test_a_document_is_cut_to_at_most_its_tokens() -> None:
    first, second = demo_text.documents(lambda text: len(text) // 3, 2000)
    for document in (first, second):
        assert 1900 < document.n_tokens <= 2000
        assert document.n_tokens == len(document.text) // 3
    assert first.text != second.text


def test_a_streamed_answer_is_put_together() -> None:
    lines = [
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n',
        b"\n",
        b'data: {"choices": [{"delta": {"content": "Hel"}}]}\n',
        b'data: {"choices": [{"delta": {"content": "lo"}}]}\n',
        b'data: {"choices": [], "sglext": {"output_ids": [[7, 8]]}}\n',
        b'data: {"choices": [], "sglext": {"cached_tokens_details": {"device": 3, "host": 4, "storage": 1}}}\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 9}}\n',
        b"data: [DONE]\n",
    ]
    reply = demo_server.read_reply(demo_server.events(iter(lines)), time.perf_counter())
    assert (reply.text, reply.token_ids, reply.n_prompt) == ("Hello", (7, 8), 9)
    assert (reply.n_device, reply.n_host, reply.n_storage) == (3, 4, 1)
    assert reply.ttft_s > 0


@pytest.mark.parametrize("lines", [[], [b'data: {"error": {"message": "out of memory"}}\n']])
def test_an_answer_without_tokens_is_an_error(lines: list[bytes]) -> None:
    with pytest.raises(ProgramError, match=r"first token|out of memory"):
        demo_server.read_reply(demo_server.events(iter(lines)), time.perf_counter())


# ---- what it leaves behind ----


def test_a_busy_port_is_told_and_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ProgramError, match=f"Port {port} is in use"):
            programs.check_port(port)
    programs.check_port(port)


def test_a_cluster_without_what_it_needs_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = explain_unusable("ImportError: libnuma.so.1: cannot open shared object file")
    monkeypatch.setattr(demo, "why_unusable", lambda: sentence)
    assert demo.main(["--cluster"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("--cluster needs Mooncake: ")
    assert "apt-get install libibverbs1 librdmacm1 libnuma1" in said


def test_documents_that_hbm_would_hold_together_are_refused() -> None:
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--document-tokens", "500"])


def test_leaving_ends_the_server_and_its_children(tmp_path: Path) -> None:
    port = programs.free_port()
    with (
        suppress(RuntimeError),
        demo_server.running(healthy(port), port=port, log=tmp_path / "log", deadline=Deadline(WAIT_S)) as client,
    ):
        assert client.healthy()
        group = leader(port)
        wait_for("the server has its child", lambda: len(members(group)) >= 2 or None, WAIT_S)
        raise RuntimeError("the story failed")
    wait_for("nothing is left", lambda: not members(group) or None, WAIT_S)


def test_a_signal_ends_the_server_and_its_children(tmp_path: Path) -> None:
    port = programs.free_port()
    program = (
        "import signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import demo, demo_server, programs; from sgl_lmcache.serve import Launch\n"
        "signal.signal(signal.SIGTERM, demo._exit_on_signal)\n"
        "launch = Launch([sys.executable, '-c', sys.argv[2], sys.argv[3]], {})\n"
        "port, log, deadline = int(sys.argv[3]), Path(sys.argv[4]), programs.Deadline(60)\n"
        "with demo_server.running(launch, port=port, log=log, deadline=deadline):\n"
        "    print('ready', flush=True); signal.pause()\n"
    )
    arguments = [str(ROOT / "scripts"), HEALTHY, str(port), str(tmp_path / "log")]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        group = leader(port)
        process.terminate()
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    wait_for("nothing is left", lambda: not members(group) or None, WAIT_S)


def test_a_server_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", "raise SystemExit('no such model')"], {})
    port = programs.free_port()
    with (
        pytest.raises(ProgramError, match="no such model"),
        demo_server.running(launch, port=port, log=tmp_path / "log", deadline=Deadline(WAIT_S)),
    ):
        pytest.fail("it never became ready")


def test_the_deadline_ends_a_wait(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", "import signal; signal.pause()"], {})
    port = programs.free_port()
    with (
        pytest.raises(ProgramError, match="Not finished within 0 s"),
        demo_server.running(launch, port=port, log=tmp_path / "log", deadline=Deadline(0)),
    ):
        pytest.fail("there is no time left")


def healthy(port: int) -> Launch:
    return Launch([sys.executable, "-c", HEALTHY, str(port)], dict(os.environ))


@dataclass(frozen=True)
class Process:
    pid: int
    group: int
    command: list[bytes]


def processes() -> Iterator[Process]:
    """All that run. Zombies do not: nobody but their parent can do more for them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            command = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            continue
        if state not in "ZX":
            yield Process(int(folder.name), int(group), command)


def members(group: int) -> list[Process]:
    return [process for process in processes() if process.group == group]


def leader(port: int) -> int:
    """The server that was started with this port as its last argument; it leads its group."""
    (found,) = (process.pid for process in processes() if process.command[-1] == str(port).encode())
    return found


# ---- for real ----


def run(*command: str, timeout_s: float = 900.0) -> str:
    """What a script prints. It fails with all that it said."""
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-4000:]}"
    return result.stdout


def host_tokens(printed: str) -> list[int]:
    """The numbers after "in host memory", in order."""
    return [int(part.split()[0]) for part in printed.split("in host memory ")[1:]]


@pytest.mark.server
@pytest.mark.parametrize("shared", [(), ("--cluster",)], ids=["valkey", "mooncake"])
def test_demo(shared: tuple[str, ...]) -> None:
    arguments = [*shared, "--model", "tiny", "--document-tokens", "2000", "--answer-tokens", "4", "--time-limit", "900"]
    sizes = ["--host-capacity", "64MiB", "--ssd-capacity", "256MiB"]
    result = json.loads(run("scripts/demo.py", *arguments, *sizes, "--json"))
    assert result["ok"], result["failures"]
    rows = {row["row"]: row for row in result["rows"]}
    left = rows[Row.LEFT_HBM.value]
    assert left["from_host"] > 0.8 * left["prompt_tokens"]
    for row in (Row.RESTARTED, Row.SHARED):
        line = rows[row.value]
        assert line["from_below"] > 0.8 * line["prompt_tokens"]
    assert sum(row["answers_differ"] for row in rows.values()) == 0


@pytest.mark.server
@pytest.mark.parametrize("name", ["rag_engine.py", "chat_engine.py"])
def test_engine_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "tiers.yaml"
    config.write_text(CONFIG)
    monkeypatch.setenv("SGL_LMCACHE_CONFIG", str(config))
    printed = run(f"examples/{name}", "--model", "tiny", "--answer-tokens", "4")
    assert len(host_tokens(printed)) == 6
    assert max(host_tokens(printed)) > 500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    setup = Setup(
        "examples", ("--max-total-tokens", "2560", "--sleep-on-idle"), config="tiers: [{type: host, capacity: 64MiB}]\n"
    )
    with Server(setup, tmp_path_factory.mktemp("examples")) as server:
        yield server


@pytest.mark.server
@pytest.mark.parametrize("arguments", [("rag_openai.py", "--document-chars", "6000"), ("chat_openai.py",)])
def test_openai_example(server: Server, arguments: tuple[str, ...]) -> None:
    name, *options = arguments
    printed = run(f"examples/{name}", "--base-url", f"{server.url}/v1", "--answer-tokens", "4", *options)
    assert len(host_tokens(printed)) == 6
    assert max(host_tokens(printed)) > 500


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80
