"""Endpoints of our own on SGLang's HTTP server: what became of a prompt, and whether the server lives and is ready.

They are added to SGLang's application before it serves, so they have its port, its TLS and its keys. `explain` is for
those who run the server: with an admin key it needs that one, otherwise the API key, if there is one. The two for
probes need none, and say less. A server of several HTTP processes is told of in `http_workers`.

How a question gets to the schedulers is told in `explanation`. SGLang sends it to all of them, wakes those that sleep,
and collects one answer a replica; the hook here answers it between two iterations. The wait for an answer is never
cancelled: SGLang would take the late one for the answer to the next question. So only some questions may be open at a
time, those included whose askers have given up; the questions of `ready` share one wait; and an answer to somebody
else's question is recognised by its id and asked for again.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np

from sgl_lmcache import BACKEND
from sgl_lmcache.config import TokenIds
from sgl_lmcache.explanation import (
    EXPLAIN_PATH,
    LIVE_PATH,
    MAX_TOKENS,
    MAX_WAITING,
    READY_PATH,
    STATE_KEY,
    Answers,
    Ask,
    AskAgain,
    AskHealth,
    Explanation,
    Health,
    Question,
    Unknown,
    answers,
    from_rid,
    to_rid,
)

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

HTTP_SERVER: Final = "sglang.srt.entrypoints.http_server"

HTTP_WORKERS: Final = "sgl_lmcache.http_workers:app"

HEALTH_TIMEOUT_S: Final = 1.0
"""A scheduler that takes longer is busy, with a long prefill perhaps."""

EXPLAIN_TIMEOUT_S: Final = 20.0

TIERS_TIMEOUT_S: Final = 1.0
"""How long shared stores may take to say what they have; without those that take longer the answer is given."""

POLL_S: Final = 0.02

MAX_TRIES: Final = 3
"""Times that an answer to somebody else's question is passed over."""


MAX_BODY_NBYTES: Final = 8 << 20
"""Of a question: twice what `MAX_TOKENS` take."""

Name = Annotated[str, msgspec.Meta(max_length=4096)]


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a question. Names are those of SGLang's `/generate`."""

    input_ids: TokenIds
    cache_salt: Name | None = None
    extra_key: Name | None = None
    lora_path: Name | None = None


class RefusedError(Exception):
    """A question that is not answered. The sentence says why, and what would be."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


# ---- the scheduler's side ----


def register() -> None:
    """Put the hooks in place. They do nothing in a server whose cache is not ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state", answer_in_state, HookType.AROUND
    )
    HookRegistry.register("sglang.srt.server_args.ServerArgs.check_server_args", _before_launch, HookType.BEFORE)


def answer_in_state(
    original: Callable[[Scheduler, GetInternalStateReq], GetInternalStateReqOutput],
    scheduler: Scheduler,
    request: GetInternalStateReq,
) -> GetInternalStateReqOutput:
    """A question of ours is answered instead of SGLang's; with SGLang's answers goes what serves and what does not."""
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    from sgl_lmcache.cache import TieredRadixCache

    question, cache = from_rid(request.rid), getattr(scheduler, "tree_cache", None)
    explainer = cache.explainer if isinstance(cache, TieredRadixCache) else None
    if question is not None:
        answer = None if explainer is None else explainer.answer(question)
        return GetInternalStateReqOutput(internal_state={STATE_KEY: msgspec.to_builtins(answer)})
    output = original(scheduler, request)
    if explainer is not None:
        output.internal_state[STATE_KEY] = msgspec.to_builtins(explainer.health())
    return output


# ---- the HTTP server's side ----


def _before_launch(server_args: ServerArgs) -> None:
    """SGLang is about to launch its schedulers. If it is for an HTTP server, that has been imported."""
    if server_args.radix_cache_backend != BACKEND or server_args.disable_radix_cache or HTTP_SERVER not in sys.modules:
        return
    from sglang.srt.entrypoints.http_server import app, get_global_state
    from sglang.srt.environ import envs

    path = envs.SGLANG_HTTP_SERVER_APP_PATH
    if server_args.tokenizer_worker_num == 1:
        add_routes(app, get_global_state)
    elif server_args.admin_api_key is None and not path.is_set():  # SGLang looks at no key in those processes
        path.set(HTTP_WORKERS)


def add_routes(app: FastAPI, state: Callable[[], Any]) -> None:
    """Once for an application; again does nothing. state: as for `Desk`."""
    from sglang.srt.utils.auth import AuthLevel, auth_level
    from starlette.routing import Route

    if any(getattr(route, "path", None) == EXPLAIN_PATH for route in app.router.routes):
        return
    desk = Desk(state)
    auth_level(AuthLevel.ADMIN_OPTIONAL)(Desk.explain)
    app.router.routes += [
        Route(EXPLAIN_PATH, desk.explain, methods=["POST"]),
        Route(LIVE_PATH, desk.live, methods=["GET"]),
        Route(READY_PATH, desk.ready, methods=["GET"]),
    ]


class Desk:
    """Answers over HTTP. On the server's event loop. state: SGLang's, with its tokenizer manager."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self._state = state
        self._health: asyncio.Task[list[Any]] | None = None
        self._asking: dict[str, asyncio.Task[list[Any]]] = {}
        """By the id of each explanation that is not over: what was asked of the schedulers last."""

    # ---- probes ----

    async def live(self, _request: Request) -> Response:
        """200 while this process answers and those that it watches are alive, 503 when one of them is not."""
        dead = [process.name for process in self._processes() if not process.is_alive()]
        return _answer(503 if dead else 200, {"live": not dead})

    async def ready(self, _request: Request) -> Response:
        """As SGLang's own /ready, and which tiers are not used; that alone never makes a server unready."""
        if not self._manager.is_ready():
            return _answer(503, {"ready": False})
        replicas = await self._replicas_health()
        if replicas is None:
            return _answer(200, {"ready": True, "busy": True, "degraded": []})
        tiers = dict.fromkeys((tier.tier, tier.state) for health in replicas for tier in health.tiers)
        degraded = [{"tier": tier, "state": state} for tier, state in tiers if state != "ok"]
        return _answer(200, {"ready": True, "busy": False, "degraded": degraded})

    async def _replicas_health(self) -> list[Health] | None:
        """None: the schedulers have not answered in time; they are not asked again before they have."""
        if self._health is None or self._health.done():
            self._health = asyncio.create_task(self._ask(AskHealth(secrets.token_hex(8))))
        asking = self._health  # others may wait for it as well, or ask anew
        done, _ = await asyncio.wait({asking}, timeout=HEALTH_TIMEOUT_S)
        if not done:
            return None
        return [msgspec.convert(answer, Health) for answer in asking.result() if answer is not None]

    # ---- explain ----

    async def explain(self, request: Request) -> Response:
        """What became of a prompt's pages, by replica."""
        try:
            question = self._question(await _body(request))
            replicas = await self._explanations(question)
        except RefusedError as error:
            return _answer(error.status, {"error": str(error)})
        return _answer(200, Answers(tuple(replicas)))

    def _question(self, body: bytes) -> Ask:
        try:
            prompt = msgspec.json.decode(body, type=Prompt)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RefusedError(
                400, f'The body is not a question ({error}); send one such as {{"input_ids": [1, 2, 3]}}.'
            ) from error
        if not 0 < len(prompt.input_ids) <= MAX_TOKENS:
            raise RefusedError(
                400, f"A prompt of 1 to {MAX_TOKENS:,} tokens can be explained, not of {len(prompt.input_ids):,}."
            )
        return Ask(
            id=secrets.token_hex(8),
            tokens=np.array(prompt.input_ids, "<i4").tobytes(),
            cache_salt=prompt.cache_salt,
            extra_key=prompt.extra_key,
            lora_id=None if prompt.lora_path is None else self._lora_id(prompt.lora_path),
        )

    def _lora_id(self, name: str) -> str:
        adapters = self._manager.lora_registry.get_all_adapters()
        if name not in adapters:
            raise RefusedError(400, f"There is no adapter {name!r}; there are: {', '.join(adapters) or 'none'}.")
        return str(adapters[name].lora_id)

    async def _explanations(self, question: Ask) -> list[Explanation]:
        """Asks again until all tiers have answered, or have had their time."""
        if len(self._asking) >= MAX_WAITING:
            raise RefusedError(503, f"{MAX_WAITING} other questions are not answered yet; ask again later.")
        until_s = time.monotonic() + TIERS_TIMEOUT_S
        try:
            explanations = await self._explained(question)
            if not explanations:
                raise RefusedError(
                    503, "The server runs without this cache, or others ask it too much; ask again later."
                )
            while any(one.waiting for one in explanations.values()) and time.monotonic() < until_s:
                await asyncio.sleep(POLL_S)
                explanations |= await self._explained(AskAgain(question.id))
        finally:
            self._asking[question.id].add_done_callback(lambda _: self._asking.pop(question.id))
        return [explanations[replica] for replica in sorted(explanations)]

    async def _explained(self, question: Ask | AskAgain) -> dict[int, Explanation]:
        """By replica; without those that remember nothing of the question."""
        asking = self._asking[question.id] = asyncio.create_task(self._ask(question))
        done, _ = await asyncio.wait({asking}, timeout=EXPLAIN_TIMEOUT_S)
        if not done:
            raise RefusedError(
                503, f"The scheduler has been busy for {EXPLAIN_TIMEOUT_S:.0f} s and has not answered; ask again later."
            )
        found = (msgspec.convert(one, Explanation | Unknown) for one in asking.result() if one is not None)
        return {one.replica: one for one in found if isinstance(one, Explanation)}

    # ---- the schedulers ----

    async def _ask(self, question: Question) -> list[Any]:
        """One answer a replica; None from one whose cache is not ours. Never cancelled (see the module's text)."""
        from sglang.srt.managers.io_struct import GetInternalStateReq

        manager = self._manager
        manager.auto_create_handle_loop()
        for _ in range(MAX_TRIES):
            outputs = await manager.get_internal_state_communicator(GetInternalStateReq(rid=to_rid(question)))
            states = [output.internal_state for output in outputs]
            if all(answers(state, question) for state in states):
                return [state[STATE_KEY] for state in states]
        return []

    @property
    def _manager(self) -> TokenizerManager:
        return self._state().tokenizer_manager

    def _processes(self) -> Iterable[Any]:
        watchdog = self._manager._subprocess_watchdog
        return () if watchdog is None else watchdog._processes


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_NBYTES:
            raise RefusedError(413, f"A question takes {MAX_BODY_NBYTES:,} bytes at most; this one is larger.")
    return bytes(body)


def _answer(status: int, body: object) -> Response:
    from starlette.responses import Response

    return Response(msgspec.json.encode(body), status, media_type="application/json")
