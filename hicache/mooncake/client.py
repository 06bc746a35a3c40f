"""The client process: it joins the pool for one rank, holds the rank's segment, and makes the calls it is asked for.

A process of its own, because a server cannot trust its own to Mooncake's client: a call that it gives up leaves
transfers behind that write into the caller's memory later, and only the end of the process is sure to stop them; some
of its errors end the process that meets them; and its signal handlers, threads and log lines are not a server's.

It ends when the rank closes its connections, or is killed: the segment is taken out of the pool then.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Final

import msgspec

from hicache.mooncake import messages
from hicache.mooncake.messages import Connect, Ready, Reply, Start
from hicache.mooncake.store import MasterError, PageStore

SWITCH_INTERVAL_S: Final = 1e-4
"""A thread that verifies pages keeps one whose transfer has ended waiting no longer."""

LEAVE_TIMEOUT_S: Final = 5.0
"""So long calls may take to return, and the segment to be taken out; then the process ends anyway."""


def main(argument: str) -> None:
    start = msgspec.json.decode(argument, type=Start)
    threading.excepthook = _die
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its memory is KV, which is as good as the prompts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the server, which says when to end
    geometry = start.geometry
    slab = mmap.mmap(start.slab_fd, geometry.n_slots * geometry.slot_nbytes)
    store = PageStore(start.pool, geometry, slab)
    ready = Ready(_why_unusable())
    threading.Thread(target=_end_with, args=(_connection(start.life),), daemon=True).start()
    threads = [threading.Thread(target=_serve, args=(_connection(fd), store, ready)) for fd in start.connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    os._exit(0)  # no destructor of the library has anything to do any more


def _connection(fd: int) -> socket.socket:
    connection = socket.socket(fileno=fd)
    connection.settimeout(None)
    return connection


def _end_with(life: socket.socket) -> None:
    """When the rank has gone, calls that do not return are not waited for."""
    with suppress(ConnectionError):
        life.recv(1)
    time.sleep(LEAVE_TIMEOUT_S)
    os._exit(1)


def _why_unusable() -> str:
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def _die(crash: threading.ExceptHookArgs) -> None:
    """A bug in any thread ends the process: the rank would wait for its answer."""
    traceback.print_exception(crash.exc_type, crash.exc_value, crash.exc_traceback)
    os._exit(1)


def _serve(connection: socket.socket, store: PageStore, ready: Ready) -> None:
    """Answer one call after another."""
    decode = msgspec.msgpack.Decoder(messages.Call).decode
    with suppress(ConnectionError):
        connection.send(msgspec.msgpack.encode(ready))
        while message := connection.recv(messages.MAX_NBYTES):
            connection.send(msgspec.msgpack.encode(_answer(store, decode(message))))


def _answer(store: PageStore, call: messages.Call) -> Reply:
    try:
        match call:
            case Connect():
                store.connect()
                return Reply()
            case messages.Exists():
                return store.exists(call)
            case messages.Load():
                return store.load(call)
            case messages.Store():
                return store.store(call)
            case messages.Delete():
                return store.delete(call)
    except MasterError as error:
        return Reply(error=str(error))


if __name__ == "__main__":
    main(sys.argv[1])
