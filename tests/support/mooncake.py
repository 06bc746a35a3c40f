"""Real masters for the tests of the Mooncake tier, on loopback, that can be killed, stopped and started again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hicache.mooncake import Pool
from tests.support.processes import free_port, wait_for

START_TIMEOUT_S = 30.0
ADDRESS = "127.0.0.1"


def master_binary() -> str:
    beside = Path(sys.executable).with_name("mooncake_master")
    found = str(beside) if beside.exists() else shutil.which("mooncake_master")
    assert found is not None, "the package mooncake-transfer-engine-non-cuda brings mooncake_master"
    return found


class Master:
    """One master. lease: how long it protects a page that somebody has looked up, as its flag takes it."""

    def __init__(self, folder: Path, *options: str, lease: str = "2s", binary: str | None = None) -> None:
        self.port = free_port()
        self._folder = folder
        self._command = [
            binary or master_binary(),
            f"--rpc_port={self.port}",
            f"--metrics_port={free_port()}",
            f"--default_kv_lease_ttl={lease}",
            "--client_ttl=3",
            "--logtostderr",
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log)
        wait_for("the master accepts connections", self._accepts, START_TIMEOUT_S)

    def _accepts(self) -> bool | None:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text(encoding="utf-8")[-2000:]
        try:
            socket.create_connection((ADDRESS, self.port), 1.0).close()
        except OSError:
            return None
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def pool(self, **options: Any) -> Pool:
        """On loopback a call is answered at once, so that a test need not wait for long to see that it is not."""
        settings: dict[str, Any] = {
            "master": f"{ADDRESS}:{self.port}",
            "metadata": "P2PHANDSHAKE",
            "address": ADDRESS,
            "segment_nbytes": 64 << 20,
            "timeout_s": 1.0,
        }
        return Pool(**(settings | options))


@contextmanager
def master(folder: Path, *options: str, lease: str = "2s", binary: str | None = None) -> Iterator[Master]:
    started = Master(folder, *options, lease=lease, binary=binary)
    try:
        started.start()
        yield started
    finally:
        started.kill()
