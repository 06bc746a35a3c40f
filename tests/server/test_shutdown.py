"""Servers that end, in the middle of their work: nothing of them is left, whatever the way.

What SGLang does by itself, and what these tests hold it to with our cache:

- SIGTERM to its main process: it waits for the requests that it has, tells the schedulers to stop, waits for them,
  kills what is left, and exits with 0. Our cache finishes its copies and frees its memory on the schedulers' way out.
- its main process is killed: the kernel kills the schedulers and the detokenizer, by their parent-death signal.
- a scheduler is killed: a watchdog in the main process sees it within a second, and kills all of them, itself as well.

Host memory is a memfd, which lives as long as a process has it open or mapped: so its inode is looked for in all.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import CACHED, Fleet, at_tp, running
from tests.server.traffic import prompt
from tests.support.server import ANSWER_TIMEOUT_S, END_TIMEOUT_S, Server, wait_for

pytestmark = pytest.mark.server

N_CLIENTS = 4


@contextmanager
def _doomed(fleet: Fleet, folder: Path, tp_size: int) -> Iterator[Server]:
    """A server of one's own, with a folder of its own for temporary files."""
    (folder / "tmp").mkdir()
    setup = replace(at_tp(CACHED, tp_size), name="doomed", environment={"TMPDIR": str(folder / "tmp")})
    with running(fleet, setup, folder / "server") as server:
        yield server


@pytest.mark.parametrize("tp_size", [1, 2])
def test_sigterm_with_copies_in_flight(fleet: Fleet, tmp_path: Path, tp_size: int) -> None:
    with _doomed(fleet, tmp_path, tp_size) as server:
        slabs = _slabs(server)
        with server.held_copies():
            server.generate(prompt("terminated", 700))
            assert server.inspect().host["incoming"] > 0
            server.terminate()
        _check_nothing_is_left(server, slabs, tmp_path)
        assert len(server.log_lines("sgl_lmcache: Stats")) == tp_size


@pytest.mark.parametrize(
    ("tp_size", "victim", "n_before"), [(1, "main", 3), (2, "main", 17), (2, "rank 0", 25), (2, "rank 1", 11)]
)
def test_kill_under_load(fleet: Fleet, tmp_path: Path, tp_size: int, victim: str, n_before: int) -> None:
    """n_before: so many requests have been answered by then. Others are in every phase, and copies of theirs."""
    with _doomed(fleet, tmp_path, tp_size) as server, ThreadPoolExecutor(N_CLIENTS) as threads:
        slabs = _slabs(server)
        answered: list[None] = []
        for client in range(N_CLIENTS):
            threads.submit(_send_until_it_ends, server, client, answered)
        wait_for("answers", lambda: len(answered) >= n_before or None, ANSWER_TIMEOUT_S)
        number = server.processes.leader if victim == "main" else server.probe.facts(int(victim[-1]))["pid"]
        os.kill(number, signal.SIGKILL)
        wait_for("it has ended", server.processes.left_nothing, END_TIMEOUT_S)
        assert server.processes.exit_code() != 0
        _check_nothing_is_left(server, slabs, tmp_path)


def _send_until_it_ends(server: Server, client: int, answered: list[None]) -> None:
    chance = random.Random(client)
    with suppress(httpx.TransportError, AssertionError):
        while True:
            server.generate(prompt(chance.randrange(40), 600), chance.choice((1, 4, 40)))
            answered.append(None)


def _slabs(server: Server) -> set[int]:
    """The inodes of the memory files of all ranks."""
    slabs = {
        os.stat(link).st_ino
        for number in server.processes.members()
        for link in Path(f"/proc/{number}/fd").iterdir()
        if os.readlink(link).startswith("/memfd:sgl-lmcache-slab")
    }
    assert len(slabs) == server.setup.n_ranks
    return slabs


def _check_nothing_is_left(server: Server, slabs: set[int], folder: Path) -> None:
    wait_for("no process", server.processes.left_nothing, END_TIMEOUT_S)
    assert _users(slabs) == []
    # SGLang leaves sockets, empty files and folders, and what torch has compiled.
    left = [path for path in (folder / "tmp").rglob("*") if path.is_file() and path.stat().st_size]
    assert [path for path in left if not any(part.startswith("torchinductor") for part in path.parts)] == []
    assert list(Path("/dev/shm").glob("sgl[-_]lmcache*")) == []


def _users(slabs: set[int]) -> list[int]:
    """The processes that have one of these memory files mapped or open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mapped = {int(line.split()[4]) for line in (process / "maps").read_text().splitlines()}
            opened = {link.stat().st_ino for link in (process / "fd").iterdir() if _is_memory(link)}
            if slabs & (mapped | opened):
                found.append(int(process.name))
    return found


def _is_memory(link: Path) -> bool:
    with suppress(OSError):
        return os.readlink(link).startswith("/memfd:")
    return False
