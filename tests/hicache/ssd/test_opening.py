"""A start gets by with what it finds: old stores, damaged maps, locks held for an instant; or leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hicache.ssd import SsdTier, StoreError, limit_for, locks, opening
from hicache.ssd import tier as tier_module
from hicache.ssd.directory import StoreFolder, reclaim, store_folder, stores_in, used_nbytes
from hicache.ssd.locks import Lock, growing, lock_directory, lock_store
from hicache.ssd.map import Map
from hicache.ssd.opening import open_store
from hicache.ssd.sizes import OUTSIDE_NBYTES
from tests.hicache.ssd.stores import NAMESPACE, SLOT_NBYTES, make_slab, open_tier, pages, settle, wait_until
from tests.support.disk import Disk

OTHER = "f" * 32
GONE = "e" * 32


def make_store(path: Path, n_pages: int = 64, namespace: str = NAMESPACE, **options: object) -> Path:
    """A closed store with pages in it; returns its folder."""
    tier = open_tier(path, make_slab(), namespace=namespace, **options)  # type: ignore[arg-type]
    for at in range(0, n_pages, 16):
        assert tier.store(pages(16, str(at))).result() == 16
    settle(tier)
    tier.close()
    return tier._volume.spec.folder.path


def own_folder(path: Path) -> StoreFolder:
    return store_folder(path, NAMESPACE, (0, 1), SLOT_NBYTES)


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def n_threads() -> int:
    return sum(thread.name.startswith("sgl-lmcache-ssd") for thread in threading.enumerate())


def fill(tier: SsdTier, n_pages: int) -> int:
    return sum(tier.store(pages(16, f"new {at}")).result() for at in range(n_pages // 16))


# ---- a start that fails ----


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), RuntimeError("can't start new thread")])
@pytest.mark.parametrize("part", ["Volume", "Keeper"])
def test_a_start_that_fails_late_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    slab = make_slab()
    before, threads = n_descriptors(), n_threads()
    with monkeypatch.context() as patched:
        patched.setattr(tier_module, part, fail)
        with pytest.raises(StoreError, match="cannot be opened"):
            open_tier(tmp_path, slab)
    wait_until(lambda: n_threads() == threads)
    assert n_descriptors() == before
    open_tier(tmp_path, slab, server="server b").close()


def _start_no_thread(name: str) -> Callable[[threading.Thread], None]:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    return start_others


@pytest.mark.parametrize("name", ["sgl-lmcache-ssd-0", "sgl-lmcache-ssd-5", "sgl-lmcache-ssd-keeper"])
def test_a_start_without_enough_threads_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, threads = n_descriptors(), n_threads()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _start_no_thread(name))
        with pytest.raises(StoreError, match="can't start new thread"):
            open_tier(tmp_path, make_slab())
    wait_until(lambda: n_threads() == threads)
    assert n_descriptors() == before


def test_a_start_whose_room_cannot_be_counted_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make_store(tmp_path)
    before = n_descriptors()
    monkeypatch.setattr(opening, "shrink", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        open_tier(tmp_path, make_slab())
    assert n_descriptors() == before


# ---- maps ----


def _another_file_format(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(44)
        opened.write(b"\0\0\0\x63")


def _another_schema(file: Path) -> None:
    with sqlite3.connect(file) as db:
        db.execute("ALTER TABLE pages RENAME COLUMN depth TO deep")
    db.close()


def _a_schema_that_is_no_text(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE pages", b"CREATE TABL\xff pages"))


@pytest.mark.parametrize("harm", [_another_file_format, _another_schema, _a_schema_that_is_no_text])
def test_a_map_that_makes_no_sense_does_not_refuse_the_start(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    harm(make_store(tmp_path) / "map.db")
    tier = open_tier(tmp_path, make_slab())
    settle(tier)
    assert tier.store(pages(16, "new")).result() == 16
    settle(tier)
    assert tier.health().available
    tier.check_invariants()
    tier.close()
    tier = open_tier(tmp_path, make_slab())
    assert tier.exists(pages(16, "new").keys).result() == 16
    tier.close()


def test_damage_that_only_making_the_map_smaller_meets_costs_no_other_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_store(tmp_path) / "map.db"
    data = bytearray(file.read_bytes())
    leaves = [at for at in range(8192, len(data), 4096) if data[at] == 0x0D and data[at + 3 : at + 5] > b"\0\4"]
    data[leaves[0]] = 0x0E
    file.write_bytes(data)
    monkeypatch.setattr("hicache.ssd.map._SMALL_NBYTES", -(1 << 30))
    monkeypatch.setattr(Map, "delete_beyond", lambda *_: 0)  # it would meet it first
    tier = open_tier(tmp_path, make_slab())
    settle(tier)
    assert 0 < tier.stats()["n_pages"] < 64
    assert tier.stats()["map_salvaged"] == 1
    tier.close()


def test_a_disk_that_fails_is_not_taken_for_a_damaged_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    make_store(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Map, "compact", fail)
        with pytest.raises(StoreError, match="disk I/O error"):
            open_tier(tmp_path, make_slab())
    tier = open_tier(tmp_path, make_slab())
    assert tier.exists(pages(16, "48").keys).result() == 16
    tier.close()


# ---- locks ----


@pytest.mark.parametrize("take", [lock_store, lambda path: lock_directory(path, uuid.uuid4().hex)])
def test_a_released_lock_is_free_though_a_child_process_has_its_file(
    tmp_path: Path, take: Callable[[Path], Lock | None]
) -> None:
    """A copy of the descriptor is what a forked child has."""
    lock = take(tmp_path)
    assert lock is not None
    assert lock._fd is not None
    childs = os.dup(lock._fd)
    lock.release()
    again = take(tmp_path)
    assert again is not None
    again.release()
    os.close(childs)


def _descriptor_of(file: Path) -> int:
    return next(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(file))


def test_room_is_free_again_though_a_child_process_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "N_GROWTH_TRIES", 1)
    with growing(tmp_path):
        childs = os.dup(_descriptor_of(tmp_path / "growth.lock"))
    with growing(tmp_path):
        pass
    os.close(childs)


def test_whoever_keeps_the_growth_lock_stops_neither_a_start_nor_its_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "N_GROWTH_TRIES", 1)
    make_store(tmp_path, n_pages=16)
    with growing(tmp_path):
        tier = open_tier(tmp_path, make_slab())
        assert told(caplog, "has not been counted") == 1
        n_slots = tier.stats()["n_slots"]
        assert fill(tier, 64) == 64
        assert tier.stats()["n_slots"] == n_slots
    tier.close()


def test_of_a_growth_lock_that_is_deleted_there_is_one_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file goes between the opening and the locking."""
    take = locks._try_flock
    files = [tmp_path / "growth.lock"]

    def take_what_is_gone(fd: int, kind: int) -> bool:
        if files:
            files.pop().unlink()
        return take(fd, kind)

    monkeypatch.setattr(locks, "_try_flock", take_what_is_gone)
    with growing(tmp_path), (tmp_path / "growth.lock").open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch, event: Callable[[], object]) -> None:
    monkeypatch.setattr(locks, "_pause", event)


def test_a_store_that_is_locked_for_an_instant_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_store(make_store(tmp_path))
    assert lock is not None
    _while_it_is_waited_for(monkeypatch, lock.release)
    open_tier(tmp_path, make_slab()).close()


def test_a_store_that_is_just_being_deleted_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_store(tmp_path)
    lock = lock_store(folder)
    assert lock is not None

    def delete() -> None:
        shutil.rmtree(folder.parent)
        lock.release()

    _while_it_is_waited_for(monkeypatch, delete)
    tier = open_tier(tmp_path, make_slab())
    assert tier.store(pages(16, "a")).result() == 16
    tier.close()


# ---- room ----


def test_an_old_store_that_cannot_be_deleted_is_told_once_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, other = make_store(tmp_path, namespace=OTHER), make_store(tmp_path, namespace=GONE)
    (stuck / "data.99").mkdir()  # unlink refuses a folder, to root too
    os.utime(stuck / "map.db", (1, 1))
    nbytes = used_nbytes(other)
    with monkeypatch.context() as patched:
        patched.setattr(opening, "_excess_nbytes", lambda *_: nbytes + 64 * SLOT_NBYTES)
        open_tier(tmp_path, make_slab()).close()
    assert not (stuck / "data.0").exists()
    assert not other.exists(), "it goes on with the next"
    assert reclaim(tmp_path, own_folder(tmp_path), 1, spare_siblings=False) == 0
    assert told(caplog, "cannot be deleted") == 1
    lock = lock_store(stuck)
    assert lock is not None, "it is not kept locked"
    lock.release()


def test_no_store_is_deleted_where_that_is_not_enough(tmp_path: Path) -> None:
    folder = make_store(tmp_path, namespace=OTHER)
    limit_nbytes = limit_for(64, 1, SLOT_NBYTES)
    with (tmp_path / "users.bin").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, limit_nbytes)
    tier = open_tier(tmp_path, make_slab(), limit_nbytes=limit_nbytes)
    assert tier.store(pages(16, "a")).result() == 0
    assert (folder / "data.0").exists()
    tier.close()


def test_the_lock_of_a_deleted_store_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, namespace=OTHER)
    gone: list[str] = []
    unlink = Path.unlink

    def note(file: Path, missing_ok: bool = False) -> None:
        gone.append(file.name)
        unlink(file, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    assert reclaim(tmp_path, own_folder(tmp_path), 1, spare_siblings=False) > 64 * SLOT_NBYTES
    assert "map.db" in gone
    assert gone[-1] == "lock"


def test_a_foreign_file_beside_the_map_counts(tmp_path: Path) -> None:
    folder = make_store(tmp_path, n_pages=0)
    with (folder / "core.1234").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, OUTSIDE_NBYTES + 32 * SLOT_NBYTES)
    tier = open_tier(tmp_path, make_slab())
    fill(tier, 64)
    assert 16 <= tier.stats()["n_slots"] <= 32
    tier.close()


def test_what_only_begins_like_a_data_file_is_left_alone(tmp_path: Path) -> None:
    folder = make_store(tmp_path)
    kept = [folder / name for name in ("data.csv", "data.0.bak", "data.007", "data.2026072")]
    for file in kept:
        file.write_text("mine")
    disk = Disk()
    open_tier(tmp_path, make_slab(), system=disk, limit_nbytes=limit_for(30, 1, SLOT_NBYTES)).close()
    assert all(file.exists() for file in kept)
    (folder / "map.db").unlink()
    (folder / "data.0").unlink()
    open_tier(tmp_path, make_slab(), system=disk).close()
    assert all(file.read_text() == "mine" for file in kept)
    assert not (folder / "data.1").exists()


def test_the_number_of_files_is_bounded_whatever_they_were_made_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path)
    tier = open_tier(tmp_path, make_slab(), limit_nbytes=limit_for(4000, 1, SLOT_NBYTES))
    assert tier._volume.geometry.max_segments == 64
    assert told(caplog, "was made for a smaller capacity") == 1
    assert tier.exists(pages(16, "48").keys).result() == 16
    assert fill(tier, 320) == 320
    settle(tier)
    tier.check_invariants()
    tier.close()


# ---- the file system ----


def test_a_disk_that_is_not_mounted_gets_no_store_on_the_one_below(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "mount" / "tier", make_slab())
    spec = tier._volume.spec
    tier.close()
    assert spec.device == os.stat(tmp_path).st_dev
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(OSError, match="it is not on the file system"):
        open_store(replace(spec, device=spec.device + 1))
    assert not (tmp_path / "mount").exists()
    open_store(spec).close()
    open_store(replace(spec, device=spec.device + 1)).close()  # mounted again, under another number


# ---- the end ----


def test_it_closes_though_there_are_no_new_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(tmp_path, make_slab())
    settle(tier)
    monkeypatch.setattr(threading.Thread, "start", _start_no_thread("sgl-lmcache-ssd-close"))
    tier.close()
    assert all(lock._fd is None for lock in tier._volume.opened.locks)


def test_closing_ends_in_time_though_the_map_does_not_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    tier = open_tier(tmp_path, make_slab(), close_timeout_s=0.5)
    settle(tier)
    close = tier._volume.map.close
    monkeypatch.setattr(tier._volume.map, "close", lambda: answers.wait() and close())
    tier.close()
    assert told(caplog, "does not answer") == 1
    answers.set()
    wait_until(lambda: all(lock._fd is None for lock in tier._volume.opened.locks))
    assert len(list(stores_in(tmp_path))) == 1
