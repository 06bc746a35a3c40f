"""The linker's contract with SGLang where a whole request would hide it."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from hicache import Movement
from sgl_lmcache.linker import Linker, Progress
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.real_cache import RealCache
from tests.support.tiers import split
from transfer.errors import CopyError

PAGE = 16


@pytest.fixture
def real() -> Iterator[RealCache]:
    cache = RealCache(n_device_pages=16, n_slots=16, page_size=PAGE)
    yield cache
    cache.close()


def rows_of(*pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def transfer(keys: bytes, *pages: int) -> list[PoolTransfer]:
    return [PoolTransfer(name=PoolName.KV, keys=[key.hex() for key in split(keys)], device_indices=rows_of(*pages))]


def store(linker: Linker, keys: bytes, *pages: int) -> None:
    linker.write_back(keys, None, rows_of(*pages))
    linker.copies.quiesce()
    for _ in range(linker.progress().n_landed):
        linker.pop_write_back(landed=True)


def test_completions_come_in_order_one_for_each_copy(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("abcd")
    assert linker.write_back(keys[:64], None, rows_of(1, 2))
    assert not linker.write_back(keys[:64], None, rows_of(1, 2))  # nothing to copy
    assert linker.write_back(keys, None, rows_of(1, 2, 3, 4))
    linker.copies.quiesce()
    assert linker.progress() == Progress(n_ended=2, n_landed=2, n_restored=0)
    for _ in range(2):
        linker.pop_write_back(landed=True)
    assert not linker.is_copying
    assert real.engine.lookup(keys) == 4


def test_an_entry_behind_a_running_copy_waits_for_it(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("abcd")
    running = mock.Mock(done=lambda: False, failed=None)
    with mock.patch.object(linker.copies, "offload", return_value=running):
        linker.write_back(keys[:64], None, rows_of(1, 2))
    linker.write_back(keys, None, rows_of(1, 2, 3, 4))
    linker.copies.quiesce()
    assert linker.progress().n_ended == 0
    running.done = lambda: True
    assert linker.progress().n_ended == 2


def test_a_failed_copy_has_ended_and_promises_nothing(real: RealCache, caplog: pytest.LogCaptureFixture) -> None:
    linker, keys = real.linker, path_keys("ab")
    failed = mock.Mock(done=lambda: True, failed=OSError("the bus is gone"))
    with mock.patch.object(linker.copies, "offload", return_value=failed):
        linker.write_back(keys, None, rows_of(1, 2))
    assert linker.progress() == Progress(n_ended=1, n_landed=0, n_restored=0)
    linker.pop_write_back(landed=False)
    assert "2 pages were not copied to host memory" in caplog.text
    assert real.engine.lookup(keys) == 0
    assert real.engine.stats.failed == 2


def test_loads_of_one_batch_are_one_copy_and_end_their_leases(real: RealCache) -> None:
    linker = real.linker
    first, second = path_keys("ab"), path_keys("xy")
    real.pool.k_buffer[0][rows_of(1, 2, 3, 4)] = torch.arange(4 * PAGE, dtype=torch.float32)[:, None, None]
    store(linker, first, 1, 2)
    store(linker, second, 3, 4)
    assert real.engine.lookup(first) == real.engine.lookup(second) == 2
    assert linker.load("first", transfer(first, 5, 6))
    assert linker.load("second", transfer(second, 7, 8))
    index = linker.start_layer_wise_loading()
    assert linker.layer_done_counter.consumer_index == index, "the forward of an embedding model never sets it"
    assert linker.start_layer_wise_loading() == -1
    assert linker.layer_done_counter.consumer_index == -1
    assert linker.finish_layer_wise_loading(index)
    assert torch.equal(real.pool.k_buffer[0][rows_of(5, 6, 7, 8)], real.pool.k_buffer[0][rows_of(1, 2, 3, 4)])
    linker.end_restores(linker.progress().n_restored)
    real.engine.reset()  # refuses while anything is leased


def test_a_load_that_was_never_started_has_not_landed(real: RealCache) -> None:
    keys = path_keys("ab")
    store(real.linker, keys, 1, 2)
    assert real.linker.finish_layer_wise_loading(-1)
    assert real.linker.load("r", transfer(keys, 3, 4))
    assert not real.linker.finish_layer_wise_loading(-1)
    assert real.linker.cancel_queued_load("r")


def test_a_page_that_has_gone_means_recompute(real: RealCache) -> None:
    assert not real.linker.load("r", transfer(path_keys("ab"), 1, 2))


def test_two_live_requests_under_one_rid_do_not_mix(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("ab")
    store(linker, keys, 1, 2)
    assert linker.load("same", transfer(keys, 3, 4))
    assert not linker.load("same", transfer(keys, 5, 6))
    assert linker.cancel_queued_load("same")
    assert not linker.cancel_queued_load("same")
    assert linker.start_layer_wise_loading() == -1


def test_a_failed_restore_does_not_raise_into_the_forward(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("ab")
    store(linker, keys, 1, 2)
    assert linker.load("r", transfer(keys, 3, 4))
    copy = mock.Mock(done=lambda: True, wait_layer=mock.Mock(side_effect=CopyError("injected")))
    with mock.patch.object(linker.copies, "restore", return_value=copy):
        index = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(index)
    linker.layer_done_counter.wait_until(0)
    assert not linker.finish_layer_wise_loading(index), "SGLang aborts the requests of the batch"
    linker.end_restores(1)
    real.engine.reset()


def test_write_backs_are_skipped_while_too_many_pages_are_unacknowledged() -> None:
    real = RealCache(n_device_pages=16, n_slots=16, page_size=PAGE, max_pending_pages=3)
    linker, first, second, third = real.linker, path_keys("abcd"), path_keys("wx"), path_keys("yz")
    linker.write_back(first, None, rows_of(1, 2, 3, 4))
    linker.copies.quiesce()
    linker.write_back(second, None, rows_of(5, 6))
    assert real.engine.stats.skipped_pressure == 2, "copied or not, only what all ranks know counts"
    for _ in range(linker.progress().n_landed):
        linker.pop_write_back(landed=True)
    assert real.engine.lookup(second) == 0
    store(linker, third, 7, 8)
    assert real.engine.lookup(third) == 2
    real.close()


def test_flush_with_a_load_queued_and_a_write_back_running(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("abcd")
    store(linker, keys[:64], 1, 2)
    assert linker.load("r", transfer(keys[:64], 5, 6))
    linker.write_back(keys, None, rows_of(1, 2, 3, 4))
    linker.reset()
    assert not linker.is_copying
    assert real.engine.lookup(keys) == 0
    assert real.engine.host.n_free == real.engine.host.n_slots


def test_a_restore_is_timed_until_a_layer_or_an_iteration_first_sees_its_end() -> None:
    clock = Clock()
    real = RealCache(n_device_pages=16, n_slots=16, page_size=PAGE, clock=clock)
    linker, engine, keys = real.linker, real.engine, path_keys("abc")
    store(linker, keys, 1, 2, 3)
    copy = mock.Mock(done=lambda: False, failed=None)
    for ends_in_layer in (True, False):
        assert engine.lookup(keys) == 3
        assert linker.load("r", transfer(keys, 4, 5, 6))
        copy.done = lambda: False
        with mock.patch.object(linker.copies, "restore", return_value=copy):
            linker.start_layer_wise_loading()
        clock.now_s += 1.0
        linker.layer_done_counter.wait_until(0)
        clock.now_s += 2.0
        copy.done = lambda: True
        if ends_in_layer:
            linker.layer_done_counter.wait_until(1)
        clock.now_s += 4.0
        linker.end_restores(linker.progress().n_restored)
        clock.now_s += 8.0
    assert list(engine.observed.movements) == [Movement("host", 3, 3.0), Movement("host", 3, 7.0)]
    real.close()


def test_a_restore_that_fails_is_not_timed(real: RealCache) -> None:
    linker, keys = real.linker, path_keys("ab")
    store(linker, keys, 1, 2)
    assert real.engine.lookup(keys) == 2
    assert linker.load("r", transfer(keys, 4, 5))
    failed = mock.Mock(done=lambda: True, failed=OSError("the bus is gone"))
    with mock.patch.object(linker.copies, "restore", return_value=failed):
        linker.start_layer_wise_loading()
    linker.end_restores(linker.progress().n_restored)
    assert not real.engine.observed.movements
