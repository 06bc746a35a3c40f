"""A TCP proxy between nodes that makes the network bad: it delays, falls silent for seconds, and resets connections.

It listens where a node looks for another, and forwards to where that is. A node in a network namespace is led to it by
its own routing: the other's address is made local there (`address add ADDRESS/32 dev lo`), and the proxy listens on it
in that namespace. A socket stays in the namespace in which it was made, so one process can listen in one and connect
from another.

All of it runs on one thread with an event loop. What befalls a chunk of bytes is drawn from a seeded generator; the
order in which connections draw is a matter of timing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CHUNK_NBYTES = 64 << 10
BACKLOG = 64
_CLONE_NEWNET = 0x40000000

Address = tuple[str, int]


@dataclass(frozen=True)
class Route:
    """namespace: the file of the network namespace in which to listen; None: the proxy's own, from which it connects
    as well. Port 0: a free one."""

    listen: Address
    target: Address
    namespace: Path | None = None


@dataclass(frozen=True)
class Trouble:
    """Shares of the chunks, of up to 64 KiB, that are late, come after a silence, or never: the connection is reset.

    Meanwhile nothing else passes in that direction of the connection.
    """

    delayed: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.02)
    stalled: float = 0.0
    stall_s: tuple[float, float] = (1.0, 4.0)
    reset: float = 0.0


CALM = Trouble()


@dataclass
class Counts:
    """What a proxy has done so far. unreachable: connections that the target did not take, so that they were reset."""

    connections: int = 0
    unreachable: int = 0
    delays: int = 0
    stalls: int = 0
    resets: int = 0
    nbytes: int = 0


class Proxy:
    """Forwards for as long as the context is entered; leaving it resets what is open. `trouble` may be set any time."""

    def __init__(self, routes: Sequence[Route], trouble: Trouble = CALM, *, seed: object = 0) -> None:
        self.trouble = trouble
        self.counts = Counts()
        self.addresses: tuple[Address, ...] = ()
        self._routes = routes
        self._chance = random.Random(str(seed))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._connections: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Self:
        listeners: list[socket.socket] = []
        try:
            for route in self._routes:
                listeners.append(_listen(route))
        except BaseException:
            for listener in listeners:
                listener.close()
            self._loop.close()
            raise
        self.addresses = tuple(listener.getsockname()[:2] for listener in listeners)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(listeners), self._loop).result()
        return self

    def __exit__(self, *_error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, listeners: Sequence[socket.socket]) -> None:
        for route, listener in zip(self._routes, listeners, strict=True):

            def connected(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Address = route.target
            ) -> None:
                task = self._loop.create_task(self._forward(reader, writer, target))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

            self._servers.append(await asyncio.start_server(connected, sock=listener, limit=CHUNK_NBYTES))

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        connections = tuple(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _forward(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter, target: Address) -> None:
        """One connection, until both sides have said all or one of them has gone."""
        self.counts.connections += 1
        try:
            far, to_far = await asyncio.open_connection(*target, limit=CHUNK_NBYTES)
        except BaseException as error:
            _reset(to_near)
            if not isinstance(error, OSError):
                raise
            self.counts.unreachable += 1
            return
        end = _reset
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pass_on(near, to_far))
                directions.create_task(self._pass_on(far, to_near))
            end = _close
        except* _ConnectionEndedError:
            pass
        finally:
            end(to_near)
            end(to_far)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction. Raises _ConnectionEndedError if it is reset, here or by one of the ends."""
        try:
            while chunk := await reader.read(CHUNK_NBYTES):
                await self._befall()
                writer.write(chunk)
                await writer.drain()
                self.counts.nbytes += len(chunk)
            writer.write_eof()
        except OSError as error:
            raise _ConnectionEndedError from error

    async def _befall(self) -> None:
        trouble, drawn = self.trouble, self._chance.random()
        if drawn < trouble.reset:
            self.counts.resets += 1
            raise _ConnectionEndedError
        drawn -= trouble.reset
        if drawn < trouble.stalled:
            self.counts.stalls += 1
            await asyncio.sleep(self._chance.uniform(*trouble.stall_s))
        elif drawn - trouble.stalled < trouble.delayed:
            self.counts.delays += 1
            await asyncio.sleep(self._chance.uniform(*trouble.delay_s))


class _ConnectionEndedError(Exception):
    """A connection is over before its ends have said all."""


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: what has been sent and not been read is lost, and the other side sees an error."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


def _listen(route: Route) -> socket.socket:
    def make() -> socket.socket:
        if route.namespace is not None:
            _enter(route.namespace)
        return socket.create_server(route.listen, backlog=BACKLOG)

    with ThreadPoolExecutor(1) as thread:  # it ends in the namespace that it has entered
        return thread.submit(make).result()


def _enter(namespace: Path) -> None:
    """The calling thread's network namespace from now on. (os.setns came with Python 3.12.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(namespace))
    finally:
        os.close(fd)
