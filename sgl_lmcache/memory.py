"""How much memory is free, and how much of it the host tier takes.

Free is what can be allocated without swapping and without being killed: what the kernel calls available, and no more
than the process's own cgroup and each group above it may still grow. The slab is allocated in full at the server's
start, and inside a cgroup asking for too much ends in a SIGKILL instead of an error: so this is asked before.

Memory that somebody will touch later is still counted as free. On a CPU SGLang's KV pool is such memory: it is mapped
at the start and filled as requests come; and so is the segment of a Mooncake tier. The caller knows their size and
passes it as `reserved_nbytes`.

All reading is done by `read_memory`, below a root folder that tests replace; the rest is arithmetic on its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sgl_lmcache.config import Config, ConfigError
from sgl_lmcache.errors import StartError

DEFAULT_SHARE = 0.5
"""The host tier takes this share of the memory that is free, if its capacity is not configured."""

DEFAULT_LIMIT_NBYTES = 64 * 2**30
"""... and at most this much a server: more is a decision for a person."""


@dataclass(frozen=True)
class Memory:
    """A reading of one moment. `limited_by` names the file whose figure is `available_nbytes`, for messages."""

    total_nbytes: int
    available_nbytes: int
    limited_by: str


@dataclass(frozen=True)
class _CgroupFiles:
    """The files in which one version of cgroups states a group's limits, usage and file cache."""

    mount: str
    limits: tuple[str, ...]
    usage: str
    file_cache: tuple[str, ...]


_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _CgroupFiles(
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),  # above `high` the kernel slows the group down to a crawl
    "memory.current",
    ("active_file", "inactive_file"),
)


def host_capacity(
    config: Config,
    *,
    n_local_ranks: int,
    n_replicas: int = 1,
    reserved_nbytes: int = 0,
    memory: Memory | None = None,
) -> int:
    """Bytes of host memory for one rank: the server's capacity on this node divided over its `n_local_ranks`.

    A configured capacity is taken as it is. Without one it is half of what is free after `reserved_nbytes`, and at most
    64 GiB. n_replicas: data-parallel copies of the model among these ranks. They start on their own, so some may have
    taken their part already: what has to be free is the part of one.
    `memory` None: read now. Ranks that each read for themselves differ a little, and one that has allocated already
    spoils the reading of the others: let all of a replica call this first and take the minimum.

    Raises `ConfigError` if the configured capacity is not free, or if nothing is free at all.
    """
    memory = read_memory() if memory is None else memory
    free_nbytes = memory.available_nbytes - reserved_nbytes
    capacity = config.host.capacity
    if capacity is None:
        capacity_nbytes = min(int(free_nbytes * DEFAULT_SHARE), DEFAULT_LIMIT_NBYTES)
        if capacity_nbytes < n_local_ranks:
            raise ConfigError(
                f"No memory is free for the host tier: {_describe_free(memory, reserved_nbytes)}; make room, or give "
                "the KV pool less (--max-total-tokens)."
            )
        return capacity_nbytes // n_local_ranks
    if capacity // n_replicas > free_nbytes:
        raise ConfigError(
            f"tiers[0].capacity is {format_nbytes(capacity)}, but only {format_nbytes(max(0, free_nbytes))} of memory "
            f"is free for it: {_describe_free(memory, reserved_nbytes)}; give it less, or leave it out to have it "
            "sized from free memory."
        )
    return capacity // n_local_ranks


def read_memory(root: Path = Path("/")) -> Memory:
    """Read what is free now. `root` is the folder that holds `proc` and `sys`. Raises `StartError` where neither is."""
    try:
        total_nbytes, available_nbytes = _read_meminfo(root / "proc/meminfo")
    except (OSError, KeyError, ValueError) as error:
        raise StartError(f"Free memory cannot be read from {root / 'proc/meminfo'} ({error}).") from error
    candidates = [(available_nbytes, "/proc/meminfo"), *_read_cgroups(root)]
    available_nbytes, limited_by = min(candidates, key=lambda candidate: candidate[0])
    return Memory(total_nbytes, max(0, available_nbytes), limited_by)


def format_nbytes(nbytes: int) -> str:
    """A size for people, to one decimal: not exact, not YAML."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def _describe_free(memory: Memory, reserved_nbytes: int) -> str:
    free = f"{format_nbytes(memory.available_nbytes)} is free by {memory.limited_by}"
    if reserved_nbytes == 0:
        return free
    return f"{free}, of which the KV pool and a mooncake segment will still take {format_nbytes(reserved_nbytes)}"


def _read_meminfo(path: Path) -> tuple[int, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024


def _read_cgroups(root: Path) -> Iterator[tuple[int, str]]:
    """How much each group that this process is in may still grow, with the file that limits it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _read_group_and_parents(root, _V2, group)
        elif "memory" in controllers.split(","):
            yield from _read_group_and_parents(root, _V1, group)


def _read_group_and_parents(root: Path, files: _CgroupFiles, group: str) -> Iterator[tuple[int, str]]:
    """Every level counts: a limit holds for all groups below it.

    In a container the mount may show only the container's own group, under a path that is the host's: the levels that
    are not there are passed over, and the walk ends at the mount, which is then the container's group.
    """
    path = PurePosixPath("/") / group
    for level in (path, *path.parents):
        folder = root / files.mount / level.relative_to("/")
        room = [(limit, name) for name in files.limits if (limit := _read_number(folder / name)) is not None]
        usage_nbytes = _read_number(folder / files.usage)
        if not room or usage_nbytes is None:
            continue
        limit_nbytes, name = min(room)
        held_nbytes = usage_nbytes - _read_file_cache(folder / "memory.stat", files.file_cache)
        yield limit_nbytes - held_nbytes, f"/{folder.relative_to(root) / name}"


def _read_number(path: Path) -> int | None:
    """None if the file is not there, or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_file_cache(path: Path, names: tuple[str, ...]) -> int:
    """Bytes of file cache, which the kernel drops before it refuses memory. Shared memory is not among them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(value) for name, _, value in (line.partition(" ") for line in lines) if name in names)
