"""Every finding of the doctor, the good and the bad one, from readings that are made up here."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from hicache.ssd.locks import lock_directory
from sgl_lmcache import SGLANG_VERSION, doctor, mooncake
from sgl_lmcache.config import Config, ConfigError, MooncakeTier, SsdTier
from sgl_lmcache.config_file import parse
from sgl_lmcache.disk import Disk, read_disk
from sgl_lmcache.doctor import Finding, Level
from sgl_lmcache.memory import Memory
from sgl_lmcache.quantities import Nbytes
from sgl_lmcache.store import Store
from tests.support.mooncake import master

GIB = 2**30


def assert_ok(finding: Finding) -> None:
    assert finding.level is Level.OK, finding
    assert not finding.advice


def assert_bad(finding: Finding, level: Level, what: str, advice: str) -> None:
    assert finding.level is level, finding
    assert what in finding.what
    assert advice in finding.advice


def test_sglang() -> None:
    assert_ok(doctor.check_sglang(SGLANG_VERSION))
    assert_bad(doctor.check_sglang(None), Level.FAIL, "not installed", f"pip install sglang=={SGLANG_VERSION}")
    assert_bad(doctor.check_sglang("0.5.24"), Level.FAIL, "0.5.24 is installed", f"sglang=={SGLANG_VERSION}")


def test_sglang_whose_internals_differ() -> None:
    assert_ok(doctor.check_seams([]))
    different = doctor.check_seams(["a.b is missing (for c)", "d is now a function (for e)"])
    assert_bad(different, Level.FAIL, "a.b is missing (for c)\nd is now", f"sglang=={SGLANG_VERSION}")


@pytest.mark.parametrize("allowed", ["", "sgl_lmcache", "other, sgl_lmcache", " , "])
def test_plugin_that_is_loaded(allowed: str) -> None:
    assert_ok(doctor.check_plugin({"sgl_lmcache", "other"}, allowed))


def test_plugin_that_is_not() -> None:
    assert_bad(doctor.check_plugin({"other"}, ""), Level.FAIL, "no entry point sgl_lmcache", "pip install")
    excluded = doctor.check_plugin({"sgl_lmcache"}, "other,third")
    assert_bad(excluded, Level.FAIL, "SGLANG_PLUGINS=other,third", "SGLANG_PLUGINS=other,third,sgl_lmcache")


def test_rooms(tmp_path: Path) -> None:
    ours: Mapping[str, Path | None] = {
        "radix": tmp_path / "radix/__init__.py",
        "transfer": tmp_path / "transfer/__init__.py",
    }
    assert_ok(doctor.check_rooms(ours, tmp_path))
    stranger = doctor.check_rooms({**ours, "radix": Path("/elsewhere/radix.py")}, tmp_path)
    assert_bad(
        stranger, Level.FAIL, "radix would be imported from /elsewhere/radix.py", "hides the radix of sgl-lmcache"
    )
    assert_bad(doctor.check_rooms({**ours, "hicache": None}, tmp_path), Level.FAIL, "hicache is missing", "pip install")


def test_a_package_of_the_same_name_first_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.ROOMS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    origins = doctor._room_origins()
    assert origins["transfer"] == tmp_path / "transfer" / "__init__.py"
    assert_bad(doctor.check_rooms(origins, Path(doctor.__file__).parent.parent), Level.FAIL, "transfer", "hides")


def test_gpu() -> None:
    assert_ok(doctor.check_gpu(True))
    assert_bad(doctor.check_gpu(False), Level.WARN, "CPU mode", "machine with a GPU")


def test_configuration() -> None:
    assert_ok(doctor.check_configuration(Config(), ""))
    assert "tiers.yaml" in doctor.check_configuration(Config(), "/etc/tiers.yaml").what
    broken = doctor.check_configuration(ConfigError("tiers.yaml: nope."), "tiers.yaml")
    assert_bad(broken, Level.FAIL, "tiers.yaml: nope.", "docs/configuration.md")


def memory(available_nbytes: int) -> Memory:
    return Memory(64 * GIB, available_nbytes, "/sys/fs/cgroup/memory.max")


def configured(capacity: str) -> Config:
    return parse({"tiers": [{"type": "host", "capacity": capacity}]}, source="test")


def test_memory() -> None:
    unconfigured = doctor.check_memory(memory(16 * GIB), Config(), gpu=True)
    assert_ok(unconfigured)
    assert "16.0 GiB free by /sys/fs/cgroup/memory.max" in unconfigured.what
    assert unconfigured.what.endswith("the host tier gets 8.0 GiB")
    assert "KV pool" in doctor.check_memory(memory(16 * GIB), Config(), gpu=False).what
    assert doctor.check_memory(memory(16 * GIB), configured("4GiB"), gpu=False).what.endswith("gets 4.0 GiB")


def test_memory_that_does_not_suffice() -> None:
    too_much = doctor.check_memory(memory(8 * GIB), configured("9GiB"), gpu=True)
    assert_bad(too_much, Level.FAIL, "tiers[0].capacity is 9.0 GiB", "configure less")
    assert_bad(doctor.check_memory(memory(0), Config(), gpu=True), Level.FAIL, "No memory is free", "free memory")
    tight = doctor.check_memory(memory(8 * GIB), configured("7.5GiB"), gpu=True)
    assert_bad(tight, Level.WARN, "gets 7.5 GiB", "lower tiers[0].capacity")
    assert_bad(doctor.check_memory(memory(GIB), Config(), gpu=True), Level.WARN, "gets 512.0 MiB", "few prompts")


FOLDER = Path("/kv")


def test_ssd_folder() -> None:
    assert_ok(doctor.check_ssd_folder(Disk(FOLDER)))
    refused = doctor.check_ssd_folder(Disk(FOLDER, refusal="/kv is on a read-only file system"))
    assert_bad(refused, Level.FAIL, "/kv is on a read-only file system", "docs/ssd.md")
    in_use = doctor.check_ssd_folder(Disk(FOLDER, holder="pid 7 on host"))
    assert_bad(in_use, Level.FAIL, "/kv is in use by another server (pid 7 on host)", "tiers[1].path")


def test_ssd_room() -> None:
    assert_ok(doctor.check_ssd_room(Disk(FOLDER, room_nbytes=10 * GIB), 9 * GIB))
    tight = doctor.check_ssd_room(Disk(FOLDER, room_nbytes=10 * GIB), 9 * GIB + 1)
    assert_bad(tight, Level.WARN, "9.0 GiB of the 10.0 GiB", "lower tiers[1].capacity")


def test_ssd_direct_io() -> None:
    assert_ok(doctor.check_ssd_direct_io(Disk(FOLDER)))
    assert_bad(doctor.check_ssd_direct_io(Disk(FOLDER, takes_direct_io=False)), Level.WARN, "page cache", "ext4 or XFS")


def ssd(path: Path, nbytes: int = 2**20) -> SsdTier:
    return SsdTier(str(path), Nbytes(nbytes))


def test_a_folder_that_can_be_made_is_not_left_behind(tmp_path: Path) -> None:
    disk = read_disk(ssd(tmp_path / "a" / "b"))
    assert not disk.refusal
    assert not disk.holder
    assert disk.room_nbytes > 2**20
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o750)
    (tmp_path / "kv" / "other").write_text("x")
    assert not read_disk(ssd(tmp_path / "kv")).refusal
    assert [path.name for path in (tmp_path / "kv").iterdir()] == ["other"]
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o750


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(path) in read_disk(ssd(path)).refusal
    assert "has room for" in read_disk(ssd(tmp_path / "kv", 2**60)).refusal
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_use_names_who_has_it(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path, "server-1")
    assert f"pid {os.getpid()} on " in read_disk(ssd(tmp_path)).holder
    lock.release()
    assert read_disk(ssd(tmp_path)).holder == ""


def test_a_file_system_without_direct_io_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    disk = read_disk(ssd(tmp_path))
    assert not disk.refusal
    assert not disk.takes_direct_io
    assert list(tmp_path.iterdir()) == []


def test_compiler() -> None:
    assert_ok(doctor.check_compiler(["c++"], links_openssl=True))
    assert_bad(doctor.check_compiler([], links_openssl=False), Level.FAIL, "none found", "g++ libssl-dev")
    without = doctor.check_compiler(["ccache", "g++"], links_openssl=False)
    assert_bad(without, Level.FAIL, "ccache g++ cannot build a program with OpenSSL", "g++ libssl-dev")


def test_the_compiler_of_the_environment_is_the_one_that_is_tried(tmp_path: Path) -> None:
    fails = tmp_path / "broken-c++"
    fails.write_text("#!/bin/sh\nexit 1\n")
    fails.chmod(0o755)
    command = doctor._compiler({"CXX": f"{fails} -m64"})
    assert command == [str(fails), "-m64"]
    assert not doctor._links_openssl(command)
    assert doctor._compiler({"CXX": str(tmp_path / "none")}) == []
    assert not doctor._links_openssl([])


def test_ninja(tmp_path: Path) -> None:
    assert_ok(doctor.check_ninja("/usr/bin/ninja", tmp_path))
    assert_bad(doctor.check_ninja(None, tmp_path), Level.FAIL, "not on PATH", f"source {tmp_path / 'activate'}")


def test_python_headers(tmp_path: Path) -> None:
    assert_bad(doctor.check_python_headers(tmp_path), Level.FAIL, "Python.h is missing", "apt-get install python3.")
    (tmp_path / "Python.h").write_text("")
    assert_ok(doctor.check_python_headers(tmp_path))


def test_memfd() -> None:
    assert_ok(doctor.check_memfd(supported=True))
    assert_bad(doctor.check_memfd(supported=False), Level.FAIL, "memfd_create", "Linux 3.17")


def test_locked_memory() -> None:
    assert_ok(doctor.check_memlock(-1, gpu=True))
    assert_ok(doctor.check_memlock(2**16, gpu=False))
    assert_bad(doctor.check_memlock(2**23, gpu=True), Level.WARN, "limited to 8.0 MiB", "memlock=-1")


def test_port() -> None:
    assert_ok(doctor.check_port(30000, free=True))
    assert_bad(doctor.check_port(30000, free=False), Level.FAIL, "30000 is taken", "--port 30001")


def test_a_port_that_somebody_listens_on_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not doctor._port_is_free(server.getsockname()[1])


def test_every_check_answers_on_this_machine() -> None:
    findings = doctor.examine({})
    assert len({finding.check for finding in findings}) == len(findings) == 13
    assert all(finding.what for finding in findings)
    assert all(bool(finding.advice) == (finding.level is not Level.OK) for finding in findings)


def test_an_ssd_tier_is_examined_where_one_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text(f"tiers: [{{type: host}}, {{type: ssd, path: {tmp_path}/kv, capacity: 1MiB}}]")
    findings = {finding.check: finding for finding in doctor.examine({"SGL_LMCACHE_CONFIG": str(path)})}
    assert {"SSD folder", "SSD room", "SSD direct I/O"} <= set(findings)
    assert_ok(findings["SSD folder"])
    path.write_text(f"tiers: [{{type: host}}, {{type: ssd, path: {path}, capacity: 1MiB}}]")
    refused = {finding.check: finding for finding in doctor.examine({"SGL_LMCACHE_CONFIG": str(path)})}
    assert_bad(refused["SSD folder"], Level.FAIL, str(path), "docs/ssd.md")
    assert "SSD room" not in refused


def test_a_broken_configuration_is_found_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    findings = {
        finding.check: finding for finding in doctor.examine({"SGL_LMCACHE_CONFIG": str(tmp_path / "none.yaml")})
    }
    assert_bad(findings["configuration"], Level.FAIL, "none.yaml", "docs/configuration.md")
    assert findings["memory"].what


def test_the_table_is_followed_by_one_line_of_advice_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    long = "do this " * 40
    doctor.print_findings([Finding("a", Level.OK, "fine"), Finding("b", Level.FAIL, "[red]bad[/red]", long)])
    output = capsys.readouterr().out
    assert "[red]bad[/red]" in output
    assert output.rstrip("\n").splitlines()[-1].rstrip() == f"fail b: {long}".rstrip()


def test_valkey() -> None:
    store = Store("valkeys://kv:6379", is_encrypted=True)
    assert_ok(doctor.check_valkey(store))
    assert_ok(doctor.check_valkey_encryption(store))
    assert_ok(doctor.check_valkey_encryption(Store("valkey://127.0.0.1", is_local=True)))
    assert_bad(doctor.check_valkey_encryption(Store("valkey://kv")), Level.WARN, "plain text", "valkeys://")
    assert_bad(doctor.check_valkey(Store("x", trouble="kv:1 hangs")), Level.WARN, "kv:1 hangs; a server", "valkey.md")
    assert_bad(doctor.check_valkey(Store("x", refusal="no client")), Level.FAIL, "no client", "pip install")


def test_mooncake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with master(tmp_path / "master") as running:
        tier = MooncakeTier(master=running.pool().master)
        reading = mooncake.read_pool(tier)
        assert reading.address == "127.0.0.1"
        assert_ok(doctor.check_mooncake(reading))
    assert_ok(doctor.check_mooncake(mooncake.read_pool(MooncakeTier(master="etcd://127.0.0.1:1"))))
    assert_bad(doctor.check_mooncake(mooncake.read_pool(tier)), Level.WARN, "no master answers at 127.0.0.1", "start")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert_bad(doctor.check_mooncake(mooncake.read_pool(tier)), Level.FAIL, "cannot be used here", "docs/mooncake.md")
