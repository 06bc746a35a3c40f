import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transfer.copy_cases import LAYOUTS, Batch, Bytes, pool_bytes, random_batch, random_pool, random_slab
from transfer import kernels
from transfer.copies import Copy, DevicePool
from transfer.cpu import CpuCopies
from transfer.errors import CopyError, LayoutError
from transfer.layout import PageLayout
from transfer.slab import Slab

N_PAGES, N_SLOTS = 9, 7
PACKED = LAYOUTS["packed NHD"]


@dataclass
class Rig:
    layout: PageLayout
    pool: DevicePool
    slab: Slab
    copies: CpuCopies

    def payload(self) -> Bytes:
        return self.slab.array[:, : self.layout.page_nbytes]


Rigs = Callable[..., Rig]


@pytest.fixture
def rig() -> Iterator[Rigs]:
    rigs: list[Rig] = []

    def make(layout: PageLayout = PACKED, n_threads: int = 1) -> Rig:
        pool, slab = random_pool(layout, N_PAGES), random_slab(layout, N_SLOTS)
        rigs.append(Rig(layout, pool, slab, CpuCopies(pool, layout, slab, n_threads=n_threads)))
        return rigs[-1]

    yield make
    for made in rigs:
        made.copies.close()
        made.slab.close()


def batch_of(n: int, seed: int = 2) -> Batch:
    return random_batch(n, n_pages=N_PAGES, n_slots=N_SLOTS, seed=seed)


class Gate:
    """Stands before the compiled copy: each call of a copy thread needs a permit, so a test decides how far it gets."""

    def __init__(self) -> None:
        names = (f"sgl-lmcache-copy-{lane}-{i}" for lane in ("offload", "restore") for i in range(3))
        self.permits = {name: threading.Semaphore(0) for name in names}

    def open(self, n_calls: int, lane: str = "") -> None:
        """Lets each thread (of one lane) make that many more calls."""
        for name, permits in self.permits.items():
            if lane in name:
                permits.release(n_calls)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, copy_rows = Gate(), kernels.copy_rows

    def gated(*arguments: np.ndarray) -> None:
        gate.permits[threading.current_thread().name].acquire()
        copy_rows(*arguments)

    monkeypatch.setattr(kernels, "copy_rows", gated)
    yield gate
    gate.open(1_000)  # a failed test leaves no thread behind that close() would wait for


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, N_SLOTS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_survive_both_directions(rig: Rigs, name: str, n: int, n_threads: int) -> None:
    r = rig(LAYOUTS[name], n_threads)
    device, host, batch = pool_bytes(r.pool), r.slab.array.copy(), batch_of(n)
    r.copies.offload(batch.pages, batch.slots).wait()
    host[batch.slots, : r.layout.page_nbytes] = device[batch.pages]
    assert np.array_equal(r.slab.array, host), "exactly the named slots changed, and no padding"
    assert np.array_equal(pool_bytes(r.pool), device)

    targets = batch_of(n, seed=3).pages
    r.copies.restore(targets, batch.slots).wait()
    expected = device.copy()
    expected[targets] = device[batch.pages]
    assert np.array_equal(pool_bytes(r.pool), expected), "exactly the named pages changed"
    assert np.array_equal(r.slab.array, host)


def test_the_view_reads_what_the_forward_wrote(rig: Rigs) -> None:
    r = rig()
    r.copies.offload(np.array([4]), np.array([1], dtype=np.int32)).wait()
    view = r.layout.view(r.slab.tensor)
    for layer in range(r.layout.n_layers):
        for half, buffer in enumerate((r.pool.k[layer], r.pool.v[layer])):
            assert torch.equal(view[1, layer, half].view(torch.uint8), buffer[64:80].view(torch.uint8))


def test_no_pages_is_done_at_once(rig: Rigs) -> None:
    r, none = rig(), batch_of(0)
    offload, restore = r.copies.offload(none.pages, none.slots), r.copies.restore(none.pages, none.slots)
    assert offload.done()
    assert restore.done()
    offload.wait()
    restore.wait_layer(r.layout.n_layers - 1)
    assert offload.failed is restore.failed is None


def test_one_slot_may_be_restored_to_several_pages(rig: Rigs) -> None:
    r = rig()
    r.copies.restore(np.array([2, 5, 6]), np.array([3, 3, 3], dtype=np.int32)).wait()
    assert (pool_bytes(r.pool)[[2, 5, 6]] == r.payload()[3]).all()


def test_the_callers_arrays_are_free_after_the_call(rig: Rigs, gate: Gate) -> None:
    r, batch = rig(), batch_of(3)
    pages, slots = batch.pages.copy(), batch.slots.copy()
    copy = r.copies.offload(pages, slots)
    pages[:], slots[:] = 0, 0
    gate.open(1)
    copy.wait()
    assert np.array_equal(r.payload()[batch.slots], pool_bytes(r.pool)[batch.pages])


@pytest.mark.parametrize("n_threads", [1, 2])
def test_layers_arrive_in_order_and_are_in_place_when_waited_for(rig: Rigs, gate: Gate, n_threads: int) -> None:
    r, batch = rig(LAYOUTS["MLA"], n_threads), batch_of(4)
    before, source = pool_bytes(r.pool), r.payload()[batch.slots]
    nbytes = r.layout.layer_nbytes
    copy = r.copies.restore(batch.pages, batch.slots)
    for layer in range(r.layout.n_layers):
        assert not copy.done()
        assert np.array_equal(pool_bytes(r.pool)[:, layer * nbytes :], before[:, layer * nbytes :])
        gate.open(1)
        copy.wait_layer(layer)
        arrived = (layer + 1) * nbytes
        assert np.array_equal(pool_bytes(r.pool)[batch.pages, :arrived], source[:, :arrived])
    copy.wait()
    assert copy.done()


def test_waiting_for_a_layer_blocks_until_it_is_there(rig: Rigs, gate: Gate) -> None:
    r, batch = rig(), batch_of(4)
    copy = r.copies.restore(batch.pages, batch.slots)
    seen: list[bool] = []

    def forward() -> None:
        copy.wait_layer(1)
        seen.append(np.array_equal(pool_bytes(r.pool)[batch.pages], r.payload()[batch.slots]))

    thread = threading.Thread(target=forward)
    thread.start()
    gate.open(1)
    copy.wait_layer(0)
    assert not seen
    gate.open(1)
    thread.join()
    assert seen == [True]


def test_restores_do_not_queue_behind_offloads(rig: Rigs, gate: Gate) -> None:
    r, batch = rig(), batch_of(2)
    offload = r.copies.offload(batch.pages, batch.slots)
    other = batch_of(4)
    restore = r.copies.restore(other.pages[2:], other.slots[2:])
    gate.open(r.layout.n_layers, lane="restore")
    restore.wait()
    assert not offload.done()
    gate.open(1, lane="offload")
    offload.wait()


def test_quiesce_waits_for_both_directions(rig: Rigs, gate: Gate) -> None:
    r, batch = rig(), batch_of(4)
    copies = [
        r.copies.offload(batch.pages[:2], batch.slots[:2]),
        r.copies.restore(batch.pages[2:], batch.slots[2:]),
        r.copies.offload(batch.pages[:2], batch.slots[:2]),
    ]
    quiet = threading.Event()

    def quiesce() -> None:
        r.copies.quiesce()
        quiet.set()

    thread = threading.Thread(target=quiesce)
    thread.start()
    gate.open(2, lane="offload")
    copies[2].wait()
    assert not quiet.is_set()
    gate.open(r.layout.n_layers, lane="restore")
    thread.join()
    assert all(copy.done() for copy in copies)


def test_close_completes_what_is_queued_and_refuses_more(rig: Rigs, gate: Gate) -> None:
    r, batch = rig(), batch_of(5)
    queued = [r.copies.offload(batch.pages[i : i + 1], batch.slots[i : i + 1]) for i in range(5)]
    assert not any(copy.done() for copy in queued)
    gate.open(5)
    r.copies.close()
    r.copies.close()
    assert all(copy.done() for copy in queued)
    assert np.array_equal(r.payload()[batch.slots], pool_bytes(r.pool)[batch.pages])
    with pytest.raises(CopyError, match="closed"):
        r.copies.offload(batch.pages, batch.slots)
    with pytest.raises(CopyError, match="closed"):
        r.copies.restore(batch.pages, batch.slots)
    r.copies.quiesce()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("sgl-lmcache-copy-")]


BAD_BATCHES = [
    ([N_PAGES], [0], "Page 9 is outside"),
    ([0, -1], [0, 1], "Page -1 is outside"),
    ([0], [N_SLOTS], "Slot 7 is outside"),
    ([0, 1], [0, -2], "Slot -2 is outside"),
    ([0, 1], [0], "same length"),
    ([[0]], [[0]], "1-D"),
    ([0.5], [0], "must be integers"),
]


@pytest.mark.parametrize(("pages", "slots", "sentence"), BAD_BATCHES)
def test_a_bad_batch_is_refused_before_anything_is_queued(
    rig: Rigs, pages: list[int], slots: list[int], sentence: str
) -> None:
    r = rig()
    device, host = pool_bytes(r.pool), r.slab.array.copy()
    for start in (r.copies.offload, r.copies.restore):
        with pytest.raises(ValueError, match=sentence):
            start(np.array(pages), np.array(slots))
    r.copies.quiesce()
    assert np.array_equal(r.slab.array, host)
    assert np.array_equal(pool_bytes(r.pool), device)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_failing_copy_is_carried_by_its_batch_and_its_thread_lives_on(
    rig: Rigs, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    r, batch = rig(n_threads=n_threads), batch_of(4)
    fault = MemoryError("injected")

    def failing(*_: np.ndarray) -> None:
        raise fault

    with monkeypatch.context() as broken:
        broken.setattr(kernels, "copy_rows", failing)
        offload = r.copies.offload(batch.pages, batch.slots)
        restore = r.copies.restore(batch.pages, batch.slots)
        r.copies.quiesce()
    for copy in (offload, restore):
        assert copy.done()
        assert copy.failed is fault
        with pytest.raises(CopyError) as caught:
            copy.wait()
        assert caught.value.__cause__ is fault
    with pytest.raises(CopyError, match="Layer 0 will not arrive"):
        restore.wait_layer(0)

    r.copies.offload(batch.pages, batch.slots).wait()
    assert np.array_equal(r.payload()[batch.slots], pool_bytes(r.pool)[batch.pages])


def test_what_does_not_match_the_layout_is_refused() -> None:
    slab = random_slab(PACKED, 1)
    pool = random_pool(PACKED, 2)
    refused: list[tuple[DevicePool, PageLayout, str]] = [
        (random_pool(LAYOUTS["HND"], 2), PACKED, "does not match"),
        (DevicePool(pool.k, (), False, 16), PACKED, "layers"),
        (DevicePool(pool.k, pool.v, False, 8), PACKED, "8-token pages"),
        (DevicePool(tuple(k.view(torch.float16) for k in pool.k), pool.v, False, 16), PACKED, "float16"),
        (DevicePool(tuple(k[:, :1] for k in pool.k), pool.v, False, 16), PACKED, "does not match rows"),
        (DevicePool(tuple(k[16:] for k in pool.k), pool.v, False, 16), PACKED, "does not match rows"),
        (DevicePool(pool.k, tuple(torch.cat([v, v], 2)[..., ::2] for v in pool.v), False, 16), PACKED, "contiguous"),
        (random_pool(LAYOUTS["padded NHD"], 2), LAYOUTS["padded NHD"], "Slots of"),
        (DevicePool(tuple(k.to("meta") for k in pool.k), pool.v, False, 16), PACKED, "meta"),
    ]
    for wrong, layout, sentence in refused:
        with pytest.raises(LayoutError, match=sentence):
            CpuCopies(wrong, layout, slab)
    with pytest.raises(ValueError, match="n_threads"):
        CpuCopies(pool, PACKED, slab, n_threads=0)
    slab.close()


@dataclass
class InFlight:
    copy: Copy
    pages: set[int]
    slots: set[int]


Starts = st.lists(st.tuples(st.booleans(), st.integers(0, N_SLOTS), st.integers(0, 2**16)), max_size=25)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(starts=Starts, name=st.sampled_from(sorted(LAYOUTS)), n_threads=st.integers(1, 3))
def test_many_batches_in_flight_move_the_right_bytes(
    rig: Rigs, starts: list[tuple[bool, int, int]], name: str, n_threads: int
) -> None:
    """Against two plain arrays. As the contract asks, what a batch touches is left alone until it is done."""
    r = rig(LAYOUTS[name], n_threads)
    device, host = pool_bytes(r.pool), r.slab.array.copy()
    payload = host[:, : r.layout.page_nbytes]
    in_flight: list[InFlight] = []
    for is_offload, n, seed in starts:
        batch = batch_of(n, seed)
        pages, slots = set(batch.pages.tolist()), set(batch.slots.tolist())
        for other in in_flight:
            if other.pages & pages or other.slots & slots:
                other.copy.wait()
        if is_offload:
            payload[batch.slots] = device[batch.pages]
            copy: Copy = r.copies.offload(batch.pages, batch.slots)
        else:
            device[batch.pages] = payload[batch.slots]
            copy = r.copies.restore(batch.pages, batch.slots)
        in_flight = [other for other in in_flight if not other.copy.done()]
        in_flight.append(InFlight(copy, pages, slots))
    r.copies.quiesce()
    assert all(other.copy.done() and other.copy.failed is None for other in in_flight)
    assert np.array_equal(r.slab.array, host)
    assert np.array_equal(pool_bytes(r.pool), device)
