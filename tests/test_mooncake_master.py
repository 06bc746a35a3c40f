"""`sgl-lmcache mooncake-master`: the flags for each form of configuration, and a master that it has really started."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from sgl_lmcache import cli, mooncake_master
from sgl_lmcache.config import VARIABLE, MooncakeTier
from sgl_lmcache.config_file import parse
from sgl_lmcache.errors import StartError
from tests.support.processes import ProcessGroup, free_port, wait_for

START_TIMEOUT_S = 30.0
HA = "etcd://10.0.0.1:2379;10.0.0.2:2379"


def _is_missing(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return True
    return False


runs_the_program = pytest.mark.skipif(
    any(map(_is_missing, ("libibverbs.so.1", "libnuma.so.1"))),
    reason="needs Mooncake's libraries (apt-get install libibverbs1 libnuma1)",
)


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def tier(**keys: Any) -> MooncakeTier:
    below = {"type": "mooncake", "master": "10.0.0.1", **keys}
    found = parse({"tiers": [{"type": "host"}, below]}, source="test").mooncake
    assert found is not None
    return found


def flags(address: str | None = None, metrics_port: int = 9003, **keys: Any) -> dict[str, str]:
    given = mooncake_master.flags(tier(**keys), address=address, metrics_port=metrics_port)
    assert all(flag.startswith("--") for flag in given)
    return dict(flag.removeprefix("--").split("=", 1) for flag in given)


def write(folder: Path, master: str, **keys: str) -> Path:
    path = folder / "tiers.yaml"
    more = "".join(f", {key}: '{value}'" for key, value in keys.items())
    path.write_text(f"tiers: [{{type: host}}, {{type: mooncake, master: '{master}'{more}}}]", encoding="utf-8")
    return path


def test_the_flags_of_a_master_alone() -> None:
    assert flags() == {
        **{"rpc_port": "50051", "metrics_port": "9003", "enable_http_metadata_server": "false"},
        **{"default_kv_lease_ttl": "10000", "eviction_high_watermark_ratio": "0.9", "eviction_ratio": "0.05"},
        **{"logtostderr": "true"},
    }


def test_the_ports_are_those_that_are_configured() -> None:
    given = flags(master="kv.example:5", metrics_port=6)
    assert (given["rpc_port"], given["metrics_port"]) == ("5", "6")


def test_an_address_is_the_only_one_where_it_listens() -> None:
    for address in ("10.0.0.7", "10.0.0.7:50051"):
        given = flags(address)
        assert (given["rpc_address"], given["metrics_host"], given["rpc_port"]) == ("10.0.0.7", "10.0.0.7", "50051")


def test_nodes_may_ask_the_master_for_each_other() -> None:
    given = flags(metadata="http://10.0.0.1:8080/metadata")
    assert given["enable_http_metadata_server"] == "true"
    assert (given["http_metadata_server_host"], given["http_metadata_server_port"]) == ("0.0.0.0", "8080")
    given = flags("10.0.0.1", metadata="http://10.0.0.1:8080/metadata")
    assert given["http_metadata_server_host"] == "10.0.0.1"
    assert flags(metadata="etcd://10.0.0.1:2379")["enable_http_metadata_server"] == "false"


def test_what_the_master_does_for_all_comes_from_the_configuration() -> None:
    given = flags(lease="1.5s", eviction_high_watermark_ratio=0.75, eviction_ratio=1)
    assert given["default_kv_lease_ttl"] == "1500"
    assert (given["eviction_high_watermark_ratio"], given["eviction_ratio"]) == ("0.75", "1.0")
    assert "max_kv_soft_pin_ttl" not in flags(soft_pin="1d")
    assert flags(soft_pin="7d")["max_kv_soft_pin_ttl"] == "604800000", "a master's own limit is a day"
    assert flags(lease="0.1ms")["default_kv_lease_ttl"] == "1", "0 would be no lease"


@pytest.mark.parametrize(("address", "port"), [("10.0.0.7", "50051"), ("10.0.0.7:5", "5")])
def test_masters_that_take_turns_are_told_where_etcd_is_and_who_they_are(address: str, port: str) -> None:
    given = flags(address, master=HA)
    assert (given["enable_ha"], given["etcd_endpoints"]) == ("true", "10.0.0.1:2379;10.0.0.2:2379")
    assert (given["rpc_address"], given["rpc_port"]) == ("10.0.0.7", port)


@pytest.mark.parametrize(
    ("master", "address", "says"),
    [
        (HA, None, "give this one's, as the nodes reach it, with --address."),
        (HA, "a:b", "HOST or HOST:PORT."),
        ("10.0.0.1", "http://a", "HOST or HOST:PORT."),
        ("10.0.0.1", "a:0", "HOST or HOST:PORT."),
        ("10.0.0.1", "a:5", "names port 5 and the configuration port 50051; leave the port out."),
    ],
)
def test_an_address_that_cannot_be_is_refused(master: str, address: str | None, says: str) -> None:
    with pytest.raises(StartError) as caught:
        flags(address, master=master)
    assert str(caught.value).endswith(says)


@runs_the_program
def test_the_program_knows_every_flag() -> None:
    known = subprocess.run([mooncake_master.find_program(), "--help"], capture_output=True, text=True, check=False)
    for given in (flags(soft_pin="7d"), flags("a", master=HA, metadata="http://a:1/metadata")):
        for flag in given:
            assert f"    -{flag} (" in known.stdout, flag


def test_the_command_is_printed_as_a_shell_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, HA)
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["mooncake-master", "--print", "--address", "10.0.0.7"]) == 0
    from_environment = capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, "/none")
    assert cli.main(["mooncake-master", "--config", str(path), "--address", "10.0.0.7", "--print"]) == 0
    assert capsys.readouterr().out == from_environment
    program, *given = shlex.split(from_environment)
    assert program == mooncake_master.find_program()
    assert given == mooncake_master.flags(tier(master=HA), address="10.0.0.7")


def test_without_a_mooncake_tier_there_is_nothing_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text("tiers: [{type: host}]", encoding="utf-8")
    for arguments in ([], ["--config", str(path)]):
        assert cli.main(["mooncake-master", *arguments]) == 1
        assert capsys.readouterr().err == (
            "No Mooncake tier is configured; name a configuration that has one in SGL_LMCACHE_CONFIG or --config.\n"
        )


def test_a_program_that_is_missing_is_named_with_what_brings_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["mooncake-master", "--config", str(write(tmp_path, "10.0.0.1")), "--print"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "sgl-lmcache[mooncake] " in told
    assert "sgl-lmcache[mooncake-cpu] " in told


def test_the_program_beside_python_comes_before_that_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("beside", "on_path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mooncake_master").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    assert mooncake_master.find_program() == str(tmp_path / "beside" / "mooncake_master")
    (tmp_path / "beside" / "mooncake_master").unlink()
    assert mooncake_master.find_program() == str(tmp_path / "on_path" / "mooncake_master")


def test_the_command_loads_neither_sglang_nor_torch(tmp_path: Path) -> None:
    arguments = ["mooncake-master", "--config", str(write(tmp_path, "10.0.0.1")), "--print"]
    program = (
        "import sys; from sgl_lmcache.cli import main; "
        f"main({arguments}); print({{'torch', 'sglang', 'numba', 'mooncake'}} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stderr == "set()\n"


def health(port: int) -> dict[str, Any] | None:
    """What the master says of itself. None: it does not answer yet."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0) as answer:
            said: dict[str, Any] = json.load(answer)
    except (URLError, OSError):
        return None
    return said


@runs_the_program
def test_a_master_that_is_started_serves_and_ends_with_a_signal(tmp_path: Path) -> None:
    rpc, metrics, metadata = free_port(), free_port(), free_port()
    path = write(tmp_path, f"127.0.0.1:{rpc}", metadata=f"http://127.0.0.1:{metadata}/metadata")
    command = [str(Path(sys.executable).parent / "sgl-lmcache"), "mooncake-master", "--config", str(path)]
    command += ["--address", "127.0.0.1", "--metrics-port", str(metrics)]
    with ProcessGroup(command, os.environ, tmp_path / "master.log") as master:
        said = wait_for("the master answers", lambda: health(metrics), START_TIMEOUT_S)
        assert (said["role"], said["service_ready"]) == ("leader", True), master.log_tail()
        for port in (rpc, metadata):
            socket.create_connection(("127.0.0.1", port), 5.0).close()
        with urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=5.0) as answer:
            assert b"master_allocated_bytes" in answer.read()
        assert master.members() == [master.leader], "the command has become the master"
        assert "default_kv_lease_ttl=10000," in master.log(), "its log goes to stderr"
        os.kill(master.leader, signal.SIGTERM)
        assert master.wait(START_TIMEOUT_S) == 0
        assert health(metrics) is None
