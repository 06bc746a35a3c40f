"""What the folder of an SSD tier is like, as far as can be told without a server: a reading for `sgl-lmcache doctor`.

Reading leaves nothing behind. A folder that is not there is made, since that is the test of whether it can be, and then
removed again: whoever runs the doctor need not be the user who runs the server and has to own it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sgl_lmcache.config import SsdTier

_BLOCK_NBYTES = 4096


@dataclass(frozen=True)
class Disk:
    """A reading of one moment. If the folder cannot be used, `refusal` says why and the rest says nothing."""

    path: Path
    refusal: str = ""
    holder: str = ""
    """Who has it in use, such as `pid 7 on host`; empty if nobody has."""
    room_nbytes: int = 0
    """What is free on its file system, and what is in the folder already."""
    takes_direct_io: bool = True


def read_disk(tier: SsdTier) -> Disk:
    """Look at the folder of `tier` now. Does not raise for what is wrong with it."""
    from hicache.ssd import StoreError, check_directory
    from hicache.ssd.directory import used_nbytes

    path = Path(tier.path)
    with _made_folders_removed(path):
        try:
            check_directory(path, tier.capacity)
            free = os.statvfs(path)
            return Disk(
                path,
                holder=_holder(path / "lock"),
                room_nbytes=free.f_bavail * free.f_frsize + used_nbytes(path),
                takes_direct_io=_takes_direct_io(path),
            )
        except StoreError as error:
            return Disk(path, refusal=str(error))
        except OSError as error:
            return Disk(path, refusal=f"{path} cannot be looked at ({error.strerror})")


@contextmanager
def _made_folders_removed(path: Path) -> Iterator[None]:
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def _holder(lock: Path) -> str:
    """A server keeps its lock as long as it lives, and its file says who it is (`hicache.ssd`)."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 4096, 0).decode(errors="replace").partition("\n")[2].strip() or "an unknown process"
    finally:
        os.close(fd)
    return ""


def _takes_direct_io(folder: Path) -> bool:
    """Asked with a file, removed again. A file system that has none says so when it is opened, or at the first read."""
    probe = folder / f"probe.{os.getpid()}"
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        with contextlib.closing(mmap.mmap(-1, _BLOCK_NBYTES)) as aligned:
            try:
                os.preadv(fd, [aligned], 0)
            finally:
                os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
