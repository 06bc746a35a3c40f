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
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec

from sgl_lmcache.cpu import cpu_arguments, cpu_environment
from sgl_lmcache.cpu.model import TINY, make_model

START_TIMEOUT_S = 240.0
"""A server is ready within half a minute on two idle cores; this is for machines that are busy."""

STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 180.0

PROBE = Path(__file__).parent / "probe"

STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

FORGOTTEN_VARIABLES = ("SGL_LMCACHE_CONFIG", "SGLANG_PLUGINS")
"""What a server under test never takes over from the environment of the tests."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """How to start a server.

    cached: with `--radix-cache-backend sgl_lmcache`. config: the text of the file that `SGL_LMCACHE_CONFIG` names.
    """

    name: str
    arguments: tuple[str, ...] = ()
    cached: bool = True
    config: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt. Token counts are SGLang's: `host_tokens` were restored from host memory."""

    rid: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    device_tokens: int
    host_tokens: int
    finish_reason: str


class Inspection(msgspec.Struct, frozen=True):
    """What the probe saw between two scheduler iterations; see `probe/sgl_lmcache_probe/inspection.py`."""

    violation: str | None
    first_violation: str | None
    n_checks: int
    n_iterations: int
    stats: dict[str, int]
    host: dict[str, int]
    requests: dict[str, list[str]]
    ended: dict[str, str]
    open: dict[str, int]
    unfinished_at_reset: int
    hbm: dict[str, int]
    mirror: dict[str, int]
    restored: int
    checked: int
    mismatched: int
    times: dict[str, dict[str, int]]


class ServerDiedError(AssertionError):
    """A server under test has ended by itself."""


def wait_for(what: str, poll: Callable[[], T | None], timeout_s: float) -> T:
    """Ask until the answer is not None. Raises AssertionError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while (found := poll()) is None:
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)
    return found


class ProcessGroup:
    """A command and all processes that it starts, which end with it.

    Its output goes to the file `log_path`, and it works in that file's folder: it finds our packages because they are
    installed, not because it was started in a checkout.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> None:
        self.name = Path(log_path).stem
        self.log_path = log_path
        with log_path.open("wb") as log:
            self._leader = subprocess.Popen(
                command, env=dict(environment), cwd=log_path.parent, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def exit_code(self) -> int | None:
        return self._leader.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code of the command, once it has ended."""
        return wait_for(f"{self.name} has ended", self.exit_code, timeout_s)

    def members(self) -> list[int]:
        """The processes that run. Zombies do not: nobody but their parent can do more for them."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self._leader.pid and state not in "ZX":
                found.append(int(stat.parent.name))
        return found

    def stop(self) -> None:
        """SIGTERM, then SIGKILL, to the whole group; returns when no process of it is left."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._leader.pid, number)
            with suppress(AssertionError):
                wait_for(f"{self.name} has left nothing", self._left_nothing, STOP_TIMEOUT_S)
                return
        raise AssertionError(f"{self.name} has left processes: {self.members()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])

    def _left_nothing(self) -> bool | None:
        return True if self.exit_code() is not None and not self.members() else None


class Server:
    """One server, running for as long as the context is entered.

    folder: for its log, its configuration and the probe's files; no other server may have used it. All methods may be
    called from any thread but `inspect`, which is for one at a time.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self._folder = folder
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        any_number = httpx.Limits(max_connections=None)
        self._http = httpx.Client(base_url=self.url, timeout=ANSWER_TIMEOUT_S, limits=any_number)
        self._processes: ProcessGroup | None = None
        self._n_inspections = 0

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

    def check_alive(self) -> None:
        """Raises `ServerDiedError` with the tail of the log if the server has ended."""
        if (exit_code := self.processes.exit_code()) is not None:
            raise ServerDiedError(f"{self.setup.name} ended with {exit_code}; its log:\n{self.processes.log_tail()}")

    def _command(self) -> list[str]:
        arguments = ["--model-path", str(make_model(TINY)), "--host", "127.0.0.1", "--port", str(self._port)]
        arguments += ["--skip-server-warmup", "--random-seed", "0"]
        if self.setup.cached:
            arguments += ["--radix-cache-backend", "sgl_lmcache"]
        return [sys.executable, "-m", "sglang.launch_server", *cpu_arguments([*arguments, *self.setup.arguments])]

    def _environment(self) -> dict[str, str]:
        environment = {**base_environment(), "SGL_LMCACHE_PROBE_DIR": str(self._folder)}
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
        """What SGLang's scheduler made of its arguments, written by the probe at the start."""
        return dict(msgspec.json.decode((self._folder / "facts.json").read_bytes()))

    def info(self) -> dict[str, Any]:
        """SGLang's resolved arguments, and its scheduler's state."""
        response = self._http.get("/server_info")
        self._check(response)
        return dict(response.json())

    def inspect(self) -> Inspection:
        """Look into the scheduler process between two of its iterations."""
        self._n_inspections += 1
        request = self._folder / "request.part"
        request.write_text(str(self._n_inspections))
        request.replace(self._folder / "request")
        answer = self._folder / f"answer-{self._n_inspections}.json"

        def read() -> Inspection | None:
            self.check_alive()
            return msgspec.json.decode(answer.read_bytes(), type=Inspection) if answer.exists() else None

        return wait_for("the probe's answer", read, ANSWER_TIMEOUT_S)

    def at_rest(self) -> Inspection:
        """Wait until nothing is under way any more; the inspection that says so. An answer may be ahead of that."""

        def poll() -> Inspection | None:
            seen = self.inspect()
            is_busy = any(seen.requests.values()) or any(seen.open.values()) or seen.hbm["protected"]
            return None if is_busy else seen

        return wait_for("nothing is open", poll, ANSWER_TIMEOUT_S)

    @contextmanager
    def held_copies(self) -> Iterator[None]:
        """Copies into host memory begin and do not end, until the context is left or the server flushes."""
        hold = self._folder / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink(missing_ok=True)

    # ---- requests ----

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 8,
        *,
        rid: str | None = None,
        ignore_eos: bool = True,
    ) -> Answer:
        """Greedy, with the chosen tokens' logprobs.

        ignore_eos: go on to `max_new_tokens`. SGLang then admits a request only if HBM has room for all of them.
        """
        response = self._http.post("/generate", json=_request(prompt, max_new_tokens, rid, ignore_eos))
        self._check(response)
        return _answer(response.json())

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
        self, prompt: str | Sequence[int], max_new_tokens: int = 8, *, rid: str | None = None
    ) -> Iterator[Iterator[Answer]]:
        """The answers so far, each longer than the one before. Leaving the context early closes the connection."""
        body = {**_request(prompt, max_new_tokens, rid, ignore_eos=True), "stream": True}
        with self._http.stream("POST", "/generate", json=body) as response:
            self._check(response)
            yield (
                _answer(msgspec.json.decode(line.removeprefix("data: ")))
                for line in response.iter_lines()
                if line.startswith("data: {")
            )

    def abort(self, rid: str) -> None:
        self._check(self._http.post("/abort_request", json={"rid": rid}))

    def flush(self) -> None:
        """Empty HBM and host memory, waiting for requests that are on their way out."""
        self._check(self._http.post("/flush_cache", params={"timeout": 30}))

    def _check(self, response: httpx.Response) -> None:
        if not response.is_success:
            response.read()
            self.check_alive()
            raise AssertionError(f"{response.request.url} answered {response.status_code}: {response.text[:2000]}")


def base_environment() -> dict[str, str]:
    """For any process under test: CPU mode, SGLang's strict checks, and nothing of ours from outside."""
    kept = {name: value for name, value in os.environ.items() if name not in FORGOTTEN_VARIABLES}
    # Servers share the machine, and OpenMP's threads wait for each other by spinning.
    return {**cpu_environment(kept), **STRICT_CHECKS, "OMP_NUM_THREADS": "1"}


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
        finish_reason=(meta.get("finish_reason") or {"type": ""})["type"],
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
