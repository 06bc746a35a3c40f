"""Real masters for the tests of the Mooncake tier, on loopback, that can be killed, stopped and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hicache.mooncake import Pool
from sgl_lmcache.mooncake_master import find_program
from tests.support.processes import free_port, wait_for

START_TIMEOUT_S = 30.0
ADDRESS = "127.0.0.1"


class Master:
    """One master. options: its flags, but for its ports. lease: how long it protects what somebody has looked up."""

    def __init__(
        self, folder: Path, *options: str, lease: str = "2s", port: int | None = None, metrics_port: int | None = None
    ) -> None:
        self.port = port or free_port()
        self._metrics_port = metrics_port or free_port()
        self._folder = folder
        self._command = [
            find_program(),
            *options,
            f"--rpc_port={self.port}",
            f"--metrics_port={self._metrics_port}",
            f"--default_kv_lease_ttl={lease}",
            "--client_ttl=3",
            "--logtostderr",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, waits: bool = True) -> None:
        """waits: until it takes calls, which one of several does only when it leads."""
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log)
        if waits:
            wait_for("the master accepts connections", self.leads, START_TIMEOUT_S)

    def leads(self) -> bool | None:
        """True if it takes calls; None before, as `wait_for` wants it."""
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
def master(folder: Path, *options: str, waits: bool = True, **settings: Any) -> Iterator[Master]:
    started = Master(folder, *options, **settings)
    try:
        started.start(waits=waits)
        yield started
    finally:
        started.kill()
