"""`sgl-lmcache explain`: what it asks, what it shows, and the sentences where it gets no answer."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from sgl_lmcache import cli
from sgl_lmcache.explain_cli import KEY_VARIABLE, render
from sgl_lmcache.explanation import EXPLAIN_PATH, Answers, Explanation, Run, summary
from tests.support.processes import free_port

FOUND = Explanation(
    id="1",
    replica=0,
    page_size=16,
    n_tokens=1_300,
    hit_tokens={"hbm": 320, "host": 160, "ssd": 0},
    compute_tokens=820,
    runs=(
        Run(0, 320, ("hbm", "host", "ssd")),
        Run(320, 480, ("host",)),
        Run(480, 800, reason="evicted", tier="ssd", seconds_ago=400.0),
        Run(800, 960, reason="tier_down", tier="valkey"),
        Run(960, 1_296, reason="prefix_changed"),
        Run(1_296, 1_300, reason="partial_page"),
    ),
    changed_at=960,
    down=("valkey",),
)


class _Recorded(HTTPServer):
    """Answers what it is told to, and keeps what it was asked."""

    def __init__(self, answers: dict[str, tuple[int, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Recorded

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        status, content = self.server.answers.get(self.path, (404, b'{"detail":"Not Found"}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if 300 <= status < 400:
            self.send_header("Location", content.decode())
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def server(
    status: int = 200, content: bytes | None = None, **others: tuple[int, bytes]
) -> Iterator[tuple[_Recorded, str]]:
    """One that answers a question so; and /tokenize as `tokenize` says."""
    if content is None:
        content = msgspec.json.encode(Answers((FOUND,)))
    answers = {EXPLAIN_PATH: (status, content)} | {f"/{name}": answer for name, answer in others.items()}
    one = _Recorded(answers)
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    try:
        yield one, f"http://127.0.0.1:{one.server_port}"
    finally:
        one.shutdown()
        thread.join()
        one.server_close()


def run(*arguments: str) -> int:
    return cli.main(["explain", *arguments])


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    file = tmp_path / "tokens.json"
    file.write_text("[1, 2, 3]")
    return str(file)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


# ---- what is asked ----


def test_all_that_names_a_prompt_is_sent(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (one, url):
        assert (
            run("--tokens", tokens, "--salt", "s", "--extra-key", "e", "--lora", "l", "--url", url + "/", "--json") == 0
        )
    body = {"input_ids": [1, 2, 3], "cache_salt": "s", "extra_key": "e", "lora_path": "l"}
    assert one.asked == [(EXPLAIN_PATH, body, None)]
    assert msgspec.json.decode(capsys.readouterr().out, type=Answers) == Answers((FOUND,))


def test_a_text_is_tokenized_by_the_server(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("a text\n")
    with server(tokenize=(200, b'{"tokens":[7,8],"count":2,"max_model_len":9}')) as (one, url):
        assert run("--text", "a text", "--url", url) == 0
        assert run("--text-file", str(file), "--url", url) == 0
    assert [body for path, body, _ in one.asked if path == "/tokenize"] == [
        {"prompt": "a text"},
        {"prompt": "a text\n"},
    ]
    assert [body for path, body, _ in one.asked if path == EXPLAIN_PATH] == [{"input_ids": [7, 8]}] * 2


def test_the_key_is_that_of_the_option_or_of_the_environment(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of-env")
    with server() as (one, url):
        run("--tokens", tokens, "--url", url)
        run("--tokens", tokens, "--url", url, "--api-key", "given")
    assert [key for *_, key in one.asked] == ["Bearer of-env", "Bearer given"]


# ---- what is shown ----


def test_the_table() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(FOUND))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for part in (
        "0 320 20 hbm, host, ssd",
        "480 800 20 - evicted from ssd for want of room, 7 min ago",
        "given to valkey, which is given up",
        "1,296 1,300 0 - less than a page: never kept",
        "480 of 1,300 tokens would be found now (320 from hbm, 160 from host), 820 are to be computed.",
        "departs from what was seen before in the page at token 960.",
        "valkey is given up: what it has does not count.",
    ):
        assert part in flat


def test_nothing_found_and_nothing_used() -> None:
    nothing = msgspec.structs.replace(
        FOUND,
        hit_tokens={"hbm": 0},
        compute_tokens=1_300,
        changed_at=None,
        stopped="disagreement",
        waiting=("mooncake",),
    )
    assert summary(nothing) == "Nothing would be found now: all 1,300 tokens are to be computed."
    console = Console(file=io.StringIO(), width=200)
    console.print(render(nothing))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Nothing below HBM is used until /flush_cache" in text
    assert "mooncake has not answered in time" in text


def test_several_replicas_are_told_apart(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    both = Answers((FOUND, msgspec.structs.replace(FOUND, replica=1)))
    with server(content=msgspec.json.encode(both)) as (_, url):
        assert run("--tokens", tokens, "--url", url) == 0
    shown = capsys.readouterr().out
    assert shown.index("Replica 0") < shown.index("Replica 1")


# ---- no answer ----


@pytest.mark.parametrize(
    ("status", "content", "sentence"),
    [
        (401, b'{"error":"Unauthorized"}', "refuses a request without a key; give its admin key, or its API key"),
        (404, b"", "it is no SGLang server with this cache; start one with --radix-cache-backend sgl_lmcache"),
        (400, b'{"error":"A prompt of 1 to 9 tokens."}', "does not explain it: A prompt of 1 to 9 tokens."),
        (503, b'{"error":"The scheduler has been busy."}', "does not explain it: The scheduler has been busy."),
        (500, b"oops", "does not explain it: Internal Server Error"),
        (200, b"{}", "gives another answer than this version expects"),
        (200, b"<html>", "gives another answer than this version expects"),
    ],
)
def test_a_refusal_is_a_sentence(
    tokens: str, capsys: pytest.CaptureFixture[str], status: int, content: bytes, sentence: str
) -> None:
    with server(status, content) as (_, url):
        assert run("--tokens", tokens, "--url", url) == 1
    said = capsys.readouterr().err
    assert said.startswith(url)
    assert sentence in said


def test_a_key_that_is_refused_is_not_shown(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server(401, b"{}") as (_, url):
        assert run("--tokens", tokens, "--url", url, "--api-key", "very-secret") == 1
    said = capsys.readouterr().err
    assert "refuses the key given" in said
    assert "very-secret" not in said


@pytest.mark.parametrize("key", ["two\nlines", "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve", "\N{SNOWMAN}"])
def test_a_key_that_no_request_can_carry_is_not_shown(
    tokens: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server() as (one, url):
        assert run("--url", url, "--tokens", tokens, "--api-key", key) == 1
    assert one.asked == []
    said = capsys.readouterr()
    assert "The API key has a character that no request can carry" in said.err
    assert key not in said.err + said.out


def test_the_line_end_of_a_key_out_of_a_file_is_left_out(tokens: str) -> None:
    with server() as (one, url):
        assert run("--url", url, "--tokens", tokens, "--api-key", "secret\n") == 0
    assert [authorization for *_, authorization in one.asked] == ["Bearer secret"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_nobody_else(tokens: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (other, elsewhere), server(status, elsewhere.encode()) as (one, url):
        assert run("--url", url, "--tokens", tokens, "--api-key", "secret") == 1
    assert (len(one.asked), other.asked) == (1, [])
    assert f"sends requests on to {elsewhere}; name the server itself" in capsys.readouterr().err


def test_a_server_that_is_not_there(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokens", tokens, "--url", f"http://127.0.0.1:{free_port()}") == 1
    assert "cannot be reached (Connection refused); start the server, or name its address" in capsys.readouterr().err


def test_a_server_that_tokenizes_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    with server(tokenize=(200, b'{"tokens":[[1]]}')) as (_, url):
        assert run("--text", "a", "--url", url) == 1
    assert "does not tokenize texts as SGLang does" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1, -2]", '["a"]', "[1", "a text"])
def test_a_file_that_is_no_list_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(content)
    assert run("--tokens", str(file)) == 1
    assert f"{file} is not a JSON list of token ids" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokens", str(tmp_path / "none")) == 1
    assert "none cannot be read (No such file or directory); name a file that can." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--text", "a", "--tokens", "b"], ["--text", "a", "--url", "host"]])
def test_a_command_line_that_is_wrong(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


def test_neither_sglang_nor_torch_nor_numba_is_imported() -> None:
    program = (
        "import sys; from sgl_lmcache import explain_cli, explanation;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('sglang', 'torch', 'numba')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
