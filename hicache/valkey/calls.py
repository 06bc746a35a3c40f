"""Calls of the tier under way: look-ups, loads, stores and deletions.

A call is planned on an I/O thread, since names are many and a cluster may have to be asked who has them. It falls into
pieces, each for one node and of some MiB at most, which run on any connections. When the last piece has ended, nobody
is at the slots any more, and the future is done.

A piece talks to its node once or twice, pipelined. Keys for which a cluster's node sends us elsewhere are asked for
there. A connection that had been idle may have been closed by the server meanwhile, so such a one is replaced once
before that counts as a failure.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from hicache.breaker import Breaker
from hicache.calls import ABSENT, CORRUPT, FULL, GOOD, NEW, OTHER_VERSION, UNASKED, Call
from hicache.checksum import checksum, seeds
from hicache.tier import Batch, TierError
from hicache.valkey.counters import Counters
from hicache.valkey.nodes import Node, Nodes, describe
from hicache.valkey.wire import OddValue, Refusal, Reply, Value, Wire, refusal
from hicache.values import HEADER_NBYTES, checksum_in, header, is_other_version, names
from hicache.workers import Work, Workers

LOAD_NBYTES: Final = 2 << 20
STORE_NBYTES: Final = 8 << 20
"""Of a piece: for loads little, so that all connections share in a batch; for stores more, because each begins with a
round trip."""

PIECE_NAMES: Final = 4096
MAX_REDIRECTIONS: Final = 3

_OF_ONE_KEY: Final = "WRONGTYPE"
_UNSERVED: Final = "CLUSTERDOWN Hash slot not served"
"""Says a node about a slot that no node has, and serves the others."""

_FULL: Final = "OOM"
_MOVING: Final = frozenset({"CLUSTERDOWN", "MASTERDOWN", "READONLY", "TRYAGAIN"})

Refusals = Mapping[int, Refusal]
"""By position in the call: what was not answered."""


@dataclass(slots=True, eq=False)
class Shared:
    """What all calls of one tier have in common. memory: all bytes of the slab."""

    nodes: Nodes
    workers: Workers
    namespace: str
    seed: int
    memory: memoryview
    slot_nbytes: int
    page_nbytes: int
    ttl_s: int
    counters: Counters = field(default_factory=Counters)
    lock: threading.Lock = field(default_factory=threading.Lock)
    queued_nbytes: int = 0
    """Of stores that have not ended."""

    def payload(self, slab_slot: int) -> memoryview:
        start = slab_slot * self.slot_nbytes
        return self.memory[start : start + self.page_nbytes]


class NodeCall(Call):
    """One call. `future` ends with TierError if the store failed."""

    is_urgent = False
    piece_pages = PIECE_NAMES
    payload_nbytes = 0
    """Of a page that is moved; 0: the call only asks."""
    what = ""

    def __init__(self, shared: Shared, keys: bytes, n_pages: int, future: Future[int]) -> None:
        super().__init__(n_pages, shared.lock, future)
        self.shared = shared
        self.keys = keys
        self.names: list[bytes] = []

    def start(self) -> None:
        """Have it planned. Some ten microseconds."""
        self.shared.workers.submit([_Planning(self)])

    @abstractmethod
    def talk(self, wire: Wire, positions: Sequence[int]) -> Refusals:
        """Ask one node about these pages, and note in `found` what it answers. May be said again. Raises OSError."""

    def explain(self, error: Exception) -> TierError:
        return TierError(f"{self.shared.nodes.endpoint} {describe(error)}")

    # ---- on an I/O thread ----

    def plan(self) -> None:
        """Raises OSError."""
        self.names = [name.encode() for name in names(self.shared.namespace, self.keys)]
        pieces: list[Work] = []
        for node, positions in self.shared.nodes.by_node(self.names).items():
            pieces += [
                _Piece(self, node, positions[at : at + self.piece_pages])
                for at in range(0, len(positions), self.piece_pages)
            ]
        self.begin(self.shared.workers, pieces)

    def ask(self, node: Node, positions: Sequence[int]) -> None:
        """Talk to a node, and to those it sends us to. Raises OSError if the first one fails."""
        todo = self._sort(node, self._talk(node, positions, is_asking=False))
        for _ in range(MAX_REDIRECTIONS):
            elsewhere, todo = todo, defaultdict(list)
            for (target, is_asking), moved in elsewhere.items():
                with self.shared.lock:
                    self.shared.counters.redirections += len(moved)
                try:
                    if not target.reads.is_open:
                        refusals = self._talk(target, moved, is_asking=is_asking)
                        for where, again in self._sort(target, refusals).items():
                            todo[where] += again
                except OSError as error:
                    self.found[moved] = UNASKED  # one of them may have been judged before the payload of another came
                    self.give_up(target, error)

    def _talk(self, node: Node, positions: Sequence[int], *, is_asking: bool) -> Refusals:
        def say(wire: Wire) -> Refusals:
            wire.is_asking = is_asking
            refusals = self.talk(wire, positions)
            wire.is_asking = False
            return refusals

        return node.talk(say)

    def _sort(self, node: Node, refusals: Refusals) -> defaultdict[tuple[Node, bool], list[int]]:
        """What is to be asked elsewhere, and whether with ASKING; the others have been refused by this node."""
        elsewhere: defaultdict[tuple[Node, bool], list[int]] = defaultdict(list)
        refused: dict[int, Refusal] = {}
        for position, why in refusals.items():
            target = self.shared.nodes.redirected(why, node)
            if target is None:
                refused[position] = why
                continue
            elsewhere[target, why.kind == "ASK"].append(position)
            if why.kind == "MOVED":
                self.shared.nodes.mark_stale()
        if refused:
            self._refused(node, refused)
        return elsewhere

    def _refused(self, node: Node, refused: Refusals) -> None:
        why = next(iter(refused.values()))
        if why.kind == _FULL:
            self.found[list(refused)] = FULL
            node.failed(node.writes, f"takes no more pages ({why.text})")
            return
        if why.kind in _MOVING:
            self.shared.nodes.mark_stale()
        if why.text != _UNSERVED:
            self.failed(node, node.reads if self.is_read else node.writes, f"refuses {self.what}: {why.text}")

    def give_up(self, node: Node, error: Exception) -> None:
        """The node has failed: ask it for nothing for a while."""
        self.failed(node, node.reads, describe(error))
        node.disconnect()
        self.shared.nodes.mark_stale()

    def failed(self, node: Node, breaker: Breaker, what: str) -> None:
        """Count it, and open this breaker of the node."""
        self.count_failure()
        node.failed(breaker, what)

    def count_failure(self) -> None:
        with self.shared.lock:
            if self.is_read:
                self.shared.counters.read_errors += 1
            else:
                self.shared.counters.write_errors += 1


class _Question(NodeCall):
    """A command for each page that says 1 or 0."""

    def talk(self, wire: Wire, positions: Sequence[int]) -> Refusals:
        lines = wire.ask((self.what.encode(), self.names[at]) for at in positions)
        for at, line in zip(positions, lines, strict=True):
            self.found[at] = GOOD if line == b":1" else ABSENT
        return _refusals(positions, lines)


class Exists(_Question):
    is_urgent = True
    what = "EXISTS"

    def count(self, n_head: int) -> int:
        return n_head


class Delete(_Question):
    is_read = False
    what = "UNLINK"

    def count(self, n_head: int) -> int:
        n_deleted = int(np.count_nonzero(self.found == GOOD))
        self.shared.counters.deleted += n_deleted
        return n_deleted


class _Move(NodeCall):
    """Pages between the slab and the store."""

    piece_nbytes = 0

    def __init__(self, shared: Shared, batch: Batch, future: Future[int]) -> None:
        super().__init__(shared, batch.keys, len(batch), future)
        self.payload_nbytes = shared.page_nbytes
        self.piece_pages = max(1, self.piece_nbytes // shared.page_nbytes)
        self._slots = batch.slots
        self._payloads: list[memoryview] = []
        self._seeds: list[int] = []

    def plan(self) -> None:
        self._payloads = [self.shared.payload(slot) for slot in self._slots.tolist()]
        self._seeds = seeds(self.keys, self.shared.seed).tolist()
        super().plan()


class Load(_Move):
    piece_nbytes = LOAD_NBYTES
    what = "GETEX"

    def talk(self, wire: Wire, positions: Sequence[int]) -> Refusals:
        ttl = b"%d" % self.shared.ttl_s
        questions = [(b"GETEX", self.names[at], b"EX", ttl) for at in positions]
        refusals: dict[int, Refusal] = {}
        for at, reply in zip(positions, wire.load(questions, [self._payloads[at] for at in positions]), strict=True):
            if isinstance(reply, Refusal) and reply.kind != _OF_ONE_KEY:
                refusals[at] = reply
            else:
                self.found[at] = self._judge(at, reply)
        damaged = [self.names[at] for at in positions if self.found[at] == CORRUPT]
        if damaged:
            wire.ask((b"UNLINK", name) for name in damaged)
        return refusals

    def _judge(self, at: int, reply: Reply) -> int:
        if reply is None:
            return ABSENT
        if isinstance(reply, Value):
            payload = self._payloads[at]
            expected = checksum_in(reply.header, len(payload))
            if expected is not None and expected == checksum(payload, self._seeds[at]):
                return GOOD
        found = reply.header if isinstance(reply, Value) else reply.head if isinstance(reply, OddValue) else b""
        return OTHER_VERSION if len(found) == HEADER_NBYTES and is_other_version(found) else CORRUPT

    def count(self, n_head: int) -> int:
        counters = self.shared.counters
        n_good = int(np.count_nonzero(self.found == GOOD))
        counters.loaded += n_head
        counters.missed += ABSENT in self.found[self.n_known : self.n_known + 1]
        counters.corrupt += int(np.count_nonzero(self.found == CORRUPT))
        counters.other_version += int(np.count_nonzero(self.found == OTHER_VERSION))
        counters.read_nbytes += n_good * self.shared.page_nbytes
        return n_head


class Store(_Move):
    is_read = False
    piece_nbytes = STORE_NBYTES
    what = "SET"

    def talk(self, wire: Wire, positions: Sequence[int]) -> Refusals:
        """What is there lives on; the rest is sent. SET is atomic: no reader ever finds half a page."""
        ttl = b"%d" % self.shared.ttl_s
        lines = wire.ask((b"EXPIRE", self.names[at], ttl) for at in positions)
        refusals = dict(_refusals(positions, lines))
        absent = []
        for at, line in zip(positions, lines, strict=True):
            if line == b":1":
                self.found[at] = GOOD
            elif at not in refusals:
                absent.append(at)
        if absent:
            lines = wire.store([(b"SET", self.names[at], self._value(at), b"EX", ttl) for at in absent])
            refusals |= _refusals(absent, lines)
            stored = [at for at, line in zip(absent, lines, strict=True) if line == b"+OK"]
            self.found[stored] = NEW
        return refusals

    def _value(self, at: int) -> tuple[bytes, memoryview]:
        payload = self._payloads[at]
        return header(len(payload), checksum(payload, self._seeds[at])), payload

    def count(self, n_head: int) -> int:
        shared, counters = self.shared, self.shared.counters
        n_new = int(np.count_nonzero(self.found == NEW))
        counters.stored += n_new
        counters.deduplicated += int(np.count_nonzero(self.found == GOOD))
        counters.skipped_full += int(np.count_nonzero(self.found == FULL))
        counters.written_nbytes += n_new * shared.page_nbytes
        shared.queued_nbytes -= len(self.found) * shared.page_nbytes
        return n_head


class _Planning(Work):
    """A call that has been asked for."""

    nbytes = 0

    def __init__(self, call: NodeCall) -> None:
        self._call = call
        self.is_read = call.is_read
        self.is_urgent = call.is_urgent

    def run(self) -> None:
        self._call.plan()

    def finish(self) -> None:
        if self.error is not None:
            self._call.count_failure()
        if self.withdrawn or self.error is not None:
            self._call.settle(self.error)


class _Piece(Work):
    """Some pages of a call, all of one node."""

    def __init__(self, call: NodeCall, node: Node, positions: Sequence[int]) -> None:
        self._call = call
        self.is_read = call.is_read
        self.is_urgent = call.is_urgent
        self.node = node
        self.positions = positions
        self.nbytes = len(positions) * call.payload_nbytes

    def run(self) -> None:
        node, is_read = self.node, self._call.is_read
        self.moved_nbytes = 0
        if node.reads.is_open or (not is_read and node.writes.is_open and not node.writes.is_due):
            return
        if isinstance(self._call, Load) and self._call.n_known < self.positions[0]:
            return
        self._call.ask(node, self.positions)
        found = self._call.found[self.positions]
        self.moved_nbytes = int(np.count_nonzero(found == GOOD)) * self._call.payload_nbytes
        if node.writes.is_due and NEW in found and FULL not in found:
            node.writes.close()
        node.served()

    def finish(self) -> None:
        if self.error is not None:
            self._call.give_up(self.node, self.error)
        self._call.piece_ended(self.positions, self.error)


def _refusals(positions: Sequence[int], lines: Sequence[bytes]) -> Refusals:
    return {at: refusal(line) for at, line in zip(positions, lines, strict=True) if line.startswith(b"-")}
