"""A trace that a server writes of itself: one line a request, with lengths, times and hashes; no text and no tokens.

    {"timestamp":1250,"input_length":1187,"output_length":64,"block_size":512,"hash_ids":[6134...,1820...]}

That is Mooncake's format, so `sgl-lmcache simulate` replays it. `timestamp` is the arrival in milliseconds since the
first request. `hash_ids` name the prompt's full blocks; two prompts have an id in common exactly as far as they may
share KV: up to there they have the same tokens, the same salt and the same adapter.

An id is 53 bits of a keyed hash of SGLang's key of the block's last page, which covers the whole prefix. The key of the
hash is drawn when the recording starts and is never written down: without it nobody can test whether a prompt that he
guesses is in a trace, nor compare two recordings.

Readers want the lines in the order of arrival, and a line is complete when its request ends. So lines are held back
until all earlier ones have ended, at most `MAX_HELD` of them: then the oldest is written as if it had ended without
output.

The scheduler's part (`Recorder`) is a few dictionary operations. Hashing and writing are done by a thread
(`TraceFile`). Whatever goes wrong there ends the recording with one log line, never the server. A server that is killed
leaves at most a torn last line behind; so does a disk that fills up.
"""

from __future__ import annotations

import errno
import os
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from hicache.logs import get_logger
from radix import KEY_NBYTES

BLOCK_TOKENS: Final = 512
"""Mooncake's blocks have so many. Ours are whole pages, so they may have more."""

MAX_HELD: Final = 10_000
"""Lines that wait for earlier requests to end."""

MAX_QUEUED: Final = 1024
"""Lines that wait for the thread. What comes on top is left out."""

CLOSE_TIMEOUT_S: Final = 2.0

_BATCH_LINES: Final = 64
_ID_BITS: Final = 53
"""JSON readers that take numbers for floats keep so many."""

logger = get_logger(__name__)


def pages_of_block(page_size: int) -> int:
    """How many pages a block has: the fewest that are `BLOCK_TOKENS` tokens or more."""
    return -(-BLOCK_TOKENS // page_size)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One request that has ended. ends: the page keys of the last pages of its prompt's full blocks, 32 bytes each."""

    timestamp_ms: int
    n_input: int
    n_output: int
    ends: bytes


class _Line(msgspec.Struct):
    timestamp: int
    input_length: int
    output_length: int
    block_size: int
    hash_ids: list[int]


class TraceFile:
    """The file, and the thread that writes it. Made by `open`; `put` and `close` are for one thread.

    block_tokens: how many a block has. limit_nbytes: the file never gets larger.
    """

    def __init__(self, path: Path, fd: int, *, block_tokens: int, limit_nbytes: int) -> None:
        """`fd` is the object's from now on."""
        self.is_open = True
        self.n_dropped = 0
        self._path = path
        self._fd = fd
        self._block_tokens = block_tokens
        self._limit_nbytes = limit_nbytes
        self._nbytes = 0
        self._secret = secrets.token_bytes(32)
        self._queue: queue.Queue[Entry | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._serve, name="sgl-lmcache-record", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, *, block_tokens: int, limit_nbytes: int) -> TraceFile:
        """Make the file, mode 0600. Raises OSError, also if it is there: nothing is ever overwritten."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return cls(path, fd, block_tokens=block_tokens, limit_nbytes=limit_nbytes)

    def put(self, entry: Entry) -> None:
        """Write this soon. Never blocks: if too much waits, it is left out and counted, which is told once."""
        if not self.is_open:
            return
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self.n_dropped += 1
            if self.n_dropped == 1:
                logger.warning("sgl_lmcache: requests are left out of the trace %s: its disk is too slow", self._path)

    def close(self) -> None:
        """Write what has been put, as far as that takes no longer than `CLOSE_TIMEOUT_S`. Blocks."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
            except queue.Full:
                return
            self._thread.join(CLOSE_TIMEOUT_S)

    # ---- the thread ----

    def _serve(self) -> None:
        try:
            while self.is_open:
                self._write(self._waiting())
        except OSError as error:
            logger.error("sgl_lmcache: the recording has ended: %s cannot be written: %s", self._path, error.strerror)
        finally:
            self.is_open = False
            os.close(self._fd)

    def _waiting(self) -> list[Entry]:
        """Some entries, as soon as there is one. `None` among them is the end."""
        entries = []
        entry = self._queue.get()
        while entry is not None:
            entries.append(entry)
            if len(entries) == _BATCH_LINES or self._queue.empty():
                return entries
            entry = self._queue.get_nowait()
        self.is_open = False
        return entries

    def _write(self, entries: list[Entry]) -> None:
        """Whole lines, all in one call unless the system takes only a part. Raises OSError."""
        lines: list[bytes] = []
        is_full = False
        for entry in entries:
            line = self._line(entry)
            is_full = self._nbytes + len(line) > self._limit_nbytes
            if is_full:
                break
            self._nbytes += len(line)
            lines.append(line)
        if lines:
            self._write_all(b"".join(lines))
        if is_full:
            self.is_open = False
            logger.warning(
                "sgl_lmcache: the recording has ended: %s would grow beyond its limit, %s bytes",
                self._path,
                f"{self._limit_nbytes:,}",
            )

    def _write_all(self, data: bytes) -> None:
        if os.fstat(self._fd).st_nlink == 0:
            raise OSError(errno.ENOENT, "it was deleted")
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]

    def _line(self, entry: Entry) -> bytes:
        line = _Line(entry.timestamp_ms, entry.n_input, entry.n_output, self._block_tokens, list(self._ids(entry.ends)))
        return msgspec.json.encode(line) + b"\n"

    def _ids(self, ends: bytes) -> Iterator[int]:
        for at in range(0, len(ends), KEY_NBYTES):
            digest = blake2b(ends[at : at + KEY_NBYTES], digest_size=8, key=self._secret).digest()
            yield int.from_bytes(digest) >> (64 - _ID_BITS)


@dataclass(slots=True, eq=False)
class _Request:
    """One that has arrived and is not written. n_output: None until it has ended."""

    rid: str
    timestamp_ms: int
    n_input: int
    ends: bytes
    n_output: int | None = None


class Recorder:
    """Which requests there are, in the order of arrival. One thread, the scheduler's. clock: monotonic seconds."""

    def __init__(self, trace: TraceFile, clock: Callable[[], float], *, max_held: int = MAX_HELD) -> None:
        self._trace = trace
        self._clock = clock
        self._max_held = max_held
        self._first_s: float | None = None
        self._running: dict[str, _Request] = {}
        self._held: deque[_Request] = deque()

    def wants(self, rid: str) -> bool:
        """Whether this request is new, and the recording goes on. One that comes back after a retraction is not new."""
        return self._trace.is_open and rid not in self._running

    def arrived(self, rid: str, n_input: int, ends: bytes) -> None:
        """A request that is wanted. ends: as in `Entry`."""
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        request = _Request(rid, int((now_s - self._first_s) * 1000), n_input, ends)
        self._running[rid] = request
        self._held.append(request)
        if len(self._held) > self._max_held:
            self.ended(self._held[0].rid, 0)

    def ended(self, rid: str, n_output: int) -> None:
        """It will not come back. Of requests that are not known nothing is done."""
        request = self._running.pop(rid, None)
        if request is None:
            return
        request.n_output = n_output
        while self._held and self._held[0].n_output is not None:
            first = self._held.popleft()
            assert first.n_output is not None
            self._trace.put(Entry(first.timestamp_ms, first.n_input, first.n_output, first.ends))

    def close(self) -> None:
        """The server ends: what runs has no output. Blocks for seconds at most."""
        for rid in tuple(self._running):
            self.ended(rid, 0)
        self._trace.close()


def start(
    path: Path, *, replica: tuple[int, int], page_size: int, limit_nbytes: int, clock: Callable[[], float]
) -> Recorder | None:
    """Start a recording. None, with a line in the log that says why, if the file cannot be made.

    replica: (number, how many). Each of several has a file of its own, and an equal part of the limit.
    """
    number, n_replicas = replica
    block_tokens = pages_of_block(page_size) * page_size
    if n_replicas > 1:
        path = path.with_name(f"{path.stem}.dp{number}{path.suffix}")
    try:
        trace = TraceFile.open(path, block_tokens=block_tokens, limit_nbytes=limit_nbytes // n_replicas)
    except FileExistsError:
        logger.error("sgl_lmcache: nothing is recorded: %s exists; move it away, or name another file", path)
        return None
    except OSError as error:
        logger.error("sgl_lmcache: nothing is recorded: %s cannot be made (%s); see to it", path, error.strerror)
        return None
    logger.info("sgl_lmcache: recording a trace in %s, in blocks of %d tokens", path, block_tokens)
    return Recorder(trace, clock)
