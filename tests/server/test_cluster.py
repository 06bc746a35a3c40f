"""Three nodes with one pool, each in a network namespace: what becomes of requests when a node, the master or the
network between them fails."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from sgl_lmcache.mooncake_master import METRICS_PORT
from tests.server.conftest import ARGUMENTS, Fleet, check_at_rest
from tests.server.sharing import BATCHED, LEAST_SHARE, share_from_storage
from tests.server.traffic import Prompt, Tolerance, prompt, reusable
from tests.support.proxy import CALM, Proxy, Route, Trouble
from tests.support.server import ANSWER_TIMEOUT_S, Answer, Server, Setup, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cluster as script  # noqa: E402
from cluster import Cluster  # noqa: E402
from cluster_network import Place, why_not  # noqa: E402

pytestmark = pytest.mark.server

N_NODES = 3
N_PORTS = 24
"""Among which a node chooses the two that it listens on, so that a proxy can listen on all of them."""

PREFETCH_TIMEOUT_S = 3
SEGMENT_NBYTES = 128 << 20
TEMPLATE = {
    "tiers": [
        {"type": "host", "capacity": "12MiB"},
        {"type": "mooncake", "master": "nowhere:50051", "segment": SEGMENT_NBYTES, "timeout": "1s"},
    ],
    "prefetch": {"policy": "wait", "timeout": f"{PREFETCH_TIMEOUT_S}s"},
}
"""Host memory of 384 pages."""

N_TOKENS = 600
N_CLIENTS = 6
N_DOCUMENTS = 60
"""Together several times more than HBM and host memory of a node hold."""

N_REQUESTS = 100

TROUBLE = Trouble(delayed=0.2, delay_s=(0.001, 0.03), stalled=0.002, stall_s=(0.5, 3.0), reset=0.002)


class Pool:
    """The nodes' servers, by number from 0. A node or the master may be killed; `heal` brings all back."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self._folder = folder
        self._starts = itertools.count(1)
        self._servers: list[Server | None] = [None] * N_NODES

    def __getitem__(self, number: int) -> Server:
        server = self._servers[number]
        assert server is not None, f"node {number} is not running"
        return server

    def heal(self) -> None:
        if not self.cluster.has_master:
            self.cluster.start_master()
        missing = [number for number, server in enumerate(self._servers) if server is None or not server.is_alive]
        with ThreadPoolExecutor(N_NODES) as threads:
            list(threads.map(self.start, missing))

    def start(self, number: int) -> None:
        self.kill(number)
        place = self.cluster.nodes[number]
        ports = node_ports(number)
        setup = Setup(
            f"node{number}",
            (*ARGUMENTS, "--sleep-on-idle"),
            config=self.cluster.config.read_text(encoding="utf-8"),
            environment={"MC_MIN_RPC_PORT": str(ports[0]), "MC_MAX_RPC_PORT": str(ports[-1])},
        )
        folder = self._folder / f"{next(self._starts)}-{setup.name}"
        self._servers[number] = Server(setup, folder, address=place.address, prefix=place.command()).__enter__()

    def kill(self, number: int) -> None:
        """Everything on the node, at once."""
        server, self._servers[number] = self._servers[number], None
        self.cluster.nodes[number].kill()
        if server is not None:
            server.stop()

    def stop(self) -> None:
        for number in range(N_NODES):
            self.kill(number)

    def is_whole(self) -> bool | None:
        """Whether the master knows the segments of all nodes; None: it does not, as `wait_for` wants it."""
        text = httpx.get(f"http://{self.cluster.master.address}:{METRICS_PORT}/metrics", trust_env=False).text
        values = dict(line.split()[:2] for line in text.splitlines() if line and not line.startswith("#"))
        return float(values["master_total_capacity_bytes"]) == N_NODES * SEGMENT_NBYTES or None


def node_ports(number: int) -> range:
    """Each node's own, so that a proxy finds them free on the other nodes."""
    first = 21000 + number * N_PORTS
    return range(first, first + N_PORTS)


@pytest.fixture(scope="module")
def healthy(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    if (reason := why_not() or script.missing_client()) is not None:
        pytest.skip(reason)
    fleet.stop()
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(N_NODES, TEMPLATE, folder) as cluster, ExitStack() as stack:
        pool = Pool(cluster, folder)
        stack.callback(pool.stop)
        yield pool


@pytest.fixture
def pool(healthy: Pool) -> Pool:
    healthy.heal()
    return healthy


# ---- a node, and the master ----


def test_nodes_share_and_go_on_without_one_of_them_and_without_the_master(pool: Pool) -> None:
    tokens = prompt("shared", N_TOKENS)
    cold = pool[0].generate(tokens)
    pool[0].at_rest()
    hit = pool[1].generate(tokens)
    assert (hit.storage_tokens, hit.device_tokens, hit.host_tokens) == (reusable(tokens), 0, 0)
    Tolerance(0.0).check(hit, cold)

    with gone_on_without_node_0(pool, "killed") as (documents, expected, limit_s):
        pool.kill(0)

    pool.start(0)
    wait_for("its segment is in the pool again", pool.is_whole, ANSWER_TIMEOUT_S)
    wait_for("what it stores is loaded elsewhere", lambda: shares(pool[0], pool[1]), ANSWER_TIMEOUT_S)
    wait_for("it loads what others have stored", lambda: shares(pool[2], pool[0]), ANSWER_TIMEOUT_S)

    pool.cluster.kill_master()
    assert time_s(pool[1], documents, expected) < limit_s, "later than deadline and recompute"
    pool.cluster.start_master()
    check_whole(pool)


def test_nodes_go_on_while_one_of_them_is_cut_off(pool: Pool) -> None:
    """Nothing tells the others that it is gone: what they send it is lost."""
    with ExitStack() as stack, gone_on_without_node_0(pool, "cut off"):
        stack.enter_context(pool.cluster.nodes[0].cut_off())
    check_whole(pool)


@contextmanager
def gone_on_without_node_0(pool: Pool, name: str) -> Iterator[tuple[list[Prompt], list[Answer], float]]:
    """Inside, node 0 is to be lost; then the others are asked for what it has stored, and what they store they share.

    Yields what it has stored, the answers, and how long a node may take for it: the deadline and the computation.
    """
    documents = [prompt((name, number), N_TOKENS) for number in range(N_CLIENTS)]
    expected = [pool[0].generate(document) for document in documents]
    pool[0].at_rest()
    unknown = [[prompt((name, "cold", node, number), N_TOKENS) for number in range(N_CLIENTS)] for node in (1, 2)]
    limit_s = PREFETCH_TIMEOUT_S + 10 * max(time_s(pool[1], unknown[0]), time_s(pool[2], unknown[1]))
    wait_for("all nodes have joined", pool.is_whole, ANSWER_TIMEOUT_S)
    yield documents, expected, limit_s
    for number in (1, 2):
        assert time_s(pool[number], documents, expected) < limit_s, "later than deadline and recompute"
    wait_for("nodes 1 and 2 share", lambda: shares(pool[1], pool[2]), ANSWER_TIMEOUT_S)
    wait_for("the master has forgotten node 0", lambda: not pool.is_whole() or None, ANSWER_TIMEOUT_S)
    wait_for("nodes 1 and 2 share without node 0", lambda: shares(pool[2], pool[1]), ANSWER_TIMEOUT_S)


def check_whole(pool: Pool) -> None:
    """All nodes share again, and have all segments."""
    for writer, reader in ((0, 1), (1, 2), (2, 0)):
        wait_for(
            f"node {reader} loads what node {writer} stores",
            lambda writer=writer, reader=reader: shares(pool[writer], pool[reader]),  # type: ignore[misc]
            ANSWER_TIMEOUT_S,
        )
    wait_for("the master knows all segments", pool.is_whole, ANSWER_TIMEOUT_S)
    for number in range(N_NODES):
        check_at_rest(pool[number])


_new = itertools.count()


def shares(writer: Server, reader: Server) -> bool | None:
    """Whether one loads all of a new prompt that the other has computed. The answer is right, whether or not."""
    tokens = prompt(("new", next(_new)), N_TOKENS)
    cold = writer.generate(tokens)
    writer.at_rest()
    hit = reader.generate(tokens)
    BATCHED.check(hit, cold)
    return hit.storage_tokens == reusable(tokens) or None


def time_s(server: Server, prompts: Sequence[Prompt], expected: Sequence[Answer] = ()) -> float:
    """How long the server takes for all of them at once. expected: what it has to answer."""
    began_s = time.monotonic()
    answers = server.generate_all(prompts)
    took_s = time.monotonic() - began_s
    for answer, right in zip(answers, expected, strict=False):
        BATCHED.check(answer, right)
    return took_s


# ---- the network ----


def test_requests_while_the_network_between_nodes_is_bad(
    pool: Pool, record_property: Callable[[str, object], None]
) -> None:
    documents = [prompt(("document", number), N_TOKENS) for number in range(N_DOCUMENTS)]
    chance = random.Random(0)
    requests = [(chance.randrange(N_NODES), chance.randrange(N_DOCUMENTS)) for _ in range(N_REQUESTS)]
    with ExitStack() as stack:
        proxy = stack.enter_context(between(pool.cluster.nodes))
        has_netem = min(stack.enter_context(netem(node)) for node in pool.cluster.nodes)
        expected = [pool[number % N_NODES].generate(document) for number, document in enumerate(documents)]
        for number in range(N_NODES):
            pool[number].at_rest()
        wait_for("all share by way of the proxy", lambda: shares(pool[0], pool[1]), ANSWER_TIMEOUT_S)

        def ask(request: tuple[int, int]) -> Answer:
            node, document = request
            answer = pool[node].generate(documents[document])
            assert answer.finish_reason == "length"
            BATCHED.check(answer, expected[document])
            return answer

        proxy.trouble = TROUBLE
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            answers = list(clients.map(ask, requests))
        proxy.trouble = CALM
        share = share_from_storage(answers)
        local = sum(answer.device_tokens + answer.host_tokens for answer in answers)
        facts = {"netem": has_netem, "proxy": proxy.counts, "from the pool": share, "own tokens": local}
        for name, value in facts.items():
            record_property(name, str(value))
            print(f"{name}: {value}")
        assert min(proxy.counts.delays, proxy.counts.stalls, proxy.counts.resets) > 0
        assert share >= LEAST_SHARE
    wait_for("they share without the proxy again", lambda: shares(pool[0], pool[1]), ANSWER_TIMEOUT_S)
    for number in range(N_NODES):
        check_at_rest(pool[number])


@contextmanager
def between(nodes: Sequence[Place]) -> Iterator[Proxy]:
    """A proxy by which the nodes reach each other: on each, the addresses of the others are its own."""
    pairs = [(node, number) for node in nodes for number in range(len(nodes)) if nodes[number] != node]
    routes = []
    with ExitStack() as stack:
        for node, number in pairs:
            address = nodes[number].address
            change = ("ip", "-netns", node.name, "address")
            subprocess.run([*change, "add", f"{address}/32", "dev", "lo"], check=True)
            stack.callback(subprocess.run, [*change, "delete", f"{address}/32", "dev", "lo"], check=True)
            routes += [Route((address, port), (address, port), node.path) for port in node_ports(number)]
        yield stack.enter_context(Proxy(routes, seed="cluster"))


@contextmanager
def netem(node: Place) -> Iterator[bool]:
    """Whether the kernel can delay and reorder the packets of a node; if so, it does."""
    options = ("delay", "2ms", "2ms", "loss", "0.1%")
    device = ("tc", "-netns", node.name, "qdisc")
    try:
        done = subprocess.run(
            [*device, "add", "dev", "eth0", "root", "netem", *options], capture_output=True, check=False
        )
    except FileNotFoundError:
        yield False
        return
    yield done.returncode == 0
    if done.returncode == 0:
        subprocess.run([*device, "delete", "dev", "eth0", "root"], check=True)
