"""`scripts/cluster`: what it says, and that the networks it makes are apart and leave nothing behind.

What runs in such a network is tested in `tests/server/test_cluster.py`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from sgl_lmcache.config_file import load
from tests.support.server import wait_for

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cluster  # noqa: E402
import cluster_network  # noqa: E402
from cluster_network import Network, why_not  # noqa: E402

WAIT_S = 30.0

HOST = "{type: host, capacity: 1GiB}"
POOL = "{type: mooncake, master: somewhere}"


@pytest.fixture
def namespaces() -> None:
    """Skips the test where there cannot be any."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)


def template(folder: Path, *tiers: str) -> Path:
    path = folder / "pool.yaml"
    path.write_text("tiers:\n" + "".join(f"  - {tier}\n" for tier in tiers), encoding="utf-8")
    return path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which it gives up."""
    assert cluster.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (sentence,) = captured.err.splitlines()
    return sentence


# ---- what it says ----


def test_commands_for_real_machines_need_no_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = template(tmp_path, HOST, "{type: ssd, path: /var/lib/x, capacity: 1GiB}", POOL)
    for arguments in ((), ("--config", str(path), "--model", "org/some-model")):
        assert cluster.main(["--print", *arguments]) == 0
    default, own = capsys.readouterr().out.split("The same on real machines")[1:]
    for text in (default, own):
        assert "sgl-lmcache mooncake-master" in text
        assert "--radix-cache-backend sgl_lmcache" in text
        assert "sgl-lmcache serve" in text
    assert str(cluster.TEMPLATE) in default
    assert str(path) in own
    assert "--model-path org/some-model" in own


@pytest.mark.parametrize("how", ["root", "ip", "client"])
def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if how == "root" else 0)
    if how == "ip":
        monkeypatch.setenv("PATH", "")
    if how == "client":
        monkeypatch.setattr(cluster, "why_not", lambda: None)
        monkeypatch.setattr(sys, "executable", "/bin/false")
    expected = {"root": "need root", "ip": "apt-get install iproute2", "client": "Mooncake's client does not load"}
    assert expected[how] in complaint(capsys)


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ((HOST,), "no mooncake tier"),
        ((HOST, "{type: ssd, path: /x, capacity: 1GiB}", POOL), "leave the others out"),
        ((HOST, "{type: mooncake, master: m, address: 10.0.0.2}"), "no address here"),
        ((HOST, '{type: mooncake, master: "etcd://a:1;b:2"}'), "one master"),
        ((HOST, "{type: mooncake, mastr: m}"), "did you mean master"),
    ],
)
def test_a_template_that_nodes_of_one_machine_cannot_share_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiers: tuple[str, ...], expected: str
) -> None:
    assert expected in complaint(capsys, "--config", str(template(tmp_path, *tiers)))


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--nodes", "x"], ["--model", "no-such-folder"]])
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        cluster.parse_arguments(arguments)


def test_only_the_host_of_the_master_is_replaced(tmp_path: Path) -> None:
    before = cluster.read_template(cluster.TEMPLATE)
    after = cluster.with_master(before, "198.18.0.10")
    path = tmp_path / "after.yaml"
    path.write_text(yaml.safe_dump(after), encoding="utf-8")
    tier = load(path).mooncake
    assert tier is not None
    assert tier.master == "198.18.0.10:50051"
    assert cluster.with_master(after, "10.0.0.1") == before


# ---- its networks ----


@pytest.mark.usefixtures("namespaces")
def test_networks_are_apart_and_leave_nothing() -> None:
    with Network(2) as first, Network(2) as second:
        assert not {place.address for place in first.places} & {place.address for place in second.places}
        listening = (
            "import socket; s = socket.create_server(('', 7000)); print('ready', flush=True); s.accept()[0].close()"
        )
        with subprocess.Popen(
            first.places[0].command([sys.executable, "-c", listening]), stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            connecting = "import socket, sys; socket.create_connection((sys.argv[1], 7000), 2.0)"
            connect = [sys.executable, "-c", connecting, first.places[0].address]
            assert subprocess.run(second.places[0].command(connect), capture_output=True, check=False).returncode != 0
            assert subprocess.run(first.places[1].command(connect), check=False).returncode == 0
        names = [place.name for place in (*first.places, *second.places)]
        assert set(names) <= set(cluster_network._names(""))
    assert not set(names) & set(cluster_network._names(""))


@pytest.mark.usefixtures("namespaces")
def test_killing_a_place_ends_all_that_runs_there_and_nothing_else() -> None:
    deaf = shlex.join([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
    both = ["sh", "-c", f"{deaf} & {deaf}; true"]
    with Network(2) as network, ExitStack() as stack:
        for place in network.places:
            process = stack.enter_context(subprocess.Popen(place.command(both), start_new_session=True))
            stack.callback(place.kill)
            wait_for("all run", lambda place=place: len(place.processes()) == 3 or None, WAIT_S)  # type: ignore[misc]
        network.places[0].kill()
        assert [len(place.processes()) for place in network.places] == [0, 3]
        assert process.poll() is None


@pytest.mark.usefixtures("namespaces")
def test_what_a_killed_run_leaves_is_removed_by_the_next() -> None:
    program = (
        "import subprocess, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from cluster_network import Network\n"
        "network = Network(2).__enter__()\n"
        "subprocess.Popen(network.places[0].command(['sleep', '1000']), start_new_session=True)\n"
        "while not network.places[0].processes(): time.sleep(0.01)\n"
        "print(network.places[0].name, flush=True); time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", program, str(ROOT / "scripts")]
    with Network(1) as other, subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        name = process.stdout.readline().decode().strip()
        cluster_network.remove_stale()
        assert name in cluster_network._names(""), "it is in use"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert name in cluster_network._names("")
        with Network(1):
            assert name not in cluster_network._names("")
        assert other.places[0].name in cluster_network._names("")
