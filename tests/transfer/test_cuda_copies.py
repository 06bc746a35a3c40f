"""`StridedOps` on CPU tensors against the compiled path; the streams and events around it only where a GPU is."""

import numpy as np
import pytest
import torch

from tests.transfer.copy_cases import LAYOUTS, pool_bytes, random_batch, random_pool, random_slab
from transfer.copies import DevicePool
from transfer.cpu import CpuCopies
from transfer.cuda import CudaCopies, StridedOps
from transfer.errors import CopyError, SlabError

N_PAGES, N_SLOTS = 9, 7


@pytest.mark.parametrize("staging_nbytes", [1, 10_000, 32 << 20])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_strided_ops_move_the_same_bytes_as_the_compiled_path(name: str, n: int, staging_nbytes: int) -> None:
    layout = LAYOUTS[name]
    batch = random_batch(n, n_pages=N_PAGES, n_slots=N_SLOTS)
    pages, slots = torch.from_numpy(batch.pages), torch.from_numpy(batch.slots.astype(np.int64))
    ops = StridedOps(layout, staging_nbytes=staging_nbytes)
    strided, compiled = random_pool(layout, N_PAGES), random_pool(layout, N_PAGES)
    strided_slab, compiled_slab = random_slab(layout, N_SLOTS), random_slab(layout, N_SLOTS)
    copies = CpuCopies(compiled, layout, compiled_slab)

    ops.offload(strided, pages, slots, strided_slab.tensor)
    copies.offload(batch.pages, batch.slots).wait()
    assert np.array_equal(strided_slab.array, compiled_slab.array)

    targets = random_batch(n, n_pages=N_PAGES, n_slots=N_SLOTS, seed=7).pages
    layers = list(ops.restore_layers(strided, torch.from_numpy(targets), slots, strided_slab.tensor))
    copies.restore(targets, batch.slots).wait()
    assert layers == list(range(layout.n_layers))
    assert np.array_equal(pool_bytes(strided), pool_bytes(compiled))
    copies.close()
    strided_slab.close()
    compiled_slab.close()


def test_strided_ops_restore_one_layer_a_step() -> None:
    layout = LAYOUTS["MLA"]
    pool, slab = random_pool(layout, 3), random_slab(layout, 2)
    before, source, nbytes = pool_bytes(pool), slab.array[1, : layout.page_nbytes], layout.layer_nbytes
    for layer in StridedOps(layout).restore_layers(pool, torch.tensor([2]), torch.tensor([1]), slab.tensor):
        end = (layer + 1) * nbytes
        assert np.array_equal(pool_bytes(pool)[2], np.concatenate([source[:end], before[2, end:]]))
    slab.close()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def on_gpu(pool: DevicePool) -> DevicePool:
    k, v = (tuple(tensor.cuda() for tensor in buffers) for buffers in (pool.k, pool.v))
    return DevicePool(k, v, pool.rows_are_pages, pool.page_size)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_survive_both_directions_on_a_gpu(name: str) -> None:
    layout = LAYOUTS[name]
    host_pool, slab = random_pool(layout, N_PAGES), random_slab(layout, N_SLOTS)
    pool, batch = on_gpu(host_pool), random_batch(5, n_pages=N_PAGES, n_slots=N_SLOTS)
    slab.pin()
    forward_stream = torch.cuda.Stream()
    copies = CudaCopies(pool, layout, slab, ops=StridedOps(layout), forward_stream=forward_stream)
    copies.offload(batch.pages, batch.slots).wait()
    expected = pool_bytes(host_pool)
    assert np.array_equal(slab.array[batch.slots, : layout.page_nbytes], expected[batch.pages])

    targets = random_batch(5, n_pages=N_PAGES, n_slots=N_SLOTS, seed=7).pages
    restore = copies.restore(targets, batch.slots)
    with torch.cuda.stream(forward_stream):
        restore.wait_layer(layout.n_layers - 1)
        k, v = (tuple(tensor.cpu() for tensor in buffers) for buffers in (pool.k, pool.v))
    expected[targets] = slab.array[batch.slots, : layout.page_nbytes]
    assert np.array_equal(pool_bytes(DevicePool(k, v, pool.rows_are_pages, pool.page_size)), expected)
    copies.close()
    with pytest.raises(CopyError, match="closed"):
        copies.offload(batch.pages, batch.slots)
    slab.close()


@pytest.mark.gpu
@gpu
def test_an_unpinned_slab_is_refused() -> None:
    layout = LAYOUTS["MLA"]
    slab = random_slab(layout, 1)
    with pytest.raises(SlabError, match="pinned"):
        CudaCopies(
            on_gpu(random_pool(layout, 2)),
            layout,
            slab,
            ops=StridedOps(layout),
            forward_stream=torch.cuda.Stream(),
        )
    slab.close()
