"""The ways in: the flag alone, an engine in one's own process, the OpenAI endpoint; and what stops a start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from sgl_lmcache.cpu.model import TINY, make_model
from sgl_lmcache.page_size import PAGE_SIZES
from tests.server.conftest import PLAIN, Fleet, check_does_not_start
from tests.server.traffic import N_HBM_TOKENS, prompt, push_out
from tests.support.server import START_TIMEOUT_S, ProcessGroup, Server, Setup, base_environment

pytestmark = pytest.mark.server

FREE_NBYTES = 96 << 20
"""What the server of the flag alone is told is free on this machine, its KV pool included."""

FLAG_ALONE = Setup(
    "flag-alone",
    ("--max-total-tokens", str(N_HBM_TOKENS)),  # without it, SGLang's own pool takes all memory of a CPU
    environment={"SGL_LMCACHE_PROBE_FREE_NBYTES": str(FREE_NBYTES)},
)

WITHOUT_US = Setup("without-us", PLAIN.arguments, cached=False, environment={"SGLANG_PLUGINS": "sgl_lmcache_probe"})
"""As `PLAIN`, but SGLang does not load our plug-in at all."""

NOT_COMPARED = {"port", "launch_command", "startup_time", "internal_states"}
"""What differs between two stock servers too."""


def test_openai_chat_second_turn_hits(cached: Server) -> None:
    client = openai.OpenAI(base_url=f"{cached.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "What does a radix tree do? " * 30}]
    first = client.chat.completions.create(model="default", messages=messages, temperature=0, max_tokens=16)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And a slab?"})
    push_out(cached, "chat")
    before = cached.at_rest()
    second = client.chat.completions.create(model="default", messages=messages, temperature=0, max_tokens=16)
    after = cached.at_rest()
    client.close()

    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    n_cached = second.usage.prompt_tokens_details.cached_tokens
    assert n_cached is not None
    assert 0.9 * first.usage.prompt_tokens < n_cached < second.usage.prompt_tokens
    assert (after.restored - before.restored) * 16 == n_cached


def test_installed_without_the_flag_changes_nothing(fleet: Fleet) -> None:
    installed, absent = fleet.get(PLAIN), fleet.get(WITHOUT_US)
    facts, stock_facts = installed.facts(), absent.facts()
    assert facts.pop("pid") != stock_facts.pop("pid")
    assert facts.pop("backends") == [*stock_facts.pop("backends"), "sgl_lmcache"]
    assert facts == stock_facts
    assert facts["cache_class"] == "UnifiedRadixCache"
    assert not facts["enable_lmcache"]

    ours, stock = installed.info(), absent.info()
    assert ours.keys() == stock.keys()
    assert [name for name in ours if name not in NOT_COMPARED and ours[name] != stock[name]] == []


def test_flag_alone(fleet: Fleet) -> None:
    server = fleet.get(FLAG_ALONE)
    page_size = server.facts()["page_size"]
    tokens = prompt("flag alone", 1000)
    cold = server.generate(tokens)
    push_out(server, "flag alone")
    restored = server.generate(tokens)
    seen = server.at_rest()

    token_nbytes = 4 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim
    pool_nbytes = (N_HBM_TOKENS + page_size) * token_nbytes
    assert page_size in PAGE_SIZES
    assert seen.host["capacity"] == (FREE_NBYTES - pool_nbytes) // 2 // (page_size * token_nbytes)
    assert restored.host_tokens == (len(tokens) - 1) // page_size * page_size
    assert restored.tokens == cold.tokens
    assert (seen.violation, seen.mismatched, seen.checked) == (None, 0, restored.host_tokens // page_size)


def test_engine_in_this_process(fleet: Fleet, tmp_path: Path) -> None:
    """In a child of ours, so that SGLang's state and SGLang's children end with it."""
    fleet.rest()
    child = Path(__file__).with_name("engine_child.py")
    command = [sys.executable, str(child), str(make_model(TINY))]
    with ProcessGroup(command, base_environment(), tmp_path / "engine.log") as engine:
        assert engine.wait(START_TIMEOUT_S) == 0, engine.log_tail()
    last_line = [line for line in engine.log().splitlines() if line.startswith('{"answers"')][-1]
    seen = msgspec.json.decode(last_line)

    for answers in (seen["answers"], seen["salted"]):  # the same prompts; no tenant finds the other's
        first, *others, again = answers
        assert [answer["details"] for answer in (first, *others)] == [None] * 5
        assert (again["details"]["device"], again["details"]["host"]) == (0, 784)
        assert again["tokens"] == first["tokens"]
    assert [answer["tokens"] for answer in seen["salted"]] == [answer["tokens"] for answer in seen["answers"]]


@pytest.mark.parametrize(
    ("name", "arguments", "config", "sentence"),
    [
        ("bad-key", (), "tiers: [{type: host, capcity: 16MiB}]", r"tiers\[0\]\.capcity.*did you mean capacity"),
        ("bad-tier", (), "tiers: [{type: hots}]", r'tiers\[0\]\.type is "hots".*available: host'),
        ("too-large", (), "tiers: [{type: host, capacity: 900TiB}]", r"tiers\[0\]\.capacity is .* but only .* is free"),
        ("bad-page", ("--page-size", "8"), None, r"--page-size 8 is below 16"),
    ],
)
def test_wrong_configuration_stops_the_start(
    fleet: Fleet, tmp_path: Path, name: str, arguments: tuple[str, ...], config: str | None, sentence: str
) -> None:
    arguments = ("--max-total-tokens", str(N_HBM_TOKENS), *arguments)
    check_does_not_start(fleet, Setup(name, arguments, config=config), tmp_path, sentence)
