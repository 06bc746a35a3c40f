"""HBM pages are locked for their own copy only, and eviction waits for the copies that it needs, not for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sgl_lmcache.linker import Linker
from tests.support.real_cache import RealCache, request
from transfer import cpu

PAGE = 16
N_DEVICE_PAGES = 16


@pytest.fixture(params=["rust", "python"])
def real(request: pytest.FixtureRequest) -> Iterator[RealCache]:
    cache = RealCache(
        N_DEVICE_PAGES,
        64,
        page_size=PAGE,
        tree_core=request.param,
        max_pending_pages=4,
        max_len=N_DEVICE_PAGES * PAGE,
        make_copies=partial(cpu.CpuCopies, n_threads=1),  # so the first write-back is the first through the gate
    )
    yield cache
    cache.close()


@pytest.fixture
def gate() -> Iterator[threading.Semaphore]:
    """One release lets one write-back through. At the end all go through."""
    gate = threading.Semaphore(0)

    def wait(offload: Callable[..., None], *args: Any) -> None:
        gate.acquire()
        offload(*args)

    offload = cpu._Planes.offload
    with mock.patch.object(cpu._Planes, "offload", lambda *args: wait(offload, *args)):
        yield gate
        gate.release(1000)


def run(real: RealCache, number: int, n_pages: int) -> bool:
    """Whether there was room for it."""
    one = request(f"{number}", [1000 * number + token for token in range(n_pages * PAGE)] + [0])
    real.arrive(one)
    real.iterate()
    return real.admit(one) is not None


def test_pages_that_are_not_copied_are_not_locked(real: RealCache, gate: threading.Semaphore) -> None:
    with mock.patch.object(Linker, "wait_write_back", side_effect=AssertionError("a request waits for a copy")):
        assert all(run(real, number, 3) for number in range(20))
    assert real.cache.protected_size() == 2 * 3 * PAGE
    assert real.engine.stats.skipped_pressure == 18 * 3
    gate.release(1000)
    real.settle()
    assert real.cache.protected_size() == 0


def test_pages_that_are_kept_already_are_not_locked(real: RealCache, gate: threading.Semaphore) -> None:
    gate.release(1000)
    assert run(real, 0, 3)
    real.settle()
    real.cache.evict(EvictParams(num_tokens=3 * PAGE))
    assert run(real, 0, 3)  # restored, and inserted into the tree once more
    assert real.engine.stats.deduplicated == 3
    assert real.cache.protected_size() == 0


def test_eviction_waits_for_the_first_copies_only(real: RealCache, gate: threading.Semaphore) -> None:
    assert run(real, 0, 4)
    assert run(real, 1, 4)
    gate.release(1)
    assert run(real, 2, 10)
    assert real.cache.protected_size() == (4 + 10) * PAGE, "the second's pages and its own are still being copied"
