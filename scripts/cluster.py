"""Several SGLang servers with one pool of memory on one machine, as on several: to try, and for tests.

Each server is on a node of its own, which is a network namespace (`cluster_network`), and so is the pool's master. All
read one configuration, the same file that real machines would. They compute on the CPU, whatever the machine has.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any, Self
from urllib.request import ProxyHandler, Request, build_opener

import yaml
from cluster_network import ClusterError, Network, Place, locked, why_not
from programs import end_group, tail

from sgl_lmcache import config, config_file, serve
from sgl_lmcache.cpu.model import RECIPES, make_model
from sgl_lmcache.errors import StartError

TEMPLATE = Path(__file__).with_name("cluster.yaml")
FOLDER_PREFIX = "sgl-lmcache-cluster-"
PORT = 30000
"""Of every server: each has an address of its own."""

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 180.0
POLL_S = 0.25

SERVER_ARGUMENTS = ("--page-size", "16", "--max-total-tokens", "8192", "--skip-server-warmup", "--sleep-on-idle")

_http = build_opener(ProxyHandler({}))
"""What this machine calls its HTTP proxy does not know these nodes."""


@dataclass(frozen=True, slots=True)
class Process:
    """A command in a place, the leader of a process group of its own, and where its output goes."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, place: Place, launch: serve.Launch, log: Path) -> Self:
        with log.open("ab") as output:
            popen = subprocess.Popen(
                place.command(launch.command),
                env=launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(name, popen, log)

    def check_alive(self) -> None:
        if self.popen.poll() is not None:
            raise ClusterError(f"The {self.name} has ended. The end of its log, {self.log}:\n{tail(self.log)}")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready():
            self.check_alive()
            if time.monotonic() > deadline_s:
                raise ClusterError(f"The {self.name} was not ready within {START_TIMEOUT_S:.0f} s; its log: {self.log}")
            time.sleep(POLL_S)


class Cluster:
    """Places for nodes, one for a master, which runs, and the configuration for all, while the context is entered.

    template: the configuration as plain values; the host of its master is replaced. folder: for that file and for logs.
    What is to run on the nodes is the caller's to start there (`Place.command`), and ends with the context.
    """

    def __init__(self, n_nodes: int, template: Any, folder: Path) -> None:
        self._folder = folder
        self._template = template
        self._network = Network(n_nodes + 1)
        self._exit = ExitStack()
        self._master: Process | None = None
        self.config = folder / "cluster.yaml"

    def __enter__(self) -> Self:
        try:
            self._exit.enter_context(self._network)
            self.config.write_text(yaml.safe_dump(with_master(self._template, self.master.address)), encoding="utf-8")
            self._exit.callback(self.kill_master)
            self.start_master()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._exit.close()

    @property
    def master(self) -> Place:
        """Where the master is."""
        return self._network.places[0]

    @property
    def nodes(self) -> tuple[Place, ...]:
        return self._network.places[1:]

    @property
    def host_address(self) -> str:
        """Of the host, as the nodes reach it."""
        return self._network.host_address

    def start_master(self) -> None:
        """It knows of nothing then. Returns when it takes connections."""
        launch = serve.Launch(master_command(self.config), dict(os.environ))
        self._master = Process.start("master", self.master, launch, self._folder / "master.log")
        self._master.wait_until(lambda: accepts(self.master.address, master_port(self._template)))

    def kill_master(self) -> None:
        """As its machine would lose power; the nodes and their memory stay. Killing it twice does nothing."""
        self.master.kill()
        if self._master is not None:
            end_group(self._master.popen)
            self._master = None

    @property
    def has_master(self) -> bool:
        """Whether it runs."""
        return self._master is not None and self._master.popen.poll() is None

    def check_master(self) -> None:
        """Raises `ClusterError` if it has ended by itself."""
        if self._master is not None:
            self._master.check_alive()


def read_template(path: Path) -> Any:
    """The plain values of a configuration that servers on one machine can share. Raises `ClusterError`."""
    parsed = load(path)
    if [type(tier) for tier in parsed.tiers] != [config.HostTier, config.MooncakeTier]:
        raise ClusterError(
            f"{path}: tiers has to be a host tier and a mooncake tier here; the nodes of this cluster share a disk and "
            "reach nothing but each other, so leave the others out."
        )
    assert parsed.mooncake is not None
    if parsed.mooncake.metadata != config.P2P_HANDSHAKE or "://" in parsed.mooncake.master or parsed.mooncake.address:
        raise ClusterError(
            f"{path}: the mooncake tier has to have one master, host[:port], metadata {config.P2P_HANDSHAKE} and no "
            "address here."
        )
    return config_file.read(path)


def load(path: Path) -> config.Config:
    """A configuration with a pool. Raises `ClusterError`."""
    try:
        parsed = config_file.load(path)
    except StartError as error:
        raise ClusterError(str(error)) from error
    if parsed.mooncake is None:
        raise ClusterError(f"{path}: there is no mooncake tier, and so no pool; add one, as in {TEMPLATE}.")
    return parsed


def with_master(template: Any, host: str) -> Any:
    """The same with the master on another host."""
    tiers = [
        {**tier, "master": f"{host}:{master_port(template)}"} if tier["type"] == "mooncake" else tier
        for tier in template["tiers"]
    ]
    return {**template, "tiers": tiers}


def master_port(template: Any) -> int:
    tier = config_file.parse(template, source="the template").mooncake
    assert tier is not None
    address = config.split_address(tier.master, config.MASTER_PORT)
    assert address is not None
    return address[1]


def master_command(path: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("sgl-lmcache")), "mooncake-master", "--config", str(path)]


def accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1.0).close()
    except OSError:
        return False
    return True


# ---- the command ----


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.print:
            load(arguments.config)
            print(real_machines(arguments.config, arguments.model))
            return 0
        run(arguments)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The cluster has been ended.", file=sys.stderr)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./scripts/cluster",
        description="Several SGLang servers on this machine, each on a node of its own, with one pool of memory. As "
        "root; Ctrl-C ends it and leaves nothing behind.",
    )
    parser.add_argument("--nodes", type=_number, default=3, metavar="N", help="how many servers (default 3)")
    parser.add_argument("--model", default="tiny", help="a local model, or one to generate: tiny (default), bench")
    parser.add_argument(
        "--config", type=Path, default=TEMPLATE, metavar="FILE", help="the configuration of all (scripts/cluster.yaml)"
    )
    parser.add_argument("--once", action="store_true", help="send the two requests of the example, check them, and end")
    parser.add_argument(
        "--print", "--dry-run", action="store_true", help="only print what to run on real machines; needs no root"
    )
    arguments = parser.parse_args(argv)
    if arguments.model not in RECIPES and not arguments.print and not Path(arguments.model).is_dir():
        parser.error(f"--model is {arguments.model}, which is not a folder; name a local model, tiny or bench")
    return arguments


def _number(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 50):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 50")
    return int(text)


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Leave through every `finally` on the way, which is what ends the cluster."""
    sys.exit(128 + number)


def run(arguments: argparse.Namespace) -> None:
    """Until Ctrl-C, or until something of the cluster ends by itself. Raises `ClusterError`."""
    template = read_template(arguments.config)
    if (reason := why_not() or missing_client()) is not None:
        raise ClusterError(f"{reason} What to run on real machines: ./scripts/cluster --print")
    recipe = RECIPES.get(arguments.model)
    model = Path(arguments.model).absolute() if recipe is None else make_model(recipe)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        say(f"starting a master and {arguments.nodes} servers; logs are in {folder}")
        cluster = stack.enter_context(Cluster(arguments.nodes, template, folder))
        servers = []
        for number, place in enumerate(cluster.nodes, 1):
            launch = server_launch(model, place, cluster.config)
            log = folder / f"node{number}.log"
            servers.append(Process.start(f"server on node {number}", place, launch, log))
            stack.callback(end_group, servers[-1].popen)
        stack.callback(ask_to_end, servers)
        for server, place in zip(servers, cluster.nodes, strict=True):
            server.wait_until(lambda place=place: is_healthy(url(place)))  # type: ignore[misc]
            say(f"{server.name} is ready")
        request = folder / "request.json"
        request.write_text(json.dumps(example()), encoding="utf-8")
        print(how_to_use(cluster, request), flush=True)
        if arguments.once:
            once(cluster)
            return
        print(f"\n{real_machines(arguments.config, arguments.model)}\n\nCtrl-C ends it.", flush=True)
        while True:
            cluster.check_master()
            for server in servers:
                server.check_alive()
            time.sleep(POLL_S)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Removed at the end. It is locked meanwhile, so that those of killed runs can be told, and are removed now."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError), locked(left, wait=False):
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    with locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def ask_to_end(processes: Sequence[Process]) -> None:
    """All at once: then each takes no longer than the slowest."""
    for process in processes:
        process.popen.terminate()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def missing_client() -> str | None:
    """Why Mooncake's client cannot be used, as a sentence; None: it can. In a process of its own: it is large."""
    result = subprocess.run(
        [sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return None
    complaint = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return f"Mooncake's client does not load ({complaint}); `sgl-lmcache doctor` says what to install."


def server_launch(model: Path, place: Place, config_path: Path) -> serve.Launch:
    words = ["--cache-config", str(config_path), "--model-path", str(model), "--host", place.address]
    words += ["--port", str(PORT), *SERVER_ARGUMENTS]
    try:
        # The servers share the cores, and OpenMP's threads wait for each other.
        return serve.plan(words, {"OMP_NUM_THREADS": "1", **os.environ}, gpu=False)
    except StartError as error:
        raise ClusterError(str(error)) from error


def url(place: Place) -> str:
    return f"http://{place.address}:{PORT}"


def is_healthy(url: str) -> bool:
    try:
        with _http.open(f"{url}/health", timeout=10) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def example() -> Mapping[str, Any]:
    """A request whose prompt is worth keeping: some two thousand tokens."""
    sampling = {"temperature": 0, "max_new_tokens": 8}
    return {"text": inspect.getsource(argparse)[:8000], "sampling_params": sampling}


def once(cluster: Cluster) -> None:
    """The example's request to the first node, then to the last. Raises `ClusterError` if that computes it again."""
    first, last = cluster.nodes[0], cluster.nodes[-1]
    cold = ask(first)
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        _http.open(Request(f"{url(last)}/flush_cache?timeout=30", b""), timeout=ANSWER_TIMEOUT_S).close()
        hit = ask(last)
        n_stored = (hit["meta_info"]["cached_tokens_details"] or {}).get("storage", 0)
        if hit["text"] != cold["text"]:
            raise ClusterError(f"The nodes answer differently: {cold['text']!r} and {hit['text']!r}.")
        if n_stored > hit["meta_info"]["prompt_tokens"] / 2:
            print(f"\nOf {hit['meta_info']['prompt_tokens']} prompt tokens, {n_stored} came from the pool.")
            return
        if time.monotonic() > deadline_s:
            raise ClusterError(f"{url(last)} did not find in the pool what {url(first)} has computed.")


def ask(place: Place) -> Any:
    request = Request(f"{url(place)}/generate", json.dumps(example()).encode(), {"Content-Type": "application/json"})
    try:
        with _http.open(request, timeout=ANSWER_TIMEOUT_S) as response:
            return json.load(response)
    except (OSError, HTTPException) as error:
        raise ClusterError(f"{url(place)} did not answer: {error}") from error


def how_to_use(cluster: Cluster, request: Path) -> str:
    first, last = cluster.nodes[0], cluster.nodes[-1]
    servers = "\n".join(f"  node {number:<3} {url(place)}" for number, place in enumerate(cluster.nodes, 1))
    return f"""
The servers, which this machine reaches:

{servers}

One pool for all; its master is at {cluster.master.address}, its configuration is {cluster.config}.

Send a prompt to one server, and the same to another; what came from the pool is counted as "storage":

{curl(first, request)}
{curl(last, request)}

Look into a node, here the first: ip netns exec {first.name} ss -tnp"""


def curl(place: Place, request: Path) -> str:
    """The command that asks, and shows where the prompt's KV was found."""
    shown = r"""grep -oE '"cached_tokens_details":(null|\{[^}]*})'"""
    return f"""\
  curl --noproxy '*' -s {url(place)}/generate -H 'Content-Type: application/json' \\
      -d @{request} | {shown}"""


def real_machines(path: Path, model: str) -> str:
    """What to run on real machines for the same."""
    shown = "MODEL" if model in RECIPES else model
    return f"""\
The same on real machines. Install on each, in the environment that runs SGLang:

  pip install '.[mooncake]'              # [mooncake-cpu] without CUDA

Copy {path}
to each as /etc/sgl-lmcache.yaml, the same everywhere, with the host of the master in `master` and sizes that suit them.
On that host:

  SGL_LMCACHE_CONFIG=/etc/sgl-lmcache.yaml sgl-lmcache mooncake-master

On every machine with a GPU:

  SGL_LMCACHE_CONFIG=/etc/sgl-lmcache.yaml python -m sglang.launch_server --model-path {shown} \\
      --host 0.0.0.0 --port 30000 --radix-cache-backend sgl_lmcache

or, with or without one:

  SGL_LMCACHE_CONFIG=/etc/sgl-lmcache.yaml sgl-lmcache serve --model-path {shown} --host 0.0.0.0 --port 30000

All have to run the same model with the same arguments, and to reach each other and the master."""


if __name__ == "__main__":
    sys.exit(main())
