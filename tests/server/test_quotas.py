"""A tenant's burst, and a pinned prompt, on a server: who keeps what in host memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, at_tp, running
from tests.server.traffic import prompt, push_out, reusable, whole_pages
from tests.support.processes import free_port, wait_for
from tests.support.server import ANSWER_TIMEOUT_S, Server, Setup

pytestmark = pytest.mark.server

PINNED = prompt("system prompt", 500)
METRICS = f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def server(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("quotas")
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(PINNED))
    config = (
        "tiers: [{type: host, capacity: 24MiB, quotas: {burst: 25%, calm: 25%}}]\n"
        f"pins: [{{tokens: {tokens}, ttl: 1h}}]\n"
        f'metrics: {{listen: "{METRICS}"}}\n'
    )
    with running(fleet, at_tp(Setup("quotas", (*ARGUMENTS, "--sleep-on-idle"), config=config), 2), folder) as server:
        yield server


def test_a_burst_costs_its_own_tenant_only_and_a_pin_stays(server: Server) -> None:
    calm = prompt("calm", 1000)
    server.generate(calm, 1, cache_salt="calm")
    server.generate([*PINNED, *prompt("a question", 100)], 1)
    for number in range(20):
        server.generate(prompt(("burst", number), 1000), 1, cache_salt="burst")
    server.at_rest()
    hit = server.generate(calm, 1, cache_salt="calm")
    assert (hit.device_tokens, hit.host_tokens) == (0, reusable(calm)), "the burst has held a quarter at most"

    push_out(server, "others", 14_000)  # more than all of host memory
    unpinned = server.generate([*prompt("not a system prompt", 500), *prompt("a question", 100)], 1)
    pinned = server.generate([*PINNED, *prompt("another question", 100)], 1)
    assert unpinned.cached_tokens == 0
    assert (pinned.device_tokens, pinned.host_tokens) == (0, whole_pages(len(PINNED)))
    assert server.generate(calm, 1, cache_salt="calm").cached_tokens == reusable(calm)


def test_metrics_on_a_port_of_their_own_are_of_both_ranks(server: Server) -> None:
    """Without `--enable-metrics`; what each rank has is summed, and a request is counted once."""
    answers = [server.generate(prompt(("counted", number), 300), 1) for number in range(3)]
    n_tokens = sum(answer.prompt_tokens for answer in answers)
    n_sent = len(server.at_rest().ended)

    def page() -> dict[str, float]:
        with urlopen(f"http://{METRICS}/metrics") as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def one_more() -> dict[str, float] | None:
        """A server that sleeps when it is idle publishes with its requests."""
        nonlocal n_sent
        server.generate(prompt(("one more", n_sent), 50), 1)
        n_sent += 1
        found = page()
        assert found.get("sgl_lmcache_requests_total", 0) <= n_sent
        return found if found.get("sgl_lmcache_miss_tokens_total", 0) >= n_tokens else None

    found = wait_for("all are counted", one_more, ANSWER_TIMEOUT_S)
    assert found['sgl_lmcache_tier_limit_bytes{tier="host"}'] == 24 << 20
    assert all(name.startswith("sgl_lmcache_") for name in found)
