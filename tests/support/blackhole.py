"""A server that accepts connections and behaves badly, for tests of those who talk to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class BadServer:
    """`talk` has each connection to itself, on a thread of its own. n_connections: so far."""

    port: int
    n_connections: int = 0
    _open: list[socket.socket] = field(default_factory=list)


def say_nothing(connection: socket.socket) -> None:
    """Takes everything, and never answers."""
    while connection.recv(1 << 16):
        pass


def say(answer: bytes) -> Callable[[socket.socket], None]:
    """Answers everything with these bytes."""

    def talk(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(answer)

    return talk


def hang_up(connection: socket.socket) -> None:
    """Closes the connection when it is asked for something."""
    connection.recv(1)


@contextmanager
def bad_server(talk: Callable[[socket.socket], None], port: int = 0) -> Iterator[BadServer]:
    listener = socket.create_server(("127.0.0.1", port))
    server = BadServer(listener.getsockname()[1])

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            talk(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                server.n_connections += 1
                server._open.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection in server._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
