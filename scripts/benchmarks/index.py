#!/usr/bin/env python3
"""What the radix index costs: time a call at 2,048 pages, memory a page, and both against the number of pages held.

    python scripts/benchmarks/index.py [--pages 1000000] [--max-pages 1000000] [--rounds 15] [--json]

The index is full of a branching tree: edges of 1 to 200 pages hang from random pages of it, every page is resident on
all four tiers, and all paths have been used in random order. Two paths are laid through it: one of 32 edges, and one
whose every page is an edge of its own. Both were inserted piece by piece between the other edges, with a sibling after
each piece, so that their rows are not adjacent where they branch.

Times are medians of one call. "cold": the caches were swept by reading a large buffer just before it, which is what a
scheduler sees after a forward; "warm": they were not. Every figure above its target is marked with "!". Memory is the
growth of the process's resident set, tables and all. `--max-pages 10000000` adds that size; it takes about 1.2 GiB.

Then every eviction policy at `--pages`: a tier is filled by requests of some 64 pages, of which half go on where an
earlier one ended, and then goes on at its full size, making room 64 pages at a time. "evict" is the time a page that
leaves; "ask" that of telling the policy of a request for 2,048 pages; "learn" that of `radix.reuse.learn` with 800
classes. Medians, warm.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from radix import HBM, HOST, POLICIES, ROOT, Index, Rows, State, reuse

KEY_NBYTES = 32
LONGEST_EDGE = 200
SWEPT_NBYTES = 96 << 20

TARGETS_MS = {
    "match, 32 edges": 0.25,
    "match, one-page edges": 1.5,
    "insert a run": 2.0,
    "insert a run under one-page edges": 2.0,
}
EVICT_TARGET_US = 5.0
"""A page, by any policy."""
POLICY_CALL_TARGET_MS = 1.0
BATCH = 64
STEP_TARGET_MS = 0.3
"""Of begin, commit, drop, touch, lease, release and evict."""
SWEEP = ("match, 32 edges", "match, one-page edges", "insert a run", "evict")


@dataclass(frozen=True)
class Result:
    """One line of the table: medians over the rounds."""

    held_pages: int
    n_pages: int
    what: str
    cold_ms: float
    warm_ms: float
    target_ms: float | None


@dataclass(frozen=True)
class Memory:
    held_pages: int
    rss_nbytes_a_page: float
    columns_nbytes_a_page: float


@dataclass(frozen=True)
class PolicyCost:
    """Medians. evict_us: a page. ask_ms: a request for `n_asked` pages."""

    policy: str
    held_pages: int
    evict_us: float
    ask_ms: float
    n_asked: int


class Stopwatch:
    """Times of calls, by what was called; sweeps the caches before each while `cold`."""

    def __init__(self) -> None:
        self.cold = True
        self.times_ms: dict[tuple[str, bool], list[float]] = {}
        self._sweep = np.ones(SWEPT_NBYTES // 8)

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        if self.cold:
            self._sweep.sum()
        started = time.perf_counter()
        yield
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        self.times_ms.setdefault((what, self.cold), []).append(elapsed_ms)


class Tree:
    """An index that is full of a branching tree of `held_pages` pages, with two paths of `n` pages laid through it."""

    def __init__(self, held_pages: int, n: int) -> None:
        self.random = np.random.default_rng(0)
        self.index = Index(held_pages + 2 * n)
        self.n_slots = 0
        self.few_edges: list[bytes] = []
        self.one_page_edges: list[bytes] = []
        n_pieces = min(32, n)
        pieces = [(self.few_edges, n // n_pieces)] * n_pieces + [(self.one_page_edges, 1)] * n
        self.random.shuffle(pieces)
        n_random = held_pages - sum(length + 1 for _, length in pieces)
        n_edges = max(1, 2 * n_random // (LONGEST_EDGE + 1))
        while len(self.index) < held_pages:
            if pieces and self.random.random() * (n_edges + len(pieces)) < len(pieces):
                self._extend(*pieces.pop())
            elif n_random:
                length = min(int(self.random.integers(1, LONGEST_EDGE + 1)), n_random)
                self._hang(self.random.bytes(KEY_NBYTES * length), self._random_row())
                n_random -= length
                n_edges -= 1
        self._use_everything()

    def _random_row(self) -> int:
        return int(self.random.integers(len(self.index))) if len(self.index) else ROOT

    def _extend(self, path: list[bytes], length: int) -> None:
        above = self.index.row_of(path[-1][-KEY_NBYTES:]) if path else ROOT
        assert above is not None
        path.append(self.random.bytes(KEY_NBYTES * length))
        self._hang(path[-1], above)
        self._hang(self.random.bytes(KEY_NBYTES), above)

    def _hang(self, keys: bytes, above: int) -> None:
        rows = self.index.insert(keys, above)
        for tier in (HBM, HOST + 1, HOST + 2):
            self.index.put(rows, tier)
        self.index.begin(rows, HOST, self.new_slots(len(rows)))
        self.index.commit(rows, HOST)

    def _use_everything(self) -> None:
        for row in self.random.permutation(len(self.index))[: len(self.index) // 50]:
            self.index.tick()
            self.index.touch_path(int(row))

    def new_slots(self, n: int) -> Rows:
        self.n_slots += n
        return np.arange(self.n_slots - n, self.n_slots, dtype=np.int32)


def measure(tree: Tree, n: int, n_rounds: int) -> Stopwatch:
    """Every call, once cold and once warm a round, after one round of each that is thrown away."""
    watch = Stopwatch()
    for round_number in range(n_rounds + 1):
        for watch.cold in (True, False):
            _look_up(tree, watch)
            _insert(tree, watch, n)
            _steps(tree, watch, ", 32 edges", b"".join(tree.few_edges))
            _steps(tree, watch, ", one-page edges", b"".join(tree.one_page_edges))
            _evict(tree, watch, n)
        if round_number == 0:
            watch.times_ms.clear()
    return watch


def _look_up(tree: Tree, watch: Stopwatch) -> None:
    for what, path in (("match, 32 edges", tree.few_edges), ("match, one-page edges", tree.one_page_edges)):
        keys = b"".join(path)
        with watch.timing(what):
            rows = tree.index.match(keys)
        assert len(rows) == len(keys) // KEY_NBYTES
    digests = [tree.random.bytes(KEY_NBYTES).hex() for _ in range(len(tree.one_page_edges))]
    with watch.timing("(decode hex digests)"):
        bytes.fromhex("".join(digests))


def _insert(tree: Tree, watch: Stopwatch, n: int) -> None:
    new = tree.random.bytes(KEY_NBYTES * n)
    with watch.timing("insert a run"):
        rows = tree.index.insert(new)
    with watch.timing("forget a run"):
        tree.index.forget(rows)
    keys = b"".join((*tree.one_page_edges, new))
    with watch.timing("insert a run under one-page edges"):
        rows = tree.index.insert(keys)
    tree.index.forget(rows)


def _steps(tree: Tree, watch: Stopwatch, which: str, keys: bytes) -> None:
    index, rows = tree.index, tree.index.match(keys)
    slots = tree.new_slots(len(rows))
    index.tick()
    with watch.timing("drop" + which):
        index.drop(rows, HOST)
    with watch.timing("begin" + which):
        index.begin(rows, HOST, slots)
    with watch.timing("commit" + which):
        index.commit(rows, HOST)
    with watch.timing("touch" + which):
        index.touch_path(int(rows[-1]))
    with watch.timing("lease" + which):
        index.lease(rows)
    with watch.timing("release" + which):
        index.release(rows)


def _evict(tree: Tree, watch: Stopwatch, n: int) -> None:
    """The victims come back with new slots, as the most recent pages, so that the tier stays full."""
    tree.index.tick()
    with watch.timing("evict"):
        evicted = tree.index.evict(n)
    keys = [evicted.keys[i : i + KEY_NBYTES] for i in range(0, len(evicted.keys), KEY_NBYTES)]
    rows = np.array([tree.index.row_of(key) for key in reversed(keys)], np.int32)
    tree.index.begin(rows, HOST, tree.new_slots(len(rows)))
    tree.index.commit(rows, HOST)


def bench(held_pages: int, n_rounds: int) -> tuple[list[Result], Memory]:
    """Build one tree and measure it. Blocks for all of it: about 10 s at 10^6 pages."""
    n = min(2048, held_pages // 8)
    gc.collect()
    before = _rss_nbytes()
    tree = Tree(held_pages, n)
    memory = Memory(held_pages, (_rss_nbytes() - before) / held_pages, tree.index.nbytes / held_pages)
    times_ms = measure(tree, n, n_rounds).times_ms
    results = []
    for what, cold in times_ms:
        if cold:
            cold_ms, warm_ms = (statistics.median(times_ms[what, c]) for c in (True, False))
            results.append(Result(held_pages, n, what, cold_ms, warm_ms, _target_ms(what)))
    return results, memory


class Server:
    """A host tier of `n_pages` under a policy, and requests for it."""

    def __init__(self, policy: str, n_pages: int) -> None:
        self.random = np.random.default_rng(0)
        self.index = Index(n_pages + 64 * BATCH, policies={HOST: policy}, n_pages=n_pages)
        self.free = np.arange(n_pages, dtype=np.int32)
        self.prompts: list[bytes] = []
        self.evict_us: list[float] = []

    def request(self) -> None:
        n_new, before = int(self.random.integers(1, 2 * BATCH)), b""
        if self.prompts and self.random.random() < 0.5:
            before = self.prompts[int(self.random.integers(len(self.prompts)))]
            n_new = n_new // 4 + 1
        keys = (before + self.random.bytes(KEY_NBYTES * n_new))[: 512 * KEY_NBYTES]
        self.prompts.append(keys)
        del self.prompts[:-2000]
        index = self.index
        index.tick()
        index.asked(keys)
        rows = index.insert(keys)
        index.lease(rows)
        index.touch(rows)
        rows = rows[index.states(rows, HOST) == State.ABSENT]
        while len(self.free) < len(rows):
            started = time.perf_counter()
            evicted = index.evict(BATCH)
            self.evict_us.append(1e6 * (time.perf_counter() - started) / len(evicted.slots))
            self.free = np.concatenate((self.free, evicted.slots))
        index.begin(rows, HOST, self.free[: len(rows)])
        index.commit(rows, HOST)
        self.free = self.free[len(rows) :]
        row = index.match(keys)[-1]
        index.answered(int(row), int(self.random.integers(1, 1000)))
        index.release(index.path(int(row)))


def bench_policy(policy: str, n_pages: int, n_rounds: int) -> PolicyCost:
    """Blocks for filling the tier: about 10 s at 10^6 pages."""
    server = Server(policy, n_pages)
    while not server.evict_us:
        server.request()
    for _ in range(20 * n_rounds):
        server.request()
    n_asked, ask_ms = min(2048, n_pages // 8), []
    for _ in range(n_rounds):
        keys = server.random.bytes(KEY_NBYTES * n_asked)
        started = time.perf_counter()
        server.index.asked(keys)
        ask_ms.append(1e3 * (time.perf_counter() - started))
    return PolicyCost(policy, n_pages, statistics.median(server.evict_us[10:]), statistics.median(ask_ms), n_asked)


def bench_learn(n_classes: int, n_rounds: int) -> float:
    """Milliseconds to draw the conclusions for so many classes."""
    random, memory = np.random.default_rng(0), reuse.allocate(16, 10**6)
    memory.tally[reuse.N_CLASSES] = n_classes
    for feature, n_levels in enumerate(reuse.LEVELS):
        memory.features[:, feature] = random.integers(n_levels, size=len(memory.features))
    memory.entered[:] = random.integers(1, 1000, size=memory.entered.shape)
    memory.reused[:] = memory.entered * random.random(memory.entered.shape) * 0.3
    times_ms = []
    for _ in range(n_rounds):
        started = time.perf_counter()
        reuse.learn(memory, 0.9, 10.0)
        times_ms.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times_ms)


def _target_ms(what: str) -> float | None:
    step = what.split(",")[0]
    if step in ("begin", "commit", "drop", "touch", "lease", "release", "evict"):
        return STEP_TARGET_MS
    return TARGETS_MS.get(what)


def _rss_nbytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(results: Sequence[Result], memories: Sequence[Memory], main_size: int) -> None:
    """The whole table at `main_size`, then the cost against the size."""
    main = [r for r in results if r.held_pages == main_size]
    print(f"{main[0].n_pages} pages a call, {main_size} pages held\n")
    print(f"{'call':<36}{'cold ms':>10}  {'warm ms':>10}  {'target':>10}")
    for r in main:
        target = "" if r.target_ms is None else f"{r.target_ms:.2f}"
        print(f"{r.what:<36}{_marked(r.cold_ms, r.target_ms)}{_marked(r.warm_ms, r.target_ms)}{target:>10}")
    print(f"\n{'pages held':<12}{'bytes a page':>13}{'of columns':>12}" + "".join(f"{what:>24}" for what in SWEEP))
    for memory in memories:
        cold_ms = {r.what: r.cold_ms for r in results if r.held_pages == memory.held_pages}
        line = f"{memory.held_pages:<12}{memory.rss_nbytes_a_page:>13.0f}{memory.columns_nbytes_a_page:>12.0f}"
        print(line + "".join(f"{cold_ms[what]:>21.3f} ms" for what in SWEEP))
    print("\nbytes a page: target 400 at 10^6. !: above the target")


def show_policies(costs: Sequence[PolicyCost], learn_ms: float) -> None:
    print(f"\n{'policy':<12}{f'evict {BATCH}, us a page':>24}  {f'ask for {costs[0].n_asked}, ms':>18}")
    for cost in costs:
        evict, ask = _marked(cost.evict_us, EVICT_TARGET_US), _marked(cost.ask_ms, POLICY_CALL_TARGET_MS)
        print(f"{cost.policy:<12}{evict:>26}{ask:>20}")
    print(f"learn, 800 classes: {_marked(learn_ms, POLICY_CALL_TARGET_MS).strip()} ms")
    print(f"\ntargets: {EVICT_TARGET_US} us a page, {POLICY_CALL_TARGET_MS} ms a call")


def _marked(ms: float, target_ms: float | None) -> str:
    missed = target_ms is not None and ms > target_ms
    return f"{ms:>10.3f}{' !' if missed else '  '}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of the radix index.")
    parser.add_argument("--pages", type=int, default=1_000_000, help="pages held for the main table")
    parser.add_argument("--max-pages", type=int, help="largest size of the second table (default: --pages)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    options = parser.parse_args(argv)
    if options.pages < 100 or options.rounds < 1:
        parser.error("at least 100 pages and one round")
    largest = max(options.pages, options.max_pages or 0)
    sizes = sorted({options.pages, *(10**k for k in range(4, 8) if 10**k <= largest)})
    results, memories = [], []
    for size in sizes:
        of_size, memory = bench(size, options.rounds)
        results += of_size
        memories.append(memory)
    costs = [bench_policy(policy, options.pages, options.rounds) for policy in POLICIES]
    learn_ms = bench_learn(800, options.rounds)
    if options.json:
        report = {
            "calls": [asdict(result) for result in results],
            "memory": [asdict(memory) for memory in memories],
            "policies": [asdict(cost) for cost in costs],
            "learn_ms": learn_ms,
        }
        print(json.dumps(report, indent=1))
    else:
        show(results, memories, options.pages)
        show_policies(costs, learn_ms)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
