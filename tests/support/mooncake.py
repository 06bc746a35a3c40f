"""Real masters for the tests of the Mooncake tier, on loopback, that can be killed, stopped and started again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hicache.mooncake import Pool
from sgl_lmcache.mooncake_master import find_program
from tests.support.processes import Daemon, free_port

ADDRESS = "127.0.0.1"


class Master(Daemon):
    """One master. options: its flags, but for its ports. lease: how long it protects what somebody has looked up."""

    def __init__(
        self, folder: Path, *options: str, lease: str = "2s", port: int | None = None, metrics_port: int | None = None
    ) -> None:
        super().__init__(folder, port)
        self._options = options
        self._lease = lease
        self._metrics_port = metrics_port or free_port()

    def command(self) -> list[str]:
        ports = [f"--rpc_port={self.port}", f"--metrics_port={self._metrics_port}"]
        more = [f"--default_kv_lease_ttl={self._lease}", "--client_ttl=3", "--logtostderr"]
        return [find_program(), *self._options, *ports, *more]

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
