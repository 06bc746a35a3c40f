"""`sgl-lmcache status`: what it makes of a metrics page, and what it says where there is none."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from sgl_lmcache import cli
from sgl_lmcache.errors import StartError
from sgl_lmcache.status import WINDOW_S, Look, Looks, Status, parse, render, watch
from tests.support.clock import Clock
from tests.support.processes import free_port

RECORDED = Path(__file__).with_name("data") / "metrics.txt"
"""Of a real server with an SSD tier, SGLang's own metrics but for a few left out."""

URL = "http://server:30000"


@pytest.fixture
def status() -> Status:
    return parse(RECORDED.read_text(encoding="utf-8"), URL)


def shown(now: Look, before: Look | None = None) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(now, before))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str, tier: str) -> list[list[str]]:
    """What the two tables say of a tier, without what is empty."""
    lines = [line for line in text.splitlines() if line.startswith(f" {tier} ")]
    assert len(lines) == 2
    return [re.split(r"  +| (?=[\d.]+ [MG]iB)", line.strip()) for line in lines]


def grown(status: Status, *, host: int, missed: int) -> Status:
    """After a prompt of which so many tokens were in host memory and others nowhere."""
    tiers = [replace(tier, hit_tokens=tier.hit_tokens + host) if tier.tier == "host" else tier for tier in status.tiers]
    return replace(status, tiers=tuple(tiers), miss_tokens=status.miss_tokens + missed, requests=status.requests + 1)


# ---- what a page says ----


def test_a_recorded_page(status: Status) -> None:
    assert [tier.tier for tier in status.tiers] == ["hbm", "host", "ssd"]
    hbm, host, ssd = status.tiers
    assert hbm.available is None
    assert (host.available, ssd.available) == (True, True)
    assert host.limit_nbytes == 512 * (32 << 10)
    assert hbm.hit_tokens == host.hit_tokens == ssd.hit_tokens == 992
    assert status.prompt_tokens == status.requests * 1000
    assert status.hit_tokens == 3 * 992
    assert status.saved_s > 0
    assert host.evicted_pages > 0


def test_ranks_and_replicas_are_summed_and_one_tier_that_is_down_is_down() -> None:
    status = parse(
        'sgl_lmcache_tier_available{tier="ssd"} 0.0\n'
        'sgl_lmcache_skipped_pages_total{reason="full",tier="ssd"} 2.0\n'
        'sgl_lmcache_skipped_pages_total{reason="pressure",tier="ssd"} 3.0\n',
        URL,
    )
    (ssd,) = [tier for tier in status.tiers if tier.tier == "ssd"]
    assert (ssd.available, ssd.health, ssd.skipped_pages, ssd.n_pages) == (False, "given up", 5, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<html>no</html>", "http://server:30000/metrics is not a page of metrics"),
        ("sglang:num_running_reqs 0.0\n", "without this cache; start it with --radix-cache-backend sgl_lmcache."),
        ("python_info 1.0\n", "is not an SGLang server, by its metrics; name one's address with --url."),
        ("", "is not an SGLang server"),
    ],
)
def test_a_page_that_is_not_ours(text: str, sentence: str) -> None:
    with pytest.raises(StartError) as caught:
        parse(text, URL)
    assert sentence in str(caught.value)


# ---- what is shown ----


def test_the_table_has_a_row_a_tier(status: Status) -> None:
    text = shown(Look(0.0, status))
    assert max(map(len, text.splitlines())) <= 80
    assert rows(text, "host") == [
        ["host", "ok", "1.9 MiB", "16.0 MiB", "62", "0", "0"],
        ["host", "992", "7.6%", "620", "0", "0"],
    ]
    assert rows(text, "ssd")[1] == ["ssd", "992", "7.6%", "0", "0", "0"]
    assert "13 requests, 13,000 prompt tokens, 22.9% found" in text
    assert "slow calls" in text


def test_a_store_that_does_not_say_how_full_it_is(status: Status) -> None:
    valkey = replace(status.tiers[-1], tier="valkey", n_pages=None, used_nbytes=0, limit_nbytes=0, available=False)
    held, _ = rows(shown(Look(0.0, replace(status, tiers=(valkey,)))), "valkey")
    assert held == ["valkey", "given up", "shared", "0", "0"]


def test_a_server_that_has_served_nothing(status: Status) -> None:
    idle = replace(status, requests=0, miss_tokens=0, tiers=tuple(replace(t, hit_tokens=0) for t in status.tiers))
    assert "0 requests, 0 prompt tokens, 0% found" in shown(Look(0.0, idle))


def test_rates_since_an_earlier_look(status: Status) -> None:
    text = shown(Look(70.0, grown(status, host=300, missed=700)), Look(10.0, status))
    assert "last 60 s" in text
    assert rows(text, "host")[1][3] == "30.0%"
    assert rows(text, "ssd")[1][3] == "0.0%"


def test_looks_go_back_a_while_and_not_beyond_a_restart(status: Status) -> None:
    looks = Looks()
    assert looks.add(Look(0.0, status)) is None
    later = grown(status, host=1, missed=1)
    assert looks.add(Look(WINDOW_S, later)) == Look(0.0, status)
    assert looks.add(Look(WINDOW_S + 1, later)) == Look(WINDOW_S, later)
    assert looks.add(Look(WINDOW_S + 2, replace(status, requests=0))) is None, "started again"


def test_watching_goes_on_when_the_server_is_away(status: Status) -> None:
    clock, answers = Clock(), iter([status, None, grown(status, host=100, missed=100)])
    console = Console(file=io.StringIO(), width=200, force_terminal=True)

    def read_status() -> Status:
        answer = next(answers, None)
        if answer is None:
            raise StartError("it cannot be reached")
        return answer

    def sleep(seconds: float) -> None:
        clock.now_s += seconds
        if clock.now_s >= 30:
            raise KeyboardInterrupt

    watch(read_status, console, period_s=10.0, clock=clock, sleep=sleep)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "it cannot be reached" in text
    assert "last 20 s" in text
    assert "50.0%" in text


# ---- the command ----


@contextmanager
def serving(text: str, code: int = 200) -> Iterator[str]:
    """A server that answers /metrics so, and everything else with 404. Its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_one_look_and_the_same_as_json(capsys: pytest.CaptureFixture[str], status: Status) -> None:
    with serving(RECORDED.read_text(encoding="utf-8")) as url:
        assert cli.main(["status", "--url", f"{url}/"]) == 0
        assert "requests" in capsys.readouterr().out
        assert cli.main(["status", "--url", url, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["requests"] == status.requests
    assert [tier["tier"] for tier in seen["tiers"]] == ["hbm", "host", "ssd"]


def test_a_tier_that_is_given_up_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with serving('sgl_lmcache_tier_available{tier="ssd"} 0.0\n') as url:
        assert cli.main(["status", "--url", url]) == 1
    assert "given up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (404, "publishes no metrics; start the server with --enable-metrics."),
        (503, "/metrics is answered with 503 Service Unavailable, not with metrics."),
    ],
)
def test_no_metrics(capsys: pytest.CaptureFixture[str], code: int, sentence: str) -> None:
    with serving("", code) as url:
        assert cli.main(["status", "--url", url]) == 1
        assert capsys.readouterr().err == f"{url}{'' if code == 503 else ' '}{sentence}\n"


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert cli.main(["status", "--url", url]) == 1
    expected = f"{url} cannot be reached (Connection refused); start the server, or name its address with --url.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "file:///etc/passwd"], "file:///etc/passwd is not an address such as http://127.0.0.1:30000"),
        (["--watch", "0"], "0 is not a number of seconds from 1 to 3600"),
        (["--watch", "often"], "often is not a number of seconds from 1 to 3600"),
        (["--watch", "--json"], "not allowed with"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["status", *arguments])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err
