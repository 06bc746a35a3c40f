"""Where the store is: one server, or the nodes of a cluster, and the connections to them.

The client, valkey-py, makes connections: it knows TLS, users and databases. Which node of a cluster has which key is
kept here, because the client's own cluster class would take the payloads through its own memory.

Each node has two breakers. `reads` opens when it cannot be reached, does not answer or refuses to be read: nobody asks
it until a trial has gone well. `writes` opens when it refuses to take more.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hicache.breaker import Breaker
from hicache.valkey.wire import Refusal, Wire

logger = logging.getLogger(__name__)

Address = tuple[str, int]


class ClientMissingError(Exception):
    """The client, valkey-py, is not installed."""


class ConnectError(OSError):
    """A connection was not made, or user, password or database were refused: the sentence says which."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. ca: whom to trust, None: whom the system trusts. certificate and key: the client's own."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, or any node of a cluster. timeout_s: how long a call may take, which moves some MiB at most."""

    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    is_cluster: bool = False
    connect_timeout_s: float = 1.0
    timeout_s: float = 2.0

    def __str__(self) -> str:
        """Without user and password, for logs and errors."""
        scheme = "valkeys" if self.tls else "valkey"
        return f"{scheme}://{_joined((self.host, self.port))}" + ("" if self.is_cluster else f"/{self.db}")


class Node:
    """One server, and the idle connections to it. Any thread may call it. Making it does not connect."""

    def __init__(self, address: Address, connect: Callable[[Address], Wire], clock: Callable[[], float]) -> None:
        self.address = address
        self.reads = Breaker(clock)
        self.writes = Breaker(clock)
        self.is_on_trial = False
        self._connect = connect
        self._idle: list[Wire] = []
        self._closed = False
        self._lock = threading.Lock()
        self._told = ""

    def __str__(self) -> str:
        return _joined(self.address)

    @contextmanager
    def borrow(self) -> Iterator[Wire]:
        """A connection, for as long as the block lasts; one that meets an error is closed. Blocks to connect.

        Raises OSError, of which ConnectError, TimeoutError and ProtocolError are kinds.
        """
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is None:
            wire = self._connect(self.address)
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        with self._lock:
            is_wanted = not self._closed
            if is_wanted:
                self._idle.append(wire)
        if not is_wanted:
            wire.close()

    def disconnect(self) -> None:
        """Close what is idle: after a failure each of these would have to find out for itself."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """Connections that are lent are closed when they come back."""
        with self._lock:
            self._closed = True
        self.disconnect()

    def failed(self, breaker: Breaker, what: str) -> None:
        """Open one of the breakers, or let it be open for longer. The same failure is told once, until all is well."""
        sentence = f"{self} {what}"
        if breaker.is_due:
            breaker.failed()
        elif breaker.trip(sentence) and sentence != self._told:
            self._told = sentence
            logger.error("sgl_lmcache: Valkey tier: %s; going on without it, and trying again", sentence)

    def served(self) -> None:
        """It has answered as it should."""
        if self._told and not (self.reads.is_open or self.writes.is_open):
            self._told = ""
            logger.warning("sgl_lmcache: Valkey tier: %s is used again", self)


class Nodes:
    """All nodes that hold pages. Any thread may call it. Making it does not connect. Raises `ClientMissingError`."""

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        try:
            import valkey.connection  # an optional dependency: only whoever has such a tier needs it
            import valkey.crc
            import valkey.exceptions
        except ImportError as error:
            raise ClientMissingError(str(error)) from error
        self._client: Any = valkey.connection
        self._errors = valkey.exceptions.ValkeyError
        self._slot_of: Callable[[bytes], int] = valkey.crc.key_slot
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[Address, Node] = {}
        self._owners: list[Node] = []
        self._is_stale = endpoint.is_cluster
        self.endpoint = endpoint
        self.home = self.node((endpoint.host, endpoint.port))

    def all(self) -> list[Node]:
        """Those that are known, the one that was configured first."""
        with self._lock:
            return list(self._nodes.values())

    def node(self, address: Address) -> Node:
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = Node(address, self._connect, self._clock)
            return self._nodes[address]

    def by_node(self, names: Sequence[bytes]) -> dict[Node, list[int]]:
        """Positions in `names`, ascending, by the node that has them.

        Blocks if the cluster has to be asked, and may raise OSError then. A slot that nobody serves is taken for the
        first node's, which refuses it.
        """
        if not self.endpoint.is_cluster:
            return {self.home: list(range(len(names)))}
        if self._is_stale:
            self._ask_for_slots()
        owners, found = self._owners, defaultdict[Node, list[int]](list)
        for position, name in enumerate(names):
            found[owners[self._slot_of(name)]].append(position)
        return found

    def mark_stale(self) -> None:
        """Slots have moved, or a node does not answer: ask where they are before the next call."""
        self._is_stale = self.endpoint.is_cluster

    def redirected(self, refusal: Refusal, node: Node) -> Node | None:
        """To whom a cluster's node sends us for a key. None: this refusal is of another kind."""
        if refusal.kind not in ("MOVED", "ASK"):
            return None
        host, _, port = refusal.text.split()[2].rpartition(":")
        return self.node((host.strip("[]") or node.address[0], int(port)))

    def close(self) -> None:
        for node in self.all():
            node.close()

    def _ask_for_slots(self) -> None:
        """Of any node that answers, the configured one first. Raises OSError."""
        failure: OSError | None = None
        for node in self.all():
            try:
                with node.borrow() as wire:
                    owners = wire.cluster_slots(node.address[0])
            except OSError as error:
                failure = failure or error
                continue
            self._owners = [self.home if address is None else self.node(address) for address in owners]
            self._is_stale = False
            return
        assert failure is not None
        raise failure

    def _connect(self, address: Address) -> Wire:
        endpoint = self.endpoint
        options: dict[str, Any] = {
            "host": address[0],
            "port": address[1],
            "db": 0 if endpoint.is_cluster else endpoint.db,
            "username": endpoint.username,
            "password": endpoint.password,
            "socket_connect_timeout": endpoint.connect_timeout_s,
            "socket_timeout": endpoint.timeout_s,
            "socket_keepalive": True,
            "lib_name": None,
            "lib_version": None,
        }
        kind = self._client.Connection
        if endpoint.tls is not None:
            kind = self._client.SSLConnection
            options |= {
                "ssl_ca_certs": endpoint.tls.ca,
                "ssl_certfile": endpoint.tls.certificate,
                "ssl_keyfile": endpoint.tls.key,
                "ssl_check_hostname": True,
            }
        connection = kind(**options)
        try:
            connection.connect()
        except (self._errors, OSError) as error:
            connection.disconnect()
            raise ConnectError(_reason(error)) from error
        return Wire(connection, endpoint.timeout_s)


def _joined(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(error: Exception) -> str:
    """What goes after the server's name."""
    if isinstance(error, ssl.SSLError):
        return _about_tls(str(error))
    if isinstance(error, TimeoutError):
        return f"does not answer ({error})"
    return str(error) if isinstance(error, ConnectError) else f"failed: {error}"


def _about_tls(text: str) -> str:
    return f"and this server do not agree about TLS ({text}); check valkeys://, ca_file, cert_file and key_file"


def _reason(error: BaseException) -> str:
    """What goes after the server's name. The client wraps what system and server said in sentences of its own."""
    text = " ".join(str(error).split()).rstrip(".")
    causes, cause = [error], error.__context__
    while cause is not None:
        causes.append(cause)
        cause = cause.__context__
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return _about_tls(text)
    lower = text.lower()
    if "wrongpass" in lower or "invalid username" in lower or "invalid password" in lower or "without any" in lower:
        return f"refuses the user or the password ({text})"
    if "noauth" in lower or "authentication required" in lower:
        return f"wants a password ({text})"
    if "noperm" in lower or "no permission" in lower:
        return f"denies the user a right ({text})"
    if "db index" in lower or "invalid database" in lower or "select" in lower:
        return f"has no such database ({text})"
    return f"cannot be reached ({text})"
