"""Free memory, read below folders that stand for machines, and the share of it that the host tier takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_lmcache.config import Config, ConfigError
from sgl_lmcache.config_file import parse
from sgl_lmcache.errors import StartError
from sgl_lmcache.memory import DEFAULT_LIMIT_NBYTES, Memory, host_capacity, read_memory

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """The files of a machine below a folder."""

    def __init__(self, root: Path, *, available_gib: int = 32) -> None:
        self.root = root
        self.write(
            "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {available_gib * 2**20} kB\nHugePages_Total: 0\n"
        )

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def group_v2(
        self, group: str, *, limit: object, usage: int, high: object = "max", cache: int = 0, shmem: int = 0
    ) -> None:
        folder = f"sys/fs/cgroup{group}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.high", high)
        self.write(f"{folder}/memory.current", usage)
        self.write(
            f"{folder}/memory.stat",
            f"file {cache + shmem}\nshmem {shmem}\nactive_file {cache // 4}\ninactive_file {cache - cache // 4}",
        )

    def group_v1(self, group: str, *, limit: int, usage: int, cache: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory{group}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        self.write(
            f"{folder}/memory.stat",
            f"inactive_file 5\ntotal_active_file {cache // 4}\ntotal_inactive_file {cache - cache // 4}",
        )

    def available_gib(self) -> float:
        return read_memory(self.root).available_nbytes / GIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_cgroups_it_is_what_the_kernel_says(machine: Machine) -> None:
    assert read_memory(machine.root) == Memory(64 * GIB, 32 * GIB, "/proc/meminfo")


def test_a_v2_limit_counts_less_its_usage_but_not_its_file_cache(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/job")
    machine.group_v2("/job", limit=16 * GIB, usage=10 * GIB, cache=6 * GIB)
    assert machine.available_gib() == 12
    assert read_memory(machine.root).limited_by == "/sys/fs/cgroup/job/memory.max"


def test_shared_memory_is_not_taken_for_file_cache(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/job")
    machine.group_v2("/job", limit=16 * GIB, usage=10 * GIB, cache=2 * GIB, shmem=7 * GIB)
    assert machine.available_gib() == 8


def test_the_tightest_of_nested_v2_groups_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/pod/job")
    machine.group_v2("/pod/job", limit="max", usage=GIB)
    machine.group_v2("/pod", limit=12 * GIB, usage=4 * GIB)
    machine.group_v2("", limit=24 * GIB, usage=4 * GIB)
    assert machine.available_gib() == 8
    machine.group_v2("/pod/job", limit=6 * GIB, usage=GIB)
    assert machine.available_gib() == 5
    machine.group_v2("/pod/job", limit=6 * GIB, usage=GIB, high=3 * GIB)
    assert machine.available_gib() == 2


def test_a_group_of_the_host_that_the_container_does_not_show_ends_at_the_mount(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/kubepods/pod1/abc")
    machine.group_v2("", limit=4 * GIB, usage=GIB)
    assert machine.available_gib() == 3


def test_v1_groups_count_at_every_level(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "7:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    machine.group_v1("/docker/abc", limit=NO_LIMIT_V1, usage=GIB)
    machine.group_v1("", limit=NO_LIMIT_V1, usage=2 * GIB)
    assert read_memory(machine.root).limited_by == "/proc/meminfo"
    machine.group_v1("/docker", limit=8 * GIB, usage=6 * GIB, cache=2 * GIB)
    assert read_memory(machine.root) == Memory(64 * GIB, 4 * GIB, "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes")


def test_a_full_group_leaves_nothing_and_not_less(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/job")
    machine.group_v2("/job", limit=4 * GIB, usage=5 * GIB)
    assert machine.available_gib() == 0


@pytest.mark.parametrize("meminfo", ["MemTotal: 5 kB", "MemTotal: 5 kB\nMemAvailable: x kB"])
def test_a_machine_that_does_not_say_is_an_error(tmp_path: Path, meminfo: str) -> None:
    with pytest.raises(StartError, match="proc/meminfo"):
        read_memory(tmp_path)
    Machine(tmp_path).write("proc/meminfo", meminfo)
    with pytest.raises(StartError, match="proc/meminfo"):
        read_memory(tmp_path)


def test_this_machine_can_be_read() -> None:
    memory = read_memory()
    assert 0 < memory.available_nbytes < memory.total_nbytes


def memory(available_nbytes: int) -> Memory:
    return Memory(total_nbytes=2**42, available_nbytes=available_nbytes, limited_by="/proc/meminfo")


def configured(capacity: str) -> Config:
    return parse({"tiers": [{"type": "host", "capacity": capacity}]}, source="test")


@given(st.integers(min_value=2 * GIB, max_value=2**41), st.integers(min_value=0, max_value=GIB), st.integers(1, 8))
def test_unconfigured_is_half_of_the_rest_within_the_limit(available: int, reserved: int, n_ranks: int) -> None:
    nbytes = host_capacity(Config(), n_local_ranks=n_ranks, reserved_nbytes=reserved, memory=memory(available))
    assert nbytes == min((available - reserved) // 2, DEFAULT_LIMIT_NBYTES) // n_ranks


def test_a_configured_capacity_is_taken_as_it_is_and_divided_over_ranks() -> None:
    assert host_capacity(configured("80GiB"), n_local_ranks=4, memory=memory(80 * GIB)) == 20 * GIB


def test_of_replicas_that_start_on_their_own_each_needs_room_for_its_part_only() -> None:
    half_taken = memory(40 * GIB)
    assert host_capacity(configured("80GiB"), n_local_ranks=4, n_replicas=2, memory=half_taken) == 20 * GIB
    with pytest.raises(ConfigError, match=r"only 39\.0 GiB"):
        host_capacity(configured("80GiB"), n_local_ranks=4, n_replicas=2, memory=memory(39 * GIB))


def test_a_configured_capacity_that_is_not_free_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError) as caught:
        host_capacity(configured("8GiB"), n_local_ranks=1, reserved_nbytes=2 * GIB, memory=memory(9 * GIB))
    message = str(caught.value)
    assert message.startswith("tiers[0].capacity is 8.0 GiB, but only 7.0 GiB of memory is free for it")
    assert "the KV pool and a mooncake segment will still take 2.0 GiB" in message


@pytest.mark.parametrize(("available", "reserved"), [(0, 0), (GIB, GIB), (GIB, 8 * GIB)])
def test_nothing_free_is_refused(available: int, reserved: int) -> None:
    with pytest.raises(ConfigError, match="No memory is free for the host tier"):
        host_capacity(Config(), n_local_ranks=1, reserved_nbytes=reserved, memory=memory(available))
    with pytest.raises(ConfigError, match=r"only 0\.0 MiB"):
        host_capacity(configured("1GiB"), n_local_ranks=1, reserved_nbytes=reserved, memory=memory(available))
