"""A rank's client process, seen from the rank: it is started, called, and ended when it does not answer.

The promise to whoever owns slots: when a call has returned or raised, the client process writes into its slots no more.
If the call was answered, Mooncake has ended all its transfers; if not, the process has been killed and is gone.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Final, TypeVar

import msgspec

from hicache.logs import get_logger
from hicache.mooncake.messages import MAX_NBYTES, Call, Geometry, Pool, Ready, Reply, Start

logger = get_logger(__name__)

T = TypeVar("T")

GIVE_UP_S: Final = 60.0
"""After so long Mooncake answers that a call has failed while its transfers go on (the constant in its
`transfer_task.cpp`)."""

DRAIN_S: Final = 40.0
"""Even if another node says nothing more, the transfers under way end by their time-outs within this."""

KILL_AFTER_S: Final = DRAIN_S + 5.0
"""The process is killed that has not answered by then: what has no time-out in Mooncake, as a greeting that nobody
answers, takes longer. It is before GIVE_UP_S, so that an answer is never of a call that Mooncake has given up."""

SLACK_S: Final = 1.3
"""What Mooncake's time-out of a transfer takes beyond what was asked for, at most (measured)."""

N_LANES: Final = 16
"""Transfers to one node at once over TCP; Mooncake's most."""

MAX_PIECE_PAGES: Final = 48
"""A node that is frozen leaves connections in its listening socket's backlog of 128, and each time-out makes a new one.
When that is full, connecting takes for ever."""

JOIN_TIMEOUT_S: Final = 300.0
"""To join the pool, which has a network card register all memory. No slot is at stake."""

START_TIMEOUT_S: Final = 60.0
LEAVE_TIMEOUT_S: Final = 7.0
LOG_NBYTES: Final = 1 << 20


class UnusableError(OSError):
    """Mooncake's client cannot be used on this machine: the sentence says why."""


class ProcessError(OSError):
    """The client process has ended, or has been ended: the sentence says why."""


def piece_pages(timeout_s: float) -> int:
    """How many pages a call may move.

    A page is two transfers. A node that falls silent lets those in its lanes time out, and then the next, and if they
    are many Mooncake gives the call up before the last has ended. So no more than are through within DRAIN_S, nor than
    MAX_PIECE_PAGES; and no fewer, because each call costs some milliseconds (docs/benchmarks.md).
    """
    n_rounds = int(DRAIN_S / (_whole_s(timeout_s) + SLACK_S))
    return min(MAX_PIECE_PAGES, n_rounds * N_LANES // 2)


class ClientProcess:
    """Starts at once, without joining the pool. Any thread may call it. slab_fd: a memfd of whole slots.

    Blocks while the process starts, a second or two. Raises UnusableError if Mooncake cannot be used here, and
    ProcessError if the process cannot be started. Whoever has called it last has to `leave` or `release` it.
    """

    def __init__(self, pool: Pool, geometry: Geometry, slab_fd: int, n_connections: int) -> None:
        try:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(n_connections + 1)]
            self._log = os.fdopen(_log_fd(), "rb")
        except OSError as error:
            raise ProcessError(f"cannot start its client process ({error.strerror})") from error
        self._life, *idle = (ours for ours, _ in pairs)
        self._idle = deque(idle)
        life, *theirs = (their for _, their in pairs)
        self._reaping = threading.Lock()
        start = Start(pool, geometry, slab_fd, life.fileno(), tuple(end.fileno() for end in theirs))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hicache.mooncake.client", msgspec.json.encode(start).decode()],
                env=os.environ | _environment(pool),
                pass_fds=(slab_fd, start.life, *start.connections),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # signals to the server's group are not for it: it ends with the server
            )
        except OSError as error:
            self._drop()
            raise ProcessError(f"cannot start its client process ({error.strerror})") from error
        finally:
            for _, end in pairs:
                end.close()
        try:
            errors = [self._receive(connection, Ready, START_TIMEOUT_S).error for connection in self._idle]
        except ProcessError:
            self.release()
            raise
        if errors[0]:
            self.release()
            raise UnusableError(errors[0])

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, message: Call, timeout_s: float | None = None) -> Reply:
        """Blocks for timeout_s at most, None: KILL_AFTER_S. Raises ProcessError. By `n_connections` threads at once."""
        timeout_s, began_s = timeout_s or KILL_AFTER_S, time.monotonic()
        try:
            connection = self._idle.popleft()
        except IndexError:  # another call has met its end, and has released it
            raise self._end("ended") from None
        try:
            self._send(connection, message)
            reply = self._receive(connection, Reply, timeout_s)
            if time.monotonic() - began_s > timeout_s:
                # All of us stood still meanwhile, and an answer that came in time looks the same as one that did not.
                raise self._late(timeout_s)
        except ProcessError:
            connection.close()
            raise
        self._idle.append(connection)
        self._trim_log()
        return reply

    def _send(self, connection: socket.socket, message: Call) -> None:
        try:
            connection.send(msgspec.msgpack.encode(message))
        except OSError as error:
            raise self._end("ended") from error

    def _receive(self, connection: socket.socket, kind: type[T], timeout_s: float) -> T:
        connection.settimeout(timeout_s)
        try:
            message = connection.recv(MAX_NBYTES)
        except TimeoutError as error:
            raise self._late(timeout_s) from error
        except OSError as error:
            raise self._end("ended") from error
        if not message:
            raise self._end("ended")
        return msgspec.msgpack.decode(message, type=kind)

    def _late(self, timeout_s: float) -> ProcessError:
        return self._end(f"did not answer within {timeout_s:.0f} s and was killed")

    def _trim_log(self) -> None:
        with self._reaping, suppress(ValueError):  # it has been released
            if os.fstat(self._log.fileno()).st_size > LOG_NBYTES:
                os.ftruncate(self._log.fileno(), 0)

    def _end(self, how: str) -> ProcessError:
        """Nothing of it runs any more when this returns."""
        with self._reaping:
            self._process.kill()
            code = self._process.wait()
        return ProcessError(f"has lost its client process, which {how} (exit code {code}; {self._last_line()})")

    def _last_line(self) -> str:
        with suppress(OSError, ValueError):  # if it has been released meanwhile
            fd = self._log.fileno()
            size = os.fstat(fd).st_size
            lines = os.pread(fd, 4096, max(0, size - 4096)).decode(errors="replace").strip().splitlines()
            if lines:
                return f"it said last: {lines[-1][:200]}"
        return "it said nothing"

    def kill(self) -> None:
        """Now. Calls under way raise ProcessError."""
        self._end("was not wanted")

    def leave(self) -> None:
        """Have it take its segment out of the pool, and end. Blocks for some seconds. No call may be under way."""
        self._drop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_TIMEOUT_S)
        self.release()

    def release(self) -> None:
        """End it, and give back what it took of this process."""
        self.kill()
        self._drop()

    def _drop(self) -> None:
        self._life.close()
        with suppress(IndexError):  # others may do the same
            while True:
                self._idle.pop().close()
        with self._reaping:
            self._log.close()


def _log_fd() -> int:
    """Memory to which the process appends, so that it goes on at the start when we have emptied it."""
    fd = os.memfd_create("sgl-lmcache-mooncake.log", os.MFD_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return fd


def _environment(pool: Pool) -> dict[str, str]:
    """Settings of Mooncake that it takes from nowhere else. What the server's environment says of them goes first."""
    timeout_ms, timeout_s = round(pool.timeout_s * 1000), _whole_s(pool.timeout_s)
    settings = {
        "MC_TCP_STATUS_TIMEOUT_SEC": str(timeout_s),
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(timeout_s),
        "MC_TCP_LANES_PER_PEER": str(N_LANES),
        "MC_HANDSHAKE_CONNECT_TIMEOUT": str(timeout_s),
        "MC_RPC_TIMEOUT_MS": str(timeout_ms),
        "MC_RPC_CONNECT_TIMEOUT_MS": str(timeout_ms),
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        "MC_LOG_LEVEL": "ERROR",
    }
    return {name: value for name, value in settings.items() if name not in os.environ}


def _whole_s(timeout_s: float) -> int:
    """Mooncake's time-outs of transfers are in whole seconds, one at least."""
    return max(1, math.ceil(timeout_s))
