"""`sgl-lmcache explain`, and the endpoints for probes, against a server with a small host tier and a small SSD tier."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from sgl_lmcache import cli
from sgl_lmcache.explanation import EXPLAIN_PATH, LIVE_PATH, READY_PATH, Explanation, decode
from tests.server.conftest import ARGUMENTS, CACHED, Fleet, check_at_rest, running
from tests.server.traffic import PAGE_SIZE, Prompt, prompt, push_out, reusable, whole_pages
from tests.support.server import ANSWER_TIMEOUT_S, Faults, Server, Setup, wait_for

pytestmark = pytest.mark.server

N_HOST_TOKENS = 768 * PAGE_SIZE
N_SSD_TOKENS = 2500 * PAGE_SIZE
"""More than the SSD holds."""


@pytest.fixture(scope="module")
def server(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("explain")
    config = f"""
        tiers:
          - {{type: host, capacity: 24MiB}}
          - {{type: ssd, path: {folder / "store"}, capacity: 64MiB}}
        prefetch: {{policy: wait, timeout: 10s}}
    """
    arguments = (*ARGUMENTS, "--sleep-on-idle")
    with running(fleet, Setup("explain", arguments, config=config), folder / "server") as server:
        yield server
        check_at_rest(server)


@pytest.fixture(autouse=True)
def _empty(server: Server) -> None:
    server.flush()
    server.clear_storage()


def explain(server: Server, tokens: Sequence[int], **fields: str) -> Explanation:
    (explanation,) = server.explain(tokens, **fields)
    return explanation


def reasons(explanation: Explanation) -> list[tuple[str, str | None]]:
    return [(run.reason, run.tier) for run in explanation.runs if not run.tiers]


def below_hbm(server: Server, seed: str, n_tokens: int = 1000) -> Prompt:
    """A prompt that is on the SSD and has left HBM and host memory."""
    tokens = prompt(seed, n_tokens)
    server.generate(tokens, 1)
    push_out(server, (seed, "others"), N_HOST_TOKENS + 5000)
    return tokens


def test_a_prompt_that_nobody_has_sent(server: Server) -> None:
    tokens = prompt("never", 1000)
    explanation = explain(server, tokens)
    assert reasons(explanation) == [("never_seen", None), ("partial_page", None)]
    assert (sum(explanation.hit_tokens.values()), explanation.compute_tokens) == (0, 1000)
    assert explanation.changed_at is None


def test_from_hbm_over_host_memory_to_the_ssd_and_out_of_it(server: Server) -> None:
    tokens = prompt("way down", 1000)
    server.generate(tokens, 1)
    explanation = explain(server, tokens)
    assert [run.tiers for run in explanation.runs] == [("hbm", "host", "ssd"), ()]
    assert explanation.hit_tokens == {"hbm": reusable(tokens), "host": 0, "ssd": 0}

    push_out(server, "a")
    explanation = explain(server, tokens)
    assert explanation.runs[0].tiers == ("host", "ssd")
    assert explanation.hit_tokens["host"] == reusable(tokens)

    push_out(server, "b", N_HOST_TOKENS)
    explanation = explain(server, tokens)
    assert explanation.runs[0].tiers == ("ssd",)
    assert explanation.hit_tokens["ssd"] == server.generate(tokens, 1).storage_tokens == reusable(tokens)

    push_out(server, "c", N_SSD_TOKENS)
    explanation = explain(server, prompt(("a", 0), 1000))  # one that nobody has asked for again
    assert reasons(explanation)[0] == ("evicted", "ssd")
    age_s = explanation.runs[0].seconds_ago
    assert age_s is not None
    assert 0 <= age_s < ANSWER_TIMEOUT_S


def test_looking_changes_nothing(server: Server) -> None:
    tokens = prompt("look", 1000)
    server.generate(tokens, 1)
    before = server.at_rest()
    assert explain(server, tokens) is not None
    after = server.at_rest()
    assert (after.host, after.hbm, after.mirror) == (before.host, before.hbm, before.mirror)


def test_another_salt_and_a_chat_that_was_cut_at_the_front(server: Server) -> None:
    tokens = prompt("chat", 2000)
    server.generate(tokens, 1, cache_salt="tenant-1")
    assert reasons(explain(server, tokens, cache_salt="tenant-1")) == []
    for salt in ({}, {"cache_salt": "tenant-2"}):
        assert reasons(explain(server, tokens, **salt)) == [("other_namespace", None)]
    cut = tokens[:320] + tokens[320 + 37 :]
    explanation = explain(server, cut, cache_salt="tenant-1")
    assert explanation.changed_at == explanation.hit_tokens["hbm"] == 320
    assert ("prefix_changed", None) in reasons(explanation)
    moved = sum(run.end - run.start for run in explanation.runs if run.reason == "prefix_changed")
    assert moved > 1400, "nearly all of the rest"


def test_flushed_and_deleted(server: Server) -> None:
    tokens = prompt("cleared", 800)
    server.generate(tokens, 1)
    server.at_rest()
    server.flush()
    assert explain(server, tokens).runs[0].tiers == ("ssd",)
    server.clear_storage()
    assert reasons(explain(server, tokens)) == [("cleared", "ssd")]


def test_a_disk_that_fails_is_said_to_be_down_and_the_server_stays_ready(server: Server) -> None:
    tokens = below_hbm(server, "disk")
    server.at_rest()
    with server.probe.faults(Faults(disk_errno=errno.EIO)):
        assert server.generate(tokens, 1).storage_tokens == 0
        push_out(server, "others", N_HOST_TOKENS + 5000)
        explanation = explain(server, tokens)
        if explanation.down:  # between two trials of the disk
            assert explanation.down == ("ssd",)
            assert ("tier_down", "ssd") in reasons(explanation)
        wait_for("it is said", lambda: _degraded(server) == [{"tier": "ssd", "state": "given_up"}] or None, 30)
    wait_for("the disk is used again", lambda: _degraded(server) == [] or None, ANSWER_TIMEOUT_S)


def _degraded(server: Server) -> object:
    response = httpx.get(f"{server.url}{READY_PATH}", trust_env=False)
    assert response.status_code == 200
    assert response.json()["ready"] is True
    return response.json()["degraded"]


def test_the_probes(server: Server) -> None:
    live = httpx.get(f"{server.url}{LIVE_PATH}", trust_env=False)
    assert (live.status_code, live.json()) == (200, {"live": True})
    ready = httpx.get(f"{server.url}{READY_PATH}", trust_env=False)
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "busy": False, "degraded": []})
    server.pause("in_place")
    try:
        assert httpx.get(f"{server.url}{READY_PATH}", trust_env=False).status_code == 503
        assert httpx.get(f"{server.url}{LIVE_PATH}", trust_env=False).status_code == 200
    finally:
        server.resume()
    (state,) = server.info()["internal_states"]
    assert [tier["state"] for tier in state["sgl_lmcache"]["tiers"]] == ["ok", "ok"]


def test_several_http_processes(fleet: Fleet, tmp_path: Path) -> None:
    """Whichever takes the question gets its answer."""
    setup = Setup("http-workers", (*ARGUMENTS, "--tokenizer-worker-num", "2", "--sleep-on-idle"), config=CACHED.config)
    with running(fleet, setup, tmp_path / "server") as server:
        tokens = prompt("workers", 500)
        server.generate(tokens, 1)
        for _ in range(20):  # each time a new connection, which either of them may take
            for path in (LIVE_PATH, READY_PATH):
                assert httpx.get(f"{server.url}{path}", trust_env=False).status_code == 200
            asked = httpx.post(f"{server.url}{EXPLAIN_PATH}", json={"input_ids": tokens}, trust_env=False)
            (replica,) = decode(asked.content).replicas
            assert replica.hit_tokens["hbm"] == reusable(tokens)


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Where are the pages of this prompt, and why is the rest not there? " * 12
    answer = server.generate(text, 1)
    server.at_rest()
    assert cli.main(["explain", "--url", server.url, "--text", text, "--json"]) == 0
    (replica,) = json.loads(capsys.readouterr().out)["replicas"]
    assert replica["n_tokens"] == answer.prompt_tokens, "tokens as /generate makes them"
    assert replica["hit_tokens"]["hbm"] == whole_pages(answer.prompt_tokens - 1)
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(prompt("command", 100)))
    assert cli.main(["explain", "--url", server.url, "--tokens", str(file), "--salt", "s"]) == 0
    shown = capsys.readouterr().out
    assert "never seen" in shown
    assert "Nothing would be found now: all 100 tokens are to be computed." in shown
    assert cli.main(["explain", "--url", server.url, "--tokens", str(file), "--lora", "x"]) == 1
    assert "There is no adapter 'x'; there are: none." in capsys.readouterr().err
