"""`scripts/bench`: what it asks, how it measures, what it concludes, and a small run with real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import programs  # noqa: E402
from benchmarks.compare import __main__ as bench  # noqa: E402
from benchmarks.compare import systems  # noqa: E402
from benchmarks.compare.figures import Differing, Figures, Measured, differing, summarise  # noqa: E402
from benchmarks.compare.load import LoadError, Round, Sample, run_round, windowed  # noqa: E402
from benchmarks.compare.report import Results, doubts, plot, write_json  # noqa: E402
from benchmarks.compare.systems import CannotRunError, Place, Prepare, Running, System  # noqa: E402
from benchmarks.compare.usage import Meter, Usage  # noqa: E402
from benchmarks.compare.workloads import (  # noqa: E402
    COLD,
    FULL,
    ON_DEVICE,
    QUICK,
    RESTORED,
    WARM,
    Phase,
    Request,
    Tokens,
    Workload,
)
from programs import Deadline  # noqa: E402


def runs_of_16(phases: Sequence[Phase]) -> set[Tokens]:
    """All of them, wherever they begin."""
    prompts = [request.tokens for phase in phases for request in phase]
    return {tokens[at : at + 16] for tokens in prompts for at in range(len(tokens) - 15)}


RESTORES = [workload for workload in (*FULL, *QUICK) if RESTORED in workload.counted]
ALL = pytest.mark.parametrize("workload", [*FULL, *QUICK], ids=lambda workload: workload.name)


def answer(request: Request, prompt: Tokens, due_s: float) -> Sample:
    """A server that answers at once, with tokens that follow from the prompt."""
    tokens = tuple((sum(prompt) + number) % 4000 for number in range(request.n_answer))
    return Sample(request.label, prompt, 0.5, 1.0, 0, 0, 0, tokens)


def workload(phases: list[Phase], **fields: object) -> Workload:
    return replace(Workload("test", "", lambda rng: phases), **fields)  # type: ignore[arg-type]


# ---- what is asked ----


@ALL
def test_a_round_is_the_same_for_every_system_and_shares_nothing_with_the_next(workload: Workload) -> None:
    first, again, second = (workload.of_round(number) for number in (0, 0, 1))
    assert first == again
    assert not runs_of_16(first) & runs_of_16(second)


@ALL
def test_requests_follow_earlier_ones_and_the_counted_phase_is_the_last(workload: Workload) -> None:
    phases = workload.of_round(0)
    requests = [request for phase in phases for request in phase]
    assert all(request.after is None or request.after < position for position, request in enumerate(requests))
    assert {request.label for request in phases[-1]} >= set(workload.counted)
    assert all(request.label == COLD for phase in phases[:-1] for request in phase)


@ALL
def test_what_is_reused_does_not_fit_into_hbm(workload: Workload) -> None:
    """But for the workloads that share nothing, and the burst, whose one prompt nobody has seen."""
    sent = run_round(replace(workload, rate=None), 0, answer).samples
    longest = max(len(sample.prompt) + len(sample.answer) for sample in sent)
    assert longest < workload.pool_tokens
    runs = {sample.prompt[at : at + 16] for sample in sent for at in range(0, len(sample.prompt) - 15, 16)}
    if workload.name not in ("short", "no-reuse", "burst"):
        assert len(runs) * 16 > 1.1 * workload.pool_tokens


@pytest.mark.parametrize("workload", RESTORES, ids=lambda workload: workload.name)
def test_what_is_restored_fits_into_no_host_memory_above_another_tier_but_each_prompt_twice(workload: Workload) -> None:
    """A tier below host memory may fill half of it at a time (`hicache.lower.FETCH_SHARE`)."""
    [cold, _] = workload.of_round(0)
    n_host = systems.SMALL_HOST * workload.pool_tokens
    assert sum(len(request.tokens) for request in cold) > 1.1 * n_host
    assert all(2 * len(request.tokens) <= n_host for request in cold)


def test_a_chat_sends_all_that_was_said_until_its_window_is_full() -> None:
    turns = ((1, 1, 1), (2, 2), (3, 3), (4, 4))
    assert windowed(turns, None) == turns
    assert windowed(turns, 9) == turns
    assert windowed(turns, 8) == (turns[0], *turns[2:])
    assert windowed(turns, 0) == (turns[0], turns[3])


# ---- how it is sent ----


def test_conversations_grow_by_the_servers_own_answers() -> None:
    chat: list[Phase] = [[Request(COLD, (1, 2), 2), Request(COLD, (7,), 2)], [Request(WARM, (3,), 1, after=0)]]
    samples = run_round(workload(chat), 0, answer).samples
    assert [sample.prompt for sample in samples] == [(1, 2), (7,), (1, 2, *samples[0].answer, 3)]


@given(n_users=st.integers(1, 5), n_requests=st.integers(1, 20))
def test_never_more_requests_than_users(n_users: int, n_requests: int) -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def ask(request: Request, prompt: Tokens, due_s: float) -> Sample:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        try:
            return answer(request, prompt, due_s)
        finally:
            with lock:
                under_way[0] -= 1

    phase = [Request(WARM, (number,)) for number in range(n_requests)]
    found = run_round(workload([phase], n_users=n_users), 0, ask)
    assert [sample.prompt for sample in found.samples] == [request.tokens for request in phase]
    assert most[0] <= n_users


def test_in_an_open_loop_requests_do_not_wait_for_one_another() -> None:
    """All of them are under way at once, though none has been answered; and each was due later than the one before."""
    all_there = threading.Barrier(8, timeout=60)
    dues: list[float] = []

    def ask(request: Request, prompt: Tokens, due_s: float) -> Sample:
        dues.append(due_s)
        all_there.wait()
        return answer(request, prompt, due_s)

    phase = [Request(WARM, (number,)) for number in range(8)]
    run_round(workload([phase], rate=1000.0), 0, ask)
    assert all(earlier < later for earlier, later in pairwise(sorted(dues)))


def test_a_turn_is_due_when_the_one_before_it_is_over() -> None:
    """In an open loop it may have been due long ago: what it waited for is not its server's time to first token."""
    begun: list[float] = []
    dues: list[float] = []

    def ask(request: Request, prompt: Tokens, due_s: float) -> Sample:
        begun.append(time.perf_counter())
        dues.append(due_s)
        return answer(request, prompt, due_s)

    phase = [Request(WARM, (1,)), Request(WARM, (2,), after=0)]
    run_round(workload([phase], rate=1e9), 0, ask)
    assert dues[1] > begun[0]


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_a_request_that_fails_ends_the_round_with_its_error(rate: float | None) -> None:
    def ask(request: Request, prompt: Tokens, due_s: float) -> Sample:
        if 3 in request.tokens:
            raise LoadError("the third")
        return answer(request, prompt, due_s)

    phase = [Request(WARM, (1,)), Request(WARM, (3,), after=0), Request(WARM, (4,), after=1)]
    with pytest.raises(LoadError, match="the third"):
        run_round(workload([phase], rate=rate, n_users=2), 0, ask)


@pytest.mark.parametrize("rate", [None, 0.001])
def test_an_interruption_lets_what_is_under_way_end_and_begins_nothing_more(rate: float | None) -> None:
    """Not even what is due in a quarter of an hour."""
    asked: list[Tokens] = []

    def ask(request: Request, prompt: Tokens, due_s: float) -> Sample:
        asked.append(prompt)
        raise KeyboardInterrupt

    phase = [Request(WARM, (number,)) for number in range(50)]
    with pytest.raises(KeyboardInterrupt):
        run_round(workload([phase], rate=rate, n_users=2), 0, ask)
    assert 1 <= len(asked) <= 2


# ---- what is concluded ----


def sample(label: str, ttft_s: float, *, host: int = 0, device: int = 0, prompt: Tokens = (1,) * 10) -> Sample:
    return Sample(label, prompt, ttft_s, 2 * ttft_s, device, host, 0, (5,) * 10)


def measured(system: str, number: int, samples: Sequence[Sample], last_phase_s: float = 10.0) -> Measured:
    return Measured(system, number, Round(tuple(samples), (1.0, last_phase_s)), Usage(100, 200, 300, 10**9 + number))


def test_figures_of_a_workload() -> None:
    """Worked out by hand: ratios are of the same round, so a slow second half of a run changes none of them."""
    work = workload([], counted=(WARM,))
    rounds = [
        measured("stock", 0, [sample(COLD, 9.0), sample(WARM, 2.0), sample(WARM, 4.0)]),
        measured("ours", 0, [sample(COLD, 9.0), sample(WARM, 1.0, host=8), sample(WARM, 1.0, device=8)], 5.0),
        measured("stock", 1, [sample(COLD, 9.0), sample(WARM, 20.0), sample(WARM, 40.0)]),
        measured("ours", 1, [sample(COLD, 9.0), sample(WARM, 10.0, host=8), sample(WARM, 10.0)], 5.0),
    ]
    stock, ours = summarise(work, rounds, token_nbytes=100)
    assert (stock.ttft_ratio, stock.throughput_ratio, stock.computed_tokens) == (1.0, 1.0, 20)
    assert (ours.ttft_ratio, ours.throughput_ratio) == (3.0, 2.0)
    assert (ours.ttft_mean_s, ours.ttft_p50_s, ours.tokens_per_s) == (5.5, 5.5, 8.0)
    assert (ours.prompt_tokens, ours.device_tokens, ours.host_tokens, ours.computed_tokens) == (20, 4, 8, 8)
    assert ours.avoided == pytest.approx(0.6)
    assert ours.restored_nbytes == 800
    assert (ours.disk_read_nbytes, ours.disk_written_nbytes, ours.network_nbytes) == (100, 200, 300)
    assert ours.memory_nbytes == 10**9 + 1
    assert ours.n_differ is None
    assert ours.overhead_s is None


def test_what_a_restore_adds_is_measured_against_the_hit_right_after_it() -> None:
    samples = [sample(COLD, 9.0)]
    for below_s, device_s in ((1.1, 1.0), (5.2, 5.0), (2.9, 2.0)):
        samples += [sample(RESTORED, below_s), sample(ON_DEVICE, device_s)]
    [figures] = summarise(workload([], counted=(RESTORED,)), [measured("ours", 0, samples)], 1)
    assert figures.overhead_s == pytest.approx(0.2)
    assert (figures.device_ttft_s, figures.cold_ttft_s) == (2.0, 9.0)
    assert figures.ttft_mean_s == pytest.approx((1.1 + 5.2 + 2.9) / 3)


def test_a_tier_that_gave_nothing_is_named(tmp_path: Path) -> None:
    shown = [system for system in systems.SYSTEMS if system.name in ("ours-host", "ours-ssd", "ours-valkey")]

    def figures_of(system: str, n_storage: int) -> Figures:
        pair = [
            Sample(label, (1,) * 10, 1.0, 2.0, 0, 8 - n_storage, n_storage, (5,)) for label in (RESTORED, ON_DEVICE)
        ]
        return summarise(workload([], counted=(RESTORED,)), [measured(system, 0, pair)], 1)[0]

    rows = [figures_of("ours-host", 0), figures_of("ours-ssd", 0), figures_of("ours-valkey", 8)]
    assert [sentence.partition(":")[0] for sentence in doubts(shown, rows)] == ["ours-ssd"]


def test_answers_are_compared_where_the_prompt_is_the_same() -> None:
    def of(*pairs: tuple[Tokens, Tokens]) -> Round:
        return Round(tuple(Sample(WARM, prompt, 1, 1, 0, 0, 0, given) for prompt, given in pairs), (1.0,))

    stock = of(((1, 2), (3, 4, 5)), ((1,), (2, 2, 2)), ((9,), (8, 8, 8)))
    other = of(((1, 2), (3, 6, 7)), ((1,), (2, 2, 2)), ((7,), (6, 6, 6)))
    assert differing(other, stock) == [Differing(prompt=(1, 2, 3), token_of_stock=4, token=6)]
    assert differing(stock, stock) == []


def test_the_report_keeps_everything_and_draws_it(tmp_path: Path) -> None:
    works = [workload([], counted=(RESTORED,), name=name) for name in ("restore-2k", "restore-4k")]
    rounds = [
        measured(system, 0, [sample(COLD, 9.0), sample(RESTORED, 1.5), sample(ON_DEVICE, 1.0)])
        for system in ("ours-host", "stock")
    ]
    shown = [system for system in systems.SYSTEMS if system.name in ("stock", "ours-host", "flexkv")]
    results = Results(shown, works, 100, {work.name: rounds for work in works}, {"flexkv": "No module named flexkv"})
    write_json(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["errors"] == {"flexkv": "No module named flexkv"}
    assert [row["system"] for row in written["figures"]["restore-2k"]] == ["stock", "ours-host"]
    assert written["figures"]["restore-2k"][1]["overhead_s"] == 0.5
    [first, *_] = written["rounds"]["restore-2k"]
    assert [one["ttft_s"] for one in first["round"]["samples"]] == [9.0, 1.5, 1.0]
    assert [path.name for path in plot(tmp_path, results)] == ["ttft.png", "restore.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


# ---- what is used ----

HUNGRY = """
import os, sys
sys.stdin.readline()
grown = bytearray(200 << 20)
del grown
with open(sys.argv[1], "wb", buffering=0) as file:
    file.write(bytes(8 << 20))
    os.fsync(file)
print("done", flush=True)
sys.stdin.read()
"""


def test_the_most_memory_is_known_though_it_has_been_given_back(tmp_path: Path) -> None:
    """Of a process that a shell has started; its disk's bytes as well. Afterwards the most is forgotten."""
    inner = [sys.executable, "-c", HUNGRY, str(tmp_path / "file")]
    with subprocess.Popen(["sh", "-c", '"$@"; true', "sh", *inner], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        outer = psutil.Process(process.pid)
        first = Meter([outer])
        process.stdin.write(b"begin\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"done\n"
        usage, again = first.read(), Meter([outer]).read()
        process.stdin.close()
    assert 200 << 20 <= usage.memory_nbytes < 400 << 20
    assert 0 < again.memory_nbytes < 100 << 20
    assert usage.disk_written_nbytes == 0 or usage.disk_written_nbytes >= 8 << 20, "0: a file system in memory"
    assert again.disk_written_nbytes == 0
    assert Meter([outer]).read().memory_nbytes == 0, "it has ended"


# ---- how systems are started ----


def test_every_system_gets_the_same_but_for_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the flags of the cache itself, the command lines are equal; and all run in the same CPU mode."""
    from benchmarks.compare import lmcache_environment

    started: list[list[str]] = []

    class Started(Exception):  # noqa: N818
        pass

    def daemon(command: list[str], log: Path, health: str, environment: object = None) -> object:
        started.append(command)
        raise Started

    monkeypatch.setattr(systems, "daemon", daemon)
    monkeypatch.setattr(systems, "free_port", lambda: 12345)
    place = Place(tmp_path, tmp_path, gpu=False, pool_nbytes=1 << 30)
    alone: Sequence[Prepare] = [system.prepare for system in systems.SYSTEMS if "lmcache" not in system.name]
    for prepare in alone[:5]:
        parts = prepare(place, ExitStack())
        with pytest.raises(Started), systems._server(parts, place, 12_000):
            pass
    assert len(started) == 5
    assert all(command[: len(started[0])] == started[0] for command in started)
    assert lmcache_environment.folder() != Path(sys.prefix)


def test_a_system_that_ends_at_the_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    program = "print('loading'); raise RuntimeError('cudaHostRegister failed')"
    with (
        pytest.raises(CannotRunError, match="RuntimeError: cudaHostRegister failed"),
        systems.daemon([sys.executable, "-c", program], tmp_path / "log", "http://127.0.0.1:1/health"),
    ):
        pytest.fail("it never answers")


def test_shared_memory_that_lmcache_leaves_is_removed_once_nobody_has_it() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, used = (Path(f"/dev/shm/lmcache_kv_{number}_0") for number in (ended.pid, os.getpid()))
    try:
        left.touch()
        used.touch()
        systems._remove_segments()
        assert (left.exists(), used.exists()) == (False, True)
    finally:
        used.unlink()


def test_a_system_that_cannot_run_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def get(fleet: bench.Fleet, system: System, pool_tokens: int) -> object:
        tries.append(system.name)
        raise CannotRunError(f"{system.name} is not for CPUs")

    monkeypatch.setattr(bench.Fleet, "get", get)
    arguments = bench.parse_arguments(["--quick", "--rounds", "1", "--workloads", "rag"])
    results = Results(arguments.systems, arguments.workloads, 1)
    fleet = bench.Fleet(results, tmp_path, tmp_path, 1)
    with Progress(disable=True) as progress:
        bench.run(results, fleet, tmp_path, progress)
    assert tries == ["stock", "lmcache-fast", "ours-ssd"]
    assert results.errors["lmcache-fast"] == "lmcache-fast is not for CPUs"
    assert json.loads((tmp_path / "results.json").read_text())["errors"] == results.errors


def has_begun(log: Path) -> bool:
    return log.stat().st_size > 0


def test_a_second_interruption_leaves_no_server(tmp_path: Path) -> None:
    """Real processes that take their time to end, and signals in between."""
    program = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), exit()))\n"
        "print()\nwhile True: signal.pause()"
    )
    fleet = bench.Fleet(Results([], [], 1), tmp_path, tmp_path, 3)
    for number in range(3):
        with ExitStack() as stack:
            log = tmp_path / f"{number}.log"
            command = [sys.executable, "-uc", program]
            stack.enter_context(programs.started(command, partial(has_begun, log), log, Deadline(60)))
            fleet._up["stock", number] = (Running("", systems.Settings([], {}, {}), ()), stack.pop_all())
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    fleet.stop_all()
    assert fleet._up == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [child for child in psutil.Process().children() if program in child.cmdline()]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--systems", "stock,vllm"], "vllm: there is no such system"),
        (["--workloads", "games"], "games: there is no such system or workload"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_is_not_there_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(argv)
    assert words in capsys.readouterr().err


def test_stock_sglang_is_always_among_the_systems() -> None:
    """All ratios are to it."""
    picked = bench.parse_arguments(["--systems", "ours-host"])
    assert [system.name for system in picked.systems] == ["stock", "ours-host"]
    quick = bench.parse_arguments(["--quick"])
    assert [system.name for system in quick.systems] == ["stock", "lmcache-fast", "ours-ssd"]
    assert [work.name for work in quick.workloads] == ["restore-2k", "rag", "chat"]


def test_the_docs_have_every_system_and_every_workload() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in [*(system.name for system in systems.SYSTEMS), *(work.name for work in FULL)]:
        assert f"| `{name}` |" in text


@pytest.mark.server
def test_a_small_run_with_real_servers(tmp_path: Path) -> None:
    """FlexKV is in no package index, so its row is its error; ours restores, and answers what stock does."""
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", "--workloads", "restore-2k", "--rounds", "1"]
    command += ["--systems", "flexkv,ours-ssd", "--model", "tiny", "--alive", "2", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "flexkv does not run here: " in done.stdout
    assert "flexkv" in done.stdout.partition("flexkv does not run here: ")[2]
    written = json.loads((tmp_path / "results.json").read_text())
    stock, ours = written["figures"]["restore-2k"]
    assert (stock["system"], stock["host_tokens"], stock["storage_tokens"]) == ("stock", 0, 0)
    assert stock["computed_tokens"] == stock["prompt_tokens"]
    found = sum(ours[f"{where}_tokens"] for where in ("device", "host", "storage"))
    assert 0.9 * 5 * 1984 < found <= 5 * 1984, "a tiny model lands more at once than may be on its way to the SSD"
    assert ours["storage_tokens"] > 0
    assert "gave no token" not in done.stdout
    assert ours["n_differ"] == 0
    assert ours["memory_nbytes"] > 0
    assert ours["disk_written_nbytes"] > 0
    assert "--radix-cache-backend sgl_lmcache" in done.stdout
    assert (tmp_path / "ttft.png").exists()
