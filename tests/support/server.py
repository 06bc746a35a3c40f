"""Real SGLang servers for tests: started as they are in production, asked over HTTP, looked into by the probe.

A server is a process group of its own. Whatever happens to the test, leaving `Server` as a context ends the group, and
waits until nothing of it is left. A server that dies while somebody waits for it fails that test with the tail of its
log, at once.

SGLang's own strict checks are on in all of them: it counts the tokens of its pool after every batch and in every idle
iteration, looks for pages that are freed twice or used after that, and ends itself when the sums do not come out.

Nothing here waits for a time. `wait_for` asks again until the answer is there or a generous deadline has passed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from sgl_lmcache.cpu import cpu_arguments, cpu_environment
from sgl_lmcache.cpu.model import TINY, Recipe, make_model
from sgl_lmcache.explanation import EXPLAIN_PATH, Explanation, decode
from tests.support.inspection import ANSWER_TIMEOUT_S, Faults, Inspection, ProbeFolder
from tests.support.processes import STOP_TIMEOUT_S, ProcessGroup, free_port, wait_for

__all__ = [
    "ANSWER_TIMEOUT_S",
    "START_TIMEOUT_S",
    "STOP_TIMEOUT_S",
    "Answer",
    "Faults",
    "Inspection",
    "ProcessGroup",
    "Server",
    "ServerDiedError",
    "Setup",
    "base_environment",
    "wait_for",
]

START_TIMEOUT_S = 480.0
"""On two idle cores a server is ready within half a minute, two ranks within one; this is for busy machines."""

END_TIMEOUT_S = 60.0

PROBE = Path(__file__).parent / "probe"

STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

FORGOTTEN_VARIABLES = ("SGL_LMCACHE_CONFIG", "SGL_LMCACHE_RECORD", "SGL_LMCACHE_RECORD_LIMIT", "SGLANG_PLUGINS")
"""What a server under test never takes over from the environment of the tests."""


@dataclass(frozen=True)
class Setup:
    """How to start a server.

    cached: with `--radix-cache-backend sgl_lmcache`. config: the text of the file that `SGL_LMCACHE_CONFIG` names.
    n_ranks: how many scheduler processes the arguments make. recipe: of the model.
    """

    name: str
    arguments: tuple[str, ...] = ()
    cached: bool = True
    config: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    n_ranks: int = 1
    recipe: Recipe = TINY


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt. Token counts are SGLang's: `host_tokens` were restored from host memory, and
    `storage_tokens` as well, but were fetched into it for this request."""

    rid: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    device_tokens: int
    host_tokens: int
    storage_tokens: int
    finish_reason: str


class ServerDiedError(AssertionError):
    """A server under test has ended by itself."""


class Server:
    """One server, running for as long as the context is entered.

    folder: for its log, its configuration and the probe's files; no other server may have used it. address: where it
    listens. prefix: what has to come before a command for it to run where that address is. All methods may be called
    from any thread but `inspect`, which is for one at a time.
    """

    def __init__(self, setup: Setup, folder: Path, *, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.setup = setup
        self._folder = folder
        self._address = address
        self._prefix = tuple(prefix)
        self._port = free_port()
        self.url = f"http://{address}:{self._port}"
        any_number = httpx.Limits(max_connections=None)
        self._http = httpx.Client(base_url=self.url, timeout=ANSWER_TIMEOUT_S, limits=any_number, trust_env=False)
        self._processes: ProcessGroup | None = None
        self.probe = ProbeFolder(folder, setup.n_ranks, self.check_alive)

    # ---- life ----

    def __enter__(self) -> Self:
        try:
            self._processes = self.launch()
            wait_for(f"server {self.setup.name} is ready", self._ready, START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def launch(self) -> ProcessGroup:
        """Start the processes and do not wait: for servers that are to fail. They are the caller's to stop."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return ProcessGroup(self._command(), self._environment(), self._folder / f"{self.setup.name}.log")

    def terminate(self) -> None:
        """SIGTERM to the main process, as an operator sends it; returns when it has ended by itself, and well."""
        os.kill(self.processes.leader, signal.SIGTERM)
        assert self.processes.wait(END_TIMEOUT_S) == 0, self.processes.log_tail()

    def stop(self) -> None:
        """Returns when no process is left. Calling it again does nothing."""
        self._http.close()
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.stop()

    @property
    def processes(self) -> ProcessGroup:
        assert self._processes is not None, f"server {self.setup.name} is not running"
        return self._processes

    @property
    def is_alive(self) -> bool:
        return self.processes.exit_code() is None

    def check_alive(self) -> None:
        """Raises `ServerDiedError` with the tail of the log if the server has ended."""
        if (exit_code := self.processes.exit_code()) is not None:
            raise ServerDiedError(f"{self.setup.name} ended with {exit_code}; its log:\n{self.processes.log_tail()}")

    def _command(self) -> list[str]:
        arguments = [
            "--model-path",
            str(make_model(self.setup.recipe)),
            "--host",
            self._address,
            "--port",
            str(self._port),
        ]
        arguments += ["--skip-server-warmup", "--random-seed", "0"]
        if self.setup.cached:
            arguments += ["--radix-cache-backend", "sgl_lmcache"]
        server = [sys.executable, "-m", "sglang.launch_server", *cpu_arguments([*arguments, *self.setup.arguments])]
        return [*self._prefix, *server]

    def _environment(self) -> dict[str, str]:
        environment = {**base_environment(self.setup.n_ranks), "SGL_LMCACHE_PROBE_DIR": str(self._folder)}
        environment["PYTHONPATH"] += os.pathsep + str(PROBE)
        if self.setup.config is not None:
            path = self._folder / "tiers.yaml"
            path.write_text(self.setup.config)
            environment["SGL_LMCACHE_CONFIG"] = str(path)
        return {**environment, **self.setup.environment}

    def _ready(self) -> bool | None:
        self.check_alive()
        try:
            return self._http.get("/health").status_code == httpx.codes.OK or None
        except httpx.TransportError:
            return None

    # ---- what it says about itself ----

    def log_lines(self, pattern: str) -> list[str]:
        """The lines of the log in which the regular expression is found."""
        return [line for line in self.processes.log().splitlines() if re.search(pattern, line)]

    def facts(self) -> dict[str, Any]:
        """What SGLang's scheduler made of its arguments: rank 0's."""
        return self.probe.facts()

    def info(self) -> dict[str, Any]:
        """SGLang's resolved arguments, and its scheduler's state."""
        response = self._http.get("/server_info")
        self._check(response)
        return dict(response.json())

    def explain(self, tokens: Sequence[int], **fields: str | None) -> tuple[Explanation, ...]:
        """Where a prompt's pages are, by replica, once nothing is under way. fields: more of the question."""
        self.at_rest()
        response = self._http.post(EXPLAIN_PATH, json={"input_ids": list(tokens), **fields})
        self._check(response)
        replicas = decode(response.content).replicas
        for one in replicas:
            assert [run.end for run in one.runs[:-1]] == [run.start for run in one.runs[1:]]
            assert (one.runs[0].start, one.runs[-1].end) == (0, len(tokens))
        return replicas

    def metrics(self) -> dict[str, float]:
        """What `/metrics` says, by name and labels as they stand there. Only with `--enable-metrics`."""
        response = self._http.get("/metrics")
        self._check(response)
        lines = (line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def inspect(self) -> Inspection:
        """Look into the scheduler process of rank 0 between two of its iterations."""
        return self.probe.inspect()[0]

    def at_rest(self) -> Inspection:
        """`ranks_at_rest`, rank 0's."""
        return self.ranks_at_rest()[0]

    def ranks_at_rest(self) -> list[Inspection]:
        """Wait until nothing is under way any more; the inspection that says so. An answer may be ahead of that."""

        def poll() -> list[Inspection] | None:
            seen = self.probe.inspect()
            return seen if all(rank.is_at_rest for rank in seen) else None

        return self.probe.wait_for("nothing is open", poll, ANSWER_TIMEOUT_S)

    def held_copies(self) -> AbstractContextManager[None]:
        """Copies into host memory begin and do not end, until the context is left or the server flushes."""
        return self.probe.held_copies()

    # ---- requests ----

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 8,
        *,
        rid: str | None = None,
        ignore_eos: bool = True,
        **fields: Any,
    ) -> Answer:
        """Greedy, with the chosen tokens' logprobs.

        ignore_eos: go on to `max_new_tokens`. SGLang then admits a request only if HBM has room for all of them.
        fields: more of the request's body, such as `cache_salt`.
        """
        body = _request(prompt, max_new_tokens, rid, ignore_eos) | fields
        return _answer(self.ask("/generate", **body))

    def ask(self, path: str, **body: Any) -> Any:
        """The JSON that any endpoint answers, if anything. Raises AssertionError for another status than success."""
        response = self._http.post(path, json=body)
        self._check(response)
        return response.json() if response.content else None

    def ask_refused(self, path: str, **body: Any) -> str:
        """The text with which an endpoint refuses. Raises AssertionError if it does not."""
        response = self._http.post(path, json=body)
        assert response.status_code == httpx.codes.BAD_REQUEST, response.text[:2000]
        return response.text

    def generate_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 8,
        *,
        n_at_once: int | None = None,
        ignore_eos: bool = True,
    ) -> list[Answer]:
        """One answer a prompt, in their order; all sent at once, or at most `n_at_once` at any time."""
        with ThreadPoolExecutor(n_at_once or len(prompts)) as threads:
            send = partial(self.generate, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
            return list(threads.map(send, prompts))

    @contextmanager
    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 8,
        *,
        rid: str | None = None,
        ignore_eos: bool = True,
    ) -> Iterator[Iterator[Answer]]:
        """The answers so far, each longer than the one before. Leaving the context early closes the connection."""
        body = {**_request(prompt, max_new_tokens, rid, ignore_eos), "stream": True}
        with self._http.stream("POST", "/generate", json=body) as response:
            self._check(response)
            yield (
                _answer(msgspec.json.decode(line.removeprefix("data: ")))
                for line in response.iter_lines()
                if line.startswith("data: {")
            )

    def abort(self, rid: str) -> None:
        self._post("/abort_request", {"rid": rid})

    def flush(self) -> None:
        """Empty HBM and host memory, waiting for requests that are on their way out."""
        self._post("/flush_cache", {}, timeout=30)

    def clear_storage(self) -> None:
        """Empty the tier below host memory."""
        self._post("/hicache/storage-backend/clear", {})

    def try_flush(self) -> bool:
        """Flush now or not at all; whether it was done."""
        response = self._http.post("/flush_cache")
        self.check_alive()
        return response.is_success

    def pause(self, mode: str) -> None:
        """mode: "abort" all requests, "retract" them into the queue, or leave them "in_place"."""
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._post("/continue_generation", {})

    def _post(self, path: str, body: Mapping[str, Any], **parameters: int) -> httpx.Response:
        """Raises AssertionError for an answer that says no, and, with the stacks of all ranks, for none in time."""
        try:
            response = self._http.post(path, json=body, params=parameters)
        except httpx.TimeoutException as error:
            self.check_alive()
            raise AssertionError(f"{path} was not answered\n{self.probe.stacks()}") from error
        self._check(response)
        return response

    def _check(self, response: httpx.Response) -> None:
        if not response.is_success:
            response.read()
            self.check_alive()
            raise AssertionError(f"{response.request.url} answered {response.status_code}: {response.text[:2000]}")


def base_environment(n_ranks: int = 1) -> dict[str, str]:
    """For any process under test: CPU mode, SGLang's strict checks, and nothing of ours from outside."""
    kept = {name: value for name, value in os.environ.items() if name not in FORGOTTEN_VARIABLES}
    # Servers share the machine, and OpenMP's threads wait for each other by spinning.
    return {**cpu_environment(kept, n_ranks=n_ranks), **STRICT_CHECKS, "OMP_NUM_THREADS": "1"}


def _request(prompt: str | Sequence[int], max_new_tokens: int, rid: str | None, ignore_eos: bool) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
    body: dict[str, Any] = {"sampling_params": sampling, "return_logprob": True}
    body |= {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
    return body if rid is None else {**body, "rid": rid}


def _answer(body: Mapping[str, Any]) -> Answer:
    meta = body["meta_info"]
    details = meta.get("cached_tokens_details") or {"device": 0, "host": 0}
    chosen = meta.get("output_token_logprobs", [])
    return Answer(
        rid=meta["id"],
        text=body["text"],
        tokens=tuple(token for _, token, _ in chosen),
        logprobs=tuple(logprob for logprob, _, _ in chosen),
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        device_tokens=details["device"],
        host_tokens=details["host"],
        storage_tokens=details.get("storage", 0),
        finish_reason=(meta.get("finish_reason") or {"type": ""})["type"],
    )
