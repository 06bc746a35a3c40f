"""The command as a person runs it, and what its options refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from radix import POLICIES
from sgl_lmcache import cli
from sgl_lmcache.config import Config
from sgl_lmcache.simulate.bound import clairvoyant_hits
from tests.simulate.traces import BLOCK, conversations, lines, trace_of, write

REQUESTS = conversations(120, seed=21)
POLICY = next(iter(POLICIES))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test runs, with a trace in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", REQUESTS)
    return tmp_path


def simulate(*arguments: str, code: int = 0) -> list[Any]:
    """Its records."""
    assert cli.main(["simulate", "chats.jsonl", "--json", "out.json", "--plot", "out.png", *arguments]) == code
    records: list[Any] = json.loads(Path("out.json").read_text())
    return records


def test_end_to_end_in_a_process_of_its_own(folder: Path) -> None:
    program = (
        "import sys; from sgl_lmcache.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'sglang'} & set(sys.modules)); sys.exit(code)"
    )
    command = ["simulate", "chats.jsonl", "--capacity", "5%,50%", "--json", "r.json", "--hits", "hits.tsv"]
    process = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert process.stderr == ""
    assert process.returncode == 0
    assert process.stdout.endswith("set()\n")
    assert all(word in process.stdout for word in ("120 requests", *POLICIES, "of bound", "TTFT", "evicted", "5%"))
    records = json.loads((folder / "r.json").read_text())
    assert [(r["capacity"], r["policy"]) for r in records] == [(c, p) for c in (0.05, 0.5) for p in POLICIES]
    assert (folder / "chats.png").read_bytes().startswith(PNG)
    assert len((folder / "hits.tsv").read_text().splitlines()) == 120


def test_a_record_has_what_was_counted() -> None:
    (record,) = simulate("--capacity", "20%", "--policy", POLICY)
    trace = trace_of(REQUESTS)
    n_pages = int(Fraction(1, 5) * trace.n_blocks)
    assert {name: record[name] for name in ("policy", "capacity", "capacity_pages", "requests", "total_tokens")} == {
        **{"policy": POLICY, "capacity": 0.2, "capacity_pages": n_pages},
        **{"requests": 120, "total_tokens": sum(request["input_length"] for request in REQUESTS)},
    }
    assert record["is_default"] == (Config().eviction == POLICY)
    assert record["bound_hit_tokens"] == clairvoyant_hits(trace, n_pages).sum() * BLOCK
    assert 0 < record["hit_tokens"] <= record["bound_hit_tokens"]
    (host,) = record["tiers"]
    assert host["name"] == "host"
    assert host["hit_tokens"] == record["hit_tokens"]
    assert host["read_nbytes"] == record["hit_tokens"] * 128 * 1024
    assert host["written_nbytes"] == (len(trace.blocks) * BLOCK - record["hit_tokens"]) * 128 * 1024
    assert host["evicted_pages"] > 0
    ttft = record["ttft_s"]
    assert 0 < ttft["p50"] <= ttft["p90"] <= ttft["p99"]
    assert ttft["mean"] > 0


def test_the_default_policy_is_marked() -> None:
    assert [r["policy"] for r in simulate("--capacity", "20%") if r["is_default"]] == [Config().eviction]


def test_without_a_capacity_there_is_a_list_of_them() -> None:
    assert [r["capacity"] for r in simulate("--policy", POLICY)] == [0.01, 0.02, 0.05, 0.1, 0.25, 1.0]


def test_hits_are_a_line_a_request_and_a_column_a_capacity(folder: Path) -> None:
    records = simulate("--policy", POLICY, "--capacity", "0.05,100%", "--hits", "hits.tsv", "--count-from", "50%")
    rows = [[int(cell) for cell in row.split("\t")] for row in (folder / "hits.tsv").read_text().splitlines()]
    assert len(rows) == 120
    assert [record["requests"] for record in records] == [60, 60]
    assert [sum(column[60:]) for column in zip(*rows, strict=True)] == [record["hit_tokens"] for record in records]
    assert all(hit % BLOCK == 0 for row in rows for hit in row)
    trace = trace_of(REQUESTS)
    everything = clairvoyant_hits(trace, trace.n_blocks) * BLOCK
    assert [row[1] for row in rows] == everything.tolist()
    assert records[1]["bound_hit_tokens"] == everything[60:].sum()


def test_hits_are_those_of_the_configured_policy_if_it_runs(folder: Path) -> None:
    policies = list(POLICIES)
    (folder / "tiers.yaml").write_text(f"eviction: {Config().eviction}")
    for said in (policies, policies[::-1]):
        simulate("--policy", ",".join(said), "--capacity", "10%", "--config", "tiers.yaml", "--hits", "hits")
        total = sum(map(int, (folder / "hits").read_text().split()))
        by_policy = {r["policy"]: r["hit_tokens"] for r in json.loads((folder / "out.json").read_text())}
        assert total == by_policy[Config().eviction]


def test_hits_are_those_of_the_first_policy_otherwise(folder: Path) -> None:
    others = [policy for policy in POLICIES if policy != Config().eviction]
    if not others:
        pytest.skip("there is one policy")
    records = simulate("--policy", others[-1], "--policy", others[0], "--capacity", "10%", "--hits", "hits")
    assert [record["policy"] for record in records] == list(dict.fromkeys((others[-1], others[0])))
    assert sum(map(int, (folder / "hits").read_text().split())) == records[0]["hit_tokens"]


def test_the_configuration_s_tiers_are_simulated(folder: Path) -> None:
    page_nbytes = BLOCK * 1000
    (folder / "tiers.yaml").write_text(
        f"tiers:\n- {{type: host, capacity: {20 * page_nbytes}}}\n"
        f"- {{type: ssd, path: /kv, capacity: {200 * page_nbytes}}}\n"
    )
    (record,) = simulate("--config", "tiers.yaml", "--policy", POLICY, "--bytes-per-token", "1000")
    assert record["capacity_pages"] == 20
    assert record["capacity"] == 20 / trace_of(REQUESTS).n_blocks
    host, ssd = record["tiers"]
    assert (host["name"], ssd["name"]) == ("host", "ssd")
    assert host["hit_tokens"] + ssd["hit_tokens"] == record["hit_tokens"]
    assert ssd["hit_tokens"] > 0
    assert ssd["read_nbytes"] >= ssd["hit_tokens"] * 1000
    (instead,) = simulate("--config", "tiers.yaml", "--policy", POLICY, "--capacity", "3%", "--bytes-per-token", "1000")
    assert instead["capacity"] == 0.03
    assert [tier["name"] for tier in instead["tiers"]] == ["host", "ssd"]


def test_assumptions_change_times_and_nothing_else() -> None:
    (slow,) = simulate("--capacity", "10%", "--policy", POLICY)
    (fast,) = simulate("--capacity", "10%", "--policy", POLICY, "--prefill-tokens-per-s", "1e6")
    assert fast["ttft_s"]["mean"] < slow["ttft_s"]["mean"] / 2
    (near,) = simulate(
        "--capacity", "10%", "--policy", POLICY, "--assume", "host.read=1GB", "--assume", "host.latency=1s"
    )
    assert near["ttft_s"]["p99"] > slow["ttft_s"]["p99"]
    assert slow["hit_tokens"] == fast["hit_tokens"] == near["hit_tokens"]


def test_repeated_ids_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "chats.jsonl", lines(["a", "x"], ["b", "x"]))
    simulate("--policy", POLICY)
    assert "1 blocks have the id of another block, behind another prefix." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--capacity", wrong] for wrong in ("0", "0%", "-1%", "x", "", "5%x", "2", "1%,,2%", "nan", "1/0")),
        *(["--count-from", wrong] for wrong in ("100%", "1", "x")),
        *(["--bytes-per-token", wrong] for wrong in ("0", "many", "12 parsecs")),
        *(["--prefill-tokens-per-s", wrong] for wrong in ("0", "-1", "nan", "inf", "fast")),
        *(["--assume", wrong] for wrong in ("ssd", "ssd.read", "disk.read=1GB", "ssd.speed=1GB", "ssd.latency=1GB")),
        ["--assume", "host.capacity=1GiB"],
        ["another.jsonl"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["simulate", "chats.jsonl", *arguments])
    assert left.value.code == 2
    assert "usage: sgl-lmcache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chats.jsonl", "--policy", "fifo2"], f"--policy: fifo2 is not an eviction policy; there are: {POLICY}"),
        (["chats.jsonl", "--policy", f"{POLICY},"], "--policy: nothing is not an eviction policy"),
        (["none.jsonl"], "none.jsonl: the trace cannot be read"),
        (["chats.jsonl", "--config", "none.yaml"], "none.yaml: the file cannot be read"),
        (["chats.jsonl", "--json", "none/x.json"], "none/x.json cannot be written: the folder none is not there."),
        (["chats.jsonl", "--policy", POLICY, "--capacity", "5%", "--hits", "."], ". cannot be written: Is a directory"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith(says)
    assert message.count("\n") == 1


def test_a_plot_needs_matplotlib(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["simulate", "chats.jsonl", "--policy", POLICY, "--capacity", "10%"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.startswith("There will be no plot: matplotlib is not installed")
    assert not (folder / "chats.png").exists()
    assert cli.main([*arguments, "--plot", "x.png"]) == 1
    assert capsys.readouterr().err.startswith("--plot: matplotlib is not installed")


def test_a_plot_is_a_png_of_a_readable_size(folder: Path) -> None:
    simulate("--policy", "all")
    picture = (folder / "out.png").read_bytes()
    assert picture.startswith(PNG)
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1200, 750)


def test_one_capacity_can_be_plotted_too(folder: Path) -> None:
    simulate("--policy", POLICY, "--capacity", "7.5%")
    assert (folder / "out.png").read_bytes().startswith(PNG)
