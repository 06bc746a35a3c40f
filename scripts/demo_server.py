"""A real SGLang server for the demo: started, asked, ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from programs import Deadline, ProgramError, started, tail

from sgl_lmcache.serve import Launch

PROBE_TIMEOUT_S: Final = 10.0


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
            raise ProgramError(f"The server refused a request ({error.code}): {detail}") from error
        except (OSError, HTTPException) as error:
            self.deadline.remaining_s()
            raise ProgramError(
                f"The server stopped answering ({error}). The end of its log:\n{tail(self.log)}"
            ) from error


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
            raise ProgramError(f"The server failed a request: {chunk['error'].get('message', chunk['error'])}")
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
        raise ProgramError("The server ended an answer before its first token; its log says why.")
    found = (int(cached.get(tier, 0)) for tier in ("device", "host", "storage"))
    return Reply(text, token_ids, ttft_s, n_prompt, *found)


@contextmanager
def running(launch: Launch, *, port: int, log: Path, deadline: Deadline) -> Iterator[Client]:
    """Start a server, wait until it answers, end it and all its processes on the way out. `log` gets what it prints."""
    client = Client(f"http://127.0.0.1:{port}", log, deadline)
    with started(launch.command, client.healthy, log, deadline, launch.environment):
        yield client
