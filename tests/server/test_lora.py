"""KV of a LoRA adapter is found by requests with that adapter only: not by others, not by the base model, in no order.

All requests here have the same tokens. What is found is told apart twice: by SGLang's counts of hits, and by the
answers, which differ between adapters and would not come out right from another one's KV.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, check_at_rest
from tests.server.traffic import prompt, push_out, reusable
from tests.support.adapters import MODULES, RANK, write_adapter
from tests.support.server import Answer, Server, Setup

pytestmark = pytest.mark.server

BASE = None
USERS = (BASE, "left", "right")
TOKENS = prompt("adapters", 500)
SETUP = Setup(
    "lora",
    (
        *ARGUMENTS,
        "--enable-lora",
        *("--lora-backend", "torch_native"),
        *("--max-loras-per-batch", "3"),
        *("--max-lora-rank", str(RANK)),
        *("--lora-target-modules", *MODULES),
    ),
    config="tiers: [{type: host, capacity: 24MiB}]\n",
)


@pytest.fixture
def server(fleet: Fleet) -> Iterator[Server]:
    """Empty, without any adapter."""
    server = fleet.get(SETUP)
    server.flush()
    yield server
    check_at_rest(server)


@pytest.fixture
def adapters(server: Server, tmp_path: Path) -> Iterator[Path]:
    """Two that are loaded, `left` and `right`, in folders of these names."""
    for seed, name in enumerate(("left", "right")):
        write_adapter(tmp_path / name, seed)
        load(server, name, tmp_path / name)
    yield tmp_path
    for name in ("left", "right"):
        unload(server, name)


def load(server: Server, name: str, folder: Path) -> None:
    assert server.ask("/load_lora_adapter", lora_name=name, lora_path=str(folder))["success"]


def unload(server: Server, name: str) -> None:
    assert server.ask("/unload_lora_adapter", lora_name=name)["success"]


def ask(server: Server, user: str | None, **fields: Any) -> Answer:
    return server.generate(TOKENS, lora_path=user, **fields)


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("fields", [{}, {"cache_salt": "shared"}], ids=["plain", "salted"])
@pytest.mark.parametrize("order", [USERS, USERS[::-1]], ids=["base-first", "base-last"])
def test_an_adapter_finds_its_own_kv_only(
    server: Server, order: tuple[str | None, ...], fields: dict[str, str]
) -> None:
    cold = {user: ask(server, user, **fields) for user in order}
    on_device = {user: ask(server, user, **fields) for user in order}
    push_out(server, "adapters")
    restored = {user: ask(server, user, **fields) for user in order}

    assert [answer.cached_tokens for answer in cold.values()] == [0, 0, 0]
    assert len({answer.tokens for answer in cold.values()}) == 3
    for user in USERS:
        assert (on_device[user].device_tokens, on_device[user].host_tokens) == (reusable(TOKENS), 0)
        assert (restored[user].device_tokens, restored[user].host_tokens) == (0, reusable(TOKENS))
        assert cold[user].tokens == on_device[user].tokens == restored[user].tokens
        assert cold[user].logprobs == on_device[user].logprobs == restored[user].logprobs


@pytest.mark.usefixtures("adapters")
def test_explain_knows_adapters_by_name(server: Server) -> None:
    tokens = prompt("explained", 500)
    server.generate(tokens, lora_path="left")
    found = {user: server.explain(tokens, lora_path=user)[0] for user in USERS}
    assert {user: one.hit_tokens["hbm"] for user, one in found.items()} == {
        BASE: 0,
        "left": reusable(tokens),
        "right": 0,
    }
    assert found["right"].runs[0].reason == found[BASE].runs[0].reason == "other_namespace"


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(("owner", "thief"), [*itertools.permutations(USERS, 2)])
def test_what_only_host_memory_has_is_not_found_by_others(server: Server, owner: str | None, thief: str | None) -> None:
    """The owner's pages are in host memory alone when the other asks for the same tokens first."""
    kept = ask(server, owner)
    push_out(server, "thief")
    stolen = ask(server, thief)
    own = ask(server, owner)

    assert stolen.cached_tokens == 0
    assert stolen.tokens != kept.tokens
    assert (own.device_tokens, own.host_tokens, own.tokens) == (0, reusable(TOKENS), kept.tokens)


def test_another_adapter_under_the_same_name_and_path(server: Server, adapters: Path) -> None:
    left, right = ask(server, "left"), ask(server, "right")
    unload(server, "left")
    write_adapter(adapters / "left", seed=1)  # the files of `right`, where those of `left` have been
    load(server, "left", adapters / "left")
    changed = ask(server, "left")
    push_out(server, "reloaded")
    restored = ask(server, "left")

    assert left.tokens != right.tokens
    assert (changed.cached_tokens, changed.tokens) == (0, right.tokens)
    assert (restored.host_tokens, restored.tokens) == (reusable(TOKENS), right.tokens)


def test_another_adapter_under_the_same_name_when_only_host_memory_has_the_old_one(
    server: Server, adapters: Path
) -> None:
    left, right = ask(server, "left"), ask(server, "right")
    push_out(server, "old adapter")
    unload(server, "left")
    write_adapter(adapters / "left", seed=1)
    load(server, "left", adapters / "left")
    changed = ask(server, "left")

    assert left.tokens != right.tokens
    assert (changed.cached_tokens, changed.tokens, changed.logprobs) == (0, right.tokens, right.logprobs)
