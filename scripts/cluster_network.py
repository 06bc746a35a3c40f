"""Several nodes on one machine: a network namespace each, and one bridge that joins them and the host.

A process in a namespace has addresses, ports and routes of its own, as on another machine; files, memory and cores are
shared. So a pool of memory over a network behaves here as it does on real nodes, but for its speed.

Namespaces, bridges and interfaces outlive the process that has made them, and so do the processes inside. Everything
here is therefore named `sglc-IDENTITY...`, and whoever has made it holds a lock on a file of that name, which the
kernel releases however that process ends. `Network` first removes what nobody holds any more.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PREFIX = "sglc-"
LOCKS = Path("/run")

NETWORKS = ipaddress.IPv4Network("198.18.0.0/15")
"""Set aside for tests of networks (RFC 2544), so hardly in use. One /24 of it is taken."""

MAX_PLACES = 100
FIRST_PLACE = 10
"""The host's address in the network ends in 1, the first place's in this."""

END_TIMEOUT_S = 30.0
POLL_S = 0.05


class ClusterError(Exception):
    """The cluster cannot be made, or has failed. The message is for the person who runs it."""


def why_not() -> str | None:
    """Why this machine cannot have such nodes, as a sentence; None: it can."""
    if os.geteuid() != 0:
        return "Network namespaces need root, and this is not run as root."
    if shutil.which("ip") is None:
        return "The command ip is missing; install iproute2 (Debian: apt-get install iproute2)."
    try:
        with Network(1):
            return None
    except ClusterError as error:
        return str(error)


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace with one address, at which the host and the other places reach it."""

    name: str
    address: str

    @property
    def path(self) -> Path:
        """What `setns` takes."""
        return Path("/run/netns") / self.name

    def command(self, command: Sequence[str] = ()) -> list[str]:
        """The command that runs there; it keeps its process number. Nothing: what has to come before it."""
        return ["ip", "netns", "exec", self.name, *command]

    def processes(self) -> list[int]:
        """All that run there. Zombies do not."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL to everything that runs there, as a machine that loses power; returns when nothing is left."""
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while pids := self.processes():
            if time.monotonic() > deadline_s:
                raise ClusterError(f"Processes of {self.name} do not end: {pids}.")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """What is sent from there or to there is lost, as with the cable pulled, until the context is left."""
        _ip("link", "set", self.name, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.name, "up")


class Network:
    """`n_places` namespaces on a bridge, for as long as the context is entered. Leaving it kills what runs in them."""

    def __init__(self, n_places: int) -> None:
        if not 1 <= n_places <= MAX_PLACES:
            raise ClusterError(f"A network has 1 to {MAX_PLACES} places, not {n_places}.")
        self._n_places = n_places
        self._exit = ExitStack()
        self.places: tuple[Place, ...] = ()
        self.host_address = ""

    def __enter__(self) -> Self:
        try:
            with locked(LOCKS / f"{PREFIX.rstrip('-')}.lock"):  # two that start at once take different names
                remove_stale()
                self._make()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.places = ()
        self._exit.close()

    def _make(self) -> None:
        identity = secrets.token_hex(2)
        while _names(identity):
            identity = secrets.token_hex(2)
        lock = _lock_path(identity)
        self._exit.callback(lock.unlink, missing_ok=True)
        self._exit.enter_context(locked(lock))
        self._exit.callback(_remove, identity)
        network, bridge = _free_network(), PREFIX + identity
        self.host_address = str(network[1])
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self.host_address}/{network.prefixlen}", "dev", bridge)
        _ip("link", "set", bridge, "up")
        self.places = tuple(
            self._place(f"{bridge}-{number}", bridge, f"{network[FIRST_PLACE + number]}", network.prefixlen)
            for number in range(self._n_places)
        )

    @staticmethod
    def _place(name: str, bridge: str, address: str, prefix_length: int) -> Place:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", bridge, "up")
        for more in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{address}/{prefix_length}", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _ip("-netns", name, *more)
        return Place(name, address)


def remove_stale() -> None:
    """Remove what was left behind by runs that could not: killed ones."""
    for identity in _identities():
        path = _lock_path(identity)
        with suppress(BlockingIOError), locked(path, wait=False):
            _remove(identity)
            path.unlink()


def _remove(identity: str) -> None:
    """All of one network, as far as it is there; the processes first."""
    spaces, links = _spaces(identity), _links(identity)
    for name in spaces:
        Place(name, "").kill()
    for name in links:
        with suppress(ClusterError):  # it may be on its way out
            _ip("link", "delete", name)
    for name in spaces:
        _ip("netns", "delete", name)


def _lock_path(identity: str) -> Path:
    return LOCKS / f"{PREFIX}{identity}.lock"


def _identities() -> set[str]:
    names = [*_names(""), *(path.stem for path in LOCKS.glob(f"{PREFIX}*.lock"))]
    matched = (re.match(rf"{PREFIX}([0-9a-f]{{4}})(?![0-9a-f])", name) for name in names)
    return {found[1] for found in matched if found}


def _names(identity: str) -> list[str]:
    return [*_spaces(identity), *_links(identity)]


def _spaces(identity: str) -> list[str]:
    names = (line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip())
    return [name for name in names if name.startswith(PREFIX + identity)]


def _links(identity: str) -> list[str]:
    """Of the host. The other ends of its pairs are in the namespaces."""
    names = (line.split(": ")[1].partition("@")[0] for line in _ip("-oneline", "link", "show").splitlines())
    return [name for name in names if name.startswith(PREFIX + identity)]


def _free_network() -> ipaddress.IPv4Network:
    """One that none of this host's routes overlaps."""
    words = (line.split() for line in _ip("-4", "route", "show", "table", "all").splitlines())
    routes = [word for line in words for word in line[:2] if re.fullmatch(r"[0-9.]+(/[0-9]+)?", word)]
    used = [ipaddress.IPv4Network(route, strict=False) for route in routes]
    candidates = list(NETWORKS.subnets(new_prefix=24))
    secrets.SystemRandom().shuffle(candidates)
    for network in candidates:
        if not any(network.overlaps(other) for other in used):
            return network
    raise ClusterError(f"This host has routes to all of {NETWORKS}; no network is left for the nodes.")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the exclusive lock of a folder, or of a file that is made if needed.

    wait: until it is free; otherwise BlockingIOError is raised if it is not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if path.is_dir() else os.O_CREAT), 0o600)
    except OSError as error:
        raise ClusterError(f"{path} cannot be opened ({error.strerror}).") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def _ip(*arguments: str) -> str:
    """What `ip` prints. Raises `ClusterError` with what it complains about."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        complaint = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ClusterError(f"This machine refuses `ip {' '.join(arguments)}`: {complaint.rstrip('.')}.")
    return result.stdout
