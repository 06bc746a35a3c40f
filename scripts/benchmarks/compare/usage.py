"""What a system takes beside time: memory, bytes to and from disks, bytes over the machine's network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

LOOPBACK: Final = "lo"


@dataclass(frozen=True, slots=True)
class Usage:
    """disk_read_nbytes, disk_written_nbytes: by all processes of a system. network_nbytes: through the loopback device,
    by everybody on the machine. memory_nbytes: at most, of all its processes."""

    disk_read_nbytes: int
    disk_written_nbytes: int
    network_nbytes: int
    memory_nbytes: int


class Meter:
    """Of processes and all that they have started, from now on.

    Nothing is sampled while they work: the kernel keeps the most that each has had resident. What that was above the
    last is added to the last, of which pages that several share are counted once (PSS). So the sum is of peaks that may
    have been at different times.
    """

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        for process in self._all():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # forget the most: proc_pid_clear_refs(5)
        self._before = self._disk_nbytes(), _network_nbytes()

    def read(self) -> Usage:
        (read_before, written_before), network_before = self._before
        read, written = self._disk_nbytes()
        network_nbytes = _network_nbytes() - network_before
        memory_nbytes = sum(_of(process, _most_nbytes) for process in self._all())
        return Usage(read - read_before, written - written_before, network_nbytes, memory_nbytes)

    def _disk_nbytes(self) -> tuple[int, int]:
        processes = tuple(self._all())
        return (
            sum(_of(process, lambda one: int(one.io_counters().read_bytes)) for process in processes),
            sum(_of(process, lambda one: int(one.io_counters().write_bytes)) for process in processes),
        )

    def _all(self) -> Iterator[psutil.Process]:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                yield from (process, *process.children(recursive=True))


def _most_nbytes(process: psutil.Process) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    most, now = (1024 * int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS"))
    return int(process.memory_full_info().pss) + most - now


def _network_nbytes() -> int:
    counters = psutil.net_io_counters(pernic=True).get(LOOPBACK)
    return 0 if counters is None else counters.bytes_sent


def _of(process: psutil.Process, read: Callable[[psutil.Process], int]) -> int:
    try:
        return read(process)
    except (psutil.Error, OSError, KeyError):  # it has ended meanwhile
        return 0
