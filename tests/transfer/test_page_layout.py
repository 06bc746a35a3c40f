import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.transfer.copy_cases import LAYOUTS, random_slab
from transfer.errors import LayoutError
from transfer.layout import PageLayout


def test_sizes_of_a_page_that_fills_its_slot() -> None:
    layout = PageLayout(12, 16, 8, 64, 64, torch.bfloat16, "NHD")
    assert layout.k_nbytes == layout.v_nbytes == 16_384
    assert layout.layer_nbytes == 32_768
    assert layout.page_nbytes == layout.slot_nbytes == 393_216
    assert layout.is_packed


def test_sizes_of_a_page_that_is_padded() -> None:
    layout = PageLayout(3, 5, 3, 7, 7, torch.bfloat16, "NHD")
    assert layout.page_nbytes == 3 * 2 * 5 * 3 * 7 * 2
    assert layout.slot_nbytes == 4096
    assert not layout.is_packed


def test_mla_has_one_plane_a_layer() -> None:
    layout = PageLayout(4, 16, 1, 576, 0, torch.bfloat16, "MLA")
    assert layout.v_nbytes == 0
    assert layout.page_nbytes == 4 * 16 * 576 * 2


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [16, 5])
def test_a_layer_of_the_view_is_a_flashinfer_paged_cache(order: str, page_size: int) -> None:
    utils = pytest.importorskip("flashinfer.utils")
    layout = PageLayout(3, page_size, 2, 32, 32, torch.float16, order)  # type: ignore[arg-type]
    slab = random_slab(layout, 6)
    n_chunk = layout.k_nbytes
    for layer in range(layout.n_layers):
        k, v = utils._unpack_paged_kv_cache(layout.view(slab.tensor)[:, layer], order)
        block = (page_size, 2, 32) if order == "NHD" else (2, page_size, 32)
        assert k.shape == v.shape == (6, *block)
        for tensor, first in ((k, layer * 2 * n_chunk), (v, layer * 2 * n_chunk + n_chunk)):
            assert tensor.data_ptr() == slab.address + first, "FlashInfer's view shares the slab's memory"
            for slot in range(6):
                expected = slab.array[slot, first : first + n_chunk]
                assert np.array_equal(tensor[slot].contiguous().view(torch.uint8).flatten().numpy(), expected)


def test_an_mla_view_is_the_latent_rows() -> None:
    layout = LAYOUTS["MLA"]
    slab = random_slab(layout, 3)
    view = layout.view(slab.tensor)
    assert view.shape == (3, 4, 16, 72)
    first = 2 * layout.layer_nbytes
    row = view[1, 2].contiguous().view(torch.uint8).flatten().numpy()
    assert np.array_equal(row, slab.array[1, first : first + layout.layer_nbytes])


@pytest.mark.parametrize("name", LAYOUTS)
def test_k_and_v_views_cover_each_page_once(name: str) -> None:
    layout = LAYOUTS[name]
    slab = random_slab(layout, 2)
    views = [layout.k_view(slab.tensor)] + ([layout.v_view(slab.tensor)] if layout.v_head_dim else [])
    for view in views:
        view.view(torch.uint8).fill_(7)
    assert (slab.array[:, : layout.page_nbytes] == 7).all(), "the views reach every byte of the payload"
    assert sum(view.numel() for view in views) * layout.dtype.itemsize == 2 * layout.page_nbytes


def test_the_view_is_dense_when_slots_have_no_padding() -> None:
    for layout in LAYOUTS.values():
        if layout.head_dim == layout.v_head_dim:
            slab = random_slab(layout, 2)
            assert layout.view(slab.tensor).is_contiguous() == layout.is_packed


def test_a_view_of_some_slots_starts_at_the_first_of_them() -> None:
    layout = LAYOUTS["packed NHD"]
    slab = random_slab(layout, 4)
    assert layout.view(slab.tensor[2:]).data_ptr() == slab.address + 2 * layout.slot_nbytes
    assert torch.equal(layout.view(slab.tensor[2:]).view(torch.uint8), layout.view(slab.tensor).view(torch.uint8)[2:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_heads": -1}, "n_heads must be at least 1"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"v_head_dim": 0}, "v_head_dim must be at least 1"),
        ({"order": "NDH"}, "order must be one of NHD, HND, MLA"),
        ({"order": "MLA"}, "An MLA page has n_heads 1 and v_head_dim 0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], sentence: str) -> None:
    good = PageLayout(2, 16, 2, 8, 8, torch.bfloat16, "NHD")
    with pytest.raises(LayoutError, match=sentence):
        dataclasses.replace(good, **change)  # type: ignore[arg-type]


def test_views_refuse_what_they_cannot_describe() -> None:
    uneven, mla = LAYOUTS["K wider than V"], LAYOUTS["MLA"]
    with pytest.raises(LayoutError, match="differ"):
        uneven.view(random_slab(uneven, 1).tensor)
    with pytest.raises(LayoutError, match="no V"):
        mla.v_view(random_slab(mla, 1).tensor)
    with pytest.raises(LayoutError, match="Expected a uint8 slab"):
        mla.view(torch.zeros((2, 4096), dtype=torch.int8))
    with pytest.raises(LayoutError, match="Expected a uint8 slab"):
        mla.view(torch.zeros((2, 123), dtype=torch.uint8))


def test_describe_differs_for_different_bytes_and_is_stable() -> None:
    variants = {layout.describe() for layout in LAYOUTS.values()}
    assert len(variants) == len(LAYOUTS)
    layout = PageLayout(12, 16, 8, 64, 64, torch.bfloat16, "NHD")
    assert layout.describe() == "NHD/layers=12,page=16,heads=8,dim=64,v_dim=64/bfloat16"
    swapped = PageLayout(12, 8, 16, 64, 64, torch.bfloat16, "NHD")
    assert math.prod((12, 8, 16)) == math.prod((12, 16, 8))
    assert swapped.describe() != layout.describe()
