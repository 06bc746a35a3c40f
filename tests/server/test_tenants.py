"""Requests that must not share KV do not, wherever it lies: by `cache_salt`, by `extra_key`, on every way in.

That an `sglang.Engine` does the same is in `test_surface.py`, which starts one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.traffic import prompt, push_out, reusable
from tests.support.server import Server

pytestmark = pytest.mark.server

Ask = Callable[..., tuple[int, int, str]]
"""Asks with some of a tenant's fields. (HBM hit, host hit, text), hits in tokens."""

TENANTS: list[dict[str, str]] = [
    {},
    {"cache_salt": "a"},
    {"cache_salt": "b"},
    {"extra_key": "a"},
    {"extra_key": "ab", "cache_salt": "c"},
    {"extra_key": "a", "cache_salt": "bc"},  # the same letters as above, cut elsewhere
    {"extra_key": "c", "cache_salt": "ab"},
]


def by_generate(server: Server) -> Ask:
    tokens = prompt("tenants", 400)

    def ask(**tenant: Any) -> tuple[int, int, str]:
        answer = server.generate(tokens, **tenant)
        return answer.device_tokens, answer.host_tokens, answer.text

    return ask


def by_chat(server: Server) -> Ask:
    content = "Whose cache is this? " * 60

    def ask(**tenant: Any) -> tuple[int, int, str]:
        body: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0, "max_tokens": 8, "return_cached_tokens_details": True, **tenant}
        return _openai(server.ask("/v1/chat/completions", **body), lambda choice: str(choice["message"]["content"]))

    return ask


def by_completions(server: Server) -> Ask:
    text = "Nobody else may read this. " * 60

    def ask(**tenant: Any) -> tuple[int, int, str]:
        body: dict[str, Any] = {"model": "default", "prompt": text, "temperature": 0, "max_tokens": 8}
        body |= {"return_cached_tokens_details": True, **tenant}
        return _openai(server.ask("/v1/completions", **body), lambda choice: str(choice["text"]))

    return ask


def _openai(body: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> tuple[int, int, str]:
    details = body.get("sglext", {}).get("cached_tokens_details") or {"device": 0, "host": 0}
    return details["device"], details["host"], text(body["choices"][0])


@pytest.mark.parametrize("way", [by_generate, by_chat, by_completions])
def test_tenants_find_their_own_kv_only(cached: Server, way: Callable[[Server], Ask]) -> None:
    ask = way(cached)
    cold = [ask(**tenant) for tenant in TENANTS]
    push_out(cached, way.__name__)
    restored = [ask(**tenant) for tenant in reversed(TENANTS)][::-1]
    push_out(cached, (way.__name__, "again"))
    newcomer = ask(cache_salt="newcomer")

    assert [(device, host) for device, host, _ in cold] == [(0, 0)] * len(TENANTS)
    assert {(device, host > 300) for device, host, _ in restored} == {(0, True)}
    assert newcomer[:2] == (0, 0)
    assert {text for _, _, text in [*cold, *restored, newcomer]} == {cold[0][2]}


def test_a_salt_of_each_prompt_of_a_batch(cached: Server) -> None:
    tokens = prompt("batch of tenants", 300)
    body = {"sampling_params": {"temperature": 0, "max_new_tokens": 4}, "input_ids": [tokens] * 2}
    salts = {"cache_salt": ["left", "right"]}
    cached.generate(tokens, cache_salt="left")
    push_out(cached, "batch of tenants")
    left, right = (answer["meta_info"] for answer in cached.ask("/generate", **body, **salts))

    assert left["cached_tokens_details"]["host"] == reusable(tokens)
    assert right["cached_tokens"] == 0
