"""Attention of SGLang's torch-native backend, computed for the new rows only.

The stock backend answers an extend by running causal attention over the whole sequence, prefix included, and throwing
the prefix's rows away. A cache hit then costs as much attention as a miss, which makes the CPU useless for judging a KV
cache. Here a row is computed if and only if it is new.

Invariant: a row's numbers do not depend on how many rows are computed beside it. All ways through this file, and the
stock one, use the same `scaled_dot_product_attention`, which walks the keys in blocks from position zero. So a hit
repeats the numbers of the cold run, in bfloat16 nearly always bit for bit. A kernel of our own for few rows would be
faster still, and would round differently: that is why there is none.

What else is saved: a sequence whose slots are consecutive is read in place instead of gathered; a gather goes into
memory that is kept, because page faults on fresh memory cost several times the copy; few rows are folded over the query
heads that share a KV head, so that each key is read once. Decode is the case of one new row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

ROW_BLOCK = 1024
"""Most rows of one call behind a prefix. It bounds the mask's memory, and the work on keys that a row may not see."""

MAX_FOLDED_ROWS = 32
"""Up to here, rows are folded over the query heads of their KV head. Beyond it that gains nothing."""


def attend(
    query: torch.Tensor, output: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> None:
    """Causal attention of the last rows of one sequence.

    `query` is `[n_rows, heads, head_dim]` and `output` `[n_rows, heads, value_dim]`, written in place. `keys` and
    `values` are `[n_tokens, kv_heads, dim]` of the whole sequence: row i sees the first `n_tokens - n_rows + i + 1` of
    them. `kv_heads` divides `heads`. All are of one dtype. `scaling` None means `1 / sqrt(head_dim)`.
    """
    n_rows, n_tokens = query.shape[0], keys.shape[0]
    if n_rows == n_tokens:
        output.copy_(_sdpa(query, keys, values, scaling, is_causal=True))
    elif n_rows <= MAX_FOLDED_ROWS:
        output.copy_(_folded(query, keys, values, scaling))
    else:
        n_prefix = n_tokens - n_rows
        for first, end in _row_blocks(n_prefix, n_tokens):
            rows = slice(first - n_prefix, end - n_prefix)
            mask = _mask(end - first, end, query.dtype)
            output[rows] = _sdpa(query[rows], keys[:end], values[:end], scaling, mask=mask)


def _row_blocks(n_prefix: int, n_tokens: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions, cut at multiples of `ROW_BLOCK`, wherever the prefix ends."""
    first = n_prefix
    while first < n_tokens:
        end = min(n_tokens, (first // ROW_BLOCK + 1) * ROW_BLOCK)
        yield first, end
        first = end


def _mask(n_rows: int, n_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of the last `n_rows` of `n_tokens` positions, `[n_rows, n_tokens]`: 0 or -inf."""
    mask = torch.zeros(n_rows, n_tokens, dtype=dtype)
    mask[:, n_tokens - n_rows :] = torch.full((n_rows, n_rows), float("-inf"), dtype=dtype).triu_(1)
    return mask


def _sdpa(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """One call of the stock kernel. Tokens come first in all shapes here; the kernel wants the heads there."""
    result = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return result.squeeze(0).transpose(0, 1)


def _folded(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None) -> torch.Tensor:
    n_rows, n_heads, head_dim = query.shape
    n_tokens, n_kv_heads, value_dim = values.shape
    n_sharing = n_heads // n_kv_heads
    # Row r of query head h becomes row (h % n_sharing) * n_rows + r of KV head h // n_sharing.
    folded = query.view(n_rows, n_kv_heads, n_sharing, head_dim).permute(2, 0, 1, 3)
    folded = folded.reshape(n_sharing * n_rows, n_kv_heads, head_dim)
    mask = None if n_rows == 1 else _mask(n_rows, n_tokens, query.dtype).repeat(n_sharing, 1)
    result = _sdpa(folded, keys, values, scaling, mask=mask).reshape(n_sharing, n_rows, n_kv_heads, value_dim)
    return result.permute(1, 2, 0, 3).reshape(n_rows, n_heads, value_dim)
