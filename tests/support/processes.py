"""Commands under test and everything that they start, and waiting without sleeping for a time."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0

T = TypeVar("T")


def wait_for(what: str, poll: Callable[[], T | None], timeout_s: float) -> T:
    """Ask until the answer is not None. Raises AssertionError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while (found := poll()) is None:
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)
    return found


class ProcessGroup:
    """A command and all processes that it starts, which end with it.

    Its output goes to the file `log_path`, and it works in that file's folder: it finds our packages because they are
    installed, not because it was started in a checkout.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> None:
        self.name = Path(log_path).stem
        self.log_path = log_path
        with log_path.open("wb") as log:
            self._leader = subprocess.Popen(
                command, env=dict(environment), cwd=log_path.parent, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    @property
    def leader(self) -> int:
        """The process number of the command."""
        return self._leader.pid

    def exit_code(self) -> int | None:
        return self._leader.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code of the command, once it has ended."""
        return wait_for(f"{self.name} has ended", self.exit_code, timeout_s)

    def members(self) -> list[int]:
        """The processes that run. Zombies do not: nobody but their parent can do more for them."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self._leader.pid and state not in "ZX":
                found.append(int(stat.parent.name))
        return found

    def left_nothing(self) -> bool | None:
        """True when the command has ended and nothing that it started runs; None before, as `wait_for` wants it."""
        return True if self.exit_code() is not None and not self.members() else None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """None of them takes any time until the context is left."""
        try:
            self.freeze()
            yield
        finally:
            self.thaw()

    def freeze(self) -> None:
        """None of them takes any time until `thaw`."""
        os.killpg(self._leader.pid, signal.SIGSTOP)
        for pid in self.members():
            wait_until_stopped(pid)

    def thaw(self) -> None:
        os.killpg(self._leader.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Kill the whole group; returns when no process of it is left. To end in good order takes SGLang five seconds,
        which is for the tests that are about it (`Server.terminate`)."""
        with suppress(ProcessLookupError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        wait_for(f"{self.name} has left nothing", self.left_nothing, STOP_TIMEOUT_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])


class Daemon:
    """A server on a port of loopback that can be killed, stopped, and started again. Its output goes to `folder/log`.

    port: None for a free one.
    """

    def __init__(self, folder: Path, port: int | None) -> None:
        self.port = port or free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What starts it."""
        raise NotImplementedError

    def start(self, *, waits: bool = True) -> None:
        """waits: until it takes connections."""
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), cwd=self._folder, stdout=log, stderr=log)
        if waits:
            wait_for("the server accepts connections", self.accepts, START_TIMEOUT_S)

    def accepts(self) -> bool | None:
        """True if it takes connections; None before, as `wait_for` wants it."""
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text(encoding="utf-8")[-2000:]
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return None
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        freeze(self._process.pid)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def freeze(pid: int) -> None:
    """Stop a process, and return when it has: a signal is only on its way when `kill` returns."""
    os.kill(pid, signal.SIGSTOP)
    wait_until_stopped(pid)


def wait_until_stopped(pid: int) -> None:
    """Returns when all threads of a process are stopped, or it has ended."""
    wait_for(f"process {pid} is stopped", lambda: _states(pid) <= set("TtZX") or None, STOP_TIMEOUT_S)


def _states(pid: int) -> set[str]:
    """Of all its threads, in the kernel's letters."""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.add(stat.read_text().rpartition(")")[2].split()[0])
    return states


def free_port() -> int:
    """One that nobody listens on, below those that the system hands out: still free when a server takes it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
