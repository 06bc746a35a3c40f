"""`sgl-lmcache ssd check` on real stores, without a server."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from hicache.ssd.directory import stores_in
from sgl_lmcache import cli
from sgl_lmcache.config import VARIABLE
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, open_tier, pages, settle

N_PAGES = 12


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with the stores of two ranks, each of some pages."""
    path = tmp_path / "kv"
    for rank in range(2):
        tier = open_tier(path, make_slab(), n_members=2, member=(rank, 2))
        assert tier.store(pages(N_PAGES, "text")).result(timeout=30) == N_PAGES
        settle(tier)
        tier.close()
    return path


@pytest.fixture
def configured(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, named by the configuration in use."""
    configuration = path.parent / "tiers.yaml"
    configuration.write_text(f"tiers: [{{type: host}}, {{type: ssd, path: {path}, capacity: 1GiB}}]")
    monkeypatch.setenv(VARIABLE, str(configuration))
    return path


def key_of(position: int) -> bytes:
    return pages(N_PAGES, "text").keys[32 * position : 32 * (position + 1)]


def damage(path: Path, position: int) -> tuple[Path, int]:
    """Flip a bit in this page of rank 0; returns its store and its slot."""
    store = next(stores_in(path)).path
    with closing(sqlite3.connect(store / "map.db")) as db:
        (slot,) = db.execute("SELECT slot FROM pages WHERE key = ?", (key_of(position),)).fetchone()
    segment, at = divmod(slot * SLOT_NBYTES, (store / "data.0").stat().st_size)
    with (store / f"data.{segment}").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return store, slot


def check(path: Path, *options: str) -> int:
    return cli.main(["ssd", "check", str(path), *options])


def test_sound_stores_are_called_sound(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{store.path}: {N_PAGES} pages, sound" for store in stores_in(path)]


def test_damage_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, slot = damage(path, N_PAGES - 1)
    assert check(path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{store}: {N_PAGES} pages, 1 fault"
    assert lines[1].startswith(f"  page {key_of(N_PAGES - 1).hex()}, slot {slot}: ")
    assert lines[2].endswith("sound")
    assert len(lines) == 3


def test_fix_drops_what_is_damaged_and_what_hangs_below_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = damage(path, N_PAGES - 2)
    assert check(path) == 1, "looking changes nothing"
    assert check(path, "--fix") == 0
    assert f"{store}: {N_PAGES} pages, 2 faults, 2 pages dropped" in capsys.readouterr().out
    assert check(path) == 0
    assert f"{store}: {N_PAGES - 2} pages, sound" in capsys.readouterr().out


def test_fix_says_what_it_leaves(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = damage(path, N_PAGES - 1)
    (store / "notes.txt").touch()
    assert check(path, "--fix") == 1
    assert f"{store}: {N_PAGES} pages, 2 faults, 1 page dropped, 1 fault left" in capsys.readouterr().out
    (store / "notes.txt").unlink()
    assert check(path) == 0


def test_json_says_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, slot = damage(path, N_PAGES - 1)
    assert check(path, "--json") == 1
    first, second = json.loads(capsys.readouterr().out)
    (found,) = first.pop("damage")
    assert first == {"store": str(store), "skipped": "", "n_pages": N_PAGES, "n_dropped": 0, "n_fixed": 0}
    assert found["slot"] == slot
    assert bytes.fromhex(found["key"]) == key_of(N_PAGES - 1)
    assert found["what"]
    assert second["damage"] == []


def test_a_store_in_use_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = open_tier(path, make_slab(), n_members=2, member=(1, 2))
    try:
        assert check(path, "--fix") == 1
        sound, in_use = capsys.readouterr().out.splitlines()
        assert sound.endswith("sound")
        assert in_use.endswith(": not checked: it is in use")
        assert tier.exists(pages(N_PAGES, "text").keys).result(timeout=30) == N_PAGES
    finally:
        tier.close()


def test_the_configured_folder_is_checked(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ssd", "check"]) == 0
    assert str(configured) in capsys.readouterr().out


def test_without_an_ssd_tier_a_folder_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ssd", "check"]) == 1
    assert "No SSD tier is configured; name its folder" in capsys.readouterr().err


def test_a_folder_without_stores_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: there is no store\n"
    assert check(tmp_path / "none") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{tmp_path}/none ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["ssd"], ["ssd", "mend"], ["ssd", "check", "--dry"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: sgl-lmcache" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["ssd", "check"], ["doctor", "--json"]])
def test_neither_sglang_nor_torch_is_loaded(configured: Path, command: list[str]) -> None:
    program = (
        f"import sys; from sgl_lmcache.cli import main; main({command}); "
        "print({'torch', 'sglang'} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert str(configured) in process.stdout
    assert process.stderr == "set()\n"
