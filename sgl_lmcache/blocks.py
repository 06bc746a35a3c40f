"""The keys of a request's blocks, for a recording: those of HBM's part, of the tail behind it, and of what neither has.

A block's last page names the whole prefix up to there, so one key a block is enough. The keys of the tail have been
computed when the request was matched. Those of pages in HBM are in the index, or else in SGLang's tree, which gives
the keys of all pages and takes ten times as long. And a match leaves out what SGLang computes anew in any case: the
prompt's last token, and what a request wants the logprobs of; the blocks there are hashed here, as SGLang does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from radix import KEY_NBYTES, Index
from sgl_lmcache.keys import to_blob, to_hashes
from sgl_lmcache.record import pages_of_block

if TYPE_CHECKING:
    from sgl_lmcache.wrapper import Tail


def block_ends(tail: Tail, index: Index, tree_core: Any, page_size: int) -> bytes:
    """The keys of the last pages of a prompt's full blocks, in order. The prompt has just been matched."""
    step = pages_of_block(page_size)
    n_pages = len(tail.req.origin_input_ids) // (step * page_size) * step
    n_head, n_tail = tail.device_hit_len // page_size, len(tail.keys) // KEY_NBYTES
    ends = _head_ends(tail, index, tree_core, step) + every(tail.keys, step, n_before=n_head)
    if n_head + n_tail < n_pages:
        ends += every(unmatched(tail, n_head + n_tail, n_pages, page_size), step, n_before=n_head + n_tail)
    return ends[: n_pages // step * KEY_NBYTES]


def every(keys: bytes, step: int, *, n_before: int) -> bytes:
    """Of keys that have so many before them each `step`-th, counted from the first of all."""
    return np.frombuffer(keys, f"V{KEY_NBYTES}")[step - 1 - n_before % step :: step].tobytes()


def _head_ends(tail: Tail, index: Index, tree_core: Any, step: int) -> bytes:
    if tail.anchor is None:
        return b""
    row = index.row_of(tail.anchor)
    if row is not None:
        return index.keys_of(index.path(row)[step - 1 :: step])
    node = tail.req.last_node
    return to_blob([*tree_core.get_prefix_hash_values(node), *tree_core.get_hash_values(node)][step - 1 :: step])


def unmatched(tail: Tail, first: int, end: int, page_size: int) -> bytes:
    """The keys of the prompt's pages first .. end, where `first` is the one behind all that were matched."""
    req = tail.req
    above = tail.keys[-KEY_NBYTES:] or tail.anchor
    tokens = req.origin_input_ids[first * page_size : end * page_size]
    key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
    return to_blob(get_storage_hash_str(key, to_hashes(above, 1)[0] if above else None, page_size=page_size))
