"""A disk that fails when a test says so."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transfer.files import System


class Disk(System):
    """Real files, with faults. `fail[name]` is the error number that the call of that name answers with.

    `short`: reads and writes stop after that many bytes. `no_direct`: where O_DIRECT is refused, `open` or `preadv`.
    `bad`: offsets in `data.*` of blocks that are refused, by the name of the file.
    `hold()`: reads and writes stay in the call until `let_go()`; `n_held` are there. `calls` counts calls by name.
    """

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.short: int | None = None
        self.no_direct: str | None = None
        self.bad: dict[str, set[int]] = {}
        self.calls: Counter[str] = Counter()
        self._open = threading.Event()
        self._open.set()
        self.n_held = 0
        self._names: dict[int, str] = {}

    def hold(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.fail:
            raise OSError(self.fail[name], os.strerror(self.fail[name]))

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and self.no_direct == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._called("open")
        fd = super().open(path, flags)
        self._names[fd] = path.name
        return fd

    def fallocate(self, fd: int, nbytes: int) -> None:
        self._called("fallocate")
        super().fallocate(fd, nbytes)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        self._called("preadv")
        if self.no_direct == "preadv" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._refuse(fd, buffers, offset)
        return super().preadv(fd, _shortened(buffers, self.short), offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        self._called("pwritev")
        self._refuse(fd, buffers, offset)
        return super().pwritev(fd, _shortened(buffers, self.short), offset)

    def fdatasync(self, fd: int) -> None:
        self._called("fdatasync")
        super().fdatasync(fd)

    def unlink(self, path: Path) -> None:
        self._called("unlink")
        super().unlink(path)

    def _refuse(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        end = offset + sum(len(buffer) for buffer in buffers)
        if any(offset <= bad < end for bad in self.bad.get(self._names.get(fd, ""), ())):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _wait(self) -> None:
        self.n_held += 1
        self._open.wait()
        self.n_held -= 1


def _shortened(buffers: Sequence[memoryview], nbytes: int | None) -> Sequence[memoryview]:
    return buffers if nbytes is None else [buffers[0][:nbytes]]
