"""Servers that share a Mooncake Store: what one has computed the other loads, and what becomes of it when one ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, at_tp
from tests.server.sharing import check_that_servers_share
from tests.server.traffic import prompt
from tests.support.mooncake import Master, master
from tests.support.server import Server, Setup, wait_for

pytestmark = pytest.mark.server

JOIN_TIMEOUT_S = 60.0


def mooncake_setup(pool: Master, name: str, *, segment: str = "128MiB") -> Setup:
    config = f"""
        tiers:
          - {{type: host, capacity: 24MiB}}
          - {{type: mooncake, master: "127.0.0.1:{pool.port}", segment: {segment}, timeout: 1s}}
        prefetch: {{policy: wait, timeout: 3s}}
    """
    return Setup(name, (*ARGUMENTS, "--enable-metrics"), config=config)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Master]:
    with master(tmp_path / "master") as started:
        yield started


def join(server: Server) -> None:
    """A server takes requests before it has joined, and keeps nothing in the pool until then."""
    server.generate(prompt("warm", 100), 1)  # an idle server tells no figures
    available = 'sgl_lmcache_tier_available{tier="mooncake"}'
    wait_for("the pool is joined", lambda: server.metrics().get(available) == 1.0 or None, JOIN_TIMEOUT_S)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_second_server_answers_from_what_the_first_has_computed(
    fleet: Fleet, pool: Master, tmp_path: Path, n_ranks: int
) -> None:
    setups = [at_tp(mooncake_setup(pool, name), n_ranks) for name in ("first", "second")]
    check_that_servers_share(fleet, setups, tmp_path, join)
