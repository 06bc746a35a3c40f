"""Where the store is: one server, or the nodes of a cluster, and the connections to them.

The client, valkey-py, makes connections: it knows TLS, users and databases. Which node of a cluster has which key is
kept here, because the client's own cluster class would take the payloads through its own memory.

Each node has two breakers. `reads` opens when it cannot be reached, does not answer or refuses to be read: nobody asks
it until a trial has gone well. `writes` opens when it refuses to take more.
"""

from __future__ import annotations

import math
import socket
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from hicache.breaker import Breaker
from hicache.logs import CHANGE, get_logger
from hicache.valkey.wire import ProtocolError, Refusal, Wire

logger = get_logger(__name__)

Address = tuple[str, int]
T = TypeVar("T")

MAP_PAUSE_S: Final = 1.0
"""A cluster is asked where its slots are at most so often."""


class ClientMissingError(Exception):
    """The client, valkey-py, is not installed."""


class CertificateError(Exception):
    """Our own certificates, or those that we are to trust, cannot be used: the sentence says which."""


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
        self._lent: set[Wire] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._told = ""

    def __str__(self) -> str:
        return _joined(self.address)

    def talk(self, say: Callable[[Wire], T]) -> T:
        """Say something on a connection of our own; one that meets an error is closed. Blocks, to connect too.

        A connection that was idle may have been closed by the server meanwhile: then it is said again on a new one.
        Raises OSError, of which ConnectError, TimeoutError and ProtocolError are kinds.
        """
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is not None:
            try:
                return self._say(wire, say)
            except (TimeoutError, ProtocolError):
                raise
            except ConnectionError:
                self.disconnect()
        return self._say(self._connect(self.address), say)

    def _say(self, wire: Wire, say: Callable[[Wire], T]) -> T:
        with self._lock:
            self._lent.add(wire)
        is_good = False
        try:
            answer = say(wire)
            is_good = True
            return answer
        finally:
            with self._lock:
                self._lent.remove(wire)
                is_wanted = is_good and not self._closed
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
        """What is being said now may be finished."""
        with self._lock:
            self._closed = True
        self.disconnect()

    def interrupt(self) -> None:
        """End what is being said now, with errors."""
        with self._lock:
            lent = list(self._lent)
        for wire in lent:
            wire.shut_down()

    def failed(self, breaker: Breaker, what: str) -> None:
        """Open one of the breakers, or let it be open for longer. The same failure is told once, until all is well."""
        sentence = f"{self} {what}"
        if breaker.is_due:
            breaker.failed()
        elif breaker.trip(sentence) and sentence != self._told:
            self._told = sentence
            logger.error("sgl_lmcache: Valkey tier: %s; going on without it, and trying again", sentence, extra=CHANGE)

    def served(self) -> None:
        """It has answered as it should."""
        if self._told and not (self.reads.is_open or self.writes.is_open):
            self._told = ""
            logger.warning("sgl_lmcache: Valkey tier: %s is used again", self, extra=CHANGE)


class Nodes:
    """All nodes that hold pages. Any thread may call it. Making it does not connect.

    Raises `ClientMissingError`; `CertificateError` for files of our own that TLS cannot use.
    """

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        try:
            import valkey.connection  # an optional dependency: only whoever has such a tier needs it
            import valkey.crc
            import valkey.exceptions
        except ImportError as error:
            raise ClientMissingError(str(error)) from error
        self._kind: Any = valkey.connection.Connection
        if endpoint.tls is not None:
            self._kind = _tls_connection(valkey.connection.SSLConnection, _tls_context(endpoint.tls))
        self._errors = valkey.exceptions.ValkeyError
        self._slot_of: Callable[[bytes], int] = valkey.crc.key_slot
        self._clock = clock
        self._lock = threading.Lock()
        self._nodes: dict[Address, Node] = {}
        self._asking = threading.Lock()
        self._asked_at_s = -math.inf
        self._owners: list[Node | None] = []
        self._is_stale = endpoint.is_cluster
        self.map = Breaker(clock)
        """Open while no node of the cluster says where the slots are."""
        self.endpoint = endpoint
        self.home = self.node((endpoint.host, endpoint.port))

    def all(self) -> list[Node]:
        """Those that hold pages: of a cluster, the owners of slots; before they are known, the one of the URL."""
        owners = [node for node in dict.fromkeys(self._owners) if node is not None]
        return owners or [self.home]

    @property
    def is_unknown(self) -> bool:
        """Whether a cluster has not told yet where its slots are."""
        return self.endpoint.is_cluster and not self._owners

    def node(self, address: Address) -> Node:
        with self._lock:
            if address not in self._nodes:
                self._nodes[address] = Node(address, self._connect, self._clock)
            return self._nodes[address]

    def by_node(self, names: Sequence[bytes]) -> dict[Node, list[int]]:
        """Positions in `names`, ascending, by the node that has them; those that no node serves are left out.

        Blocks if the cluster has to be asked. Raises OSError if it has never told.
        """
        if not self.endpoint.is_cluster:
            return {self.home: list(range(len(names)))}
        if self._is_stale:
            self._update_map()
        owners, found = self._owners, defaultdict[Node, list[int]](list)
        for position, name in enumerate(names):
            owner = owners[self._slot_of(name)]
            if owner is not None:
                found[owner].append(position)
        return found

    def mark_stale(self) -> None:
        """Slots have moved, or a node does not answer: ask where they are before a next call."""
        self._is_stale = self.endpoint.is_cluster

    def redirected(self, refusal: Refusal, node: Node) -> Node | None:
        """To whom a cluster's node sends us for a key. None: this refusal is of another kind, or names nobody."""
        if not refusal.is_redirection:
            return None
        try:
            host, _, port = refusal.text.split()[2].rpartition(":")
            return self.node((host.strip("[]?") or node.address[0], int(port)))
        except (IndexError, ValueError):
            return None

    def close(self) -> None:
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def interrupt(self) -> None:
        """End all calls that are under way, with errors."""
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.interrupt()

    # ---- the map of a cluster ----

    def _update_map(self) -> None:
        """One thread at a time asks, and not too often; the map of before serves meanwhile. Raises OSError."""
        with self._asking:
            if not self._is_stale:
                return
            now_s = self._clock()
            may_ask = self.map.is_due if self.map.is_open else now_s - self._asked_at_s >= MAP_PAUSE_S
            if not may_ask and self._owners:
                return
            if not may_ask:
                raise ConnectError("has not told where its slots are")
            self._asked_at_s = now_s
            try:
                self._ask_for_map()
            except OSError as error:
                self.home.failed(self.map, describe(error))
                if not self._owners:
                    raise

    def _ask_for_map(self) -> None:
        """Of any node that knows one, those that serve first. Raises OSError."""
        with self._lock:
            nodes = sorted(self._nodes.values(), key=lambda node: node.reads.is_open)
        failure: OSError | None = None
        for node in nodes:
            if node.reads.is_open and not node.reads.is_due:
                continue
            try:
                addresses = node.talk(lambda wire, node=node: wire.cluster_slots(node.address[0]))  # type: ignore[misc]
            except OSError as error:
                failure = failure or error
                continue
            if any(addresses):
                self._take_map(addresses)
                return
            failure = failure or ConnectError("serves no slots: it is in no cluster, or has left it")
        raise failure or ConnectError("has no node that could be asked where its slots are")

    def _take_map(self, addresses: Sequence[Address | None]) -> None:
        self._owners = [None if address is None else self.node(address) for address in addresses]
        self._is_stale = False
        self.map.close()
        current = {self.home, *self._owners}
        with self._lock:
            gone = [node for node in self._nodes.values() if node not in current]
            for node in gone:
                del self._nodes[node.address]
        for node in gone:
            node.close()

    # ---- connections ----

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
        connection = self._kind(**options)
        try:
            connection.connect()
        except (self._errors, OSError, ValueError) as error:  # ValueError: a host that cannot be one
            connection.disconnect()
            raise ConnectError(_reason(error, endpoint.password)) from None
        return Wire(connection, endpoint.timeout_s)


def _tls_context(tls: Tls) -> ssl.SSLContext:
    """Made once: certificates take milliseconds to read. With `ca` nobody else is trusted."""
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except OSError as error:
        files = ", ".join(file for file in (tls.ca, tls.certificate, tls.key) if file is not None)
        raise CertificateError(f"TLS cannot use {files} ({error})") from error
    return context


def _tls_connection(base: Any, context: ssl.SSLContext) -> Any:
    """The client's kind of connection, with our trust: its own adds to whom the system trusts, for each connection."""

    class TlsConnection(base):  # type: ignore[misc]
        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            return context.wrap_socket(sock, server_hostname=self.host)

    return TlsConnection


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


def _reason(error: BaseException, password: str | None) -> str:
    """What goes after the server's name. The client wraps what system and server said in sentences of its own.

    A server that does not know AUTH repeats its arguments.
    """
    text = " ".join(str(error).split()).rstrip(".")
    if password:
        text = text.replace(password, "***")
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
