"""A restart: a store with very many pages is opened, and used at once, while its map is being read.

The store is made by hand, since most of its pages need no bytes: segments that are allocated and never written, and a
map that names a page in every slot. The first path, the one in the middle and the last have bytes, and can be loaded.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from benchmarks.paths import BLOCK_NBYTES, NAMESPACE, SWITCH_INTERVAL_S, open_tier, path, path_keys, random_slab

from hicache.checksum import checksum, namespace_seed, seeds
from hicache.quotas import NOBODY
from hicache.ssd import SsdTier, limit_for
from hicache.ssd.directory import store_folder
from hicache.ssd.map import Identity, PageRows
from hicache.ssd.opening import open_store
from hicache.ssd.volume import Opened, Spec
from hicache.tier import ROOT_KEY
from radix import KEY_NBYTES
from transfer.files import System
from transfer.slab import Slab

PATH_PAGES = 500
ROWS_A_TRANSACTION = 10_000
STALL_MS = 2.0
SUMS_A_PIECE = 40
"""Some 50 us."""
ASK_EVERY = 32
LOOK_EVERY = 256


@dataclass(frozen=True)
class Loop:
    """What a loop of small pieces of work met. A stall is the time from one piece to the next.

    The second kind of figure is without the time in which this thread, or the one that reads the map and may hold what
    this one waits for, could have run, but the kernel ran something else.
    """

    seconds: float
    pieces: int
    median_us: float
    longest_ms: float
    n_over_2_ms: int
    longest_net_ms: float
    n_net_over_2_ms: int


@dataclass(frozen=True)
class Restart:
    """Seconds since the call of `SsdTier.open`. Memory is the growth of the process's resident set."""

    pages: int
    opened_s: float
    answered_s: float
    loaded_s: float
    filled_s: float
    during: Loop
    after: Loop
    rss_nbytes_a_page: float
    peak_nbytes_a_page: float


def restarts(folder: Path, n_pages: int, n_rounds: int) -> Iterator[Restart]:
    """Make the store, then open it again and again, each time in a new process. Blocks for all of it."""
    n_path = min(PATH_PAGES, n_pages // 4)
    n_pages = n_pages // n_path * n_path
    make_store(folder, n_pages, n_path)
    for _ in range(n_rounds):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(restart, folder, n_pages, n_path).result()


# ---- the store ----


def make_store(folder: Path, n_pages: int, n_path: int) -> None:
    slab = random_slab(n_path, BLOCK_NBYTES)
    opened = open_store(
        Spec(
            path=folder,
            folder=store_folder(folder, NAMESPACE, (0, 1), BLOCK_NBYTES),
            identity=Identity(NAMESPACE, BLOCK_NBYTES, BLOCK_NBYTES),
            slab=slab.array,
            limit_nbytes=limit_for(_n_slots(n_pages), 1, BLOCK_NBYTES),
            server="benchmark",
            eviction="lru",
            system=System(),
        )
    )
    while opened.files.n_slots < n_pages:
        opened.files.grow()
    paths_a_transaction = max(1, ROWS_A_TRANSACTION // n_path)
    for first in range(0, n_pages // n_path, paths_a_transaction):
        _name(opened, range(first, min(first + paths_a_transaction, n_pages // n_path)), n_path)
    for number in {0, n_pages // n_path // 2, n_pages // n_path - 1}:
        _write(opened, slab, number, n_path)
    opened.close()
    slab.close()


def _n_slots(n_pages: int) -> int:
    """Somewhat more than the pages need, since segments are whole."""
    return n_pages + n_pages // 8


def _name(opened: Opened, numbers: range, n_path: int) -> None:
    """In the map: paths one after another in the slots, in random order of use."""
    keys = [path_keys(number, n_path) for number in numbers]
    n_rows = len(numbers) * n_path
    uses = np.random.default_rng(numbers.start).permutation(len(numbers)) + 1 + numbers.start
    rows = PageRows(
        np.arange(numbers.start * n_path, numbers.start * n_path + n_rows),
        b"".join(keys),
        b"".join(ROOT_KEY + of_path[:-KEY_NBYTES] for of_path in keys),
        np.tile(np.arange(n_path), len(numbers)),
        np.zeros(n_rows, np.uint64),
        np.repeat(uses, n_path),
        NOBODY * n_rows,
    )
    nothing = np.empty(0, np.int64)
    opened.map.apply(nothing, rows, (nothing, nothing), int(uses.max()))


def _write(opened: Opened, slab: Slab, number: int, n_path: int) -> None:
    """The bytes of one path, and its checksums in the map."""
    keys, slots = path_keys(number, n_path), np.arange(n_path, dtype=np.int32)
    file_slots = slots + np.int32(number * n_path)
    opened.files.write(file_slots, slots)
    page_seeds = seeds(keys, namespace_seed(NAMESPACE)).tolist()
    sums = [checksum(page.data, seed) for page, seed in zip(slab.array, page_seeds, strict=True)]
    rows = PageRows(
        file_slots.astype(np.int64),
        keys,
        ROOT_KEY + keys[:-KEY_NBYTES],
        slots.astype(np.int64),
        np.array(sums, np.uint64),
        np.full(n_path, number + 1),
        NOBODY * n_path,
    )
    nothing = np.empty(0, np.int64)
    opened.map.apply(nothing, rows, (nothing, nothing), number + 1)


def _forget_cached(folder: Path) -> None:
    """Nothing of the map's file is in the page cache."""
    for file in folder.rglob("map.db*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---- one restart, in a process of its own ----


def restart(folder: Path, n_pages: int, n_path: int) -> Restart:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    slab = random_slab(n_path, BLOCK_NBYTES)
    middle = path(n_pages // n_path // 2, np.arange(n_path))
    asked = path_keys(0, n_path)
    _forget_cached(folder)
    gc.collect()
    rss_before = _status_nbytes("VmRSS")
    started_s = time.perf_counter()
    tier = open_tier(folder, slab, BLOCK_NBYTES, _n_slots(n_pages))
    opened_s = time.perf_counter() - started_s
    n_found = tier.exists(middle.keys).result()
    answered_s = time.perf_counter() - started_s
    n_loaded = tier.load(middle).result()
    loaded_s = time.perf_counter() - started_s
    assert n_found == n_loaded == n_path, f"of {n_path} pages {n_found} were found and {n_loaded} loaded"
    during = _loop(tier, asked, lambda: not tier.stats()["is_filling"])
    filled_s = time.perf_counter() - started_s
    assert tier.stats()["n_pages"] == n_pages, f"{tier.stats()['n_pages']} of {n_pages} pages are known"
    tier.flush().result()
    peak, rss = _status_nbytes("VmHWM"), _status_nbytes("VmRSS")
    until_s = time.perf_counter() + during.seconds
    after = _loop(tier, asked, lambda: time.perf_counter() > until_s)
    tier.close()
    slab.close()
    return Restart(
        n_pages,
        opened_s,
        answered_s,
        loaded_s,
        filled_s,
        during,
        after,
        (rss - rss_before) / n_pages,
        (peak - rss_before) / n_pages,
    )


def _status_nbytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _loop(tier: SsdTier, keys: bytes, is_over: Callable[[], bool]) -> Loop:
    """Small pieces of numpy work on this thread, until it is over; at least one."""
    values = np.ones(512)
    gaps_ns: list[int] = []
    waits_ns: list[int] = []
    with ExitStack() as stack:
        waits = [stack.enter_context(_Runnable(thread)) for thread in _threads()]
        started_s = time.perf_counter()
        last_ns, last_wait_ns = time.perf_counter_ns(), sum(wait.ns() for wait in waits)
        while len(gaps_ns) % LOOK_EVERY or not gaps_ns or not is_over():
            for _ in range(SUMS_A_PIECE):
                values.sum()
            if len(gaps_ns) % ASK_EVERY == 0:
                tier.exists(keys)
            now_ns, wait_ns = time.perf_counter_ns(), sum(wait.ns() for wait in waits)
            gaps_ns.append(now_ns - last_ns)
            waits_ns.append(wait_ns - last_wait_ns)
            last_ns, last_wait_ns = now_ns, wait_ns
    gaps_ms = np.array(gaps_ns) / 1e6
    net_ms = gaps_ms - np.array(waits_ns) / 1e6
    return Loop(
        seconds=time.perf_counter() - started_s,
        pieces=len(gaps_ms),
        median_us=1e3 * float(np.median(gaps_ms)),
        longest_ms=float(gaps_ms.max()),
        n_over_2_ms=int(np.count_nonzero(gaps_ms > STALL_MS)),
        longest_net_ms=float(net_ms.max()),
        n_net_over_2_ms=int(np.count_nonzero(net_ms > STALL_MS)),
    )


def _threads() -> list[int]:
    """This thread, and the tier's that reads the map."""
    keepers = [thread for thread in threading.enumerate() if thread.name.endswith("-keeper")]
    return [thread.native_id for thread in (threading.current_thread(), *keepers) if thread.native_id]


class _Runnable:
    """For how long a thread of this process could have run, and did not: proc(5), schedstat."""

    def __init__(self, thread: int) -> None:
        self._fd = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)

    def ns(self) -> int:
        return int(os.pread(self._fd, 64, 0).split()[1])

    def __enter__(self) -> _Runnable:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)
