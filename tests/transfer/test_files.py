"""Segment files: bytes come back, neighbours share a call, short calls go on, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.disk import Disk
from transfer.files import SegmentFiles

SLOT_NBYTES = 4096
SEGMENT_SLOTS = 8
MAX_SEGMENTS = 8


def make_slab(n_slots: int = 64) -> npt.NDArray[np.uint8]:
    slab = np.frombuffer(mmap.mmap(-1, n_slots * SLOT_NBYTES), np.uint8).reshape(n_slots, SLOT_NBYTES)
    slab[:] = np.random.default_rng(1).integers(0, 256, slab.shape, dtype=np.uint8)
    return slab


def slots(*numbers: int) -> npt.NDArray[np.int32]:
    return np.array(numbers, np.int32)


def run(first: int, n: int) -> npt.NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


class Case:
    def __init__(self, folder: Path, n_segments: int = 3) -> None:
        self.folder = folder
        self.disk = Disk()
        self.slab = make_slab()
        self.files = self.open()
        for _ in range(n_segments):
            self.files.grow()

    def open(self) -> SegmentFiles:
        return SegmentFiles(
            self.folder, self.slab, segment_slots=SEGMENT_SLOTS, max_segments=MAX_SEGMENTS, system=self.disk
        )


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@settings(max_examples=50)
@given(data=st.data(), short=st.sampled_from([None, 4096, 4608, 12288]))
def test_what_is_written_to_any_slots_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, short: int | None
) -> None:
    case = Case(tmp_path_factory.mktemp("files"))
    case.disk.short = short
    n = data.draw(st.integers(0, 20))
    file_slots = slots(*data.draw(st.permutations(range(24)))[:n])
    source = slots(*data.draw(st.permutations(range(32)))[:n])
    target = 32 + slots(*data.draw(st.permutations(range(32)))[:n])
    case.files.write(file_slots, source)
    assert case.files.read(file_slots, target).all()
    assert np.array_equal(case.slab[target], case.slab[source])
    case.files.close()


def test_neighbours_go_in_one_call_and_segments_do_not(case: Case) -> None:
    case.files.write(run(1, 6), slots(9, 3, 4, 5, 1, 0))
    assert case.disk.calls["pwritev"] == 1
    assert case.files.read(run(6, 4), run(32, 4)).all()
    assert case.disk.calls["preadv"] == 2
    assert case.files.read(slots(0, 2, 3, 9), run(32, 4)).all()
    assert case.disk.calls["preadv"] == 5


def test_a_read_past_the_end_says_which_slots(case: Case) -> None:
    case.files.write(run(0, 8), run(0, 8))
    os.truncate(case.folder / "data.0", 5 * SLOT_NBYTES + 100)
    assert case.files.read(run(2, 8), run(32, 8)).tolist() == [True] * 3 + [False] * 3 + [True] * 2
    assert np.array_equal(case.slab[32:35], case.slab[2:5])


def test_a_call_that_makes_no_progress_is_an_error(case: Case) -> None:
    case.disk.short = 0
    with pytest.raises(OSError, match="gave 0 bytes at 4096 and stopped"):
        case.files.read(run(1, 2), run(0, 2))
    with pytest.raises(OSError, match="stopped"):
        case.files.write(run(1, 2), run(0, 2))
    case.disk.short = 100
    with pytest.raises(OSError, match="gave 100 bytes"):
        case.files.read(run(1, 2), run(0, 2))


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_without_direct_io_it_goes_buffered(tmp_path: Path, where: str) -> None:
    case = Case(tmp_path, n_segments=0)
    assert case.files.is_direct
    case.disk.no_direct = where
    case.files.grow()
    case.files.write(run(0, 4), run(0, 4))
    assert case.files.read(run(0, 4), run(32, 4)).all()
    assert not case.files.is_direct
    assert np.array_equal(case.slab[32:36], case.slab[:4])


class _RefusedTwice(Disk):
    """While one read is being refused for its flags, another is, and has gone buffered before the first can."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], object]] = []

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            return super().preadv(fd, buffers, offset)
        except OSError:
            while self.meanwhile:
                self.meanwhile.pop()()
            raise


def test_two_threads_may_find_at_once_that_there_is_no_direct_io(tmp_path: Path) -> None:
    disk = _RefusedTwice()
    files = SegmentFiles(tmp_path, make_slab(), segment_slots=SEGMENT_SLOTS, max_segments=MAX_SEGMENTS, system=disk)
    files.grow()
    disk.no_direct = "preadv"
    disk.meanwhile.append(lambda: files.read(run(0, 1), run(1, 1)))
    assert files.read(run(0, 1), run(0, 1)).all()
    assert not files.is_direct


def test_what_is_refused_for_other_reasons_is_an_error_with_and_without_direct_io(case: Case) -> None:
    case.disk.fail["preadv"] = errno.EINVAL
    for _ in range(2):
        with pytest.raises(OSError, match="Invalid argument"):
            case.files.read(run(0, 1), run(0, 1))


def test_an_error_is_not_taken_for_missing_direct_io(case: Case) -> None:
    case.disk.fail["preadv"] = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        case.files.read(run(0, 1), run(0, 1))
    assert case.files.is_direct


def test_a_segment_is_allocated_in_full_or_not_at_all(case: Case) -> None:
    found = (case.folder / "data.2").stat()
    assert found.st_size == SEGMENT_SLOTS * SLOT_NBYTES
    assert 512 * found.st_blocks >= found.st_size
    assert stat.S_IMODE(found.st_mode) == 0o600
    case.disk.fail["fallocate"] = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        case.files.grow()
    assert not (case.folder / "data.3").exists()
    assert case.files.n_segments == 3
    del case.disk.fail["fallocate"]
    case.files.grow()
    assert case.files.n_slots == 4 * SEGMENT_SLOTS


def test_dropping_removes_the_highest(case: Case) -> None:
    case.files.drop(1)
    assert sorted(path.name for path in case.folder.iterdir()) == ["data.0"]
    assert case.files.n_slots == SEGMENT_SLOTS


def test_opening_restores_lengths_and_removes_what_lies_behind_a_gap(case: Case) -> None:
    case.files.grow()
    case.files.write(run(0, 8), run(0, 8))
    case.files.close()
    os.truncate(case.folder / "data.0", 3 * SLOT_NBYTES)
    os.truncate(case.folder / "data.1", 100 * SLOT_NBYTES)
    (case.folder / "data.2").unlink()
    foreign = {"data.old", "data.05", "data.0.bak", "data.", "data.\u0661", f"data.{MAX_SEGMENTS}", "data.20260726"}
    for name in foreign:
        (case.folder / name).touch()
    files = case.open()
    assert files.n_segments == 2
    assert {path.name for path in case.folder.iterdir()} == {"data.0", "data.1"} | foreign
    assert [(case.folder / f"data.{i}").stat().st_size for i in range(2)] == [SEGMENT_SLOTS * SLOT_NBYTES] * 2
    assert files.read(run(0, 8), run(32, 8)).all()
    assert np.array_equal(case.slab[32:35], case.slab[:3])
    assert not case.slab[35:40].any()


def test_opening_allocates_what_was_copied_with_holes(case: Case) -> None:
    case.files.write(run(0, 2), run(0, 2))
    case.files.close()
    with (case.folder / "data.0").open("r+b") as file:
        file.truncate(2 * SLOT_NBYTES)
        file.truncate(SEGMENT_SLOTS * SLOT_NBYTES)
    n_calls = case.disk.calls["fallocate"]
    files = case.open()
    assert 512 * (case.folder / "data.0").stat().st_blocks >= SEGMENT_SLOTS * SLOT_NBYTES
    assert case.disk.calls["fallocate"] == n_calls + 1, "the others are whole"
    assert files.read(run(0, 2), run(32, 2)).all()
    assert np.array_equal(case.slab[32:34], case.slab[:2])


def test_a_file_that_was_replaced_or_deleted_is_noticed(case: Case) -> None:
    assert case.files.are_in_place()
    (case.folder / "data.1").rename(case.folder / "elsewhere")
    assert not case.files.are_in_place()
    (case.folder / "data.1").touch()
    assert not case.files.are_in_place()


def test_slots_must_be_aligned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4000 bytes are not aligned"):
        SegmentFiles(tmp_path, np.zeros((2, 4000), np.uint8), segment_slots=2, max_segments=2, system=Disk())
