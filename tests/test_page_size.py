from types import SimpleNamespace

import pytest
import torch

from sgl_lmcache.errors import RefusedError
from sgl_lmcache.page_size import check_page_size, choose_page_size, kv_nbytes_per_token


@pytest.mark.parametrize(
    ("token_nbytes", "page_size"),
    [
        (24_576, 16),  # Qwen3 of 12 layers, 8 KV heads of 64, bf16
        (131_072, 16),  # a 70B model on one rank: 2 MiB at the smallest size
        (8_192, 16),  # exactly 128 KiB
        (8_191, 32),
        (4_096, 32),
        (2_048, 64),
        (64, 64),  # never more than 64 tokens, however small the page
    ],
)
def test_the_smallest_size_that_makes_a_page_worth_moving(token_nbytes: int, page_size: int) -> None:
    assert choose_page_size(token_nbytes) == page_size


def test_an_explicit_size_below_16_is_refused_with_what_to_do() -> None:
    with pytest.raises(RefusedError, match=r"--page-size 8 is below 16 tokens; leave it out"):
        check_page_size(8)
    check_page_size(16)
    check_page_size(128)


def config(arch: str) -> SimpleNamespace:
    return SimpleNamespace(
        attention_arch=SimpleNamespace(name=arch),
        dtype=torch.bfloat16,
        num_hidden_layers=12,
        head_dim=64,
        v_head_dim=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        get_num_kv_heads=lambda tp_size: max(1, 8 // tp_size),
    )


@pytest.mark.parametrize(
    ("arch", "dtype", "tp_size", "nbytes"),
    [
        ("MHA", "auto", 1, 12 * 8 * 128 * 2),
        ("MHA", "auto", 4, 12 * 2 * 128 * 2),
        ("MHA", "auto", 16, 12 * 1 * 128 * 2),
        ("MHA", "fp8_e4m3", 1, 12 * 8 * 128),
        ("MLA", "auto", 4, 12 * 576 * 2),
    ],
)
def test_kv_bytes_a_token(arch: str, dtype: str, tp_size: int, nbytes: int) -> None:
    assert kv_nbytes_per_token(config(arch), dtype, tp_size) == nbytes
