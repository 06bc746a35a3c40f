"""The host tier's memory: one contiguous region of page-sized slots.

The slab is a memfd, so it has no name to collide or to be left behind, the kernel frees it with its last user, and
another process may map it later. It is allocated in full at the start, page tables included: the kernel holds the
memory from then on, so that no copy or I/O meets a page fault, a SIGBUS or an out-of-memory later. (/dev/shm is not
used: containers give it 64 MB, and a full one is a SIGBUS at first touch.)

The invariant: a view never dangles. The mapping belongs to the views; `close` drops the slab's own, and the memory
goes when the last one of anybody goes. Nothing here unmaps memory that someone can still reach.

Slots are 4096-byte aligned, for direct I/O straight from the slab and RDMA over one region.
"""

import mmap
import os

import numpy as np
import numpy.typing as npt
import torch

from transfer.errors import LayoutError, SlabError
from transfer.layout import SLOT_ALIGNMENT_NBYTES, PageLayout

PIN_CHUNK_NBYTES = 1 << 30
"""cudaHostRegister is called on at most this much at once: a driver refuses very large ranges."""


class Slab:
    """`n_slots` slots of `slot_nbytes` bytes, zeroed at the start.

    Blocks while the kernel allocates (about half a second a GiB). Raises `SlabError` when there is not enough memory.
    Under a cgroup limit the kernel may kill the process instead: the caller compares `n_slots * slot_nbytes` with the
    memory at hand first. Only the constructor, `pin` and `close` block; views may be read from any thread.
    """

    def __init__(self, n_slots: int, slot_nbytes: int) -> None:
        if n_slots < 1:
            raise SlabError(f"A slab needs at least 1 slot, not {n_slots}.")
        if slot_nbytes < 1 or slot_nbytes % SLOT_ALIGNMENT_NBYTES:
            raise SlabError(f"slot_nbytes must be a positive multiple of {SLOT_ALIGNMENT_NBYTES}, not {slot_nbytes}.")
        self.n_slots = n_slots
        self.slot_nbytes = slot_nbytes
        self.nbytes = n_slots * slot_nbytes
        self._pinned: list[int] = []
        self._fd: int | None = os.memfd_create("sgl-lmcache-slab", os.MFD_CLOEXEC)
        try:
            array = _mapped(self._fd, self.nbytes)
        except OSError as error:
            os.close(self._fd)
            raise SlabError(
                f"Cannot allocate a slab of {self.nbytes:,} bytes ({error.strerror}); "
                f"{_available_nbytes():,} bytes are available."
            ) from error
        self._array: npt.NDArray[np.uint8] | None = array.reshape(n_slots, slot_nbytes)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All slots, `(n_slots, slot_nbytes)`, writable. Shares the memory and keeps it alive, also after `close`."""
        if self._array is None:
            raise SlabError("The slab is closed.")
        return self._array

    @property
    def tensor(self) -> torch.Tensor:
        """`array` as a torch uint8 tensor on the CPU, sharing the memory."""
        return torch.from_numpy(self.array)

    @property
    def fd(self) -> int:
        """The memfd, closed on exec. The slab owns it: duplicate it to keep it past `close`."""
        if self._fd is None:
            raise SlabError("The slab is closed.")
        return self._fd

    @property
    def address(self) -> int:
        """Where slot 0 starts in this process. Holding the number keeps nothing alive."""
        return int(self.array.ctypes.data)

    @property
    def is_pinned(self) -> bool:
        return bool(self._pinned)

    def check(self, layout: PageLayout) -> None:
        """Raises `LayoutError` unless a slot holds exactly a page of `layout` and its padding."""
        if self.slot_nbytes != layout.slot_nbytes:
            raise LayoutError(
                f"Slots of {self.slot_nbytes} bytes do not match {layout.slot_nbytes}-byte ones of pages."
            )

    def pin(self) -> None:
        """Registers the memory with CUDA, so that its copies are asynchronous and kernels may read it in place.

        Only where CUDA is. Blocks. A second call does nothing. Raises `SlabError` when the
        driver refuses; nothing stays registered then.
        """
        if self._pinned:
            return
        for first in range(0, self.nbytes, PIN_CHUNK_NBYTES):
            start = self.address + first
            result = torch.cuda.cudart().cudaHostRegister(start, min(PIN_CHUNK_NBYTES, self.nbytes - first), 0)
            if int(result) != 0:
                self._unpin()
                raise SlabError(f"CUDA refused to pin the slab of {self.nbytes:,} bytes (error {int(result)}).")
            self._pinned.append(start)

    def close(self) -> None:
        """Unpins the memory, closes the descriptor and drops the slab's own view. Idempotent.

        Copies and I/O on the slab must have ended. Views that others hold stay valid, and keep the memory.
        """
        self._unpin()
        self._array = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _unpin(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())


def _mapped(fd: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The whole file as an array, for its owner only and left out of core dumps.

    The array owns the mapping, so it is unmapped with the last view.
    """
    os.fchmod(fd, 0o600)
    os.posix_fallocate(fd, 0, nbytes)
    mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    mapping.madvise(mmap.MADV_DONTDUMP)
    return np.frombuffer(mapping, dtype=np.uint8)


def _available_nbytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
