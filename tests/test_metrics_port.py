"""Our metrics on a port of their own: of all processes that inherit its folder, and nothing but ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pytest

from sgl_lmcache import metrics_port
from sgl_lmcache.errors import StartError
from tests.support.processes import free_port, wait_for


def test_a_folder_that_is_not_there_and_a_name_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metrics_port, "_open", {})
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(StartError, match=r"/gone, where no folder is; make it, or unset the variable\."):
        metrics_port.open_port(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(StartError, match="cannot be had"):
        metrics_port.open_port(f"{'x' * 300}:{free_port()}")


def test_silent_clients_keep_it_from_nobody_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beyond some it turns away, and it hangs up on those that say nothing."""
    monkeypatch.setattr(metrics_port, "_open", {})
    monkeypatch.setattr(metrics_port._Handler, "timeout", 0.2)
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path))
    port = free_port()
    metrics_port.open_port(f"127.0.0.1:{port}")
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(4 * metrics_port.MAX_CLIENTS)]
    for one in silent:
        one.settimeout(30)
        assert one.recv(1) == b"", "it has hung up"
        one.close()

    def scrape() -> bool | None:
        try:
            return bool(urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).status == 200)
        except (OSError, HTTPException):
            return None

    wait_for("a scrape", scrape, 30)


def test_gauges_of_processes_that_have_ended_count_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    files = [f"gauge_livesum_{ended.pid}.db", f"counter_{ended.pid}.db", f"gauge_livemin_{os.getpid()}.db"]
    for name in files:
        (tmp_path / name).touch()
    metrics_port.forget_the_dead()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files[1:])


RANK = """
from prometheus_client import Counter
Counter("sgl_lmcache_requests", "Ours.", ["rank"]).labels("all").inc(2)
Counter("other_requests", "Not ours.").inc()
"""

SERVER = f"""
import subprocess, sys
from urllib.request import urlopen
from sgl_lmcache.metrics_port import open_port
open_port(sys.argv[1])
open_port(sys.argv[1])
for _ in range(2):
    subprocess.run([sys.executable, "-c", {RANK!r}], check=True)
print(urlopen("http://" + sys.argv[1] + "/metrics").read().decode())
"""


def test_ranks_are_summed_and_what_is_not_ours_is_left_to_sglang() -> None:
    environment = {name: value for name, value in os.environ.items() if name != metrics_port.FOLDER_VARIABLE}
    command = [sys.executable, "-c", SERVER, f"127.0.0.1:{free_port()}"]
    page = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    assert 'sgl_lmcache_requests_total{rank="all"} 4.0' in page
    assert "other_requests" not in page


def test_an_address_that_cannot_be_had_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(metrics_port, "_open", {})
    listen = f"127.0.0.1:{free_port()}"
    metrics_port.open_port(listen)
    assert urlopen(f"http://{listen}/metrics").status == 200
    metrics_port._open.clear()
    monkeypatch.delenv(metrics_port.FOLDER_VARIABLE)  # as in a process that goes on after the error, and tries again
    monkeypatch.setattr(metrics_port, "_made", [])
    for _ in range(2):
        with pytest.raises(StartError, match="cannot be had"):
            metrics_port.open_port(listen)
    assert len(metrics_port._made) == 1
    assert os.environ[metrics_port.FOLDER_VARIABLE] == metrics_port._made[0].name
    metrics_port._made.pop().cleanup()
    monkeypatch.setenv(metrics_port.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(StartError, match=f"metrics.listen: {listen} cannot be had .*; name another port"):
        metrics_port.open_port(listen)
