"""One directory, one cap: who may use it, what counts, and what is deleted when room is lacking."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hicache.ssd import SsdTier, StoreError, check_directory, limit_for
from hicache.ssd.directory import used_nbytes
from hicache.ssd.locks import lock_directory
from hicache.ssd.sizes import MIN_SLOTS
from tests.hicache.ssd.stores import NAMESPACE, SLOT_NBYTES, Slab, make_slab, open_tier, pages, settle

ROOT = Path(__file__).parents[3]
OTHER = "f" * 32
GONE = "e" * 32


def fill_up(
    path: Path, limit_nbytes: int, *, n_pages: int = 64, member: tuple[int, int] = (0, 1), namespace: str = NAMESPACE
) -> None:
    """Open a store, put pages in it, close it."""
    tier = open_tier(path, make_slab(), member=member, namespace=namespace, limit_nbytes=limit_nbytes)
    for at in range(n_pages // 16):
        tier.store(pages(16, str(at), first_slot=16 * at)).result()
    settle(tier)
    tier.close()


# ---- who may use it ----


@contextmanager
def contenders(path: Path, *servers: str) -> Iterator[list[tuple[int, str, str]]]:
    """Processes that have tried to take the directory: (pid, server, outcome) of each."""
    command = [sys.executable, "-m", "tests.hicache.ssd.lock_child", str(path), *servers]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in servers]
        yield [(int(pid), server, outcome) for pid, server, outcome in lines]
        process.stdin.close()


def test_a_second_server_is_refused_and_the_ranks_of_one_are_not(tmp_path: Path) -> None:
    slab = make_slab()
    first = open_tier(tmp_path, slab, n_members=2, member=(0, 2))
    second = open_tier(tmp_path, slab, n_members=2, member=(1, 2))
    with pytest.raises(StoreError, match=rf"in use by another server \(pid {os.getpid()} on .*directory of its own"):
        open_tier(tmp_path, slab, n_members=2, member=(0, 2), server="server b")
    first.close()
    with pytest.raises(StoreError, match="another server"):
        open_tier(tmp_path, slab, n_members=2, member=(0, 2), server="server b")
    second.close()
    open_tier(tmp_path, slab, n_members=2, member=(0, 2), server="server b").close()


def test_one_rank_cannot_be_opened_twice(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, make_slab())
    with pytest.raises(StoreError, match="is open already"):
        open_tier(tmp_path, make_slab())
    tier.close()


def test_of_many_processes_at_once_one_server_gets_the_directory(tmp_path: Path) -> None:
    """Two ranks each of four servers."""
    with contenders(tmp_path, *"abcdabcd") as outcomes:
        taken = [server for _, server, outcome in outcomes if outcome == "taken"]
        assert len(taken) == 2
        assert len(set(taken)) == 1


def test_the_lock_of_a_dead_server_is_free(tmp_path: Path) -> None:
    with contenders(tmp_path, "b") as [(pid, _, outcome)]:
        assert outcome == "taken"
        with pytest.raises(StoreError, match=f"pid {pid} "):
            lock_directory(tmp_path, "server a")
        os.kill(pid, signal.SIGKILL)
        lock_directory(tmp_path, "server a").release()


# ---- what is refused ----


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="is not a folder"):
            check_directory(path, 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "cannot be written by this user"),
        (OSError(30, "Read-only file system"), "is on a read-only file system"),
        (OSError(5, "Input/output error"), r"cannot be used \(Input/output error\)"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=words):
        check_directory(tmp_path, 1)


def test_a_cap_that_the_disk_has_no_room_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has room for .* lower it, or free space"):
        check_directory(tmp_path, 1 << 60)


def test_a_cap_too_small_for_a_few_pages_is_refused(tmp_path: Path) -> None:
    enough = limit_for(MIN_SLOTS, 2, SLOT_NBYTES)
    with pytest.raises(StoreError, match=f"at least {enough:,} are needed"):
        open_tier(tmp_path / "a", make_slab(), n_members=2, limit_nbytes=enough - 2)
    open_tier(tmp_path / "a", make_slab(), n_members=2, limit_nbytes=enough).close()


def test_a_refusal_leaves_the_directory_unlocked(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, make_slab())
    with pytest.raises(StoreError):
        open_tier(tmp_path, make_slab())
    tier.close()
    lock_directory(tmp_path, "server b").release()


def test_checking_a_directory_leaves_only_the_folder(tmp_path: Path) -> None:
    check_directory(tmp_path / "new" / "store", 1)
    assert not list((tmp_path / "new" / "store").iterdir())
    assert stat.S_IMODE((tmp_path / "new" / "store").stat().st_mode) == 0o700


def test_everything_is_for_its_owner_only(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "store", make_slab())
    tier.store(pages(16, "a")).result()
    settle(tier)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").rglob("*")}
    assert {"lock", "map.db", "map.db-wal", "data.0"} <= found.keys()
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    tier.close()


# ---- the cap ----


def test_the_cap_holds_for_all_ranks_together_at_every_moment(tmp_path: Path) -> None:
    limit = limit_for(40, 3, SLOT_NBYTES)
    slab = make_slab()
    for restart in range(2):
        tiers = [open_tier(tmp_path, slab, n_members=3, member=(i, 3), limit_nbytes=limit) for i in range(3)]
        for at in range(8):
            for tier in tiers:
                tier.store(pages(16, f"{restart} {at}", first_slot=16 * at)).result()
                assert used_nbytes(tmp_path) <= limit
        for tier in tiers:
            settle(tier)
            tier.check_invariants()
            assert tier.stats()["n_slots"] >= 36
            tier.close()
        assert used_nbytes(tmp_path) <= limit


def test_a_foreign_store_is_left_alone_while_there_is_room(tmp_path: Path) -> None:
    limit = limit_for(64, 1, SLOT_NBYTES) * 3
    fill_up(tmp_path, limit, namespace=OTHER)
    n_files = len(list((tmp_path / OTHER).rglob("data.*")))
    fill_up(tmp_path, limit)
    assert len(list((tmp_path / OTHER).rglob("data.*"))) == n_files
    tier = open_tier(tmp_path, make_slab(), namespace=OTHER, limit_nbytes=limit)
    assert tier.exists(pages(16, "0").keys).result() == 16
    tier.close()


BIG_NBYTES = 1 << 18
"""Slots so large that the fixed part of a share is small beside the data."""


def open_big(path: Path, slab: Slab, n_slots: int, namespace: str) -> SsdTier:
    limit_nbytes = limit_for(n_slots, 1, BIG_NBYTES)
    return open_tier(path, slab, namespace=namespace, page_nbytes=BIG_NBYTES, limit_nbytes=limit_nbytes)


def store_big(tier: SsdTier) -> int:
    """Up to 64 pages."""
    return sum(tier.store(pages(16, str(at), first_slot=16 * at)).result() for at in range(4))


def test_foreign_stores_go_oldest_first_when_room_is_lacking(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The cap has room for two and a half stores."""
    slab = make_slab(64, BIG_NBYTES)
    for age, namespace in enumerate((GONE, OTHER)):
        tier = open_big(tmp_path, slab, 160, namespace)
        assert store_big(tier) == 64
        tier.close()
        (folder,) = (tmp_path / namespace).iterdir()
        os.utime(folder / "map.db", (age, age))
    tier = open_big(tmp_path, slab, 160, NAMESPACE)
    assert (tmp_path / GONE).exists(), "there is room as yet"
    assert store_big(tier) == 64
    assert used_nbytes(tmp_path) <= limit_for(160, 1, BIG_NBYTES)
    assert not (tmp_path / GONE).exists()
    assert (tmp_path / OTHER).exists()
    assert sum("to make room" in record.getMessage() for record in caplog.records) == 1
    tier.close()


def test_a_foreign_store_that_is_open_is_not_deleted(tmp_path: Path) -> None:
    slab = make_slab(64, BIG_NBYTES)
    other = open_big(tmp_path, slab, 64, OTHER)
    assert store_big(other) == 64
    tier = open_big(tmp_path, slab, 64, NAMESPACE)
    assert store_big(tier) == 0
    assert tier.health().available
    assert tier.stats()["skipped_full"] == 64
    assert other.exists(pages(16, "3").keys).result() == 16
    assert used_nbytes(tmp_path) <= limit_for(64, 1, BIG_NBYTES)
    for opened in (tier, other):
        settle(opened)
        opened.check_invariants()
        opened.close()


def test_what_is_not_named_like_ours_is_never_touched(tmp_path: Path) -> None:
    limit = limit_for(64, 1, BIG_NBYTES)
    slab = make_slab(64, BIG_NBYTES)
    tier = open_big(tmp_path, slab, 64, OTHER)
    store_big(tier)
    tier.close()
    (theirs,) = (tmp_path / OTHER).iterdir()
    kept = [
        tmp_path / "README",
        tmp_path / "models" / "weights.bin",
        theirs / "mine.txt",
        tmp_path / OTHER / "r0" / "x",
    ]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("do not touch")
    (tmp_path / ("d" * 32)).symlink_to(tmp_path / "models")
    tier = open_big(tmp_path, slab, 64, NAMESPACE)
    assert store_big(tier) == 64
    tier.close()
    assert used_nbytes(tmp_path) <= limit
    assert not (theirs / "data.0").exists(), "the store was deleted"
    assert all(file.read_text() == "do not touch" for file in kept)
    assert (tmp_path / ("d" * 32)).is_symlink()


def test_at_a_start_what_another_rank_will_open_is_spared(tmp_path: Path) -> None:
    """A smaller cap: each rank drops its own part of what is too much."""
    large, small = limit_for(64, 2, SLOT_NBYTES), limit_for(40, 2, SLOT_NBYTES)
    fill_up(tmp_path, large, member=(0, 2))
    fill_up(tmp_path, large, member=(1, 2), namespace=OTHER)
    slab = make_slab()
    first = open_tier(tmp_path, slab, n_members=2, member=(0, 2), limit_nbytes=small)
    second = open_tier(tmp_path, slab, n_members=2, member=(1, 2), limit_nbytes=small, namespace=OTHER)
    for tier in (first, second):
        settle(tier)
        assert 30 <= tier.stats()["n_pages"] <= 40
        tier.close()
    assert used_nbytes(tmp_path) <= small
    assert NAMESPACE != OTHER
