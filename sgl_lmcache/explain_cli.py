"""`sgl-lmcache explain`: which pages of a prompt a running server has on which tier, and why it lacks the rest.

The server's endpoint (`endpoints`) is asked; a text is first turned into tokens by the server's own tokenizer, as
`/generate` does it. An API key is sent as SGLang wants it, from the option or from the environment, and never printed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sgl_lmcache.config import TokenIds
from sgl_lmcache.errors import StartError
from sgl_lmcache.explanation import EXPLAIN_PATH, Answers, Explanation, Run, decode, summary, words

if TYPE_CHECKING:
    from rich.console import RenderableType

KEY_VARIABLE: Final = "SGL_LMCACHE_API_KEY"
TIMEOUT_S: Final = 60.0
MAX_NBYTES: Final = 64 << 20
"""Of an answer."""


class _Tokenized(msgspec.Struct):
    tokens: list[int]


def add_command(commands: Any, url: Any) -> None:
    """url: how an address is checked."""
    parser = commands.add_parser("explain", help="where the pages of a prompt are, and why the rest is not there")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", type=Path, metavar="FILE", help="a JSON list of token ids")
    prompt.add_argument("--text", help="a text, which the server tokenizes")
    prompt.add_argument("--text-file", type=Path, metavar="FILE", help="the same, from a file")
    parser.add_argument("--salt", help="the cache_salt of the request")
    parser.add_argument("--extra-key", metavar="KEY", help="its extra_key")
    parser.add_argument("--lora", metavar="NAME", help="the name of its LoRA adapter")
    parser.add_argument("--url", type=url, default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the server's admin key, or its API key (default: ${KEY_VARIABLE}, if set)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace) -> int:
    """Returns 0, whatever is found. Raises `StartError`."""
    server = Server(options.url.rstrip("/"), _key(options.api_key or os.environ.get(KEY_VARIABLE)))
    body: dict[str, Any] = {"input_ids": _tokens(options, server)}
    for name, value in (("cache_salt", options.salt), ("extra_key", options.extra_key), ("lora_path", options.lora)):
        if value is not None:
            body[name] = value
    answers = server.explain(body)
    if options.json:
        print(json.dumps(msgspec.to_builtins(answers), indent=2))
        return 0
    from rich.console import Console

    console = Console()
    for explanation in answers.replicas:
        if len(answers.replicas) > 1:
            console.print(f"Replica {explanation.replica}", style="bold")
        console.print(render(explanation))
    return 0


def _key(given: str | None) -> str | None:
    """Without the line end of a file. None: there is none. Raises `StartError`, which does not show it."""
    key = (given or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise StartError("The API key has a character that no request can carry; give it in ASCII, on one line.")
    return key or None


def _tokens(options: argparse.Namespace, server: Server) -> list[int]:
    if options.tokens is not None:
        return read_tokens(options.tokens)
    text = options.text if options.text is not None else _read(options.text_file).decode("utf-8", "replace")
    return server.tokenize(text)


def read_tokens(path: Path) -> list[int]:
    """The token ids in a file. Raises `StartError`."""
    try:
        return msgspec.json.decode(_read(path), type=TokenIds)
    except msgspec.MsgspecError as error:
        raise StartError(
            f"{path} is not a JSON list of token ids ({error}); write one such as [1, 2, 3], or give the text itself "
            "with --text-file."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{path} cannot be read ({error.strerror}); name a file that can.") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, and goes nowhere else."""

    def redirect_request(self, *_arguments: Any) -> None:
        return None


class Server:
    """A server to ask. url: such as http://127.0.0.1:30000, without a slash at its end. Every method blocks."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def tokenize(self, text: str) -> list[int]:
        """As `/generate` tokenizes a text. Raises `StartError`."""
        answer = self._post("/tokenize", {"prompt": text})
        try:
            return msgspec.json.decode(answer, type=_Tokenized).tokens
        except msgspec.MsgspecError as error:
            raise StartError(
                f"{self._url} does not tokenize texts as SGLang does ({error}); give the prompt with --tokens."
            ) from error

    def explain(self, body: Mapping[str, Any]) -> Answers:
        """Raises `StartError`."""
        answer = self._post(EXPLAIN_PATH, body)
        try:
            return decode(answer)
        except msgspec.MsgspecError as error:
            raise StartError(
                f"{self._url} gives another answer than this version expects ({error}); use the version that it runs."
            ) from error

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        if self._api_key is not None:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read(MAX_NBYTES)
                return content
        except urllib.error.HTTPError as error:
            with error:
                raise StartError(self._refusal(path, error)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise StartError(
                f"{self._url} cannot be reached ({getattr(reason, 'strerror', None) or reason}); start the server, or "
                "name its address with --url."
            ) from error

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            key = "the key given" if self._api_key is not None else "a request without a key"
            return (
                f"{self._url} refuses {key}; give its admin key, or its API key if it has no other, with --api-key or "
                f"in {KEY_VARIABLE}."
            )
        if error.code in (404, 405):
            return (
                f"{self._url} has no {path}: it is no SGLang server with this cache; start one with "
                "--radix-cache-backend sgl_lmcache, or name its address with --url."
            )
        if 300 <= error.code < 400:
            return f"{self._url} sends requests on to {error.headers['Location']}; name the server itself with --url."
        try:
            sentence = json.loads(error.read(MAX_NBYTES))["error"]
        except (ValueError, KeyError, TypeError, OSError):
            sentence = error.reason
        return f"{self._url} does not explain it: {sentence}"


# ---- what is shown ----


def render(explanation: Explanation) -> RenderableType:
    """A table that fits into 80 columns, and some lines."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(
        "from token", "to", "pages", "where", "why not", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in table.columns[:3]:
        column.justify = "right"
        column.no_wrap = True
    for run in explanation.runs:
        n_pages = (run.end - run.start) // explanation.page_size
        table.add_row(f"{run.start:,}", f"{run.end:,}", f"{n_pages:,}", ", ".join(run.tiers) or "-", _why(run))
    lines = [summary(explanation)]
    if explanation.stopped:
        lines.append(
            "Nothing below HBM is used until /flush_cache: " + words(Run(0, 0, reason=explanation.stopped)) + "."
        )
    lines += [f"{tier} is given up: what it has does not count." for tier in explanation.down]
    lines += [f"{tier} has not answered in time: what it has does not count." for tier in explanation.waiting]
    return Group(table, *lines)


def _why(run: Run) -> str:
    if not run.reason:
        return ""
    return words(run) if run.seconds_ago is None else f"{words(run)}, {_ago(run.seconds_ago)} ago"


def _ago(seconds: float) -> str:
    for unit, length_s in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
