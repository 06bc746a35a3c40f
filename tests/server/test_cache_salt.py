"""`cache_salt` as docs/security.md sets it: through SGLang's own API and through OpenAI's, below HBM too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import httpx
import openai
import pytest

from tests.server.traffic import push_out
from tests.support.server import ANSWER_TIMEOUT_S, Server

pytestmark = pytest.mark.server

Ask = Callable[[str, str | None], int]
"""Sends a prompt with a salt; returns how many of its tokens were cached."""


def native(server: Server, text: str, salt: str | None) -> int:
    body = {"text": text, "cache_salt": salt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=ANSWER_TIMEOUT_S)
    answer.raise_for_status()
    n_cached: int = answer.json()["meta_info"]["cached_tokens"]
    return n_cached


def chat(server: Server, text: str, salt: str | None) -> int:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": text}],
            max_tokens=1,
            extra_body={"cache_salt": salt} if salt else {},
        )
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return 0 if details is None else details.cached_tokens or 0


@pytest.mark.parametrize("api", [native, chat], ids=lambda api: api.__name__)
def test_only_the_same_salt_finds_a_prompt(cached: Server, api: Callable[[Server, str, str | None], int]) -> None:
    text = f"Through {api.__name__}: what only tenant 17 may know. " * 12
    ask: Ask = partial(api, cached)
    other_prefix = ask("Something else. " * 40, "tenant-18")
    assert other_prefix == 0

    assert ask(text, "tenant-17") == 0
    assert ask(text, "tenant-18") == 0
    assert ask(text, None) == 0
    in_hbm = ask(text, "tenant-17")
    push_out(cached, f"salt {api.__name__}")
    before = cached.at_rest()
    assert ask(text, "tenant-19") == 0
    assert cached.at_rest().restored == before.restored
    in_host_memory = ask(text, "tenant-17")
    assert in_hbm == in_host_memory > 100
    assert cached.at_rest().restored > before.restored
