"""`sgl-lmcache doctor`: would a server start here with our cache, and if not, what has to be done?

Each check is a pure function from a reading to one `Finding`, so that every answer can be tested without the machine
that gives it. `examine` takes the readings of this machine and asks all checks. A finding that is not `ok` carries
advice: a command or a change, not an explanation. Only `fail` means that a server would not start.

Nothing here imports SGLang or torch: a broken installation is what this has to report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import sgl_lmcache
from sgl_lmcache import BACKEND, SGLANG_VERSION, seams
from sgl_lmcache.config import VARIABLE, Config, ConfigError, SsdTier, ValkeyTier
from sgl_lmcache.config_file import from_environment
from sgl_lmcache.cpu import has_gpu
from sgl_lmcache.disk import Disk, read_disk
from sgl_lmcache.memory import Memory, format_nbytes, host_capacity, read_memory
from sgl_lmcache.mooncake import PoolReading, read_pool
from sgl_lmcache.seam_table import SEAMS
from sgl_lmcache.store import Store, read_store

ENTRY_POINT_GROUP = "sglang.srt.plugins"
"""SGLang's `GENERAL_PLUGINS_GROUP`."""

ROOMS = ("radix", "hicache", "transfer")
DEFAULT_PORT = 30000

_SMALL_TIER_NBYTES = 2**30
_TIGHT_SHARE = 0.9
_UNLIMITED = resource.RLIM_INFINITY
_TOOL_PACKAGES = "apt-get install g++ libssl-dev"
_PROGRAM = (
    "#include <openssl/sha.h>\nint main() { unsigned char digest[32]; return SHA256(nullptr, 0, digest) == 0; }\n"
)


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """The answer of one check. `advice` is empty only where the level is `ok`."""

    check: str
    level: Level
    what: str
    advice: str = ""


def examine(env: Mapping[str, str], *, port: int = DEFAULT_PORT) -> list[Finding]:
    """Read this machine and answer every check, in the order in which they should be repaired. Takes a few seconds."""
    gpu = has_gpu()
    compiler = _compiler(env)
    configuration = _read_configuration(env)
    config = configuration if isinstance(configuration, Config) else Config()
    return [
        check_sglang(seams.installed_version()),
        check_seams(seams.differences()),
        check_plugin(_plugin_names(), env.get("SGLANG_PLUGINS", "")),
        check_rooms(_room_origins(), Path(sgl_lmcache.__file__).parent.parent),
        check_gpu(gpu),
        check_configuration(configuration, env.get(VARIABLE, "")),
        check_memory(read_memory(), config, gpu=gpu),
        *(_examine_ssd(config.ssd) if config.ssd is not None else ()),
        *(_examine_valkey(config.valkey, env) if config.valkey is not None else ()),
        *([check_mooncake(read_pool(config.mooncake))] if config.mooncake is not None else []),
        check_compiler(compiler, links_openssl=_links_openssl(compiler)),
        check_ninja(shutil.which("ninja"), Path(sys.executable).parent),
        check_python_headers(Path(sysconfig.get_path("include"))),
        check_memfd(supported=_memfd_works()),
        check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], gpu=gpu),
        check_port(port, free=_port_is_free(port)),
    ]


def check_sglang(installed: str | None) -> Finding:
    check = "SGLang"
    advice = f"pip install sglang=={SGLANG_VERSION}"
    if installed is None:
        return Finding(check, Level.FAIL, "not installed in this Python", advice)
    if installed != SGLANG_VERSION:
        what = f"{installed} is installed, and this version works with {SGLANG_VERSION} only: it hooks into internals"
        return Finding(check, Level.FAIL, what, advice)
    return Finding(check, Level.OK, installed)


def check_seams(differences: Sequence[str]) -> Finding:
    """`differences`: between SGLang's internals and those that this version was written against."""
    check = "SGLang's internals"
    if differences:
        return Finding(
            check, Level.FAIL, "\n".join(differences), f"pip install --force-reinstall sglang=={SGLANG_VERSION}"
        )
    return Finding(check, Level.OK, f"all {len(SEAMS)} names that this version uses are as they were")


def check_plugin(names: Collection[str], allowed: str) -> Finding:
    """`names`: the entry points that SGLang sees. `allowed`: the value of SGLANG_PLUGINS; empty allows all."""
    check = "plug-in"
    if BACKEND not in names:
        advice = "install sgl-lmcache into the Python that runs SGLang: pip install ."
        return Finding(check, Level.FAIL, f"no entry point {BACKEND} in the group {ENTRY_POINT_GROUP}", advice)
    listed = [name.strip() for name in allowed.split(",") if name.strip()]
    if listed and BACKEND not in listed:
        advice = f"export SGLANG_PLUGINS={','.join([*listed, BACKEND])}"
        return Finding(check, Level.FAIL, f"SGLANG_PLUGINS={allowed} keeps SGLang from loading it", advice)
    return Finding(check, Level.OK, "SGLang will load it")


def check_rooms(origins: Mapping[str, Path | None], home: Path) -> Finding:
    """`origins`: the file that each top-level package would be imported from; None if there is none."""
    check = "packages"
    for name, origin in origins.items():
        if origin is None:
            return Finding(
                check, Level.FAIL, f"the package {name} is missing", "install sgl-lmcache again: pip install ."
            )
        if home.resolve() not in origin.resolve().parents:
            advice = f"remove it from the path, or run where it is not: it hides the {name} of sgl-lmcache"
            return Finding(check, Level.FAIL, f"{name} would be imported from {origin}", advice)
    return Finding(check, Level.OK, f"{', '.join(origins)} come from {home}")


def check_gpu(gpu: bool) -> Finding:
    check = "GPU"
    if gpu:
        return Finding(check, Level.OK, "an NVIDIA driver is there")
    what = "no NVIDIA driver: `sgl-lmcache serve` will use CPU mode, which is right but slow"
    return Finding(
        check, Level.WARN, what, "fine for trying it out; for real use take a machine with a GPU and its driver"
    )


def check_configuration(configuration: Config | ConfigError, path: str) -> Finding:
    check = "configuration"
    if isinstance(configuration, ConfigError):
        return Finding(check, Level.FAIL, str(configuration), "docs/configuration.md describes every key")
    return Finding(check, Level.OK, path or f"defaults ({VARIABLE} is not set)")


def check_memory(memory: Memory, config: Config, *, gpu: bool) -> Finding:
    """What the host tier of one server would get now. Without a GPU the KV pool comes off as well, and its size is
    known only when the server starts."""
    check = "memory"
    try:
        capacity_nbytes = host_capacity(config, n_local_ranks=1, memory=memory)
    except ConfigError as error:
        return Finding(check, Level.FAIL, str(error), "free memory, raise the container's limit, or configure less")
    pool = "" if gpu else ", less what the KV pool takes"
    what = (
        f"{format_nbytes(memory.available_nbytes)} free by {memory.limited_by}; the host tier gets "
        f"{format_nbytes(capacity_nbytes)}{pool if config.host.capacity is None else ''}"
    )
    if capacity_nbytes > memory.available_nbytes * _TIGHT_SHARE:
        advice = "leave a tenth for the server itself: lower tiers[0].capacity"
        return Finding(check, Level.WARN, what, advice)
    if capacity_nbytes < _SMALL_TIER_NBYTES:
        return Finding(check, Level.WARN, what, "this holds few prompts: free memory or set tiers[0].capacity")
    return Finding(check, Level.OK, what)


def check_ssd_folder(disk: Disk) -> Finding:
    check = "SSD folder"
    if disk.refusal:
        advice = "name a folder that the server's user can write and that has room: docs/ssd.md"
        return Finding(check, Level.FAIL, disk.refusal, advice)
    if disk.holder:
        advice = "stop that server, or give this one a folder of its own: tiers[1].path"
        return Finding(check, Level.FAIL, f"{disk.path} is in use by another server ({disk.holder})", advice)
    return Finding(check, Level.OK, f"{disk.path} can be written, and no server uses it")


def check_ssd_room(disk: Disk, capacity_nbytes: int) -> Finding:
    """Other files on the disk grow as well, and disks that are full are slow."""
    check = "SSD room"
    what = f"{format_nbytes(capacity_nbytes)} of the {format_nbytes(disk.room_nbytes)} that the tier could have"
    if capacity_nbytes > disk.room_nbytes * _TIGHT_SHARE:
        return Finding(check, Level.WARN, what, "leave a tenth of the disk free: lower tiers[1].capacity")
    return Finding(check, Level.OK, what)


def check_ssd_direct_io(disk: Disk) -> Finding:
    check = "SSD direct I/O"
    if not disk.takes_direct_io:
        what = (
            f"the file system of {disk.path} refuses it, so every page goes through the page cache, and is copied there"
        )
        return Finding(check, Level.WARN, what, "it works, but slower: use a folder on ext4 or XFS of a local disk")
    return Finding(check, Level.OK, "the file system has it")


def check_valkey(store: Store) -> Finding:
    """A store that fails never stops a server, but one that cannot be asked at all is a mistake of our own."""
    check = "Valkey"
    if store.refusal:
        advice = 'correct the valkey tier, or install its client: pip install "sgl-lmcache[valkey]"'
        return Finding(check, Level.FAIL, store.refusal, advice)
    if store.trouble:
        what = f"{store.trouble}; a server would start, and go on without it"
        return Finding(check, Level.WARN, what, "put the store or the tier's keys right: docs/valkey.md")
    return Finding(check, Level.OK, f"{store.url} answers, and allows all that the tier needs")


def check_valkey_encryption(store: Store) -> Finding:
    check = "Valkey encryption"
    if store.is_encrypted or store.is_local:
        return Finding(check, Level.OK, "TLS" if store.is_encrypted else "not needed on one machine")
    what = "KV, which is as good as the prompts, crosses the network in plain text"
    return Finding(check, Level.WARN, what, "use valkeys:// and TLS on the store: docs/valkey.md")


def check_mooncake(pool: PoolReading) -> Finding:
    """A master that fails never stops a server, but a client that cannot be used does."""
    check = "Mooncake"
    if pool.refusal:
        return Finding(check, Level.FAIL, pool.refusal, "or remove the mooncake tier: docs/mooncake.md")
    if pool.trouble:
        what = f"{pool.trouble}; a server would start, and go on without it"
        return Finding(check, Level.WARN, what, "start the master, or put the tier's keys right: docs/mooncake.md")
    if not pool.address:
        return Finding(check, Level.OK, f"the client can be used; which master leads in {pool.master} was not asked")
    return Finding(check, Level.OK, f"the master at {pool.master} answers; this node would be {pool.address}")


def check_compiler(compiler: Sequence[str], *, links_openssl: bool) -> Finding:
    """`compiler`: its command line; empty if there is none. SGLang compiles the extension that hashes pages
    (`hicache_hash_cpp`) when it is first used."""
    check = "C++ compiler"
    name = " ".join(compiler)
    if not compiler:
        return Finding(check, Level.FAIL, "none found, and SGLang's page-hash extension needs one", _TOOL_PACKAGES)
    if not links_openssl:
        what = f"{name} cannot build a program with OpenSSL, as SGLang's page-hash extension does"
        return Finding(check, Level.FAIL, what, _TOOL_PACKAGES)
    return Finding(check, Level.OK, f"{name}, with OpenSSL")


def check_ninja(found: str | None, scripts: Path) -> Finding:
    """PyTorch builds extensions with `ninja` and looks for it on PATH only."""
    if found is None:
        advice = f"activate the environment: source {scripts / 'activate'}"
        return Finding("ninja", Level.FAIL, "not on PATH, and SGLang's extensions are built with it", advice)
    return Finding("ninja", Level.OK, found)


def check_python_headers(include: Path) -> Finding:
    check = "Python headers"
    if not (include / "Python.h").is_file():
        advice = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return Finding(check, Level.FAIL, f"{include / 'Python.h'} is missing", advice)
    return Finding(check, Level.OK, str(include))


def check_memfd(*, supported: bool) -> Finding:
    if not supported:
        advice = "use Linux 3.17 or newer, and a container profile that allows memfd_create"
        return Finding("memfd", Level.FAIL, "the kernel refuses memfd_create, which host memory is taken with", advice)
    return Finding("memfd", Level.OK, "supported")


def check_memlock(limit_nbytes: int, *, gpu: bool) -> Finding:
    """Host memory is registered with CUDA, so that copies need no bounce buffer; that locks it."""
    check = "locked memory"
    if not gpu:
        return Finding(check, Level.OK, "not needed without a GPU")
    if limit_nbytes != _UNLIMITED:
        what = f"limited to {format_nbytes(limit_nbytes)}, so registering the host tier with the GPU may be refused"
        return Finding(check, Level.WARN, what, "ulimit -l unlimited (docker run --ulimit memlock=-1)")
    return Finding(check, Level.OK, "unlimited")


def check_port(port: int, *, free: bool) -> Finding:
    if not free:
        advice = f"stop what listens there, or choose another: --port {port + 1}"
        return Finding("port", Level.FAIL, f"{port} is taken", advice)
    return Finding("port", Level.OK, f"{port} is free")


def print_findings(findings: Sequence[Finding]) -> None:
    """A table, then one line of advice for each finding that has some."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    table = Table("", "check", "finding")
    for finding in findings:
        table.add_row(Text(finding.level, styles[finding.level]), Text(finding.check), Text(finding.what))
    console = Console()
    console.print(table)
    for finding in findings:
        if finding.advice:
            label = Text(f"{finding.level} {finding.check}: ", styles[finding.level])
            console.print(label + Text(finding.advice), soft_wrap=True)


def _read_configuration(env: Mapping[str, str]) -> Config | ConfigError:
    try:
        return from_environment(env)
    except ConfigError as error:
        return error


def _examine_ssd(tier: SsdTier) -> list[Finding]:
    disk = read_disk(tier)
    folder = check_ssd_folder(disk)
    if disk.refusal:
        return [folder]
    return [folder, check_ssd_room(disk, tier.capacity), check_ssd_direct_io(disk)]


def _examine_valkey(tier: ValkeyTier, env: Mapping[str, str]) -> list[Finding]:
    store = read_store(tier, env)
    return [check_valkey(store), *([] if store.refusal else [check_valkey_encryption(store)])]


def _plugin_names() -> set[str]:
    return {entry_point.name for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _room_origins() -> dict[str, Path | None]:
    specs = {name: importlib.util.find_spec(name) for name in ROOMS}
    return {name: Path(spec.origin) if spec and spec.origin else None for name, spec in specs.items()}


def _compiler(env: Mapping[str, str]) -> list[str]:
    """The command line with which PyTorch would call the compiler; empty if there is no such program."""
    command = shlex.split(env.get("CXX") or "c++")
    return command if shutil.which(command[0]) else []


def _links_openssl(compiler: Sequence[str]) -> bool:
    if not compiler:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-", "-lcrypto", "-o", f"{folder}/program"]
        return subprocess.run(command, input=_PROGRAM, text=True, capture_output=True, check=False).returncode == 0


def _memfd_works() -> bool:
    try:
        os.close(os.memfd_create("sgl-lmcache-doctor"))
    except OSError:
        return False
    return True


def _port_is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
