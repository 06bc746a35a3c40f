"""Endpoints of our own on SGLang's application: what they answer, to whom, and what they make of answers of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.utils.auth import _get_auth_level_from_app_and_scope, decide_request_auth

from sgl_lmcache import endpoints
from sgl_lmcache.endpoints import Desk, add_routes, answer_in_state
from sgl_lmcache.explanation import (
    EXPLAIN_PATH,
    LIVE_PATH,
    MAX_TOKENS,
    MAX_WAITING,
    READY_PATH,
    STATE_KEY,
    Ask,
    AskAgain,
    AskHealth,
    Explanation,
    Health,
    Question,
    TierHealth,
    Unknown,
    decode,
    from_rid,
    to_rid,
)

Reply = Callable[[Question], Any]


def explanation(id: str, *, replica: int = 0, waiting: tuple[str, ...] = ()) -> Explanation:
    return Explanation(id, replica, 16, 32, {"hbm": 16}, 16, (), waiting=waiting)


def answered(question: Question) -> Any:
    if isinstance(question, AskHealth):
        return Health(question.id, (TierHealth("host", "ok"), TierHealth("ssd", "given_up")))
    return explanation(question.id)


@dataclass(eq=False)
class Manager:
    """As much of SGLang's tokenizer manager as is used, over schedulers that `replies` stand for."""

    replies: list[Reply] = field(default_factory=lambda: [answered])
    is_up: bool = True
    hangs: bool = False
    processes: list[Any] = field(default_factory=list)
    stale: list[dict[str, Any]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        adapters = {"polite": SimpleNamespace(lora_id="id-1")}
        self.lora_registry = SimpleNamespace(get_all_adapters=lambda: adapters)
        self._subprocess_watchdog = SimpleNamespace(_processes=self.processes)

    def is_ready(self) -> bool:
        return self.is_up

    def auto_create_handle_loop(self) -> None:
        pass

    async def get_internal_state_communicator(self, request: GetInternalStateReq) -> list[GetInternalStateReqOutput]:
        question = from_rid(request.rid)
        assert question is not None
        self.questions.append(question)
        while self.hangs:
            await asyncio.sleep(0)
        if self.stale:
            return [GetInternalStateReqOutput(internal_state=self.stale.pop(0))]
        states = [{STATE_KEY: msgspec.to_builtins(reply(question))} for reply in self.replies]
        return [GetInternalStateReqOutput(internal_state=state) for state in states]


def served(manager: Manager) -> FastAPI:
    app = FastAPI()
    add_routes(app, lambda: SimpleNamespace(tokenizer_manager=manager))
    return app


def ask(app: FastAPI, method: str, path: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, json=body or None)

    return asyncio.run(send())


def explain(manager: Manager, **body: Any) -> httpx.Response:
    return ask(served(manager), "POST", EXPLAIN_PATH, **body)


# ---- explain ----


def test_a_prompt_is_asked_of_the_schedulers_and_their_answers_come_in_order() -> None:
    manager = Manager([lambda q: explanation(q.id, replica=1), lambda q: explanation(q.id, replica=0)])
    response = explain(manager, input_ids=[1, 2, 70_000], cache_salt="s", extra_key="e", lora_path="polite")
    assert [one.replica for one in decode(response.content).replicas] == [0, 1]
    (question,) = manager.questions
    assert isinstance(question, Ask)
    assert np.frombuffer(question.tokens, "<i4").tolist() == [1, 2, 70_000]
    assert (question.cache_salt, question.extra_key, question.lora_id) == ("s", "e", "id-1")


def test_tiers_that_answer_late_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "POLL_S", 0)
    waiting = [("valkey",), ("valkey",), ()]
    manager = Manager([lambda q: explanation(q.id, waiting=waiting.pop(0))])
    (one,) = decode(explain(manager, input_ids=[1]).content).replicas
    assert one.waiting == ()
    first, *later = manager.questions
    assert [type(question) for question in later] == [AskAgain, AskAgain]
    assert {question.id for question in later} == {first.id}


def test_a_replica_that_has_forgotten_the_question_keeps_its_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "POLL_S", 0)
    monkeypatch.setattr(endpoints, "TIERS_TIMEOUT_S", 0.02)
    manager = Manager(
        [lambda q: Unknown(q.id, 0) if isinstance(q, AskAgain) else explanation(q.id, waiting=("valkey",))]
    )
    (one,) = decode(explain(manager, input_ids=[1]).content).replicas
    assert one.waiting == ("valkey",)


def test_an_answer_to_somebody_elses_question_is_passed_over() -> None:
    others = msgspec.to_builtins(Health("other", ()))
    manager = Manager(stale=[{STATE_KEY: others}, {"server": "args"}])
    assert explain(manager, input_ids=[1]).status_code == 200
    assert len(manager.questions) == 3
    manager = Manager(stale=[{STATE_KEY: others}] * endpoints.MAX_TRIES)
    response = explain(manager, input_ids=[1])
    assert (response.status_code, response.json()["error"].endswith("ask again later.")) == (503, True)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"input_ids": []}, f"A prompt of 1 to {MAX_TOKENS:,} tokens can be explained, not of 0."),
        ({"input_ids": [0] * (MAX_TOKENS + 1)}, f"can be explained, not of {MAX_TOKENS + 1:,}."),
        ({"input_ids": ["a"]}, "The body is not a question (Expected `int`, got `str`"),
        ({"input_ids": [-1]}, "The body is not a question"),
        ({"input_ids": [2**31]}, "The body is not a question"),
        ({"text": "a"}, "unknown field `text`"),
        ({"input_ids": [1], "lora_path": "rude"}, "There is no adapter 'rude'; there are: polite."),
    ],
)
def test_what_is_not_a_question_is_refused_with_a_sentence(body: dict[str, Any], sentence: str) -> None:
    manager = Manager()
    response = explain(manager, **body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]
    assert manager.questions == []


def test_a_busy_scheduler_and_one_without_our_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    response = explain(Manager([lambda _: None]), input_ids=[1])
    assert (response.status_code, "without this cache" in response.json()["error"]) == (503, True)
    monkeypatch.setattr(endpoints, "EXPLAIN_TIMEOUT_S", 0.01)
    response = explain(Manager(hangs=True), input_ids=[1])
    assert (response.status_code, "has been busy" in response.json()["error"]) == (503, True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"input_ids": [1], "cache_salt": "\xff"}', 400),
        (b'{"input_ids": [1], "cache_salt": "' + 4097 * b"s" + b'"}', 400),
        (b" " * (endpoints.MAX_BODY_NBYTES + 1), 413),
    ],
)
def test_bodies_that_are_no_text_or_too_long(body: bytes, status: int) -> None:
    manager = Manager()

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(served(manager))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(EXPLAIN_PATH, content=body)

    response = asyncio.run(send())
    assert (response.status_code, manager.questions) == (status, [])
    assert response.json()["error"].endswith((".", "}."))


def test_so_many_questions_are_open_at_a_time_also_those_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "EXPLAIN_TIMEOUT_S", 0.01)
    manager = Manager(hangs=True)
    app = served(manager)

    async def send() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            ask = partial(client.post, EXPLAIN_PATH, json={"input_ids": [1]})
            codes = [response.status_code for response in await asyncio.gather(*(ask() for _ in range(50)))]
            n_asked = len(manager.questions)
            codes.append((await ask()).status_code)
            assert len(manager.questions) == n_asked == MAX_WAITING
            manager.hangs = False
            await asyncio.sleep(0.1)
            codes.append((await ask()).status_code)
            return codes

    assert asyncio.run(send()) == [503] * 51 + [200]


@pytest.mark.parametrize(
    ("api_key", "admin_api_key", "given", "is_allowed"),
    [
        (None, None, None, True),
        ("a", None, None, False),
        ("a", None, "a", True),
        (None, "b", None, False),
        ("a", "b", "a", False),
        ("a", "b", "b", True),
    ],
)
def test_explain_needs_the_admin_key_or_the_only_one_and_probes_need_none(
    api_key: str | None, admin_api_key: str | None, given: str | None, is_allowed: bool
) -> None:
    """By the rule that SGLang's middleware goes by, for the routes as they are in its application."""
    app = served(Manager())
    header = None if given is None else f"Bearer {given}"

    def allows(method: str, path: str, authorization: str | None) -> bool:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        decision = decide_request_auth(
            method=method,
            path=path,
            authorization_header=authorization,
            api_key=api_key,
            admin_api_key=admin_api_key,
            auth_level=_get_auth_level_from_app_and_scope(app, scope),
        )
        return bool(decision.allowed)

    assert allows("POST", EXPLAIN_PATH, header) == is_allowed
    assert allows("GET", LIVE_PATH, None)
    assert allows("GET", READY_PATH, None)


def test_routes_are_added_once() -> None:
    app = served(Manager())
    n_routes = len(app.router.routes)
    add_routes(app, lambda: None)
    assert len(app.router.routes) == n_routes


# ---- probes ----


def test_live_is_whether_the_processes_are_alive() -> None:
    alive, dead = (
        SimpleNamespace(name=name, is_alive=lambda alive=alive: alive) for name, alive in (("a", 1), ("b", 0))
    )
    assert ask(served(Manager(processes=[alive])), "GET", LIVE_PATH).status_code == 200
    response = ask(served(Manager(processes=[alive, dead], is_up=False)), "GET", LIVE_PATH)
    assert (response.status_code, response.json()) == (503, {"live": False})
    manager = Manager()
    manager._subprocess_watchdog = None  # type: ignore[assignment]
    assert ask(served(manager), "GET", LIVE_PATH).status_code == 200


def test_ready_is_what_sglang_says_whatever_the_tiers_do() -> None:
    response = ask(served(Manager()), "GET", READY_PATH)
    degraded = [{"tier": "ssd", "state": "given_up"}]
    assert (response.status_code, response.json()) == (200, {"ready": True, "busy": False, "degraded": degraded})
    manager = Manager(is_up=False)
    response = ask(served(manager), "GET", READY_PATH)
    assert (response.status_code, response.json()) == (503, {"ready": False})
    assert manager.questions == [], "a server that starts has no schedulers to ask"


def test_a_busy_scheduler_is_ready_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "HEALTH_TIMEOUT_S", 0.01)
    manager = Manager(hangs=True)
    desk = Desk(lambda: SimpleNamespace(tokenizer_manager=manager))

    async def probe() -> list[Any]:
        request: Any = None
        seen = [await desk.ready(request) for _ in range(3)]
        n_asked = len(manager.questions)
        manager.hangs = False
        seen += [await desk.ready(request), await desk.ready(request)]
        return [n_asked, len(manager.questions), *(msgspec.json.decode(response.body)["busy"] for response in seen)]

    assert asyncio.run(probe()) == [1, 2, True, True, True, False, False]


def test_probes_at_the_same_time_and_after_an_error() -> None:
    """They share a wait, and an error is that of those who had it."""
    manager = Manager()
    desk = Desk(lambda: SimpleNamespace(tokenizer_manager=manager))
    request: Any = None

    async def probe() -> list[int]:
        answers = await asyncio.gather(*(desk.ready(request) for _ in range(20)))
        manager.replies = [lambda _: 1 // 0]
        errors = await asyncio.gather(*(desk.ready(request) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [ZeroDivisionError] * 3
        manager.replies = [answered]
        return [answer.status_code for answer in (*answers, await desk.ready(request))]

    assert asyncio.run(probe()) == [200] * 21


# ---- the scheduler's side ----


def original(_scheduler: Any, _request: Any) -> GetInternalStateReqOutput:
    return GetInternalStateReqOutput(internal_state={"of": "sglang"})


@pytest.mark.parametrize("question", [Ask("1", b"\1\0\0\0", "salt", None, "id"), AskAgain("2"), AskHealth("3")])
def test_a_question_travels_in_the_rid(question: Question) -> None:
    assert from_rid(to_rid(question)) == question
    assert from_rid("HEALTH_CHECK_1") is None
    assert from_rid(None) is None


def test_a_scheduler_whose_cache_is_not_ours_answers_as_ever() -> None:
    scheduler: Any = SimpleNamespace(tree_cache=None)
    output = answer_in_state(original, scheduler, GetInternalStateReq())
    assert output.internal_state == {"of": "sglang"}
    output = answer_in_state(original, scheduler, GetInternalStateReq(rid=to_rid(AskHealth("1"))))
    assert output.internal_state == {STATE_KEY: None}
