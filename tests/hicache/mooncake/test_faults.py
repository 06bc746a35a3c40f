"""A pool that fails, hangs, refuses or comes back: misses, told once, tried again from time to time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hicache import TierError
from hicache.breaker import FIRST_RETRY_S
from hicache.mooncake import Pool, UnusableError, process
from tests.hicache.mooncake.tiers import Rig, open_tier, random_slab, rig
from tests.hicache.tier_contract import batch, chain
from tests.support.mooncake import Master
from tests.support.processes import freeze, wait_for

ANSWER_TIMEOUT_S = 70.0
RECOVERY_TIMEOUT_S = 60.0


def settled(future: Future[int]) -> int:
    """What the engine takes an answer for."""
    try:
        return future.result(timeout=ANSWER_TIMEOUT_S)
    except TierError:
        return 0


def load(on: Rig, seed: str = "a", n_pages: int = 4, first_slot: int = 20) -> int:
    return settled(on.tier.load(batch(n_pages, seed, first_slot=first_slot)))


def exists(on: Rig, seed: str = "a", n_pages: int = 4) -> int:
    return settled(on.tier.exists(chain(n_pages, seed)[0]))


def store(on: Rig, seed: str = "a", n_pages: int = 4) -> int:
    return settled(on.tier.store(batch(n_pages, seed)))


def said(caplog: pytest.LogCaptureFixture, what: str) -> int:
    return sum(what in record.getMessage() for record in caplog.records)


def client_of(on: Rig) -> int:
    """Its process number."""
    client = on.tier._shared.process
    assert client is not None
    return client.pid


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def comes_back(on: Rig, seed: str) -> None:
    """Traffic alone brings the pool back."""
    wait_for("the pool is used again", lambda: store(on, seed) == 4 or None, RECOVERY_TIMEOUT_S)


# ---- the master ----


def test_a_master_that_is_killed_and_comes_back_empty(own_master: Master, caplog: pytest.LogCaptureFixture) -> None:
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        own_master.kill()
        wait_for("it is given up", lambda: (exists(on), not on.tier.health().available)[1] or None, RECOVERY_TIMEOUT_S)
        assert [load(on), store(on), exists(on)] == [0, 0, 0]
        assert "master that cannot be reached" in on.tier.health().reason
        assert said(caplog, "going on without it") == 1
        own_master.start()
        comes_back(on, "b")
        assert load(on) == 0, "it has forgotten all"
        assert load(on, "b") == 4
        assert np.array_equal(on.slab[20:24], on.slab[:4])
        assert said(caplog, "is used again") == 1
        assert on.tier.stats()["crashes"] == 0
        assert on.tier.stats()["restarts"] == 0, "the client has joined the new pool by itself"


def test_a_master_that_hangs_costs_one_time_out(own_master: Master) -> None:
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        own_master.freeze()
        assert exists(on) == 0
        wait_for("it is given up", lambda: not on.tier.health().available or None, ANSWER_TIMEOUT_S)
        assert all(on.tier.exists(chain(4, "a")[0]).done() for _ in range(100)), "nobody waits for it meanwhile"
        own_master.thaw()
        comes_back(on, "b")


def test_nobody_is_there_at_the_start(own_master: Master, caplog: pytest.LogCaptureFixture) -> None:
    own_master.kill()
    with rig(own_master.pool(), joined=False) as on:
        assert not on.tier.health().available
        assert [store(on), load(on), exists(on)] == [0, 0, 0]
        wait_for("it is told", lambda: said(caplog, "cannot be joined") or None, RECOVERY_TIMEOUT_S)
        own_master.start()
        comes_back(on, "a")
        assert load(on) == 4


# ---- another node ----


def test_a_node_that_is_killed_takes_its_pages_with_it(own_master: Master, caplog: pytest.LogCaptureFixture) -> None:
    with rig(own_master.pool()) as here, rig(own_master.pool()) as there:
        assert store(there) == 4
        assert load(here) == 4
        os.kill(client_of(there), signal.SIGKILL)
        here.slab[20:24] = 0
        assert load(here) == 0
        assert exists(here) == 0, "the master still names the node, which is not asked again at once"
        assert said(caplog, "does not answer: its pages are misses for a while") == 1
        assert here.tier.health().available, "the others are there"
        wait_for("stores go elsewhere", lambda: store(here, "b") == 4 or None, RECOVERY_TIMEOUT_S)
        assert load(here, "b") == 4
        comes_back(there, "c")
        assert there.tier.stats()["restarts"] == 1
        wait_for("its new pages are read", lambda: load(here, "c") == 4 or None, RECOVERY_TIMEOUT_S)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_what_a_silent_node_sends_later_never_reaches_a_slot(
    own_master: Master, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Mooncake leaves transfers behind when it gives a call up, which write into slots that others have by then.

    A node that has been talked to before times out; for the greeting of one that has not, Mooncake waits for ever, and
    the client process is killed.
    """
    if not is_known:
        monkeypatch.setattr(process, "KILL_AFTER_S", 10.0)
    n_pages = 96
    with rig(own_master.pool(), random_slab(2 * n_pages, 256 << 10)) as here:
        with rig(own_master.pool(), random_slab(n_pages, 256 << 10)) as there:
            assert store(there, "a", n_pages) == n_pages
            if is_known:
                assert load(here, "a", 4, n_pages) == 4
            with frozen(client_of(there)):
                loading = here.tier.load(batch(n_pages, "a", first_slot=n_pages))
                time.sleep(3 * here.tier._shared.pool.timeout_s)
                assert all(here.tier.exists(chain(4, "a")[0]).done() for _ in range(100)), "nobody waits meanwhile"
                n_loaded = settled(loading)
                assert n_loaded < n_pages
                here.slab[n_pages:] = 77  # the future is done: the slots are somebody else's now
            time.sleep(1.0)
            assert np.all(here.slab[n_pages:] == 77)
            assert here.tier.stats()["crashes"] == 0
        stats = here.tier.stats()
        assert (stats["unread"] + stats["missed"] > 0) == is_known, "or the master has given the node up meanwhile"
        comes_back(here, "b")
        assert here.tier.stats()["restarts"] == (0 if is_known else 1)


# ---- the client process ----


def test_a_client_process_that_is_killed_is_started_again(own_master: Master, caplog: pytest.LogCaptureFixture) -> None:
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        os.kill(client_of(on), signal.SIGKILL)
        assert load(on) == 0
        assert said(caplog, "has lost its client process") == 1
        comes_back(on, "b")
        assert load(on, "b") == 4
        assert on.tier.stats()["restarts"] == 1


def test_a_client_process_that_hangs_is_killed_before_the_slots_are_given_back(
    own_master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "KILL_AFTER_S", 4.0)
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        hung = client_of(on)
        freeze(hung)
        loading = on.tier.load(batch(4, "a", first_slot=20))
        wait_for("it is taken for hung", lambda: "hangs" in on.tier.health().reason or None, ANSWER_TIMEOUT_S)
        assert not loading.done()
        assert on.tier.exists(chain(4, "a")[0]).done(), "nobody waits for it meanwhile"
        assert settled(loading) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)
        comes_back(on, "b")
        assert load(on, "b") == 4


def test_closing_while_the_client_process_hangs_ends_it(own_master: Master) -> None:
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        hung = client_of(on)
        freeze(hung)
        loading = on.tier.load(batch(4, "a", first_slot=20))
        on.tier.close()
        assert settled(loading) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)


def test_the_client_process_ends_with_its_rank(own_master: Master) -> None:
    with rig(own_master.pool()) as on:
        client = client_of(on)
    with pytest.raises(ProcessLookupError):
        os.kill(client, 0)


def test_the_client_process_ends_with_a_server_that_is_killed_in_the_middle_of_a_call(own_master: Master) -> None:
    """Also if none of its threads waits for the server: each is in a call to a node that says nothing."""
    with rig(own_master.pool(), random_slab(64, 4096)) as there:
        assert store(there, "a", 64) == 64
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, own_master.pool().master],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdin is not None
        assert server.stdout is not None
        client = int(server.stdout.readline())
        with frozen(client_of(there)):
            server.stdin.write("load\n")
            server.stdin.flush()
            assert server.stdout.readline() == "loading\n"
            server.kill()
            server.communicate()
            wait_for("the client has ended", lambda: not Path(f"/proc/{client}").exists() or None, RECOVERY_TIMEOUT_S)


_SERVER = """
import sys, time
from hicache.mooncake import Pool
from tests.hicache.mooncake.tiers import join, open_tier, random_slab
from tests.hicache.tier_contract import batch
tier = join(open_tier(Pool(sys.argv[1], address="127.0.0.1", timeout_s=1.0), random_slab(64, 4096)))
print(tier._shared.process.pid, flush=True)
sys.stdin.readline()
for at in range(4):
    tier.load(batch(64, "a"))
time.sleep(0.5)
print("loading", flush=True)
time.sleep(600)
"""
"""A server that asks a node that it has never talked to."""


def test_an_answer_after_a_pause_of_everybody_is_not_believed(
    own_master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile Mooncake may have given the call up: its transfers would go on."""
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        client = client_of(on)
        times = iter([0.0, process.KILL_AFTER_S + 1])
        monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: next(times)))
        assert load(on) == 0
        monkeypatch.undo()
        assert not Path(f"/proc/{client}").exists()
        comes_back(on, "b")


def test_a_process_that_ends_just_when_it_has_joined_is_started_again(own_master: Master) -> None:
    with rig(own_master.pool()) as on:
        shared = on.tier._shared
        shared.lost(shared.process)  # by a call of before; then the trial closes the breaker
        assert not shared.reads.is_open
        assert not shared.is_joined
        comes_back(on, "a")


def test_many_calls_that_meet_the_end_of_the_process_are_one_failure(own_master: Master) -> None:
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        freeze(client_of(on))
        futures = [on.tier.load(batch(4, "a", first_slot=20)) for _ in range(8)]
        os.kill(client_of(on), signal.SIGKILL)
        assert [settled(future) for future in futures] == [0] * 8
        assert on.tier._shared.reads._pause_s == FIRST_RETRY_S, "the next trial is not put off"
        assert on.tier.stats()["crashes"] == 0
        comes_back(on, "b")


def test_stores_do_not_wait_for_a_silent_node_in_turn(own_master: Master) -> None:
    with rig(own_master.pool(segment_nbytes=0)) as here, rig(own_master.pool()) as there:
        assert store(here) == 4, "in the other's segment"
        with frozen(client_of(there)):
            futures = [here.tier.store(batch(40, seed)) for seed in "bcd"]
            assert [settled(future) for future in futures] == [0, 0, 0]
            assert here.tier.stats()["restarts"] == 0
            assert "did not take pages" in here.tier.health().reason
        wait_for("stores go on", lambda: store(here, "e") == 4 or None, RECOVERY_TIMEOUT_S)


def test_a_bug_in_the_client_process_is_a_miss(own_master: Master) -> None:
    """A message that it cannot know."""
    with rig(own_master.pool()) as on:
        assert store(on) == 4
        client = on.tier._shared.process
        assert client is not None
        connection = client._idle.popleft()
        connection.send(b"\xc1")
        assert connection.recv(10) == b"", "it has ended, and its connections with it"
        connection.close()
        assert load(on) == 0
        comes_back(on, "b")


@pytest.mark.parametrize("missing", ["No module named 'mooncake'", "libibverbs.so.1: cannot open shared object file"])
def test_a_library_that_cannot_be_loaded_is_told_at_the_start(
    own_master: Master, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise ImportError({missing!r})\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    memory = random_slab()
    with pytest.raises(UnusableError, match=missing):
        open_tier(own_master.pool(), memory)
    memory.close()


# ---- room ----


def test_a_pool_that_is_full_evicts_and_what_it_refuses_is_counted(own_master: Master) -> None:
    """Four times more than the segment holds: the master evicts what nobody has looked up lately."""
    with rig(own_master.pool(segment_nbytes=16 << 20), random_slab(64, 256 << 10)) as on:
        for n in range(4):
            store(on, f"s{n}", 64)
        stats = on.tier.stats()
        assert stats["skipped_full"] > 0
        assert stats["write_errors"] == 0
        assert on.tier.health().available

        def stored_again() -> bool | None:
            return store(on, f"again {time.monotonic()}", 1) == 1 or None

        wait_for("leases have run out, and there is room again", stored_again, RECOVERY_TIMEOUT_S)


def test_a_pool_without_a_segment_takes_nothing(own_master: Master) -> None:
    with rig(own_master.pool(segment_nbytes=0)) as on:
        assert store(on) == 0
        assert on.tier.stats()["skipped_full"] == 4
        assert on.tier.health().available


def test_a_page_that_is_gone_when_it_is_loaded_is_a_miss(own_master: Master) -> None:
    with rig(own_master.pool()) as on, rig(own_master.pool(segment_nbytes=0)) as other:
        assert store(on) == 4
        assert exists(other) == 4
        assert settled(on.tier.delete(chain(4, "a")[0][2 * 32 : 3 * 32])) == 1
        assert load(other) == 2
        assert other.tier.stats()["missed"] == 1


def test_more_copies_than_nodes_are_no_error(own_master: Master) -> None:
    with rig(own_master.pool(replicas=2)) as here, rig(own_master.pool(replicas=2)) as there:
        assert store(here) == 4
        assert load(there) == 4


def test_soft_pins_are_taken(own_master: Master) -> None:
    with rig(own_master.pool(soft_pin_s=60.0)) as on:
        assert store(on) == 4
        assert load(on) == 4


def test_queued_stores_are_bounded(own_master: Master) -> None:
    with rig(own_master.pool(), max_queued_nbytes=2 * 4096) as on:
        assert store(on) == 2
        assert on.tier.stats()["skipped_pressure"] == 2
        assert on.tier.stats()["queued_nbytes"] == 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"protocol": "nonsense"}, "cannot be joined"), ({"master": "no-such-host.invalid:1", "address": None}, "no way")],
)
def test_a_pool_that_cannot_be_joined_is_told(
    own_master: Master, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], says: str
) -> None:
    pool: Pool = own_master.pool(**changed)
    with rig(pool, joined=False) as on:
        wait_for("it is told", lambda: said(caplog, says) or None, RECOVERY_TIMEOUT_S)
        assert [store(on), load(on), exists(on)] == [0, 0, 0]
