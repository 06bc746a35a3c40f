"""Every metric moves for the right reason on a real server, and says what the answers say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from sgl_lmcache import cli
from tests.server.conftest import ARGUMENTS, PLAIN, Fleet, check_at_rest
from tests.server.traffic import PAGE_SIZE, prompt, reusable
from tests.support.server import ANSWER_TIMEOUT_S, Answer, Server, Setup, wait_for

pytestmark = pytest.mark.server

N_SLOTS = 512
SLOT_NBYTES = 32 << 10
"""Of the tiny model."""

CALLS = 'sgl_lmcache_call_seconds_total{call="iteration"}'


class Client:
    """Asks a server, and keeps what the answers say."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.answers: list[Answer] = []
        self._before = self._settled()

    def ask(self, tokens: list[int]) -> Answer:
        answer = self.server.generate(tokens, 2)
        self.answers.append(answer)
        return answer

    def ask_others(self, seed: object, n_prompts: int) -> None:
        for number in range(n_prompts):
            self.ask(prompt((seed, number), 1000))

    def moved(self) -> dict[str, float]:
        """Since the last time it was asked: what has become more or less of each metric, everything being at rest."""
        before, self._before = self._before, self._settled()
        changes = {name: value - before.get(name, 0) for name, value in self._before.items()}
        return {name.removeprefix("sgl_lmcache_"): change for name, change in changes.items() if change}

    def _settled(self) -> dict[str, float]:
        self.server.at_rest()
        seen = [self._iterations()]

        def published() -> bool | None:
            """Twice, the first time perhaps half of it was before."""
            seen.append(self._iterations())
            return len(set(seen)) > 2 or None

        wait_for("the numbers are carried over", published, ANSWER_TIMEOUT_S)
        return {name: value for name, value in self.server.metrics().items() if name.startswith(("sgl_", "sglang:"))}

    def _iterations(self) -> float:
        return self.server.metrics()[CALLS]

    def total(self, count: str) -> int:
        return sum(getattr(answer, count) for answer in self.answers)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    config = f"""
        tiers:
          - {{type: host, capacity: {N_SLOTS * SLOT_NBYTES}, eviction: lru}}
          - {{type: ssd, path: {tmp_path_factory.mktemp("store")}, capacity: 256MiB}}
        prefetch: {{policy: wait, timeout: 30s}}
    """
    return Setup("metrics", (*ARGUMENTS, "--enable-metrics"), config=config)


@pytest.fixture
def client(fleet: Fleet, setup: Setup) -> Iterator[Client]:
    server = fleet.get(setup)
    wait_for("the disk is used", lambda: server.inspect().tier["available"] or None, ANSWER_TIMEOUT_S)
    server.flush()
    yield Client(server)
    check_at_rest(server)


def test_every_metric_moves_for_its_reason_and_hits_are_those_of_the_answers(client: Client) -> None:
    """One document: new, in HBM, in host memory, and on the SSD."""
    tokens = prompt("document", 1000)
    n_hit = reusable(tokens)
    n_pages = n_hit // PAGE_SIZE

    client.ask(tokens)
    moved = client.moved()
    assert (moved["requests_total"], moved["miss_tokens_total"]) == (1, len(tokens))
    assert moved['stored_pages_total{tier="host"}'] == moved['stored_pages_total{tier="ssd"}'] == n_pages
    assert moved['written_bytes_total{tier="host"}'] == n_pages * SLOT_NBYTES
    assert moved['tier_pages{tier="hbm"}'] == moved['tier_pages{tier="host"}'] == moved['tier_pages{tier="ssd"}']
    assert moved['host_slots{state="free"}'] == -n_pages
    assert moved['fetch_decisions_total{decision="absent"}'] == 1
    assert not [name for name in moved if re.match("hit_tokens|saved|loaded|restore|evicted|skipped|fetch_s", name)]

    assert client.ask(tokens).device_tokens == n_hit
    moved = client.moved()
    assert (moved['hit_tokens_total{tier="hbm"}'], moved["miss_tokens_total"]) == (n_hit, len(tokens) - n_hit)
    assert moved['saved_seconds_total{tier="hbm"}'] > 0
    assert moved["page_reuse_gap_seconds_count"] == n_pages
    assert not [name for name in moved if re.match("loaded|stored|restore|evicted|fetch_s", name)]
    _check_hicache_gauges(client)

    client.ask_others("push out of HBM", 5)
    moved = client.moved()
    assert moved['evicted_pages_total{reason="capacity",tier="hbm"}'] >= n_pages
    assert 'evicted_pages_total{reason="capacity",tier="host"}' not in moved

    assert client.ask(tokens).host_tokens == n_hit
    moved = client.moved()
    assert moved['hit_tokens_total{tier="host"}'] == n_hit
    assert moved['saved_seconds_total{tier="host"}'] > 0
    assert moved['loaded_pages_total{tier="host"}'] == moved["page_reuse_gap_seconds_count"] == n_pages
    assert moved['read_bytes_total{tier="host"}'] == n_pages * SLOT_NBYTES
    assert moved["restore_seconds_count"] == moved["restore_bytes_per_second_count"] == 1
    assert 'loaded_pages_total{tier="ssd"}' not in moved

    client.ask_others("push out of host memory", 4)
    moved = client.moved()
    n_evicted = moved['evicted_pages_total{reason="capacity",tier="host"}']
    assert n_evicted == moved["page_age_seconds_count"] == moved["page_idle_seconds_count"] > 0

    client.server.flush()
    moved = client.moved()
    assert moved["flushes_total"] == 1
    assert moved['evicted_pages_total{reason="flush",tier="host"}'] == -moved['tier_pages{tier="host"}'] > 0
    assert moved['evicted_pages_total{reason="flush",tier="hbm"}'] == -moved['tier_pages{tier="hbm"}'] > 0
    assert 'tier_pages{tier="ssd"}' not in moved

    assert client.ask(tokens).storage_tokens == n_hit
    moved = client.moved()
    assert moved['hit_tokens_total{tier="ssd"}'] == n_hit
    assert moved['saved_seconds_total{tier="ssd"}'] > 0
    assert moved['loaded_pages_total{tier="ssd"}'] == n_pages
    assert moved['fetch_seconds_count{tier="ssd"}'] == moved['fetch_bytes_per_second_count{tier="ssd"}'] == 1
    assert moved['fetch_decisions_total{decision="load"}'] == 1

    _check_totals(client)


def _check_hicache_gauges(client: Client) -> None:
    """SGLang has published since its last batch began, when host memory held what it holds now."""
    figures = client.server.metrics()
    labels = next(name for name in figures if name.startswith("sglang:num_running_reqs{")).partition("{")[2]
    n_resident = client.server.inspect().host["resident"]
    assert figures[f"sglang:hicache_host_used_tokens{{{labels}"] == n_resident * PAGE_SIZE > 0
    assert figures[f"sglang:hicache_host_total_tokens{{{labels}"] == N_SLOTS * PAGE_SIZE


def _check_totals(client: Client) -> None:
    """All answers of this test against all of the metrics, which began with the server."""
    figures = client.server.metrics()
    found = {"hbm": client.total("device_tokens"), "host": client.total("host_tokens")}
    found["ssd"] = client.total("storage_tokens")
    for tier, source in (("hbm", "device"), ("host", "host"), ("ssd", "storage")):
        assert figures[f'sgl_lmcache_hit_tokens_total{{tier="{tier}"}}'] == found[tier], tier
        theirs = [
            value
            for name, value in figures.items()
            if name.startswith("sglang:cached_tokens_total{") and f'cache_source="{source}"' in name
        ]
        assert sum(theirs) == found[tier], source
    assert figures["sgl_lmcache_requests_total"] == len(client.answers)
    assert figures["sgl_lmcache_miss_tokens_total"] == client.total("prompt_tokens") - client.total("cached_tokens")
    assert client.total("cached_tokens") == sum(found.values()), "SGLang's own parts make its whole"


def test_status_shows_it(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.ask(prompt("status", 500))
    client.moved()
    assert cli.main(["status", "--url", client.server.url, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    tiers = {tier["tier"]: tier for tier in seen["tiers"]}
    inspected = client.server.inspect()
    assert list(tiers) == ["hbm", "host", "ssd"]
    assert tiers["host"]["n_pages"] == inspected.host["resident"]
    assert tiers["host"]["limit_nbytes"] == N_SLOTS * SLOT_NBYTES
    assert tiers["ssd"]["n_pages"] == inspected.tier["n_pages"]
    assert seen["requests"] > 0
    assert cli.main(["status", "--url", client.server.url]) == 0
    assert "ssd" in capsys.readouterr().out


def test_status_of_stock_sglang(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", fleet.get(PLAIN).url]) == 1
    assert "start the server with --enable-metrics" in capsys.readouterr().err
