"""The offline scan names what is wrong, changes nothing without `fix`, and leaves a store in use alone."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from hicache.ssd import Report, SsdTier, StoreError, check_path, locks
from hicache.ssd.map import Map
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, open_tier, pages, settle
from tests.support.tiers import split


class Case:
    """A closed store of two paths, `a` in the slots 0 to 7 and `b` in 8 to 15."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slab = make_slab()
        tier = self.open()
        assert tier.store(pages(8, "a")).result() == 8
        assert tier.store(pages(8, "b", first_slot=8)).result() == 8
        tier.close()
        (self.folder,) = path.glob("*/r0of1-*")
        with sqlite3.connect(self.folder / "map.db") as db:
            self.slots: dict[bytes, int] = dict(db.execute("SELECT key, slot FROM pages").fetchall())
            ((self.segment_slots,),) = db.execute("SELECT value FROM meta WHERE name = 'segment_slots'")
        db.close()

    def open(self) -> SsdTier:
        return open_tier(self.path, self.slab)

    def harm(self, key: bytes) -> int:
        """Change a byte of a page. Returns its slot."""
        slot = self.slots[key]
        segment, at = divmod(slot, self.segment_slots)
        with (self.folder / f"data.{segment}").open("r+b") as file:
            file.seek(at * SLOT_NBYTES + 17)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        return slot

    def check(self, *, fix: bool = False) -> Report:
        (report,) = check_path(self.path, fix=fix)
        return report

    def sql(self, statement: str, *values: object) -> None:
        with sqlite3.connect(self.folder / "map.db") as db:
            db.execute(statement, values)
        db.close()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_sound_store_is_said_to_be_sound(case: Case) -> None:
    report = case.check()
    assert report.is_sound
    assert (report.n_pages, report.n_dropped) == (16, 0)
    assert report.nbytes == 16 * 4000
    assert report.folder == case.folder


def test_a_damaged_page_is_named_and_what_hangs_below_it(case: Case) -> None:
    key = split(pages(8, "a").keys)[5]
    slot = case.harm(key)
    before = {path: path.read_bytes() for path in case.folder.iterdir()}
    report = case.check()
    assert [(found.key, found.slot) for found in report.damage[:1]] == [(key, slot)]
    assert "do not match its checksum" in report.damage[0].what
    assert {found.key for found in report.damage[1:]} == set(split(pages(8, "a").keys)[6:])
    assert report.n_dropped == 0
    assert {path: path.read_bytes() for path in case.folder.iterdir()} == before

    assert case.check(fix=True).n_dropped == 3
    assert case.check().is_sound
    tier = case.open()
    assert tier.exists(pages(8, "a").keys).result() == 5
    assert tier.load(pages(8, "b", first_slot=100)).result() == 8
    assert tier.stats()["corrupt"] == 0
    tier.close()


def test_a_cut_file_and_a_foreign_file_are_named(case: Case) -> None:
    os.truncate(case.folder / "data.0", 2 * SLOT_NBYTES)
    (case.folder / "notes.txt").touch()
    report = case.check()
    n_lost = sum(2 <= slot < case.segment_slots for slot in case.slots.values())
    assert sum("are missing" in found.what for found in report.damage) == n_lost
    assert sum("notes.txt" in found.what for found in report.damage) == 1
    assert (case.folder / "data.0").stat().st_size == 2 * SLOT_NBYTES


def test_rows_that_make_no_sense_are_named_and_dropped(case: Case) -> None:
    case.sql("UPDATE pages SET slot = 5000 WHERE key = ?", split(pages(8, "a").keys)[7])
    case.sql("UPDATE pages SET parent = x'00' WHERE key = ?", split(pages(8, "b").keys)[7])
    whats = [found.what for found in case.check(fix=True).damage]
    assert sum("no file has it" in what for what in whats) == 1
    assert sum("makes no sense" in what for what in whats) == 1
    assert case.check().is_sound


def test_a_map_that_cannot_be_read_is_dropped_by_fix_only(case: Case) -> None:
    (case.folder / "map.db").write_bytes(b"no map" * 1000)
    assert "cannot be used" in case.check().damage[0].what
    assert (case.folder / "map.db").exists()
    case.check(fix=True)
    assert not (case.folder / "map.db").exists()
    assert "there is no map" in case.check().damage[0].what
    tier = case.open()
    assert tier.exists(pages(8, "a").keys).result() == 0
    tier.close()


def test_a_store_in_use_is_left_alone(case: Case) -> None:
    tier = case.open()
    assert case.check(fix=True).skipped == "it is in use"
    assert tier.exists(pages(8, "a").keys).result() == 8
    tier.close()


def test_a_store_of_another_format_is_left_alone(case: Case) -> None:
    case.folder.rename(case.folder.with_name("r0of1-v99-4096"))
    assert "format 99" in case.check(fix=True).skipped


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a folder"):
        list(check_path(tmp_path / "nowhere", fix=False))


# ---- maps that are damaged, and what is left to the server ----


def destroy_a_leaf_of_the_key_index(file: Path) -> None:
    """So that no key can be added or deleted, and every row can be read."""
    with sqlite3.connect(file) as db:
        ((root,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name LIKE 'sqlite_autoindex_pages%'")
    db.close()
    with file.open("r+b") as opened:
        opened.seek(4096 * (root - 1))
        opened.write(bytes(64))


def test_a_map_that_opens_is_never_deleted(case: Case) -> None:
    case.harm(split(pages(8, "a").keys)[7])
    destroy_a_leaf_of_the_key_index(case.folder / "map.db")
    report = case.check(fix=True)
    assert not report.is_sound
    assert not report.is_fixed
    assert (case.folder / "map.db").exists()
    tier = case.open()
    settle(tier)
    assert tier.exists(pages(8, "b").keys).result() == 8
    assert tier.load(pages(8, "a", first_slot=100)).result() == 7
    tier.close()


def test_a_map_whose_notes_cannot_be_read_is_left_to_the_server(case: Case) -> None:
    with sqlite3.connect(case.folder / "map.db") as db:
        ((root,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'meta'")
    db.close()
    with (case.folder / "map.db").open("r+b") as opened:
        opened.seek(4096 * (root - 1))
        opened.write(bytes(64))
    report = case.check(fix=True)
    assert [found.what for found in report.damage] == [
        "a part of the map cannot be read: the next start of its server makes it anew from the rest"
    ]
    assert not report.is_fixed
    tier = case.open()
    settle(tier)
    assert tier.exists(pages(8, "b").keys).result() == 8
    tier.close()
    assert case.check().is_sound


def test_a_map_that_the_disk_refuses_is_not_deleted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Map, "__init__", fail)
        report = case.check(fix=True)
    assert "disk I/O error" in report.damage[0].what
    assert not report.is_fixed
    assert case.check().is_sound


def test_a_map_of_another_namespace_is_left_alone(case: Case) -> None:
    case.folder.parent.rename(case.path / ("e" * 32))
    (report,) = check_path(case.path, fix=True)
    assert "says namespace" in report.damage[0].what
    assert not report.is_fixed
    assert (report.folder / "map.db").exists()


def test_what_fix_does_not_put_right_is_counted(case: Case) -> None:
    case.harm(split(pages(8, "a").keys)[7])
    (case.folder / "notes.txt").touch()
    report = case.check(fix=True)
    assert (len(report.damage), report.n_fixed, report.n_dropped) == (2, 1, 1)
    (case.folder / "notes.txt").unlink()
    assert case.check().is_sound
    assert case.check().is_fixed


def test_a_store_that_was_never_used_is_sound(case: Case) -> None:
    for file in (*case.folder.glob("map.db*"), *case.folder.glob("data.*")):
        file.unlink()
    assert case.check(fix=True).is_sound


def test_folders_that_are_only_named_like_stores_are_passed_over(case: Case) -> None:
    for name in ("r0of1-v1-0", "r0of0-v1-4096", "r00of1-v1-4096", "r0of1-v1-" + "9" * 30):
        (case.folder.parent / name).mkdir()
        (case.folder.parent / name / "map.db").touch()
    assert case.check().is_sound


def test_a_store_that_is_locked_for_an_instant_is_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = locks.lock_store(case.folder)
    assert lock is not None
    monkeypatch.setattr(locks, "_pause", lock.release)
    assert not case.check().skipped
