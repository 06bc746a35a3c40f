"""Who may use what: one server a directory, one process a store.

Both are `flock`s on a file named `lock`, so they end with their process, however it ends.

    directory/lock         shared by all ranks of one server; its text names the server
    directory/growth.lock  held while room is counted and taken
    store/lock             exclusive, while the store is open

Taking the directory: who gets the lock exclusively is first; it writes its server's token and keeps the lock shared.
Who does not reads the token of those that are there: its own server, or another, which is refused. A lock can be held
for an instant by somebody who is about to be refused, so a refusal is repeated some times before it is believed. The
same holds for a store: whoever wants its place takes its lock for an instant.

A lock belongs to an open file, which a forked child has too. So it is given up expressly, not by closing the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

N_TRIES: Final = 25
N_GROWTH_TRIES: Final = 250
_TRY_AGAIN_S: Final = 0.02


class StoreError(Exception):
    """A directory cannot serve as a store: the sentence says which, why, and what would be right."""


class Lock:
    """An flock that is held. Released, it is free, even if a child process that was forked meanwhile lives on."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd: int | None = fd

    def is_in_place(self) -> bool:
        """Whether others still find this lock: its file may have been deleted. Raises OSError."""
        return self._fd is not None and _leads_to(self._path, self._fd)

    def release(self) -> None:
        """Releasing it again does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            _give_up(fd)


def lock_store(folder: Path) -> Lock | None:
    """Take a store for this process alone, or None if another has it or the folder is going away. Raises OSError."""
    fd = _open(folder / "lock")
    if _try_flock(fd, fcntl.LOCK_EX) and _leads_to(folder / "lock", fd):
        return Lock(folder / "lock", fd)
    _give_up(fd)
    return None


def attempts(n: int) -> Iterator[None]:
    """Goes n times round a loop, with a pause between."""
    for i in range(n):
        if i:
            _pause()
        yield


def _pause() -> None:
    time.sleep(_TRY_AGAIN_S)


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """While inside, no other rank counts or takes room in the directory.

    Blocks, shortly as a rule, for some seconds at most. Raises TimeoutError then, and OSError.
    """
    file = path / "growth.lock"
    for _ in attempts(N_GROWTH_TRIES):
        fd = _open(file)
        try:
            if _try_flock(fd, fcntl.LOCK_EX) and _leads_to(file, fd):
                yield
                return
        finally:
            _give_up(fd)
    raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked", str(file))


def lock_directory(path: Path, server: str) -> Lock:
    """Take the directory for a server, along with its other ranks. Blocks for at most about a second.

    Raises StoreError, naming it, if another server has the directory; OSError.
    """
    found = ""
    for _ in attempts(N_TRIES):
        fd = _open(path / "lock")
        if _try_flock(fd, fcntl.LOCK_EX):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{server}\npid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        if _try_flock(fd, fcntl.LOCK_SH) and _leads_to(path / "lock", fd):
            token, _, found = os.pread(fd, 4096, 0).decode(errors="replace").partition("\n")
            if token == server:
                return Lock(path / "lock", fd)
        _give_up(fd)
    raise StoreError(
        f"{path} is in use by another server ({found.strip() or 'unknown'}): stop it, or give each server a directory "
        f"of its own"
    )


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _give_up(fd: int) -> None:
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, fd: int) -> bool:
    """Whether the lock that was taken is the one that others find: its file, or file system, may be gone meanwhile."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(found, os.fstat(fd))
    except OSError:
        return False
