import errno
import fcntl
import gc
import mmap
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.transfer.copy_cases import LAYOUTS
from transfer import slab as slab_module
from transfer.errors import LayoutError, SlabError
from transfer.slab import Slab


def test_one_memory_under_array_tensor_and_descriptor() -> None:
    slab = Slab(3, 8192)
    slab.array[2, 5] = 41
    assert slab.tensor[2, 5] == 41
    slab.tensor[2, 5] = 42
    with mmap.mmap(slab.fd, slab.nbytes) as other:
        assert other[2 * 8192 + 5] == 42
    assert slab.array.shape == (3, 8192)
    assert slab.array.dtype == np.uint8
    assert slab.nbytes == 3 * 8192
    slab.close()


def test_the_memory_is_its_owners_and_not_in_core_dumps() -> None:
    slab = Slab(4, 4096)
    assert stat.S_IMODE(os.fstat(slab.fd).st_mode) == 0o600
    smaps = Path("/proc/self/smaps").read_text().split(f"{slab.address:x}-", 1)[1]
    flags = next(line for line in smaps.splitlines() if line.startswith("VmFlags:"))
    assert " dd" in flags, "madvise(MADV_DONTDUMP)"
    slab.close()


def test_slots_are_aligned_and_zeroed() -> None:
    slab = Slab(2, 4096)
    assert slab.address % 4096 == 0
    assert slab.array[1].ctypes.data == slab.address + 4096
    assert not slab.array.any()


def test_memory_is_held_from_the_start_and_not_inherited() -> None:
    slab = Slab(64, 4096)
    assert os.fstat(slab.fd).st_blocks * 512 >= slab.nbytes
    assert fcntl.fcntl(slab.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_close_is_idempotent_and_ends_access() -> None:
    slab = Slab(1, 4096)
    fd = slab.fd
    slab.close()
    slab.close()
    for use in (lambda: slab.array, lambda: slab.tensor, lambda: slab.fd, lambda: slab.address):
        with pytest.raises(SlabError, match="closed"):
            use()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_views_outlive_close_and_the_memory_goes_with_the_last() -> None:
    slab = Slab(4, 4096)
    tensor, address = slab.tensor, slab.address
    slab.close()
    tensor.fill_(9)
    assert int(tensor.sum()) == 9 * 4 * 4096
    assert _is_mapped(address)
    del tensor
    gc.collect()
    assert not _is_mapped(address)


def _is_mapped(address: int) -> bool:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return any(line.startswith(f"{address:x}-") and "sgl-lmcache-slab" in line for line in maps)


@contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_that_is_refused_is_one_sentence_and_leaks_nothing() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with _largest_file(1 << 20), pytest.raises(SlabError, match=r"a slab of 2,097,152 bytes .*bytes are available"):
        Slab(512, 4096)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_allocation_is_in_full_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", exhausted)
    with pytest.raises(SlabError, match=r"\(Cannot allocate memory\)"):
        Slab(1, 4096)


@pytest.mark.parametrize(("n_slots", "slot_nbytes"), [(0, 4096), (-1, 4096), (1, 0), (1, 100), (1, 4097)])
def test_impossible_sizes_are_refused(n_slots: int, slot_nbytes: int) -> None:
    with pytest.raises(SlabError):
        Slab(n_slots, slot_nbytes)


def test_a_layout_of_another_slot_size_is_refused() -> None:
    slab = Slab(1, 4096)
    slab.check(LAYOUTS["padded NHD"])
    with pytest.raises(LayoutError, match="4096 bytes"):
        slab.check(LAYOUTS["packed NHD"])


class FakeCudart:
    """Records which ranges are registered; refuses the n-th."""

    def __init__(self, refuse_at: int | None = None) -> None:
        self.registered: dict[int, int] = {}
        self.refuse_at = refuse_at

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if len(self.registered) == self.refuse_at:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "PIN_CHUNK_NBYTES", 8192)


def _with(monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart) -> FakeCudart:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: cudart))
    return cudart


@pytest.mark.usefixtures("small_chunks")
def test_pin_covers_the_slab_in_chunks_once_and_close_unpins(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = _with(monkeypatch, FakeCudart())
    slab = Slab(5, 4096)
    slab.pin()
    slab.pin()
    assert slab.is_pinned
    assert cudart.registered == {slab.address: 8192, slab.address + 8192: 8192, slab.address + 16384: 4096}
    slab.close()
    assert cudart.registered == {}


@pytest.mark.usefixtures("small_chunks")
def test_a_refused_pin_leaves_nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = _with(monkeypatch, FakeCudart(refuse_at=2))
    slab = Slab(5, 4096)
    with pytest.raises(SlabError, match="refused to pin"):
        slab.pin()
    assert cudart.registered == {}
    assert not slab.is_pinned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pinned_slab_is_pinned_for_torch() -> None:
    slab = Slab(4, 4096)
    slab.pin()
    assert slab.tensor.is_pinned()
    slab.close()
