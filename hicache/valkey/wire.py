"""Pipelined commands on one connection, with payloads that go straight between the socket and memory.

The connection is valkey-py's, which has made it, with TLS, user and database. From then on its socket is ours: replies
are parsed here, because the client would build each one in memory of its own first. The protocol is RESP2
(https://valkey.io/topics/protocol/). Of it only what the commands of this module answer is understood; anything else is
a `ProtocolError`, after which the connection must not be used any more.

A call sends all its commands, then reads as many replies. What goes wrong with a single key is that key's reply; what
goes wrong with the connection is raised as OSError, of which TimeoutError and ProtocolError are kinds.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from hicache.values import HEADER_NBYTES

N_CLUSTER_SLOTS: Final = 16384
MISS: Final = b"$-1"
_ONE_LINE: Final = (b":", b"+", b"-")
_MAX_LENGTH: Final = 512 << 20
"""Of a value: https://valkey.io/topics/strings/."""

_CRLF: Final = b"\r\n"
_ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
_IOV_MAX: Final = 1024
_LINE_NBYTES: Final = 1 << 16
"""No line of a reply is longer."""

_LINE_STEP_NBYTES: Final = 64
_VALUE_HEAD_NBYTES: Final = 12 + HEADER_NBYTES
"""As much as may be read before it is known where the payload is to go: its length in digits, and the header."""


class ProtocolError(ConnectionError):
    """What came is no reply to what was asked, or a refusal of the whole call."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reply that is an error. `text` begins with its kind, in capitals, such as WRONGTYPE or MOVED."""

    text: str

    @property
    def kind(self) -> str:
        return self.text.partition(" ")[0]

    @property
    def is_redirection(self) -> bool:
        """Whether another node of the cluster has the key."""
        return self.kind in ("MOVED", "ASK")


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the wanted length: its payload is in place. `header`: what stood before it."""

    header: bytes


@dataclass(frozen=True, slots=True)
class OddValue:
    """A value of another length. `head`: its first bytes, at most a header; the rest was passed over."""

    head: bytes


Reply = Value | OddValue | Refusal | None
"""To a question for a value. None: there is none."""


class Wire:
    """One connection. One thread at a time.

    connection: of valkey-py, connected; this object closes it. timeout_s: how long one call may take.
    """

    def __init__(self, connection: Any, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._socket: socket.socket = connection._sock
        self._is_tls = isinstance(self._socket, ssl.SSLSocket)
        self._timeout_s = timeout_s
        self._clock = clock
        self._deadline_s = 0.0
        self._ahead = bytearray()
        """What has been read and not yet used."""
        self.is_asking = False
        """Whether the node of a cluster is to answer also for keys that it is only about to get."""
        if self._is_tls:
            self._socket.settimeout(timeout_s)
        else:
            # In Python's own timeout mode every call would be a poll and a short read. The kernel waits for all of it.
            self._socket.settimeout(None)
            limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def close(self) -> None:
        self._connection.disconnect()

    # ---- calls ----

    def ask(self, commands: Iterable[Sequence[bytes]]) -> list[bytes]:
        """Commands whose replies are one line each: integers, statuses, errors. Returns the lines."""
        packed = [self._asking + pack(*command) for command in commands]
        self._begin()
        self._send([b"".join(packed)])
        return [self._reply() for _ in packed]

    def load(self, commands: Sequence[Sequence[bytes]], payloads: Sequence[memoryview]) -> Iterator[Reply]:
        """Commands whose replies are values, each of which is put where it belongs if it has the right length.

        A reply is read when it is asked for, so that its payload can be looked at while it is in the processor's cache.
        All of them must be read before the connection is used again.
        """
        self._begin()
        self._send([b"".join(self._asking + pack(*command) for command in commands)])
        for payload in payloads:
            yield self._value(payload)

    def store(self, commands: Sequence[Sequence[bytes | tuple[bytes, memoryview]]]) -> list[bytes]:
        """Commands with large arguments, sent from where they are: a pair `(header, payload)` is one argument.

        Returns the lines of the replies.
        """
        self._begin()
        self._send(list(_pieces(commands, self._asking)))
        return [self._reply() for _ in commands]

    def one(self, command: Sequence[bytes]) -> bytes:
        """A command whose reply is a line, or a short value. Returns the line, or the value."""
        self._begin()
        self._send([pack(*command)])
        line = self._line(_LINE_NBYTES)
        if line.startswith(b"$") and line != MISS:
            return self._bulk(line)
        if line[:1] not in _ONE_LINE and line != MISS:
            raise ProtocolError(f"a short answer was expected, and this came: {line[:64]!r}")
        return line

    def cluster_slots(self, host: str) -> list[tuple[str, int] | None]:
        """Of each of a cluster's 16,384 slots its primary's address, or None. host: how this node is called.

        https://valkey.io/commands/cluster-slots/. Raises ProtocolError also for a server that is no cluster's.
        """
        self._begin()
        self._send([pack(b"CLUSTER", b"SLOTS")])
        owners: list[tuple[str, int] | None] = [None] * N_CLUSTER_SLOTS
        found = self._any()
        try:
            for first, end, (name, port, *_), *_ in found:
                if not 0 <= first <= end < N_CLUSTER_SLOTS:
                    raise ValueError(f"slots {first} to {end}")
                address = (host if name in (None, b"", b"?") else name.decode(), int(port))
                owners[first : end + 1] = [address] * (end + 1 - first)
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"no map of a cluster ({error})") from error
        return owners

    # ---- sending ----

    @property
    def _asking(self) -> bytes:
        return _ASKING if self.is_asking else b""

    def _begin(self) -> None:
        """A call begins. What is there already answers nothing that was asked, and would be taken for an answer."""
        self._deadline_s = self._clock() + self._timeout_s
        if self._ahead or self._has_pending():
            raise ConnectionError("something came that was not asked for, or the server has closed the connection")

    def _has_pending(self) -> bool:
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.pending() > 0
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def shut_down(self) -> None:
        """End whatever call is under way, with an error. From any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _check_time(self) -> None:
        if self._clock() > self._deadline_s:
            raise TimeoutError(f"no answer within {self._timeout_s:g} s")

    def _send(self, buffers: list[bytes | memoryview]) -> None:
        if self._is_tls:
            for buffer in buffers:
                self._check_time()
                self._socket.sendall(buffer)
            return
        first = 0
        while first < len(buffers):
            self._check_time()
            try:
                sent = self._socket.sendmsg(buffers[first : first + _IOV_MAX])
            except BlockingIOError as error:
                raise TimeoutError(f"nothing taken within {self._timeout_s:g} s") from error
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if sent:
                buffers[first] = memoryview(buffers[first])[sent:]

    # ---- receiving ----

    def _reply(self) -> bytes:
        """The line that answers a command: an integer, a status or an error."""
        if self.is_asking:
            self._line(_LINE_NBYTES)
        line = self._line(_LINE_NBYTES)
        if line[:1] not in _ONE_LINE:
            raise ProtocolError(f"an answer in one line was expected, and this came: {line[:64]!r}")
        return line

    def _line(self, ahead: int) -> bytes:
        """The next line, without its end. Reads so much ahead, from its beginning on; more if the line is longer."""
        while (end := self._ahead.find(_CRLF)) < 0:
            if len(self._ahead) > _LINE_NBYTES:
                raise ProtocolError("a line without an end")
            self._check_time()
            self._ahead += self._some(max(ahead - len(self._ahead), _LINE_STEP_NBYTES))
        line = bytes(self._ahead[:end])
        del self._ahead[: end + len(_CRLF)]
        return line

    def _some(self, nbytes: int) -> bytes:
        try:
            got = self._socket.recv(nbytes)
        except BlockingIOError as error:
            raise TimeoutError(f"no answer within {self._timeout_s:g} s") from error
        if not got:
            raise ConnectionError("the server has closed the connection")
        return got

    def _bulk(self, line: bytes) -> bytes:
        """The string whose length this line says."""
        return self._exactly(_number(line) + len(_CRLF))[: -len(_CRLF)]

    def _any(self) -> Any:
        """A reply of integers, strings and arrays of them. Raises ProtocolError if it is an error."""
        line = self._line(_LINE_NBYTES)
        if line[:1] == b":":
            return _number(line)
        if line[:1] == b"*":
            return [self._any() for _ in range(_number(line))]
        if line == MISS:
            return None
        if line[:1] == b"$":
            return self._bulk(line)
        if line[:1] == b"+":
            return line[1:]
        raise ProtocolError(line.removeprefix(b"-").decode(errors="replace"))

    def _value(self, payload: memoryview) -> Reply:
        header = self._usual_head(len(payload))
        if header is not None:
            return self._whole(header, payload)
        if self.is_asking:
            self._line(_VALUE_HEAD_NBYTES)
        line = self._line(_VALUE_HEAD_NBYTES)
        if line == MISS:
            return None
        if line.startswith(b"-"):
            return refusal(line)
        if not line.startswith(b"$"):
            raise ProtocolError(f"a value was asked for, and this came: {line[:64]!r}")
        nbytes = _number(line)
        header = self._exactly(min(nbytes, HEADER_NBYTES))
        if nbytes != HEADER_NBYTES + len(payload):
            self._pass_over(nbytes - len(header))
            self._end_of_value(self._exactly(len(_CRLF)))
            return OddValue(header)
        return self._whole(header, payload)

    def _whole(self, header: bytes, payload: memoryview) -> Value:
        tail = bytearray(len(_CRLF))
        self._receive(payload, tail)
        self._end_of_value(tail)
        return Value(header)

    def _usual_head(self, payload_nbytes: int) -> bytes | None:
        """The header, if the next reply is a value of the wanted length and comes with its header in one piece."""
        if self._ahead or self.is_asking:
            return None
        length = b"$%d\r\n" % (HEADER_NBYTES + payload_nbytes)
        self._check_time()
        got = self._some(len(length) + HEADER_NBYTES)
        if len(got) == len(length) + HEADER_NBYTES and got.startswith(length):
            return got[len(length) :]
        self._ahead += got
        return None

    def _end_of_value(self, tail: bytes | bytearray) -> None:
        if tail != _CRLF:
            raise ProtocolError("a value is longer than it said")

    def _exactly(self, nbytes: int) -> bytes:
        while len(self._ahead) < nbytes:
            self._check_time()
            self._ahead += self._some(min(nbytes - len(self._ahead), _LINE_NBYTES))
        taken = bytes(self._ahead[:nbytes])
        del self._ahead[:nbytes]
        return taken

    def _pass_over(self, nbytes: int) -> None:
        while nbytes:
            nbytes -= len(self._exactly(min(nbytes, _LINE_NBYTES)))

    def _receive(self, payload: memoryview, tail: bytearray) -> None:
        """Fill both, one after the other."""
        buffers = [payload, memoryview(tail)]
        if not self._ahead and not self._is_tls:
            self._check_time()
            n_got = self._receive_some(buffers)
            if n_got == len(payload) + len(tail):
                return
            buffers = _behind(buffers, n_got)
        for i, buffer in enumerate(buffers):
            n_ahead = min(len(self._ahead), len(buffer))
            buffer[:n_ahead] = self._ahead[:n_ahead]
            del self._ahead[:n_ahead]
            buffers[i] = buffer[n_ahead:]
        while buffers:
            if not buffers[0]:
                del buffers[0]
                continue
            self._check_time()
            buffers = _behind(buffers, self._receive_some(buffers))

    def _receive_some(self, buffers: list[memoryview]) -> int:
        if self._is_tls:
            n_got = self._socket.recv_into(buffers[0])
        else:
            try:
                n_got = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError as error:
                raise TimeoutError(f"no answer within {self._timeout_s:g} s") from error
        if not n_got:
            raise ConnectionError("the server has closed the connection")
        return n_got


def _behind(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What of these buffers is left when so many bytes have been filled."""
    left = []
    for buffer in buffers:
        left.append(buffer[nbytes:])
        nbytes = max(0, nbytes - len(buffer))
    return left


def pack(*arguments: bytes) -> bytes:
    """One command, as it is sent."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        parts.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
    return b"".join(parts)


def refusal(line: bytes) -> Refusal:
    """The error in a line that begins with a minus."""
    return Refusal(line[1:].decode(errors="replace"))


def _number(line: bytes) -> int:
    try:
        found = int(line[1:])
    except ValueError as error:
        raise ProtocolError(f"not a number: {line[:64]!r}") from error
    if not line.startswith(b":") and not 0 <= found <= _MAX_LENGTH:
        raise ProtocolError(f"nothing is as long as {found}")
    return found


def _pieces(
    commands: Iterable[Sequence[bytes | tuple[bytes, memoryview]]], before_each: bytes
) -> Iterable[bytes | memoryview]:
    """The bytes of commands, small ones joined, payloads as they are."""
    small: list[bytes] = []
    for command in commands:
        small.append(b"%b*%d\r\n" % (before_each, len(command)))
        for argument in command:
            if isinstance(argument, tuple):
                head, payload = argument
                small.append(b"$%d\r\n%b" % (len(head) + len(payload), head))
                yield b"".join(small)
                yield payload
                small = [_CRLF]
            else:
                small.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
    yield b"".join(small)
