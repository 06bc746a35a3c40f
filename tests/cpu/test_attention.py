"""The attention of new rows against SGLang's stock methods, and against itself with other numbers of new rows."""

from __future__ import annotations

import inspect
import pkgutil
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_lmcache.cpu import attention, cpu_environment, install
from sgl_lmcache.cpu.attention import attend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, while it is imported
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_lmcache.cpu.backend import KeptRows, NewRowBackend, first_of_consecutive

LENS = {
    "cold": [(0, 1), (0, 2), (0, 77), (0, 600)],
    "one-row": [(1, 1), (16, 1), (700, 1)],
    "few-rows": [(5, 3), (640, 16), (512, 32)],
    "many-rows": [(1, 33), (300, 90), (513, 400)],
    "mixed": [(0, 40), (64, 1), (33, 50), (0, 1), (128, 8)],
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Batch:
    """The tensors of a forward pass over sequences with a prefix and new rows each."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    req_to_token: torch.Tensor
    prefix_lens: torch.Tensor
    new_lens: torch.Tensor

    def extend(self, backend: TorchNativeAttnBackend, **mode: object) -> torch.Tensor:
        lens = (self.prefix_lens + self.new_lens, self.prefix_lens, self.new_lens, None)
        mode = {"scaling": 0.2, "enable_gqa": self.has_gqa, "causal": True, **mode}
        result: torch.Tensor = backend._run_sdpa_forward_extend(*self._common(), *lens, **mode)
        return result

    def decode(self, backend: TorchNativeAttnBackend, **mode: object) -> torch.Tensor:
        lens = (self.prefix_lens + self.new_lens, None)
        mode = {"scaling": 0.2, "enable_gqa": self.has_gqa, "causal": False, **mode}
        result: torch.Tensor = backend._run_sdpa_forward_decode(*self._common(), *lens, **mode)
        return result

    @property
    def has_gqa(self) -> bool:
        return bool(self.query.shape[1] != self.k_cache.shape[1])

    def _common(self) -> tuple[torch.Tensor, ...]:
        output = torch.full((*self.query.shape[:2], self.v_cache.shape[2]), torch.nan, dtype=self.query.dtype)
        requests = torch.arange(len(self.new_lens))
        return self.query, output, self.k_cache, self.v_cache, self.req_to_token, requests


def make_batch(
    lens: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    scattered: bool = True,
) -> Batch:
    """`lens` are (prefix, new), `heads` (query, KV), `dims` (key, value)."""
    random = torch.Generator().manual_seed(0)
    prefix_lens, new_lens = (torch.tensor(column) for column in zip(*lens, strict=True))
    seq_lens = (prefix_lens + new_lens).tolist()
    n_slots = sum(seq_lens) + 7
    slots = torch.randperm(n_slots, generator=random) if scattered else torch.arange(3, n_slots)
    req_to_token = torch.zeros(len(lens), max(seq_lens) + 5, dtype=torch.int32)
    for request, taken in enumerate(slots[: sum(seq_lens)].split(seq_lens)):
        req_to_token[request, : len(taken)] = taken
    query = torch.randn(int(new_lens.sum()), heads[0], dims[0], generator=random).to(dtype)
    k_cache = torch.randn(n_slots, heads[1], dims[0], generator=random).to(kv_dtype or dtype)
    v_cache = torch.randn(n_slots, heads[1], dims[1], generator=random).to(kv_dtype or dtype)
    return Batch(query, k_cache, v_cache, req_to_token, prefix_lens, new_lens)


@pytest.fixture
def stock() -> TorchNativeAttnBackend:
    return object.__new__(TorchNativeAttnBackend)


@pytest.fixture
def ours() -> NewRowBackend:
    backend: NewRowBackend = object.__new__(NewRowBackend)
    backend._keys, backend._values = KeptRows(), KeptRows()
    return backend


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (3, 3)], ids=["gqa", "mqa", "mha"])
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS)
def test_extend_gives_what_the_stock_method_gives(
    stock: TorchNativeAttnBackend,
    ours: NewRowBackend,
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    scattered: bool,
    dtype: torch.dtype,
) -> None:
    batch = make_batch(lens, heads=heads, dtype=dtype, scattered=scattered)
    torch.testing.assert_close(batch.extend(ours), batch.extend(stock), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=["gqa", "mha"])
def test_decode_gives_what_the_stock_method_gives(
    stock: TorchNativeAttnBackend, ours: NewRowBackend, heads: tuple[int, int], scattered: bool
) -> None:
    batch = make_batch([(0, 1), (5, 1), (700, 1)], heads=heads, scattered=scattered)
    torch.testing.assert_close(batch.decode(ours), batch.decode(stock), rtol=1e-2, atol=1e-2)


def test_other_value_sizes_and_cache_dtypes(stock: TorchNativeAttnBackend, ours: NewRowBackend) -> None:
    lens = [(0, 9), (20, 1), (40, 50), (7, 4)]
    wide = make_batch(lens, dims=(16, 24), dtype=torch.float32)
    torch.testing.assert_close(wide.extend(ours), wide.extend(stock), rtol=1e-5, atol=1e-5)
    narrow = make_batch(lens, dtype=torch.bfloat16, kv_dtype=torch.float8_e5m2)
    torch.testing.assert_close(narrow.extend(ours), narrow.extend(stock), rtol=1e-2, atol=1e-2)


def test_latent_rows_are_keys_and_their_heads_are_values(stock: TorchNativeAttnBackend, ours: NewRowBackend) -> None:
    """Absorbed MLA: the values are the first numbers of the key rows, a view into the same memory."""
    for scattered in (True, False):
        batch = make_batch(LENS["mixed"], heads=(4, 1), dims=(160, 128), scattered=scattered)
        batch = replace(batch, v_cache=batch.k_cache[..., :128])
        torch.testing.assert_close(batch.extend(ours), batch.extend(stock), atol=1e-2, rtol=0)


def test_filling_rows_have_one_token(ours: NewRowBackend) -> None:
    assert ours.get_cpu_graph_seq_len_fill_value() == 1


def test_long_extends_are_cut_into_blocks(
    stock: TorchNativeAttnBackend, ours: NewRowBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ROW_BLOCK", 128)
    batch = make_batch([(100, 300), (128, 256), (1, 127)], dtype=torch.float32)
    torch.testing.assert_close(batch.extend(ours), batch.extend(stock), rtol=1e-5, atol=1e-5)


@given(n_prefix=st.integers(0, 5000), n_rows=st.integers(1, 5000))
def test_blocks_cover_the_new_rows_once_and_are_cut_at_fixed_positions(n_prefix: int, n_rows: int) -> None:
    blocks = list(attention._row_blocks(n_prefix, n_prefix + n_rows))
    assert [first for first, _ in blocks] == [n_prefix, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == n_prefix + n_rows
    assert all(0 < end - first <= attention.ROW_BLOCK for first, end in blocks)
    assert all(end % attention.ROW_BLOCK == 0 for _, end in blocks[:-1])


@pytest.mark.parametrize("n_rows", [1, 2, 16, 32, 33, 200, 1999])
def test_a_row_does_not_depend_on_how_many_are_computed(n_rows: int) -> None:
    random = torch.Generator().manual_seed(1)
    query = torch.randn(2000, 4, 64, generator=random).bfloat16()
    keys, values = (torch.randn(2000, 2, 64, generator=random).bfloat16() for _ in range(2))
    cold, hit = torch.empty_like(query), torch.empty_like(query[-n_rows:])
    attend(query, cold, keys, values, None)
    attend(query[-n_rows:], hit, keys, values, None)
    # Which kernels a processor's library picks by the number of rows is not ours to decide; a different algorithm,
    # or sums in another order, would change every second value in its last place.
    assert (hit != cold[-n_rows:]).float().mean() < 0.01
    torch.testing.assert_close(hit, cold[-n_rows:], rtol=2**-7, atol=2**-9)


def test_a_hit_computes_its_new_rows_only(ours: NewRowBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(tuple(query.shape))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    make_batch([(900, 1), (900, 50)], heads=(4, 2)).extend(ours)
    assert computed == [(1, 2, 2, 16), (1, 4, 50, 16)]


@pytest.mark.parametrize(
    "mode",
    [{"sliding_window_size": 8}, {"causal": False}, {"causal": False, "is_cross_attn": True}],
    ids=["window", "not-causal", "cross"],
)
def test_what_is_not_plain_goes_to_the_stock_method(
    stock: TorchNativeAttnBackend, ours: NewRowBackend, mode: dict[str, object]
) -> None:
    batch = make_batch([(30, 10), (0, 20)])
    assert torch.equal(batch.extend(ours, **mode), batch.extend(stock, **mode))
    assert not torch.allclose(batch.extend(ours, **mode), batch.extend(ours))


def test_a_sliding_window_is_kept_in_decode(stock: TorchNativeAttnBackend, ours: NewRowBackend) -> None:
    batch = make_batch([(30, 1)])
    assert torch.equal(batch.decode(ours, sliding_window_size=4), batch.decode(stock, sliding_window_size=4))
    assert not torch.allclose(batch.decode(ours, sliding_window_size=4), batch.decode(ours))


def test_rows_are_read_in_place_or_into_memory_that_is_kept() -> None:
    cache = torch.arange(40.0).view(20, 1, 2)
    rows = KeptRows()
    in_place = rows.read(cache, torch.arange(4, 9), first_of_consecutive(torch.arange(4, 9)))
    assert torch.equal(in_place, cache[4:9])
    assert in_place.data_ptr() == cache[4].data_ptr()

    slots = torch.tensor([7, 3, 11], dtype=torch.int32)
    first = rows.read(cache, slots, first_of_consecutive(slots))
    assert torch.equal(first, cache[slots])
    address = first.data_ptr()
    assert rows.read(cache, slots[:2], None).data_ptr() == address
    assert torch.equal(rows.read(cache, slots[:2], None), cache[slots[:2]])
    longer = torch.tensor([5, 1, 8, 2, 19, 0, 13, 3], dtype=torch.int32)
    assert torch.equal(rows.read(cache, longer, None), cache[longer])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_consecutive_slots_are_recognised(slots: list[int]) -> None:
    expected = slots[0] if slots == list(range(slots[0], slots[0] + len(slots))) else None
    assert first_of_consecutive(torch.tensor(slots)) == expected


@pytest.mark.parametrize("method", ["_run_sdpa_forward_extend", "_run_sdpa_forward_decode"])
def test_the_stock_signature_is_the_one_that_was_replaced(method: str) -> None:
    theirs = list(inspect.signature(getattr(TorchNativeAttnBackend, method)).parameters)
    named = [name for name in inspect.signature(getattr(NewRowBackend, method)).parameters if name != "mode"]
    mode = ["scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size"]
    assert theirs == named + mode


def test_install_replaces_the_backend_in_cpu_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, type, HookType]] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *hook: registered.append(hook))
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    install()
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    install()
    assert registered == [], "a CPU engine without our stand-in is somebody else's"
    monkeypatch.setenv("PYTHONPATH", cpu_environment({})["PYTHONPATH"])
    install()
    [(target, replacement, kind), (scheduler_init, _hook, scheduler_kind)] = registered
    assert (replacement, kind) == (NewRowBackend, HookType.REPLACE)
    assert pkgutil.resolve_name(target) is TorchNativeAttnBackend
    assert (scheduler_init.rpartition(".")[2], scheduler_kind) == ("__init__", HookType.BEFORE)
