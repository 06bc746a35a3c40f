"""Servers with an SSD tier: what is there after a restart, and what becomes of requests while the disk fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, at_tp, check_at_rest
from tests.server.traffic import Tolerance, prompt, push_out, reusable
from tests.support.server import Server, Setup

pytestmark = pytest.mark.server


def ssd_setup(folder: Path, name: str = "ssd", *, prefetch: str = "{policy: wait, timeout: 60s}") -> Setup:
    """Host memory of 768 pages and a store of some thousand."""
    config = f"""
        tiers:
          - {{type: host, capacity: 24MiB}}
          - {{type: ssd, path: {folder}, capacity: 256MiB}}
        prefetch: {prefetch}
    """
    return Setup(name, ARGUMENTS, config=config)


@contextmanager
def running(fleet: Fleet, setup: Setup, folder: Path) -> Iterator[Server]:
    fleet.make_room()
    with Server(setup, folder) as server:
        yield server


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
