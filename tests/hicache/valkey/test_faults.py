"""A store that fails, hangs, refuses or comes back: misses, told once, tried again from time to time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hicache import TierError
from hicache.breaker import LAST_RETRY_S
from hicache.valkey import Endpoint
from tests.hicache.tier_contract import batch, chain
from tests.hicache.valkey.tiers import Rig, page_names, rig
from tests.support.blackhole import bad_server, hang_up, say, say_nothing
from tests.support.clock import Clock
from tests.support.processes import free_port, wait_for
from tests.support.valkey import StoreServer, store_server

QUICK: dict[str, Any] = {"timeout_s": 0.3, "connect_timeout_s": 0.3}


def load(on: Rig, n_pages: int = 4) -> int:
    """What the engine takes an answer for."""
    try:
        return on.tier.load(batch(n_pages, "a", first_slot=20)).result(timeout=20)
    except TierError:
        return 0


def exists(on: Rig, n_pages: int = 4) -> int:
    try:
        return on.tier.exists(chain(n_pages, "a")[0]).result(timeout=20)
    except TierError:
        return 0


def store(on: Rig, n_pages: int = 4) -> int:
    try:
        return on.tier.store(batch(n_pages, "a")).result(timeout=20)
    except TierError:
        return 0


def comes_back(on: Rig, use: Callable[[Rig], int] = exists, n_pages: int = 4) -> None:
    """Traffic alone brings the store back."""
    wait_for("the store is used again", lambda: use(on) == n_pages or None, 30)


def goes_out(on: Rig) -> None:
    wait_for("the store is given up", lambda: (exists(on), not on.tier.health().available)[1] or None, 10)


def said(caplog: pytest.LogCaptureFixture, what: str) -> int:
    return sum(what in record.getMessage() for record in caplog.records)


def test_a_store_that_is_killed_and_started_again(own_server: StoreServer, caplog: pytest.LogCaptureFixture) -> None:
    with rig(own_server.endpoint(**QUICK)) as on:
        assert store(on) == 4
        own_server.kill()
        goes_out(on)
        assert [load(on), store(on), exists(on)] == [0, 0, 0]
        assert said(caplog, "going on without it") == 1
        own_server.start()
        comes_back(on, store)
        assert load(on) == 4, "it came back empty, and has been given the pages again"
        assert said(caplog, "is used again") == 1
        assert on.tier.stats()["crashes"] == 0


def test_an_idle_connection_that_the_server_has_closed_is_no_failure(own_server: StoreServer) -> None:
    with rig(own_server.endpoint(**QUICK)) as on:
        assert store(on) == 4
        wait_for("the trial at the start is over", lambda: not on.tier._shared.nodes.home.is_on_trial or None, 10)
        client = own_server.client()
        client("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        client.close()
        assert load(on) == 4
        assert on.tier.stats()["read_errors"] == 0
        assert on.tier.health().available


def test_a_store_that_is_stopped_and_goes_on(own_server: StoreServer) -> None:
    with rig(own_server.endpoint(**QUICK)) as on:
        assert store(on) == 4
        own_server.freeze()
        started_s = time.monotonic()
        goes_out(on)
        assert load(on) == 0
        assert time.monotonic() - started_s < 20, "nobody waits for ever"
        own_server.thaw()
        comes_back(on)
        assert load(on) == 4


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (say_nothing, "does not answer"),
        (hang_up, "closed|reset"),
        (say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "was expected"),
        (say(b"$99999999999\r\n"), "was expected|nothing is as long"),
        (say(b"*-1\r\n" * 50), "was expected"),
    ],
    ids=["nothing", "hangs up", "http", "endless", "nonsense"],
)
def test_a_server_that_accepts_and_is_no_store(talk: Callable[[socket.socket], None], reason: str) -> None:
    with bad_server(talk) as server, rig(Endpoint("127.0.0.1", server.port, **QUICK)) as on:
        goes_out(on)
        assert [load(on), store(on), exists(on)] == [0, 0, 0]
        assert any(word in on.tier.health().reason for word in reason.split("|")), on.tier.health().reason
        assert on.tier.stats()["crashes"] == 0


def test_nobody_is_there_and_nobody_storms(caplog: pytest.LogCaptureFixture) -> None:
    """While the store is out its breaker alone decides who asks: one trial at a time, later and later."""
    clock = Clock()
    with bad_server(hang_up) as server, rig(Endpoint("127.0.0.1", server.port, **QUICK), clock=clock) as on:
        goes_out(on)
        n_before = server.n_connections
        for _ in range(1000):
            assert [load(on), store(on), exists(on)] == [0, 0, 0]
        assert server.n_connections == n_before
        for _ in range(100):  # ten minutes
            clock.now_s += 6.0
            exists(on)
            wait_for("the trial has ended", lambda: on.tier.stats()["n_reads_queued"] == 0 or None, 10)
            time.sleep(0.01)
        assert server.n_connections - n_before < 2 * (600 / LAST_RETRY_S) + 10
        assert said(caplog, "going on without it") == 1


def test_a_store_that_is_not_there_at_the_start_is_used_later(tmp_path: Path) -> None:
    port = free_port()
    with rig(Endpoint("127.0.0.1", port, **QUICK)) as on:
        goes_out(on)
        assert "cannot be reached" in on.tier.health().reason
        with store_server(tmp_path / "late", port=port):
            comes_back(on, store)
            assert load(on) == 4


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"])
def test_a_store_at_its_maxmemory(tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--maxmemory", "3mb", "--maxmemory-policy", policy)
    with store_server(tmp_path / "full", *options) as server, rig(server.endpoint(**QUICK)) as on:
        n_stored = sum(on.tier.store(batch(60, f"{path}")).result() for path in range(20))
        stats = on.tier.stats()
        if policy == "noeviction":
            assert stats["skipped_full"] > 0
            assert n_stored < 1200
            assert said(caplog, "takes no more pages") == 1
            assert on.tier.health().available, "what it has can still be read"
        else:
            assert n_stored == 1200
            assert stats["skipped_full"] == 0
        assert stats["write_errors"] == 0
        for path in range(20):
            keys = chain(60, f"{path}")[0]
            n_found = on.tier.exists(keys).result()
            assert on.tier.load(batch(60, f"{path}")).result() <= max(n_found, 60)
        assert on.tier.stats()["read_errors"] == 0
        assert on.tier.stats()["corrupt"] == 0


def test_a_full_store_is_filled_again_when_it_has_room(tmp_path: Path) -> None:
    with store_server(tmp_path / "full", "--maxmemory", "3mb") as server, rig(server.endpoint(**QUICK)) as on:
        for path in range(20):
            on.tier.store(batch(60, f"{path}")).result()
        assert store(on) < 4
        client = server.client()
        client("FLUSHALL")
        client.close()
        comes_back(on, store)
        assert load(on) == 4


USERS = {
    "password": ("--requirepass", "secret"),
    "reader": ("--user", "reader", "on", ">secret", "~sgl-lmcache:*", "+@all", "-set"),
    "blind": ("--user", "blind", "on", ">secret", "~sgl-lmcache:*", "+@all", "-getex"),
    "elsewhere": ("--user", "elsewhere", "on", ">secret", "~other:*", "+@all"),
}


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ("password", {"password": "wrong"}, "refuses the user or the password"),
        ("password", {}, "refuses EXISTS: NOAUTH|wants a password"),
        ("reader", {"username": "reader", "password": "secret"}, "refuses SET: NOPERM"),
        ("blind", {"username": "blind", "password": "secret"}, "refuses GETEX: NOPERM"),
        ("elsewhere", {"username": "elsewhere", "password": "secret"}, "refuses EXISTS: NOPERM"),
        ("password", {"password": "secret", "db": 99}, "has no such database"),
    ],
)
def test_a_wrong_password_or_a_missing_right_is_told_in_a_sentence_and_once(
    tmp_path: Path, options: str, settings: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        store_server(tmp_path / "guarded", *USERS[options]) as server,
        rig(server.endpoint(**QUICK, **settings)) as on,
    ):
        wait_for("it is told", lambda: said(caplog, "going on without it") or None, 10)
        for _ in range(20):
            assert load(on) == 0
            assert store(on) == 0
        assert any(word in caplog.text for word in reason.split("|")), caplog.text
        assert said(caplog, "going on without it") == 1
        assert "secret" not in caplog.text
        assert "wrong" not in caplog.text.replace("WRONGPASS", "")
        assert on.tier.stats()["crashes"] == 0


def test_a_user_with_just_the_rights_that_are_documented_can_do_everything(tmp_path: Path) -> None:
    rights = "cache on >secret ~sgl-lmcache:* +exists +getex +set +expire +unlink +select"
    with (
        store_server(tmp_path / "guarded", "--user", *rights.split()) as server,
        rig(server.endpoint(username="cache", password="secret", db=3)) as on,
    ):
        assert store(on) == 4
        assert load(on) == 4
        assert on.tier.delete(chain(4, "a")[0]).result() == 4


def test_what_is_under_way_when_the_tier_closes_ends(own_server: StoreServer) -> None:
    with rig(own_server.endpoint(**QUICK)) as on:
        own_server.freeze()
        futures = [on.tier.load(batch(4, f"{i}", first_slot=4 * i)) for i in range(10)]
        on.tier.close()
        assert all(future.done() for future in futures)
        own_server.thaw()
        assert on.tier.exists(page_names(chain(1, "a")[0])[0][:32]).result() == 0, "closed"


def test_a_password_is_not_repeated_from_what_a_server_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that does not know AUTH repeats its arguments."""
    with (
        store_server(tmp_path / "old", "--rename-command", "AUTH", "") as server,
        rig(server.endpoint(**QUICK, username="cache", password="TOPSECRET")) as on,
    ):
        goes_out(on)
        assert "AUTH" in caplog.text
        assert "TOPSECRET" not in caplog.text + on.tier.health().reason


def test_a_host_that_cannot_be_one_is_told_like_one_that_is_not_there() -> None:
    with rig(Endpoint("kv..example", 6379, **QUICK)) as on:
        goes_out(on)
        assert "cannot be reached" in on.tier.health().reason
        assert on.tier.stats()["crashes"] == 0


def test_what_was_not_asked_for_is_not_taken_for_an_answer(own_server: StoreServer) -> None:
    """A stray line would shift all answers behind it, and sound pages would be taken for damaged ones."""
    upstream = own_server.port

    def relay(connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", upstream)) as store:
            threading.Thread(target=pump, args=(connection, store), daemon=True).start()
            n_answers = 0
            while answer := store.recv(1 << 16):
                n_answers += 1
                connection.sendall(answer)
                if n_answers == 12:
                    connection.sendall(b"$-1\r\n")

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 16):
                target.sendall(part)

    with bad_server(relay) as proxy, rig(Endpoint("127.0.0.1", proxy.port, **QUICK), n_connections=1) as on:
        assert store(on, 10) == 10
        for _ in range(20):
            assert load(on, 10) == 10
        assert on.tier.stats()["corrupt"] == 0
    with rig(own_server.endpoint()) as on:
        assert exists(on, 10) == 10


def test_a_call_that_goes_on_and_on_ends_when_the_tier_closes(own_server: StoreServer) -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b":1\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    with bad_server(drip) as server, rig(Endpoint("127.0.0.1", server.port, timeout_s=30)) as on:
        future = on.tier.load(batch(4, "a", first_slot=8))
        on.tier._call_s = 0.3
        on.tier.close()
        assert future.done(), "nobody writes to the slots any more"


def test_a_refused_reading_is_told_before_a_refused_writing(tmp_path: Path) -> None:
    neither = ("--user", "neither", "on", ">secret", "~sgl-lmcache:*", "+@all", "-set", "-getex")
    with (
        store_server(tmp_path / "guarded", *neither) as server,
        rig(server.endpoint(**QUICK, username="neither", password="secret")) as on,
    ):
        goes_out(on)
        assert "refuses GETEX" in on.tier.health().reason
