"""`sgl-lmcache ssd`: look after what an SSD tier has stored, while its server is down."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_lmcache.errors import StartError

if TYPE_CHECKING:
    from hicache.ssd import Report


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ssd = commands.add_parser("ssd", help="look after the stores of an SSD tier while its server is down")
    actions = ssd.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="read and verify every page that is stored, and name what is damaged")
    check.add_argument("path", type=Path, nargs="?", metavar="PATH", help="the folder (default: that of the SSD tier)")
    check.add_argument("--fix", action="store_true", help="drop what is damaged")
    check.add_argument("--json", action="store_true", help="print what was found as JSON")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    path = options.path or _configured_path()
    reports = _scan(path, fix=options.fix)
    if options.json:
        print(json.dumps([_plain(report) for report in reports], indent=2))
    else:
        lines = [line for report in reports for line in _lines(report, fix=options.fix)]
        print("\n".join(lines or [f"{path}: there is no store"]))
    return int(any(report.skipped or not report.is_fixed for report in reports))


def _configured_path() -> Path:
    from sgl_lmcache.config import VARIABLE
    from sgl_lmcache.config_file import from_environment

    ssd = from_environment().ssd
    if ssd is None:
        raise StartError(f"No SSD tier is configured; name its folder, or its configuration in {VARIABLE}.")
    return Path(ssd.path)


def _scan(path: Path, *, fix: bool) -> list[Report]:
    """Scan all stores below a folder, with a progress bar where somebody is looking. Raises `StartError`."""
    from rich.console import Console
    from rich.progress import Progress

    from hicache.ssd import StoreError, check_path
    from hicache.ssd.directory import stores_in

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        try:
            stores = {store.path: store.slot_nbytes for store in stores_in(path)} if path.is_dir() else {}
            tasks = {
                folder: progress.add_task(str(folder.relative_to(path)), total=_n_slots(folder, slot_nbytes))
                for folder, slot_nbytes in stores.items()
            }
            return list(check_path(path, fix=fix, progress=lambda at, n: progress.update(tasks[at], completed=n)))
        except StoreError as error:
            raise StartError(f"{error}.") from error
        except OSError as error:
            raise StartError(f"{error.filename or path} cannot be checked: {error.strerror}.") from error


def _n_slots(folder: Path, slot_nbytes: int) -> int:
    from hicache.ssd.directory import data_files

    return sum(file.stat().st_size for file in data_files(folder)) // slot_nbytes


def _lines(report: Report, *, fix: bool) -> Iterator[str]:
    if report.skipped:
        yield f"{report.folder}: not checked: {report.skipped}"
        return
    found = _count(len(report.damage), "fault") if report.damage else "sound"
    dropped = f", {_count(report.n_dropped, 'page')} dropped" if fix and report.damage else ""
    if fix and not report.is_fixed:
        dropped += f", {_count(len(report.damage) - report.n_fixed, 'fault')} left"
    yield f"{report.folder}: {_count(report.n_pages, 'page')}, {found}{dropped}"
    for damage in report.damage:
        page = f"page {damage.key.hex()}, " if damage.key is not None else ""
        slot = f"slot {damage.slot}: " if damage.slot is not None else ""
        yield f"  {page}{slot}{damage.what}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _plain(report: Report) -> dict[str, Any]:
    return {
        "store": str(report.folder),
        "skipped": report.skipped,
        "n_pages": report.n_pages,
        "n_dropped": report.n_dropped,
        "n_fixed": report.n_fixed,
        "damage": [
            {"what": damage.what, "key": damage.key.hex() if damage.key is not None else None, "slot": damage.slot}
            for damage in report.damage
        ],
    }
