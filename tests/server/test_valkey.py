"""Servers that share a Valkey: what one has computed the other loads, and what becomes of requests while it fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, at_tp, check_at_rest, running
from tests.server.sharing import BATCHED, LEAST_SHARE, check_that_servers_share, share_from_storage
from tests.server.traffic import Prompt, Tolerance, prompt, reusable
from tests.support.blackhole import bad_server, say_nothing
from tests.support.server import ANSWER_TIMEOUT_S, Answer, Server, Setup, wait_for
from tests.support.valkey import StoreServer, store_server

pytestmark = pytest.mark.server

PREFETCH_TIMEOUT_S = 3
N_CLIENTS = 16

N_DOCUMENTS = 60
"""Several times more than HBM and host memory hold."""


def valkey_setup(
    store: StoreServer, name: str, *, host: str = "24MiB", more: str = "", ssd: Path | None = None
) -> Setup:
    below = f"- {{type: ssd, path: {ssd}, capacity: 256MiB}}" if ssd else ""
    config = f"""
        tiers:
          - {{type: host, capacity: {host}}}
          {below}
          - {{type: valkey, url: "valkey://127.0.0.1:{store.port}", timeout: 1s {more}}}
        prefetch: {{policy: wait, timeout: {PREFETCH_TIMEOUT_S}s}}
    """
    return Setup(name, (*ARGUMENTS, "--enable-metrics"), config=config)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    with store_server(tmp_path / "valkey") as server:
        yield server


# ---- two servers ----


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_second_server_answers_from_what_the_first_has_computed(
    fleet: Fleet, store: StoreServer, tmp_path: Path, n_ranks: int
) -> None:
    check_that_servers_share(
        fleet, [at_tp(valkey_setup(store, name), n_ranks) for name in ("first", "second")], tmp_path
    )


def test_a_tenant_is_never_served_what_another_has_stored(fleet: Fleet, store: StoreServer, tmp_path: Path) -> None:
    """On any tier: A's pages lie in HBM, host memory, SSD and Valkey of the one server, and B asks both."""
    tokens = prompt("tenants", 1000)
    with running(fleet, valkey_setup(store, "first", ssd=tmp_path / "ssd"), tmp_path / "first") as first:
        first.generate(tokens, cache_salt="a")
        check_at_rest(first)
        assert first.generate(tokens, cache_salt="b").cached_tokens == 0, "HBM"
        first.at_rest()
        first.flush()
        own = first.generate(tokens, cache_salt="a")
        assert own.storage_tokens == reusable(tokens), "SSD and Valkey have it"
        assert first.generate(tokens, cache_salt="c").cached_tokens == 0, "HBM, host memory, SSD, Valkey"
        assert first.generate(tokens).cached_tokens == 0
        check_at_rest(first)
    with running(fleet, valkey_setup(store, "second"), tmp_path / "second") as second:
        assert second.generate(tokens, cache_salt="d").cached_tokens == 0, "Valkey"
        assert second.generate(tokens).storage_tokens == reusable(tokens), "its own, by the first server"
        assert second.generate(tokens, cache_salt="a").storage_tokens == reusable(tokens)
        check_at_rest(second)


def test_what_ssd_lacks_comes_from_valkey(fleet: Fleet, store: StoreServer, tmp_path: Path) -> None:
    tokens = prompt("both", 1600)
    with running(fleet, valkey_setup(store, "first"), tmp_path / "first") as first:
        cold = first.generate(tokens)
        check_at_rest(first)
    with running(fleet, valkey_setup(store, "second", ssd=tmp_path / "ssd"), tmp_path / "second") as second:
        assert second.generate(tokens[:800], 1).storage_tokens == reusable(tokens[:800])
        second.at_rest()
        second.flush()

        def loaded(tier: str) -> float:
            return second.metrics().get(f'sgl_lmcache_loaded_pages_total{{tier="{tier}"}}', 0.0)

        n_first, n_pages = reusable(tokens[:800]) // 16, reusable(tokens) // 16
        wait_for("it is counted", lambda: loaded("valkey") == n_first or None, ANSWER_TIMEOUT_S)
        hit = second.generate(tokens)
        assert hit.storage_tokens == reusable(tokens)
        Tolerance(0.0).check(hit, cold)
        second.at_rest()
        wait_for(
            "it is counted", lambda: loaded("ssd") + loaded("valkey") == n_first + n_pages or None, ANSWER_TIMEOUT_S
        )
        assert loaded("ssd") >= n_first, "the SSD loads what it has, and Valkey the rest"
        check_at_rest(second)


# ---- a store that fails under load ----


@dataclass
class Load:
    """Documents that clients ask for at random. `expected`: the first answer to each, which was asked for alone."""

    server: Server
    documents: list[Prompt]
    expected: dict[int, Answer] = field(default_factory=dict)

    def run(self, n_requests: int, seed: object, then: Callable[[], None] | None = None) -> list[Answer]:
        """then: called when a quarter of the answers is there."""
        chance = random.Random(str(seed))
        chosen = [chance.randrange(len(self.documents)) for _ in range(n_requests)]
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            futures = [clients.submit(self.ask, document) for document in chosen]
            if then is not None:
                wait_for(
                    "some answers", lambda: sum(f.done() for f in futures) * 4 >= n_requests or None, ANSWER_TIMEOUT_S
                )
                then()
            return [future.result() for future in futures]

    def ask_each(self) -> None:
        """One after another: host memory is small, and what it cannot hand down at once is skipped."""
        for document in range(len(self.documents)):
            self.ask(document)

    def ask(self, document: int) -> Answer:
        answer = self.server.generate(self.documents[document], 2)
        assert answer.finish_reason == "length"
        BATCHED.check(answer, self.expected.setdefault(document, answer))
        return answer


@pytest.fixture(scope="module")
def common_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@contextmanager
def killed(store: StoreServer) -> Iterator[None]:
    store.kill()
    yield
    store.start()


@contextmanager
def stopped(store: StoreServer) -> Iterator[None]:
    store.freeze()
    yield
    store.thaw()


@contextmanager
def restarted(store: StoreServer) -> Iterator[None]:
    store.kill()
    store.start()
    yield


@contextmanager
def blackholed(store: StoreServer) -> Iterator[None]:
    store.kill()
    with bad_server(say_nothing, store.port):
        yield
    store.start()


@pytest.mark.parametrize("failure", [killed, stopped, restarted, blackholed], ids=lambda failure: failure.__name__)
def test_requests_under_load_while_valkey_fails(fleet: Fleet, common_store: StoreServer, failure: Callable) -> None:  # type: ignore[type-arg]
    server = fleet.get(valkey_setup(common_store, "under-load", host="12MiB"))
    load = Load(server, [prompt((failure.__name__, number), 500) for number in range(N_DOCUMENTS)])

    def serves() -> bool | None:
        """What is computed fills it; it may have come back empty, or have been given up for a moment."""
        load.ask_each()
        server.at_rest()
        return share_from_storage(load.run(48, time.monotonic())) >= LEAST_SHARE or None

    wait_for("Valkey is used", serves, ANSWER_TIMEOUT_S)
    cold_s = _cold_s(server, failure.__name__)
    with ExitStack() as stack:
        load.run(64, "during", then=lambda: stack.enter_context(failure(common_store)))
        began_s = time.monotonic()
        load.run(N_CLIENTS, "at once")
        assert time.monotonic() - began_s < PREFETCH_TIMEOUT_S + 10 * cold_s, "later than deadline and recompute"

    wait_for("Valkey is used again", serves, ANSWER_TIMEOUT_S)
    check_at_rest(server)


def _cold_s(server: Server, seed: object) -> float:
    """How long as many prompts that nobody knows take at once."""
    began_s = time.monotonic()
    server.generate_all([prompt((seed, "cold", number), 500) for number in range(N_CLIENTS)], 2)
    return time.monotonic() - began_s
