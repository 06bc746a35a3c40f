"""Servers with an SSD tier: what is there after a restart, and what becomes of requests while the disk fails."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from hicache.ssd import check_path
from sgl_lmcache.cpu.model import TINY, make_model
from tests.server.conftest import ARGUMENTS, Fleet, at_tp, check_at_rest, running
from tests.server.sharing import BATCHED
from tests.server.traffic import PAGE_SIZE, Tolerance, prompt, push_out, reusable
from tests.support.server import ANSWER_TIMEOUT_S, END_TIMEOUT_S, START_TIMEOUT_S, Faults, Server, Setup, wait_for

pytestmark = pytest.mark.server

PREFETCH_TIMEOUT_S = 10
"""Longer than a hanging disk takes to be noticed."""

CAPACITY = "256MiB"
N_CLIENTS = 6


def ssd_setup(folder: Path, name: str = "ssd", *, policy: str = "wait", capacity: str = CAPACITY) -> Setup:
    """Host memory of 768 pages and a store of some thousand."""
    config = f"""
        tiers:
          - {{type: host, capacity: 24MiB}}
          - {{type: ssd, path: {folder}, capacity: {capacity}}}
        prefetch: {{policy: {policy}, timeout: {PREFETCH_TIMEOUT_S}s}}
    """
    return Setup(name, (*ARGUMENTS, "--enable-metrics"), config=config)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def ssd(fleet: Fleet, store: Path) -> Iterator[Server]:
    """A server with an SSD tier, with nothing in HBM or host memory. A test leaves it whole."""
    server = fleet.get(ssd_setup(store))
    wait_for("the disk is used", lambda: server.inspect().tier["available"] or None, ANSWER_TIMEOUT_S)
    server.flush()
    yield server
    check_at_rest(server)


# ---- restarts ----


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_restarted_server_answers_from_its_disk(fleet: Fleet, tmp_path: Path, n_ranks: int) -> None:
    setup = at_tp(ssd_setup(tmp_path / "store"), n_ranks)
    tokens = prompt("restart", 1500)
    with running(fleet, setup, tmp_path / "first") as server:
        cold = server.generate(tokens)
        seen = check_at_rest(server)
        assert seen.tier["n_pages"] >= reusable(tokens) // 16
        server.terminate()
    with running(fleet, setup, tmp_path / "second") as server:
        hit = server.generate(tokens)
        assert (hit.storage_tokens, hit.device_tokens, hit.host_tokens) == (reusable(tokens), 0, 0)
        Tolerance(0.0).check(hit, cold)
        again = server.generate(tokens)
        assert (again.device_tokens, again.storage_tokens) == (reusable(tokens), 0)
        push_out(server, "others")
        host = server.generate(tokens)
        assert (host.host_tokens, host.storage_tokens) == (reusable(tokens), 0), "what was fetched stays in host memory"
        check_at_rest(server)


def test_a_server_that_is_killed_while_it_writes_answers_as_before(fleet: Fleet, tmp_path: Path) -> None:
    """Three kills under load. After each: all that the map names is whole, the cap holds, and answers are the same."""
    store, chance = tmp_path / "store", random.Random(4)
    setup = ssd_setup(store, capacity="48MiB")
    tokens = prompt("before all kills", 1000)
    cold = None
    n_hits = 0
    for round_number in range(4):
        with running(fleet, setup, tmp_path / f"server-{round_number}") as server:
            answer = server.generate(tokens)
            n_hits += answer.storage_tokens > 0
            cold = cold or answer
            Tolerance(0.0).check(answer, cold)
            assert server.inspect().tier["corrupt"] == 0
            if round_number < 3:
                _kill_under_load(server, chance)
        assert [report.damage for report in check_path(store, fix=False)] == [[]]
        assert sum(512 * path.stat().st_blocks for path in store.rglob("*")) <= 48 << 20
    assert n_hits == 3, "its pages were used in each round, so they are the last to leave"


def _kill_under_load(server: Server, chance: random.Random) -> None:
    answered: list[None] = []

    def send(client: int) -> None:
        numbers = random.Random(client)
        with suppress(httpx.TransportError, AssertionError):
            while True:
                server.generate(prompt((server.url, numbers.randrange(1000)), 400), 2)
                answered.append(None)

    with ThreadPoolExecutor(N_CLIENTS) as threads:
        for client in range(N_CLIENTS):
            threads.submit(send, client)
        n_before = chance.randint(8, 30)
        wait_for("answers", lambda: len(answered) >= n_before or None, ANSWER_TIMEOUT_S)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(server.probe.facts()["pid"], signal.SIGKILL)
        wait_for("it has ended", server.processes.left_nothing, END_TIMEOUT_S)


def test_a_second_server_on_the_same_store_does_not_start(ssd: Server, store: Path, tmp_path: Path) -> None:
    second = Server(ssd_setup(store, "second"), tmp_path / "second")
    processes = second.launch()
    try:
        assert wait_for("it has ended", processes.exit_code, START_TIMEOUT_S) != 0
        assert f"{store} is in use by another server" in processes.log()
    finally:
        processes.stop()


# ---- hits ----


def test_what_a_flush_drops_comes_back_from_disk(ssd: Server) -> None:
    tokens = prompt("flushed", 1200)
    cold = ssd.generate(tokens)
    ssd.at_rest()
    ssd.flush()
    hit = ssd.generate(tokens)
    assert (hit.storage_tokens, hit.host_tokens, hit.device_tokens) == (reusable(tokens), 0, 0)
    Tolerance(0.0).check(hit, cold)


def test_a_longer_prompt_hits_disk_host_and_hbm_at_once(ssd: Server) -> None:
    tokens = prompt("three tiers", 1600)
    cold = ssd.generate(tokens)
    ssd.at_rest()
    ssd.flush()
    ssd.generate(tokens[:800], 1)
    ssd.at_rest()
    hit = ssd.generate(tokens)
    found = (hit.device_tokens, hit.host_tokens, hit.storage_tokens)
    assert found == (800, 0, reusable(tokens) - 800)
    assert hit.tokens[0] == cold.tokens[0]


def test_many_requests_for_the_same_pages_load_them_once(ssd: Server) -> None:
    tokens = prompt("single flight", 1000)
    cold = ssd.generate(tokens)
    before = ssd.at_rest()
    ssd.flush()
    answers = ssd.generate_all([tokens] * 16)
    after = ssd.at_rest()
    assert {answer.tokens[0] for answer in answers} == {cold.tokens[0]}
    assert after.tier["loaded"] - before.tier["loaded"] == reusable(tokens) // 16
    assert after.stats["fetched"] - before.stats["fetched"] == reusable(tokens) // 16


def test_a_queue_longer_than_host_memory_finds_all_that_the_disk_has(ssd: Server) -> None:
    """Waiting requests may lease half of its 768 pages; these have 1,504. What is loaded for one stays there."""
    prompts = [prompt(("queue", number), 1505) for number in range(16)]
    cold = ssd.generate_all(prompts, n_at_once=1)
    before = ssd.at_rest()
    ssd.flush()
    answers = ssd.generate_all(prompts)
    after = ssd.at_rest()
    assert [answer.cached_tokens for answer in answers] == [reusable(tokens) for tokens in prompts]
    assert after.tier["loaded"] - before.tier["loaded"] == sum(reusable(tokens) for tokens in prompts) // PAGE_SIZE
    for answer, first in zip(answers, cold, strict=True):
        BATCHED.check(answer, first)


def test_emptying_the_store_is_a_miss(ssd: Server) -> None:
    tokens = prompt("emptied", 600)
    ssd.generate(tokens, 1)
    ssd.at_rest()
    ssd.clear_storage()
    assert ssd.inspect().tier["n_pages"] == 0
    ssd.flush()
    assert ssd.generate(tokens, 1).cached_tokens == 0


def test_new_weights_find_nothing_of_the_old_ones(ssd: Server) -> None:
    tokens = prompt("weights", 700)
    old = ssd.generate(tokens)
    ssd.at_rest()
    try:
        ssd.ask("/update_weights_from_disk", model_path=str(make_model(replace(TINY, name="tiny-new", seed=1))))
        new = ssd.generate(tokens)
        assert new.cached_tokens == 0
        assert new.logprobs != old.logprobs
        ssd.at_rest()
        ssd.flush()
        again = ssd.generate(tokens)
        assert again.storage_tokens == reusable(tokens), "the new weights have a store of their own"
        Tolerance(0.0).check(again, new)
    finally:
        ssd.ask("/update_weights_from_disk", model_path=str(make_model(TINY)))
    back = ssd.generate(tokens)
    assert back.cached_tokens == 0
    Tolerance(0.0).check(back, old)


def test_the_tier_is_seen_in_the_metrics_of_sglang(ssd: Server) -> None:
    tokens = prompt("metrics", 500)
    ssd.generate(tokens, 1)
    ssd.at_rest()
    ssd.flush()
    ssd.generate(tokens, 1)
    n_loaded = ssd.at_rest().tier["loaded"]

    def counted() -> bool | None:
        figures = ssd.metrics()
        return figures['sgl_lmcache_loaded_pages_total{tier="ssd"}'] >= n_loaded or None

    wait_for("the counts are carried over", counted, ANSWER_TIMEOUT_S)
    assert ssd.metrics()['sgl_lmcache_tier_available{tier="ssd"}'] == 1
    assert ssd.metrics()['sgl_lmcache_tier_used_bytes{tier="ssd"}'] > 0


# ---- failing disks ----

FAILURES = {
    "EIO": Faults(disk_errno=errno.EIO),
    "EACCES": Faults(disk_errno=errno.EACCES, disk_calls=("open", "preadv", "pwritev")),
    "ENOSPC": Faults(disk_errno=errno.ENOSPC, disk_calls=("fallocate", "pwritev")),
    "EROFS": Faults(disk_errno=errno.EROFS, disk_calls=("open", "pwritev", "fdatasync")),
    "hang": Faults(disk_hangs=True),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_requests_are_served_while_the_disk_fails_and_hit_again_afterwards(ssd: Server, failure: str) -> None:
    known = [prompt((failure, number), 500) for number in range(6)]
    fresh = [prompt((failure, "fresh", number), 500) for number in range(6)]
    cold = ssd.generate_all(known, n_at_once=1)
    ssd.at_rest()
    ssd.flush()
    assert all(answer.storage_tokens == 496 for answer in ssd.generate_all(known, n_at_once=2)), "before"
    ssd.at_rest()
    n_logged = len(ssd.log_lines("SSD tier: the store|does not answer"))

    with ssd.probe.faults(FAILURES[failure]):
        ssd.flush()
        answers = ssd.generate_all(known + fresh, n_at_once=6)
        assert [answer.finish_reason for answer in answers] == ["length"] * 12
        assert [answer.tokens[0] for answer in answers[:6]] == [answer.tokens[0] for answer in cold]
        wait_for("the failure is noticed", lambda: not ssd.inspect().tier["available"] or None, ANSWER_TIMEOUT_S)
        ssd.flush()
        assert ssd.generate(known[0]).tokens == cold[0].tokens
    assert 1 <= len(ssd.log_lines("SSD tier: the store|does not answer")) - n_logged <= 2

    wait_for("the disk is used again", lambda: ssd.inspect().tier["available"] or None, ANSWER_TIMEOUT_S)
    ssd.generate_all(known, 1, n_at_once=2)
    ssd.at_rest()
    ssd.flush()
    after = ssd.generate_all(known, n_at_once=2)
    assert sum(answer.storage_tokens > 0 for answer in after) == 6, "after"
    assert [answer.tokens[0] for answer in after] == [answer.tokens[0] for answer in cold]


def test_a_request_that_waits_for_the_disk_is_overtaken(ssd: Server) -> None:
    tokens = prompt("waits", 900)
    cold = ssd.generate(tokens)
    ssd.at_rest()
    ssd.flush()
    with ThreadPoolExecutor(1) as thread:
        with ssd.probe.faults(Faults(disk_hangs=True)):
            waiting = thread.submit(ssd.generate, tokens)
            wait_for("it waits", lambda: ssd.inspect().requests["waiting"] or None, ANSWER_TIMEOUT_S)
            ssd.generate(prompt("overtakes", 40), 1)
            assert not waiting.done()
        answer = waiting.result()
    assert answer.tokens[0] == cold.tokens[0]
