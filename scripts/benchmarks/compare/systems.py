"""The systems that are compared, and how each is started: SGLang with the same arguments but for those of its cache."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import psutil
from programs import Deadline, EndedError, ProgramError, free_port, mooncake_master, started, tail, valkey

from sgl_lmcache import BACKEND, cpu
from sgl_lmcache.config import VARIABLE

PAGE_SIZE: Final = 16
START_TIMEOUT_S: Final = 300.0
MANY_TOKENS: Final = 60_000
"""An HBM pool that holds everything that any workload uses again."""

HOST: Final = "2GiB"
"""Host memory of every system that keeps KV there alone."""

SMALL_HOST: Final = 1.5
"""Host memory of systems of ours with a tier below it, in HBM pools: it holds twice the longest prompt, and not the set
of any `restore` workload, so that those are restored from the tier below."""


class CannotRunError(Exception):
    """A system does not run here. The message is its own last words."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server is started. folder: its own, for logs and files. model: a folder. gpu: whether there is one.
    pool_nbytes: of KV that the workload's HBM pool holds."""

    folder: Path
    model: Path
    gpu: bool
    pool_nbytes: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a system adds to stock SGLang. commands: of what was started beside it. files: what it was told, by name."""

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    commands: Sequence[Sequence[str]] = ()
    files: Mapping[str, str] = field(default_factory=dict)


Prepare = Callable[[Place, ExitStack], Parts]
"""Starts what a system needs beside SGLang, until the stack is left. Raises `CannotRunError` or `ProgramError`."""


@dataclass(frozen=True, slots=True)
class System:
    """pool_tokens: of HBM, where it is not the workload's. restores_from_below: whether its figures in the `restore`
    workloads are to be those of a tier below host memory."""

    name: str
    about: str
    prepare: Prepare
    pool_tokens: int | None = None
    restores_from_below: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that made a system what it was: commands in the order in which they were started, the variables that
    they got besides CPU mode's, and the files that they read, by name."""

    commands: list[list[str]]
    environment: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Running:
    """A system that answers at `url`. processes: those that were started for it, without what they have started."""

    url: str
    settings: Settings
    processes: tuple[psutil.Process, ...]


@contextmanager
def running(system: System, place: Place, pool_tokens: int) -> Iterator[Running]:
    """A system, from when it answers until the context is left. Raises `CannotRunError` if it never does."""
    before = set(psutil.Process().children())
    with ExitStack() as stack:
        try:
            parts = system.prepare(place, stack)
            url, command = stack.enter_context(_server(parts, place, system.pool_tokens or pool_tokens))
        except ProgramError as error:
            raise CannotRunError(str(error)) from error
        settings = Settings([*map(list, parts.commands), command], dict(parts.environment), dict(parts.files))
        yield Running(url, settings, tuple(set(psutil.Process().children()) - before))


@contextmanager
def _server(parts: Parts, place: Place, pool_tokens: int) -> Iterator[tuple[str, list[str]]]:
    port = free_port()
    arguments = [
        *("--model-path", str(place.model), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-total-tokens", str(pool_tokens), "--page-size", str(PAGE_SIZE)),
        *("--enable-cache-report", "--sleep-on-idle", *parts.arguments),
    ]
    environment = {**os.environ, **parts.environment}
    if not place.gpu:
        arguments, environment = cpu.cpu_arguments(arguments), cpu.cpu_environment(environment)
    command = [parts.python, "-m", "sglang.launch_server", *arguments]
    url = f"http://127.0.0.1:{port}"
    with daemon(command, place.folder / "sglang.log", f"{url}/health", environment):
        yield url, command


@contextmanager
def daemon(
    command: Sequence[str], log: Path, health: str, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A process that answers at the URL `health`, ended on the way out with all that it has started."""
    with ExitStack() as stack:
        try:
            deadline = Deadline(START_TIMEOUT_S)
            stack.enter_context(started(command, partial(answers, health), log, deadline, environment))
        except EndedError as error:
            raise CannotRunError(last_words(log)) from error
        except ProgramError as error:
            raise CannotRunError(f"{error} Its log ends: {last_words(log)}") from error
        yield


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def last_words(log: Path) -> str:
    """The last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in tail(log, 400).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[.*?\] )?[\w.]*(Error|Exception)\b.*:", line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


# ---- the systems ----


def _stock(place: Place, stack: ExitStack) -> Parts:
    return Parts()


def _hicache(*arguments: str) -> Prepare:
    def prepare(place: Place, stack: ExitStack) -> Parts:
        backend = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(place.folder / "hicache")} if arguments else {}
        return Parts(("--enable-hierarchical-cache", "--hicache-size", "2", *arguments), backend)

    return prepare


def _flexkv(place: Place, stack: ExitStack) -> Parts:
    return Parts(("--enable-flexkv",))


def _lmcache(*arguments: str, extra: str = "") -> Prepare:
    def prepare(place: Place, stack: ExitStack) -> Parts:
        from benchmarks.compare import lmcache_environment

        lmcache_environment.install()
        port, http_port, metrics_port = free_port(), free_port(), free_port()
        command = [
            *(str(lmcache_environment.folder() / "bin" / "lmcache"), "server", "--host", "127.0.0.1"),
            *("--port", str(port), "--http-port", str(http_port), "--prometheus-port", str(metrics_port)),
            *("--l1-size-gb", "2", "--eviction-policy", "LRU", *arguments),
        ]
        if "--shm-name" in arguments:
            command[command.index("--shm-name") + 1] += f"-{port}"
        stack.callback(_remove_segments)
        stack.enter_context(daemon(command, place.folder / "lmcache.log", f"http://127.0.0.1:{http_port}/healthcheck"))
        config = f"mp_host: 127.0.0.1\nmp_port: {port}\n{extra}"
        (place.folder / "lmcache.yaml").write_text(config)
        return Parts(
            ("--enable-lmcache", "--lmcache-config-file", str(place.folder / "lmcache.yaml")),
            python=str(lmcache_environment.python()),
            commands=(command,),
            files={"lmcache.yaml": config},
        )

    return prepare


def _remove_segments() -> None:
    """Of LMCache: SGLang's HBM pool lies in shared memory with it on a CPU, and stays there when SGLang is ended."""
    for segment in Path("/dev/shm").glob("lmcache_kv_*"):
        if not psutil.pid_exists(int(segment.name.split("_")[2])):
            segment.unlink(missing_ok=True)


def _ours(tier_below: Callable[[Place, ExitStack], str] | None = None) -> Prepare:
    def prepare(place: Place, stack: ExitStack) -> Parts:
        capacity = int(SMALL_HOST * place.pool_nbytes) if tier_below else HOST
        tiers = [f"{{type: host, capacity: {capacity}}}"]
        tiers += [tier_below(place, stack)] if tier_below else []
        config = "tiers:\n" + "".join(f"  - {tier}\n" for tier in tiers)
        (place.folder / "tiers.yaml").write_text(config)
        variables = {VARIABLE: str(place.folder / "tiers.yaml")}
        return Parts(("--radix-cache-backend", BACKEND), variables, files={"tiers.yaml": config})

    return prepare


def _ssd(place: Place, stack: ExitStack) -> str:
    return f'{{type: ssd, path: "{place.folder / "ssd"}", capacity: 8GiB}}'


def _valkey(place: Place, stack: ExitStack) -> str:
    limits = ("--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru")
    host, port = stack.enter_context(valkey(place.folder, Deadline(START_TIMEOUT_S), *limits))
    return f'{{type: valkey, url: "valkey://{host}:{port}"}}'


def _mooncake(place: Place, stack: ExitStack) -> str:
    master = stack.enter_context(mooncake_master(place.folder, Deadline(START_TIMEOUT_S)))
    return f'{{type: mooncake, master: "{master}", segment: 2GiB}}'


_ENGINE_DRIVEN: Final = ("--supported-transfer-mode", "engine_driven")
_LMCACHE_DRIVEN: Final = "extra_config:\n  lmcache.mp.mp_transfer_mode: lmcache_driven\n"

STOCK: Final = "stock"
LIMIT: Final = "limit"
LMCACHE: Final = "lmcache-fast"

SYSTEMS: Final = (
    System(STOCK, "SGLang, prefix cache in HBM alone", _stock),
    System(LIMIT, "the same with an HBM pool that holds everything", _stock, pool_tokens=MANY_TOKENS),
    System("hicache", f"SGLang's HiCache, host memory {HOST}", _hicache()),
    System("hicache-file", "the same and its file backend", _hicache("--hicache-storage-backend", "file")),
    System("flexkv", "SGLang with FlexKV", _flexkv),
    System("lmcache", f"LMCache 0.5.6, {HOST}, its default transport for this device", _lmcache(*_ENGINE_DRIVEN)),
    System(
        LMCACHE,
        "the same, its fastest transport with right outputs",
        _lmcache(*_ENGINE_DRIVEN, "--shm-name", "compare", "--no-l1-use-lazy"),
    ),
    System(
        "lmcache-driven",
        "the same, its third transport, whose outputs were wrong on a CPU",
        _lmcache("--supported-transfer-mode", "auto", extra=_LMCACHE_DRIVEN),
    ),
    System("ours-host", f"this project, host memory {HOST}", _ours()),
    *(
        System(
            f"ours-{tier.lower()}",
            f"this project, host memory of {SMALL_HOST} HBM pools and {tier}",
            _ours(start),
            restores_from_below=True,
        )
        for tier, start in (("SSD", _ssd), ("Valkey", _valkey), ("Mooncake", _mooncake))
    ),
)

QUICK: Final = (STOCK, LMCACHE, "ours-ssd")
