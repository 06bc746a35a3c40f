"""A disk that fails: said once, answered with nothing, tried again by the clock, and hits before and after."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from hicache import TierError
from hicache.ssd import SsdTier, limit_for
from hicache.ssd.map import Map
from tests.hicache.ssd.stores import SLOT_NBYTES, Slab, make_slab, open_tier, pages, settle, wait_until
from tests.support.clock import Clock
from tests.support.disk import Disk


class Case:
    """A tier over a failing disk, with 10 pages in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slab: Slab = make_slab()
        self.disk = Disk()
        self.clock = Clock()
        self.tier: SsdTier = open_tier(path, self.slab, system=self.disk, clock=self.clock)
        assert self.tier.store(pages(10, "a")).result() == 10
        settle(self.tier)

    def hits(self, name: str = "a") -> int:
        """How many pages of a path are loaded, and right."""
        n_loaded = self.tier.load(pages(10, name, first_slot=100)).result()
        assert np.array_equal(self.slab[100 : 100 + n_loaded, :4000], self.slab[:n_loaded, :4000])
        return n_loaded

    def go_round(self) -> None:
        """The keeper has looked at the clock."""
        wait_until(lambda: not self.tier._keeper._wanted.is_set())
        done: Future[int] = Future()
        self.tier._keeper.call(lambda: done.set_result(0), done)
        done.result(timeout=20)

    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for _ in range(2):
            self.go_round()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "store")


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_reads_that_fail_stop_reads_until_a_trial_succeeds(
    case: Case, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    assert case.hits() == 10
    case.disk.fail["preadv"] = error
    with pytest.raises(TierError, match="could not be read"):
        case.hits()
    health = case.tier.health()
    assert not health.available
    assert "cannot be read" in health.reason
    assert case.hits() == 0
    assert case.tier.exists(pages(10, "a").keys).result() == 0
    assert case.tier.store(pages(10, "b")).result() == 10, "writes go on"
    case.pass_time(1.5)
    assert not case.tier.health().available
    del case.disk.fail["preadv"]
    case.pass_time(1.0)
    assert not case.tier.health().available, "the second trial comes later"
    case.pass_time(1.5)
    assert case.tier.health().available
    assert case.hits() == 10
    assert case.hits("b") == 10
    assert told(caplog, "cannot be read") == 1
    assert told(caplog, "is back") == 1
    assert case.tier.stats()["read_errors"] == 1
    case.tier.check_invariants()
    case.tier.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_writes_that_fail_stop_writes_until_a_trial_succeeds(
    case: Case, caplog: pytest.LogCaptureFixture, call: str, error: int
) -> None:
    case.disk.fail[call] = error
    if call == "pwritev":
        with pytest.raises(TierError, match="could not be written"):
            case.tier.store(pages(10, "b")).result()
    else:
        assert case.tier.store(pages(10, "b")).result() == 10, "it is in the file, and not in the map"
    wait_until(lambda: not case.tier.health().available)
    assert "cannot be written" in case.tier.health().reason
    assert case.tier.store(pages(10, "c")).result() == 0
    assert case.hits() == 10, "reads go on"
    case.pass_time(1.5)
    assert not case.tier.health().available
    case.disk.fail.clear()
    case.pass_time(2.5)
    assert case.tier.health().available
    assert case.tier.store(pages(10, "b")).result() == 10
    assert case.hits("b") == 10
    settle(case.tier)
    case.tier.check_invariants()
    assert told(caplog, "cannot be written") == 1
    assert told(caplog, "is back") == 1
    case.tier.close()
    assert not (case.path / "probe").exists()
    reopened = open_tier(case.path, case.slab)
    assert reopened.exists(pages(10, "b").keys).result() == 10
    reopened.close()


@pytest.mark.parametrize(
    ("message", "code"),
    [("database or disk is full", sqlite3.SQLITE_FULL), ("disk I/O error", sqlite3.SQLITE_IOERR)],
)
def test_a_map_that_cannot_be_written_costs_no_hit(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, message: str, code: int
) -> None:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError(message)
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Map, "apply", fail)
        patched.setattr(Map, "set_note", fail)
        assert case.tier.store(pages(10, "b")).result() == 10
        wait_until(lambda: not case.tier.health().available)
        assert message in case.tier.health().reason
        assert case.hits() == 10
        assert case.hits("b") == 10
        case.pass_time(1.5)
        assert not case.tier.health().available
    case.pass_time(2.5)
    assert case.tier.health().available
    settle(case.tier)
    case.tier.check_invariants()
    assert case.tier.stats()["map_errors"] == 1
    assert told(caplog, message) == 1
    case.tier.close()
    reopened = open_tier(case.path, case.slab)
    assert reopened.exists(pages(10, "b").keys).result() == 10
    reopened.close()


def test_reads_that_stop_short_are_an_error(case: Case) -> None:
    case.disk.short = 100
    with pytest.raises(TierError, match="gave 100 bytes"):
        case.hits()
    assert case.tier.stats()["corrupt"] == 0
    case.disk.short = None
    case.pass_time(1.5)
    assert case.hits() == 10
    case.tier.close()


def test_a_disk_without_room_to_grow_goes_on_with_what_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, clock = Disk(), Clock()
    tier = open_tier(tmp_path, make_slab(), system=disk, clock=clock)
    assert tier.store(pages(8, "a")).result() == 8
    n_slots = tier.stats()["n_slots"]
    disk.fail["fallocate"] = errno.ENOSPC
    for n in range(3):
        assert tier.store(pages(8, f"b{n}")).result() == 8
    assert tier.health().available
    assert tier.stats()["n_slots"] == n_slots
    assert tier.stats()["evicted"] > 0
    assert told(caplog, "No space left") == 1
    del disk.fail["fallocate"]
    clock.now_s += 31.0
    assert tier.store(pages(8, "c")).result() == 8
    assert tier.stats()["n_slots"] > n_slots
    settle(tier)
    tier.check_invariants()
    tier.close()


def test_a_hanging_disk_answers_nothing_until_it_comes_back(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.disk.hold()
    stuck = case.tier.load(pages(10, "a", first_slot=100))
    wait_until(lambda: case.disk.n_held == 1)
    assert case.tier.health().available
    case.clock.now_s += 6.0
    assert not case.tier.health().available
    assert "does not answer" in case.tier.health().reason
    assert case.tier.load(pages(10, "a", first_slot=120)).result() == 0
    assert case.tier.exists(pages(10, "a").keys).result() == 0
    assert case.tier.store(pages(10, "b")).result() == 0
    assert not stuck.done(), "a thread is at its slots"
    case.disk.let_go()
    assert stuck.result(timeout=20) == 10
    wait_until(lambda: case.tier.health().available)
    assert case.hits() == 10
    assert told(caplog, "does not answer") == 1
    assert told(caplog, "answers again") == 1
    settle(case.tier)
    case.tier.check_invariants()
    case.tier.close()


def test_what_waits_behind_a_hanging_disk_is_answered_short(case: Case) -> None:
    case.disk.hold()
    stuck = [case.tier.load(pages(10, "a", first_slot=100)) for _ in range(8)]
    wait_until(lambda: case.disk.n_held == 8)
    waiting = [case.tier.load(pages(10, "a", first_slot=120)), case.tier.store(pages(10, "b", first_slot=40))]
    case.clock.now_s += 6.0
    assert not case.tier.health().available
    assert [future.result(timeout=20) for future in waiting] == [0, 0]
    case.disk.let_go()
    assert [future.result(timeout=20) for future in stuck] == [10] * 8
    settle(case.tier)
    case.tier.check_invariants()
    case.tier.close()


def test_closing_over_a_hanging_disk_returns_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    tier = open_tier(tmp_path, make_slab(), system=disk, close_timeout_s=0.05)
    tier.store(pages(4, "a")).result()
    settle(tier)
    disk.hold()
    stuck = tier.load(pages(4, "a", first_slot=100))
    wait_until(lambda: disk.n_held == 1)
    tier.close()
    assert told(caplog, "is left as it is") == 1
    assert not stuck.done()
    disk.let_go()
    assert stuck.result(timeout=20) == 4


def _delete(path: Path) -> None:
    shutil.rmtree(path)


def _move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def _replace_a_file(path: Path) -> None:
    (data,) = path.rglob("data.0")
    data.rename(data.with_name("data.0.old"))
    data.write_bytes(bytes(SLOT_NBYTES))


@pytest.mark.parametrize("harm", [_delete, _move, _replace_a_file])
def test_a_directory_that_goes_away_is_noticed_and_made_anew(
    case: Case, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    harm(case.path)
    case.pass_time(2.5)
    assert not case.tier.health().available
    assert case.tier.exists(pages(10, "a").keys).result() == 0
    case.pass_time(1.5)
    assert case.tier.health().available
    settle(case.tier)
    assert case.tier.store(pages(10, "b")).result() == 10
    assert case.hits("b") == 10
    settle(case.tier)
    case.tier.check_invariants()
    assert told(caplog, "was deleted or replaced") == 1
    assert told(caplog, "is back") == 1
    case.tier.close()
    reopened = open_tier(case.path, case.slab)
    assert reopened.exists(pages(10, "b").keys).result() == 10
    reopened.close()


def test_a_file_system_that_dies_and_is_mounted_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was open of it fails for ever, with whatever error; the paths are well."""
    opened = case.tier._volume.opened
    dead = {*opened.files._fds, *(lock._fd for lock in opened.locks)}
    fstat = os.fstat

    def fstat_of_the_living(fd: int) -> os.stat_result:
        if fd in dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fstat(fd)

    def close(fd: int) -> None:
        dead.discard(fd)
        real_close(fd)

    real_close = os.close
    monkeypatch.setattr(os, "fstat", fstat_of_the_living)
    monkeypatch.setattr(os, "close", close)
    case.pass_time(2.5)
    assert not case.tier.health().available
    case.pass_time(1.5)
    assert case.tier.health().available
    assert not dead
    settle(case.tier)
    assert case.hits() == 10
    case.tier.check_invariants()
    case.tier.close()


def test_a_deleted_directory_is_noticed_by_the_next_commit(case: Case) -> None:
    shutil.rmtree(case.path)
    case.tier.store(pages(10, "b")).result()
    wait_until(lambda: not case.tier.health().available)
    case.pass_time(1.5)
    settle(case.tier)
    assert case.tier.exists(pages(10, "b").keys).result() == 0
    assert case.tier.stats()["n_pages"] == 0
    case.tier.check_invariants()
    case.tier.close()


def test_no_room_for_a_page_is_a_short_answer(tmp_path: Path) -> None:
    """What is leased by a load under way cannot leave."""
    disk = Disk()
    tier = open_tier(tmp_path, make_slab(), n_slots=6, limit_nbytes=limit_for(6, 1, SLOT_NBYTES), system=disk)
    assert tier.store(pages(6, "a")).result() == 6
    settle(tier)
    disk.hold()
    loading = tier.load(pages(6, "a", first_slot=100))
    wait_until(lambda: disk.n_held == 1)
    assert tier.store(pages(3, "b")).result(timeout=20) == 0
    assert tier.stats()["skipped_full"] == 3
    disk.let_go()
    assert loading.result() == 6
    assert tier.store(pages(3, "b")).result() == 3
    tier.close()
