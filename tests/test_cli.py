"""The command line, called as a function; that it starts without SGLang is asked of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from sgl_lmcache import __version__, cli, doctor, serve
from sgl_lmcache.config import (
    RECORD_LIMIT_VARIABLE,
    RECORD_VARIABLE,
    VARIABLE,
    Config,
    HostTier,
    LowerTier,
    Record,
    SsdTier,
)
from sgl_lmcache.config_file import from_environment, load, parse
from sgl_lmcache.doctor import Finding, Level


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, RECORD_VARIABLE, RECORD_LIMIT_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `serve` is called with; it returns 3 here."""
    calls: list[list[str]] = []

    def main(argv: Sequence[str]) -> int:
        calls.append(list(argv))
        return 3

    monkeypatch.setattr(serve, "main", main)
    return calls


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--model-path", "m", "--", "-x"], ["--version"], ["doctor", "--json"], ["--port=1"]]
)
def test_serve_gets_its_arguments_to_the_letter(served: list[list[str]], arguments: list[str]) -> None:
    assert cli.main(["serve", *arguments]) == 3
    assert served == [arguments]


@pytest.mark.parametrize(
    ("arguments", "limit", "rest"),
    [
        ([], None, []),
        (["--model-path", "m", "--", "--limit", "x"], None, ["--model-path", "m", "--", "--limit", "x"]),
        (["--limit", "1GiB", "--help"], "1GiB", ["--help"]),
        (["--limit=2MB", "-x"], "2MB", ["-x"]),
    ],
)
def test_record_is_serve_with_a_recording(
    served: list[list[str]], tmp_path: Path, arguments: list[str], limit: str | None, rest: list[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    assert cli.main(["record", str(path), *arguments]) == 3
    assert served == [rest]
    named = {"path": str(path)} if limit is None else {"path": str(path), "limit": limit}
    assert from_environment().record == parse({"record": named}, source="test").record
    assert not path.exists()


def test_a_relative_file_is_recorded_where_the_command_was_given(
    served: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["record", "trace.jsonl"]) == 3
    assert from_environment().record == Record(str(tmp_path / "trace.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "name the file first"),
        (["--limit", "1GiB", "trace.jsonl"], "name the file first"),
        (["trace.jsonl", "--limit"], "--limit needs a size"),
        (["trace.jsonl", "--limit", "1gib"], "did you mean 1GiB?"),
        (["is there"], "exists, and a trace is always a new file"),
        (["no folder/trace.jsonl"], "is not a folder that can be written"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_a_server_starts(
    served: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "is there").write_text("")
    assert cli.main(["record", *arguments]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1
    assert served == []
    assert RECORD_VARIABLE not in os.environ


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_record_explains_itself(served: list[list[str]], capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert cli.main(["record", flag]) == 0
    assert capsys.readouterr().out.startswith("usage: sgl-lmcache record FILE [--limit SIZE]")
    assert served == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"sgl-lmcache {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("serve", "record", "doctor", "config", "mooncake-master", "ssd"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reload"],
        ["doctor", "--port", "x"],
        ["doctor", "--port", "0"],
        ["doctor", "--port", "65536"],
        ["config", "--check"],
        ["mooncake-master", "--metrics-port", "0"],
        ["mooncake-master", "tiers.yaml"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: sgl-lmcache" in capsys.readouterr().err


def write(folder: Path, text: str) -> Path:
    path = folder / "tiers.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_valid_file_is_called_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "eviction: lru")
    assert cli.main(["config", "--check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid\n"


def test_a_wrong_file_exits_with_1_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "evictoin: lru")
    assert cli.main(["config", "--check", str(path)]) == 1
    checked = capsys.readouterr()
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["config"]) == 1
    printed = capsys.readouterr()
    assert checked.out == printed.out == ""
    assert checked.err == printed.err
    assert checked.err.count("\n") == 1
    assert "did you mean eviction?" in checked.err


def test_the_defaults_are_marked_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"# {VARIABLE} is not set\n")
    assert "from the file" not in output
    assert "sized from free memory" in output
    assert yaml.safe_load(output)["prefetch"] == {"policy": "auto", "timeout": "5s"}


def test_each_value_says_where_it_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path,
        "tiers: [{type: host, capacity: 1GiB}, {type: ssd, path: /kv, capacity: 2TiB, eviction: lru}]\n"
        "prefetch: {timeout: 2s}",
    )
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"# {VARIABLE}={path}"
    values = [line.partition("#")[::2] for line in lines[1:]]
    assert [(key.strip(" -"), note.strip()) for key, note in values if note] == [
        ('namespace: "default"', "default"),
        ("eviction: gittins", "default"),
        ("type: host", "from the file"),
        ("capacity: 1GiB", "from the file"),
        ("eviction: gittins", "as for every tier"),
        ("type: ssd", "from the file"),
        ('path: "/kv"', "from the file"),
        ("capacity: 2TiB", "from the file"),
        ("write: through", "default"),
        ("eviction: lru", "from the file"),
        ("policy: auto", "default"),
        ("timeout: 2s", "from the file"),
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {"namespace": 'quotes " and # and: more\nin two lines ü'},
        {"tiers": [{"type": "host", "capacity": 4097, "eviction": "lru"}], "prefetch": {"timeout": 0.125}},
        {
            "tiers": [{"type": "host", "quotas": {"a: b": "12.5%", "c": 4097}}],
            "pins": [{"tokens": "/x", "ttl": "90s", "salt": "a: b"}, {"tokens": "/y"}],
        },
        {"tiers": [{"type": "host"}, {"type": "ssd", "path": "/kv: #1 ü", "capacity": 10**12 + 1}]},
        {"tiers": [{"type": "host"}, {"type": "ssd", "path": "/kv", "capacity": "1TiB", "endurance": "500GB"}]},
        {
            "tiers": [
                {"type": "host"},
                {"type": "ssd", "path": "/kv", "capacity": "1TiB", "quotas": {"a: #b": "0.5%", "ü": "80GB", "c": 4097}},
            ]
        },
        {"record": {"path": "/trace: #1 ü", "limit": 10**9 + 1}},
        {
            "tiers": [
                {"type": "host"},
                {"type": "valkey", "url": "valkeys://[::1]:1", "cluster": True, "ca_file": "/: #"},
            ]
        },
        {
            "tiers": [
                {"type": "host"},
                {
                    **{"type": "mooncake", "master": "etcd://a:1;b:2", "metadata": "http://a:1/#", "devices": "a,b: #"},
                    **{"segment": 0, "soft_pin": 0.5, "replicas": 2, "eviction_ratio": 1, "lease": "1ms"},
                },
            ]
        },
    ],
)
def test_what_is_printed_means_the_same_as_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tree: dict[str, Any]
) -> None:
    path = write(tmp_path, yaml.safe_dump(tree))
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["config"]) == 0
    printed = parse(yaml.safe_load(capsys.readouterr().out), source="printed")
    original = load(path)
    assert (printed.namespace, printed.prefetch) == (original.namespace, original.prefetch)
    assert printed.record == original.record
    assert [_resolved(printed, tier) for tier in printed.tiers] == [
        _resolved(original, tier) for tier in original.tiers
    ]


def test_a_recording_that_the_environment_asks_for_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(write(tmp_path, "record: {path: /x, limit: 1MiB}")))
    monkeypatch.setenv(RECORD_VARIABLE, "/y")
    assert cli.main(["config"]) == 0
    path, limit = capsys.readouterr().out.splitlines()[-2:]
    assert path.split() == ["path:", '"/y"', "#", "from", RECORD_VARIABLE]
    assert limit.split() == ["limit:", "256MiB", "#", "default"]


def _resolved(config: Config, tier: HostTier | LowerTier) -> HostTier | LowerTier:
    if not isinstance(tier, HostTier | SsdTier):
        return tier
    return msgspec.structs.replace(tier, eviction=config.eviction_of(tier))


@pytest.mark.parametrize(("level", "code"), [(Level.OK, 0), (Level.WARN, 0), (Level.FAIL, 1)])
def test_the_doctor_exits_with_1_only_for_a_failure(
    level: Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports: list[int] = []

    def examine(env: object, *, port: int) -> list[Finding]:
        ports.append(port)
        return [Finding("port", level, "what", "advice")]

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.main(["doctor", "--json", "--port", "8000"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"check": "port", "level": level, "what": "what", "advice": "advice"}
    ]
    assert cli.main(["doctor"]) == code
    assert f"{level} port: advice" in capsys.readouterr().out
    assert ports == [8000, doctor.DEFAULT_PORT]


@pytest.mark.parametrize("command", ["['config']", "['doctor', '--json']"])
def test_no_command_loads_sglang_or_torch(command: str) -> None:
    program = (
        "import sys; from sgl_lmcache.cli import main; "
        f"main({command}); print({{'torch', 'sglang', 'numba'}} & set(sys.modules), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stderr == "set()\n"


def test_a_valkey_tier_is_printed_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path, "tiers: [{type: host, capacity: 1GiB}, {type: valkey, url: 'valkey://u:secret@kv:1', ttl: 1h}]"
    )
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["config"]) == 0
    output = capsys.readouterr().out
    assert "secret" not in output
    tier = yaml.safe_load(output)["tiers"][1]
    assert tier == {
        **{"type": "valkey", "url": "valkey://u:***@kv:1", "cluster": False, "ttl": "3600s", "write": "through"},
        **{"connections": 4, "connect_timeout": "1s", "timeout": "2s"},
    }


def test_every_key_of_a_mooncake_tier_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path, "tiers: [{type: host, capacity: 1GiB}, {type: mooncake, master: 'kv:1', soft_pin: 1h, segment: 0}]"
    )
    monkeypatch.setenv(VARIABLE, str(path))
    assert cli.main(["config"]) == 0
    output = capsys.readouterr().out
    assert yaml.safe_load(output)["tiers"][1] == {
        **{"type": "mooncake", "master": "kv:1", "metadata": "P2PHANDSHAKE", "protocol": "tcp", "devices": ""},
        **{"segment": "0B", "replicas": 1, "soft_pin": "3600s", "write": "through"},
        **{"timeout": "2s", "lease": "10s", "eviction_high_watermark_ratio": 0.9, "eviction_ratio": 0.05},
    }
    notes = {line.partition(":")[0].strip(" -"): line.partition("#")[2].strip() for line in output.splitlines()}
    assert notes["soft_pin"] == "from the file"
    assert notes["replicas"] == "default"
