"""The servers that tests share. Each costs half a minute of two cores, so there are few, and two live at a time.

An idle scheduler spins. So that it takes no core from a server that starts, or from one that a test has to itself, the
others rest meanwhile: their processes are stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from msgspec import structs

from tests.server.traffic import N_HBM_TOKENS, PAGE_SIZE, Tolerance, greatest_gap, prompt, reusable
from tests.support.server import START_TIMEOUT_S, STOP_TIMEOUT_S, Inspection, Server, Setup, wait_for

MAX_ALIVE = 2

ARGUMENTS = (
    *("--page-size", str(PAGE_SIZE)),
    *("--max-total-tokens", str(N_HBM_TOKENS)),
    *("--chunked-prefill-size", "512"),
    *("--schedule-conservativeness", "0.3"),  # admits what may outgrow HBM, so that SGLang has to retract
    "--enable-cache-report",
)

CACHED = Setup("cached", ARGUMENTS, config="tiers: [{type: host, capacity: 24MiB}]\n")
"""Host memory of 768 pages, three times what HBM has. Its scheduler spins when idle, as in production."""

PLAIN = Setup("plain", (*ARGUMENTS, "--sleep-on-idle"), cached=False)


def at_tp(setup: Setup, n_ranks: int) -> Setup:
    """The same with the model's heads shared out over so many ranks."""
    if n_ranks == 1:
        return setup
    arguments = (*setup.arguments, "--tp", str(n_ranks))
    return replace(setup, name=f"{setup.name}-tp{n_ranks}", arguments=arguments, n_ranks=n_ranks)


class Fleet:
    """Servers by their setup, started when first asked for; the one asked for least recently makes room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_started = 0
        self._servers: dict[str, Server] = {}
        self._resting: set[str] = set()

    def get(self, setup: Setup) -> Server:
        self._drop_dead()
        server = self._servers.pop(setup.name, None)
        if server is None:
            self.make_room()
            self._n_started += 1
            with ExitStack() as stack:
                for name in self._servers.keys() - self._resting:
                    stack.enter_context(self._servers[name].processes.frozen())
                server = Server(setup, self._folder / f"{self._n_started}-{setup.name}").__enter__()
        elif setup.name in self._resting:
            self._resting.remove(setup.name)
            server.processes.thaw()
        self._servers[setup.name] = server
        server.check_alive()
        return server

    def _drop_dead(self) -> None:
        """The test that has seen a server die has failed; those after it need not."""
        for name, server in tuple(self._servers.items()):
            if not server.is_alive:
                self._stop(name)

    def make_room(self) -> None:
        """For one more server."""
        while len(self._servers) >= MAX_ALIVE:
            self._stop(next(iter(self._servers)))

    def rest(self) -> None:
        """Make room for a server of the caller's own. The others rest until they are asked for again."""
        self._drop_dead()
        self.make_room()
        for name in self._servers.keys() - self._resting:
            self._resting.add(name)
            self._servers[name].processes.freeze()

    def stop(self) -> None:
        for name in tuple(self._servers):
            self._stop(name)

    def _stop(self, name: str) -> None:
        self._resting.discard(name)
        self._servers.pop(name).stop()


@contextmanager
def running(fleet: Fleet, setup: Setup, folder: Path) -> Iterator[Server]:
    """A server of the caller's own."""
    fleet.rest()
    with Server(setup, folder) as server:
        yield server


@contextmanager
def running_together(fleet: Fleet, setups: Sequence[Setup], folder: Path) -> Iterator[list[Server]]:
    """Servers of the caller's own, started at the same time, as a start keeps one core busy for half of it."""
    fleet.rest()
    servers = [Server(setup, folder / setup.name) for setup in setups]
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as threads:
        for server in servers:
            stack.callback(server.stop)
        yield list(threads.map(Server.__enter__, servers))


def check_does_not_start(fleet: Fleet, setup: Setup, folder: Path, sentence: str) -> None:
    """It ends by itself, leaves no process, and has written the sentence, a regular expression, into its log."""
    fleet.rest()
    server = Server(setup, folder)
    with server.launch() as processes:
        assert processes.wait(START_TIMEOUT_S) != 0
        wait_for("all its processes have ended", lambda: not processes.members() or None, STOP_TIMEOUT_S)
        assert re.search(sentence, processes.log()), processes.log_tail()
        assert "The server is fired up" not in processes.log()
    server.stop()


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("servers"))
    try:
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="session", params=[1, 2], ids=["tp1", "tp2"])
def n_ranks(request: pytest.FixtureRequest) -> int:
    """Of the servers that a test uses. Of the session, so that all tests with as many ranks come one after another."""
    return int(request.param)


@pytest.fixture
def cached(fleet: Fleet, n_ranks: int) -> Iterator[Server]:
    """The server under test, empty. Whatever a test does, it has to leave it whole."""
    server = fleet.get(at_tp(CACHED, n_ranks))
    server.flush()
    yield server
    check_at_rest(server)


@pytest.fixture
def plain(fleet: Fleet, n_ranks: int) -> Server:
    """Stock SGLang with the same arguments, empty."""
    server = fleet.get(at_tp(PLAIN, n_ranks))
    server.flush()
    return server


@dataclass(frozen=True)
class Tolerances:
    """How far stock SGLang is from itself: `alone` one request after another, `batched` with others at once."""

    alone: Tolerance
    batched: Tolerance


@pytest.fixture(scope="package")
def tolerances(fleet: Fleet, n_ranks: int) -> Tolerances:
    """Measured on stock SGLang. Alone, a hit in HBM is compared with the cold answer.

    In a batch a row of a matrix product may be summed in another order, and the batch's make-up is a matter of timing.
    What is measured is the greatest of a sample, which another sample may well exceed: hence three times that.
    """
    server = fleet.get(at_tp(PLAIN, n_ranks))
    prompts = [prompt(("tolerance", number), 100 + 31 * number) for number in range(16)]
    server.flush()
    cold = server.generate_all(prompts, 12, n_at_once=1)
    hot = []
    for tokens in prompts:
        server.flush()
        server.generate(tokens, 1)
        hot.append(server.generate(tokens, 12))
    batched = 0.0
    for n_at_once in (2, 5, 16) * 2:
        server.flush()
        batched = max(batched, greatest_gap(server.generate_all(prompts, 12, n_at_once=n_at_once), cold))
    assert all(answer.cached_tokens == 0 for answer in cold)
    assert all(answer.cached_tokens == reusable(tokens) for tokens, answer in zip(prompts, hot, strict=True))
    return Tolerances(Tolerance(greatest_gap(hot, cold)), Tolerance(3 * batched))


def check_at_rest(server: Server) -> Inspection:
    """Nothing under way, nothing broken, nothing leaked, and the index knows exactly what SGLang's tree holds.

    On every rank, and all ranks hold the same in the same slots.
    """
    ranks = server.ranks_at_rest()
    for seen in ranks:
        _check_whole(seen)
        assert not seen.tainted
        assert _common(seen) == _common(ranks[0])
    return ranks[0]


def _common(seen: Inspection) -> Inspection:
    """What all ranks have to agree on."""
    return structs.replace(seen, namespace="", n_delays=0, loop={}, tier={})


def _check_whole(seen: Inspection) -> None:
    assert seen.violation is None
    assert seen.first_violation is None
    assert seen.n_checks > 0
    assert seen.mismatched == 0
    assert seen.host["leases"] == 0
    assert seen.host["incoming"] == 0
    assert seen.host["free"] + seen.host["resident"] == seen.host["capacity"]
    assert seen.hbm["available"] + seen.hbm["evictable"] == seen.hbm["total"]
    assert seen.mirror["tree"] == seen.mirror["index"] == seen.hbm["evictable"] // PAGE_SIZE
    assert (seen.mirror["tree_unknown"], seen.mirror["tree_only"], seen.mirror["index_only"]) == (0, 0, 0)
