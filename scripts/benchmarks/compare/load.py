"""Sends a round of requests to a server, by so many users or at so many arrivals a second, timed at the client."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import accumulate
from random import Random
from urllib.parse import urlsplit

from benchmarks.compare.workloads import Request, Tokens, Workload

ANSWER_TIMEOUT_S = 600.0
"""For one answer. A server that takes longer has hung."""


class LoadError(Exception):
    """A request failed. The message says how."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. ttft_s: from when the request was due until its first token; total_s: until its last. n_device,
    n_host, n_storage: prompt tokens found in HBM, in host memory and below it, by the server's own account."""

    label: str
    prompt: Tokens
    ttft_s: float
    total_s: float
    n_device: int
    n_host: int
    n_storage: int
    answer: Tokens

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True)
class Round:
    """What came of a round: a sample for each request, in the order of the workload; and how long each phase took."""

    samples: tuple[Sample, ...]
    phases_s: tuple[float, ...]


Ask = Callable[[Request, Tokens, float], Sample]
"""Sends one request with its whole prompt. The float is when it was due (`time.perf_counter`)."""


def run_round(workload: Workload, number: int, ask: Ask, progress: Callable[[], None] = lambda: None) -> Round:
    """One round of a workload, blocking until the last answer. progress: called after each, from any thread.

    Raises the `LoadError` or `OSError` of the first request that failed, once all that was under way has ended.
    """
    phases = workload.of_round(number)
    talk = _Talk([request for phase in phases for request in phase], ask, progress)
    phases_s = []
    n_done = 0
    for phase in phases:
        positions = range(n_done, n_done + len(phase))
        started_s = time.perf_counter()
        if workload.rate is not None and phase[0].label in workload.counted:
            rng = Random(f"{workload.name} {number} arrivals")
            talk.in_open_loop(positions, [rng.expovariate(workload.rate) for _ in phase])
        else:
            talk.in_closed_loop(positions, workload.n_users)
        phases_s.append(time.perf_counter() - started_s)
        n_done += len(phase)
    return Round(tuple(talk.samples[position] for position in range(n_done)), tuple(phases_s))


class _Talk:
    """The requests of a round, and what has come of them so far, by position."""

    def __init__(self, requests: Sequence[Request], ask: Ask, progress: Callable[[], None]) -> None:
        self.samples: dict[int, Sample] = {}
        self._requests = requests
        self._ask = ask
        self._progress = progress
        self._turns: dict[int, tuple[Tokens, ...]] = {}
        """The conversation with each answer at its end."""
        self._ended_s: dict[int, float] = {}
        self._over = [threading.Event() for _ in requests]
        self._failure: Exception | None = None
        self._is_stopped = threading.Event()
        """Of the phase: nothing more is to be sent."""

    def in_closed_loop(self, positions: range, n_users: int) -> None:
        """Each user asks, waits for the answer and takes the next request."""
        left = iter(positions)
        taking = threading.Lock()

        def user(_: int) -> None:
            while True:
                with taking:
                    position = next(left, None)
                if position is None:
                    return
                self._send(position, time.perf_counter())

        self._run(user, range(min(n_users, len(positions))))

    def in_open_loop(self, positions: range, gaps_s: Sequence[float]) -> None:
        """Each request is sent when it is due, however many are under way; or when the turn before it is over."""
        dues_s = dict(zip(positions, accumulate(gaps_s, initial=time.perf_counter()), strict=False))

        def arrive(position: int) -> None:
            self._is_stopped.wait(max(0.0, dues_s[position] - time.perf_counter()))
            self._send(position, dues_s[position])

        self._run(arrive, positions)

    def _run(self, work: Callable[[int], None], numbers: range) -> None:
        with ThreadPoolExecutor(len(numbers)) as threads:
            try:
                list(threads.map(work, numbers))
            finally:  # of an interruption as well: what is under way ends, and nothing more begins
                self._is_stopped.set()
        self._is_stopped.clear()
        if self._failure is not None:
            raise self._failure

    def _send(self, position: int, due_s: float) -> None:
        """Ask one request, once the one that it follows is over; nothing more is sent when one has failed."""
        request = self._requests[position]
        try:
            turns: tuple[Tokens, ...] = ()
            if request.after is not None:
                self._over[request.after].wait()
                due_s = max(due_s, self._ended_s.get(request.after, due_s))
                turns = self._turns.get(request.after, ())
            if self._is_stopped.is_set():
                return
            turns = windowed((*turns, request.tokens), request.window)
            sample = self._ask(request, tuple(token for turn in turns for token in turn), due_s)
            self._turns[position] = (*turns, sample.answer)
            self._ended_s[position] = time.perf_counter()
            self.samples[position] = sample
        except (LoadError, OSError) as error:
            self._failure = self._failure or error
            self._is_stopped.set()
        finally:
            self._over[position].set()
            self._progress()


def windowed(turns: tuple[Tokens, ...], window: int | None) -> tuple[Tokens, ...]:
    """What a chat sends of its turns: all, or the first and as many of the last as its window has room for."""
    first, *others = turns
    while window is not None and len(others) > 1 and len(first) + sum(map(len, others)) > window:
        del others[0]
    return (first, *others)


class Server:
    """Asks SGLang's own endpoint at `url`, which takes and gives token ids. All methods from any thread, blocking."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = urlsplit(url).netloc

    def ask(self, request: Request, prompt: Tokens, due_s: float) -> Sample:
        """Greedy, streamed. Raises `LoadError` for a refusal or an answer cut short, `OSError` for none at all."""
        sampling = {"temperature": 0, "max_new_tokens": request.n_answer, "ignore_eos": True}
        body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True})
        connection = HTTPConnection(self._address, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise LoadError(f"{self.url} answered {response.status}: {response.read(300).decode(errors='replace')}")
            first_s, last = 0.0, b""
            for line in response:
                if line.startswith(b"data: {"):
                    first_s = first_s or time.perf_counter()
                    last = line
        except HTTPException as error:
            raise LoadError(f"{self.url} broke an answer off ({error!r})") from error
        finally:
            connection.close()
        return self._sample(request, prompt, last, first_s - due_s, time.perf_counter() - due_s)

    def gap(self, prompt: Tokens, chosen: int, other: int) -> float:
        """How much likelier this server holds `chosen` to be than `other`, next after `prompt`, in nats."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "token_ids_logprob": [chosen, other],
        }
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
            [found] = json.load(response)["meta_info"]["output_token_ids_logprobs"]
        logprobs = {token: logprob for logprob, token, _ in found}
        return float(logprobs[chosen] - logprobs[other])

    def _sample(self, request: Request, prompt: Tokens, last: bytes, ttft_s: float, total_s: float) -> Sample:
        answer = json.loads(last.removeprefix(b"data: ")) if last else {}
        ids = tuple(answer.get("output_ids", ()))
        if len(ids) != request.n_answer:
            raise LoadError(f"{self.url} answered {len(ids)} tokens instead of {request.n_answer}: {last[:300]!r}")
        meta = answer["meta_info"]
        found = meta.get("cached_tokens_details") or {"device": meta["cached_tokens"]}
        device, host, storage = (int(found.get(tier, 0)) for tier in ("device", "host", "storage"))
        return Sample(request.label, prompt, ttft_s, total_s, device, host, storage, ids)
