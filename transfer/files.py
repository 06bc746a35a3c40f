"""Slots in preallocated files, and direct I/O between them and the slab.

A store is a row of segment files `data.0, data.1, ...` of equally many slots; a file slot is a number, counted through
all segments, and as large as a slot of the slab. Bytes go straight between the slab and the disk (O_DIRECT, where the
file system has it): no copy, and nothing of it stays in the page cache. Neighbouring file slots go in one call.

A segment is allocated in full when it is made, so that no write meets a full disk later, or it is not made at all.

`read` and `write` may run on any number of threads at once; the caller sees to it that no two of them meet in a slot,
and that nothing runs while segments are dropped or closed. Every system call goes through a `System`, so that tests can
put a failing disk below.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

ALIGNMENT_NBYTES = 4096
"""Direct I/O wants offsets, lengths and addresses to be multiples of the disk's block; 4096 serves all disks."""

CALL_NBYTES = 4 << 20
"""At most this much goes in one call, or one slot if that is more."""

IOV_MAX = 1024

_TRIED_SEGMENTS = 4

_FLAGS = os.O_RDWR | os.O_CLOEXEC

_Call = Callable[[int, Sequence[memoryview], int], int]


class System:
    """The system calls of a store, one method each. All block, and raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """Files are made for their owner only."""
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def set_buffered(self, fd: int) -> None:
        """Turns O_DIRECT off."""
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def fallocate(self, fd: int, nbytes: int) -> None:
        os.posix_fallocate(fd, 0, nbytes)

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def has_data(self, fd: int) -> bool:
        """Whether anything of a file was ever written; true also where the file system cannot tell. Never raises."""
        try:
            os.lseek(fd, 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno != errno.ENXIO
        return True

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: Path) -> os.stat_result:
        return os.stat(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)


def segment_of(name: str) -> int | None:
    """Which segment a file of this name is, or None if it cannot be one."""
    number = name.removeprefix("data.")
    canonical = name.startswith("data.") and number.isascii() and number.isdecimal() and number == str(int(number))
    return int(number) if canonical else None


class SegmentFiles:
    """The data files of one store.

    folder: exists, and is this object's to fill with `data.*`.
    slab: uint8[n_slab_slots, slot_nbytes], C-contiguous and aligned to 4096 bytes; shared, and kept alive by this.
    segment_slots: slots a file. max_segments: how many files there are to be at most.

    Opens the files that are there, up to the first missing one, and allocates them in full again where they were cut,
    or copied with holes; what lies behind a gap is removed, as far as it could be a file of ours. Raises OSError.
    """

    def __init__(
        self, folder: Path, slab: npt.NDArray[np.uint8], *, segment_slots: int, max_segments: int, system: System
    ) -> None:
        if slab.shape[1] % ALIGNMENT_NBYTES:
            raise ValueError(f"slots of {slab.shape[1]} bytes are not aligned to {ALIGNMENT_NBYTES}")
        self.segment_slots = segment_slots
        self.max_segments = max_segments
        self.slot_nbytes = slab.shape[1]
        self.segment_nbytes = segment_slots * self.slot_nbytes
        self.is_direct = True
        self._folder = folder
        self._memory = slab.reshape(-1).data
        self._system = system
        self._fds: list[int] = []
        self._call_slots = min(IOV_MAX, max(1, CALL_NBYTES // self.slot_nbytes))
        try:
            self._open_all()
        except OSError:
            self.close()
            raise

    @property
    def n_segments(self) -> int:
        return len(self._fds)

    @property
    def n_slots(self) -> int:
        return len(self._fds) * self.segment_slots

    def path(self, segment: int) -> Path:
        return self._folder / f"data.{segment}"

    # ---- segments ----

    def grow(self) -> None:
        """One more segment, allocated in full. Raises OSError, and leaves no file then. Blocks."""
        path = self.path(self.n_segments)
        fd = self._open(path, _FLAGS | os.O_CREAT)
        try:
            self._system.fallocate(fd, self.segment_nbytes)
        except OSError:
            self._system.close(fd)
            self._system.unlink(path)
            raise
        self._fds.append(fd)

    @property
    def is_last_written(self) -> bool:
        """Whether the newest segment, none of whose slots has been used yet, was written by its allocation.

        So it is where the file system cannot allocate otherwise.
        """
        return self._system.has_data(self._fds[-1])

    def drop(self, n_kept: int) -> None:
        """Remove all segments but the first `n_kept`, the highest first."""
        while len(self._fds) > n_kept:
            self._system.unlink(self.path(len(self._fds) - 1))
            self._system.close(self._fds.pop())

    def sync(self, segments: Iterable[int]) -> None:
        """What was written to these segments survives a power cut. Blocks."""
        for segment in segments:
            self._system.fdatasync(self._fds[segment])

    def are_in_place(self) -> bool:
        """Whether every path still leads to the file that is open. False also when it leads nowhere, or if that file's
        system is gone. Raises OSError.
        """
        for segment, fd in enumerate(self._fds):
            try:
                named = self._system.stat(self.path(segment))
            except FileNotFoundError:
                return False
            try:
                opened = self._system.fstat(fd)
            except OSError:
                return False
            if (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
                return False
        return True

    def close(self) -> None:
        while self._fds:
            self._system.close(self._fds.pop())

    def _open_all(self) -> None:
        while self._exists(self.path(self.n_segments)):
            fd = self._open(self.path(self.n_segments), _FLAGS)
            self._fds.append(fd)
            found = self._system.fstat(fd)
            if min(found.st_size, 512 * found.st_blocks) < self.segment_nbytes:
                self._system.fallocate(fd, self.segment_nbytes)
            if found.st_size > self.segment_nbytes:
                self._system.truncate(fd, self.segment_nbytes)
        for name in os.listdir(self._folder):
            segment = segment_of(name)
            if segment is not None and self.n_segments <= segment < self.max_segments:
                self._system.unlink(self._folder / name)

    def _exists(self, path: Path) -> bool:
        try:
            self._system.stat(path)
        except FileNotFoundError:
            return False
        return True

    def _open(self, path: Path, flags: int) -> int:
        if self.is_direct:
            try:
                return self._system.open(path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.is_direct = False
        return self._system.open(path, flags)

    def _go_buffered(self) -> None:
        self.is_direct = False
        for fd in tuple(self._fds):
            self._system.set_buffered(fd)

    # ---- bytes ----

    def read(self, file_slots: Int32Array, slab_slots: Int32Array) -> npt.NDArray[np.bool_]:
        """Fill `slab_slots[i]` from `file_slots[i]`. Blocks, without the GIL while the disk works.

        Returns bool[n]: False for a slot that lies past the end of its file, and whose bytes in the slab may be
        anything. Raises OSError; a read that stops before the end of the file without a reason is one too.
        """
        complete = np.ones(len(file_slots), dtype=np.bool_)
        for first, end in self._runs(file_slots):
            nbytes = self._move(self._system.preadv, file_slots[first], slab_slots[first:end])
            complete[first + nbytes // self.slot_nbytes : end] = False
        return complete

    def try_read(self) -> None:
        """Read the first or the last block of a segment, if there is one, into memory of its own.

        Raises OSError if neither block of the first segments can be read.
        """
        refused: OSError | None = None
        with mmap.mmap(-1, ALIGNMENT_NBYTES) as aligned, memoryview(aligned) as block:
            for fd in self._fds[:_TRIED_SEGMENTS]:
                for offset in (0, self.segment_nbytes - ALIGNMENT_NBYTES):
                    try:
                        self._system.preadv(fd, [block], offset)
                    except OSError as error:
                        refused = error
                    else:
                        return
        if refused is not None:
            raise refused

    def write(self, file_slots: Int32Array, slab_slots: Int32Array) -> None:
        """Write `slab_slots[i]` to `file_slots[i]`, whole slots. Blocks likewise. Raises OSError."""
        for first, end in self._runs(file_slots):
            nbytes = self._move(self._system.pwritev, file_slots[first], slab_slots[first:end])
            if nbytes < (end - first) * self.slot_nbytes:
                raise OSError(errno.EIO, "the write stopped short")

    def _runs(self, file_slots: Int32Array) -> Iterator[tuple[int, int]]:
        """Half-open ranges of positions that are neighbours in one file, and not too many for one call."""
        if not len(file_slots):
            return
        starts = (np.diff(file_slots) != 1) | (file_slots[1:] % self.segment_slots == 0)
        borders = [0, *(np.flatnonzero(starts) + 1).tolist(), len(file_slots)]
        for first, end in pairwise(borders):
            for at in range(first, end, self._call_slots):
                yield at, min(at + self._call_slots, end)

    def _move(self, call: _Call, file_slot: np.int32, slab_slots: Int32Array) -> int:
        """Returns how many bytes went, from the start: fewer than asked for only at the end of the file."""
        segment, slot = divmod(int(file_slot), self.segment_slots)
        fd, offset = self._fds[segment], slot * self.slot_nbytes
        buffers = self._buffers(slab_slots)
        wanted, done, is_buffered = len(slab_slots) * self.slot_nbytes, 0, False
        while done < wanted:
            try:
                moved = call(fd, _after(buffers, done) if done else buffers, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or is_buffered:
                    raise
                self._go_buffered()
                is_buffered = True
                continue
            progress = moved if done + moved == wanted else moved // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES
            done += progress
            if not progress:
                if offset + done + moved >= self._system.fstat(fd).st_size:
                    return done
                raise OSError(errno.EIO, f"{self.path(segment)} gave {moved} bytes at {offset + done} and stopped")
        return done

    def _buffers(self, slab_slots: Int32Array) -> list[memoryview]:
        """Views of the slab, one for each run of neighbouring slots."""
        borders = [0, *(np.flatnonzero(np.diff(slab_slots) != 1) + 1).tolist(), len(slab_slots)]
        buffers = []
        for first, end in pairwise(borders):
            start = int(slab_slots[first]) * self.slot_nbytes
            buffers.append(self._memory[start : start + (end - first) * self.slot_nbytes])
        return buffers


def _after(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The same memory without its first `nbytes`."""
    left: list[memoryview] = []
    for buffer in buffers:
        if nbytes < len(buffer):
            left.append(buffer[nbytes:])
        nbytes = max(0, nbytes - len(buffer))
    return left
