"""SGLang's torch-native attention backend with our `attend` in the place of its two loops over a batch's sequences."""

from __future__ import annotations

import logging
from typing import TypedDict, Unpack

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sgl_lmcache.cpu.attention import attend

logger = logging.getLogger(__name__)


class Mode(TypedDict, total=False):
    """What the stock methods take by keyword."""

    scaling: float | None
    enable_gqa: bool
    causal: bool
    is_cross_attn: bool
    sliding_window_size: int | None


class NewRowBackend(TorchNativeAttnBackend):
    """Computes new rows only. Used by the scheduler thread, one forward pass at a time.

    Whatever is not plain causal self-attention (sliding windows, encoders, cross-attention) is left to the stock
    methods. Arguments and results of the two methods here are theirs.
    """

    def __init__(self, model_runner: object) -> None:
        super().__init__(model_runner)
        self._keys = KeptRows()
        self._values = KeptRows()
        logger.info("CPU mode: attention computes new rows only")

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """The length of a sequence that only fills up a batch, for data-parallel attention; not in the stock class."""
        return 1

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **mode: Unpack[Mode],
    ) -> torch.Tensor:
        tables = (req_to_token, req_pool_indices)
        if encoder_lens is not None or not mode.get("causal") or not _is_plain(mode):
            stock = super()._run_sdpa_forward_extend
            lens = (seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens)
            result: torch.Tensor = stock(query, output, k_cache, v_cache, *tables, *lens, **mode)
            return result
        self._walk(query, output, (k_cache, v_cache), tables, (seq_lens, extend_seq_lens), mode.get("scaling"))
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **mode: Unpack[Mode],
    ) -> torch.Tensor:
        tables = (req_to_token, req_pool_indices)
        if encoder_lens is not None or not _is_plain(mode):
            stock = super()._run_sdpa_forward_decode
            result: torch.Tensor = stock(query, output, k_cache, v_cache, *tables, seq_lens, encoder_lens, **mode)
            return result
        # The last row of a sequence sees all of it, which is why stock calls say `causal=False` here.
        lens = (seq_lens, torch.ones_like(seq_lens))
        self._walk(query, output, (k_cache, v_cache), tables, lens, mode.get("scaling"))
        return output

    def _walk(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        tables: tuple[torch.Tensor, torch.Tensor],
        lens: tuple[torch.Tensor, torch.Tensor],
        scaling: float | None,
    ) -> None:
        """Each sequence in turn: `tables` say where its slots are, `lens` how many tokens and new rows it has."""
        k_cache, v_cache = caches
        req_to_token, req_pool_indices = tables
        end = 0
        for request, n_tokens, n_rows in zip(req_pool_indices.tolist(), *(t.tolist() for t in lens), strict=True):
            first, end = end, end + n_rows
            slots = req_to_token[request, :n_tokens]
            first_slot = first_of_consecutive(slots)
            keys = self._keys.read(k_cache, slots, first_slot).to(query.dtype)
            values = self._values.read(v_cache, slots, first_slot).to(query.dtype)
            attend(query[first:end], output[first:end], keys, values, scaling)


class KeptRows:
    """Reads a sequence's keys (or values) in place, or gathers them into memory that it keeps for the next time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, cache: torch.Tensor, slots: torch.Tensor, first_slot: int | None) -> torch.Tensor:
        """`cache[slots]`, valid until the next call; in place if `first_slot` says that the slots are consecutive."""
        n_tokens = slots.shape[0]
        if first_slot is not None:
            return cache[first_slot : first_slot + n_tokens]
        nbytes = n_tokens * cache[0].nbytes
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(2 * nbytes, dtype=torch.uint8)
        out = self._memory[:nbytes].view(cache.dtype).view(n_tokens, *cache.shape[1:])
        return torch.index_select(cache, 0, slots, out=out)


def first_of_consecutive(slots: torch.Tensor) -> int | None:
    """The first slot, if each of the others is one more than the one before it; otherwise None."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first != slots.shape[0] - 1 or not bool((slots[1:] - slots[:-1] == 1).all()):
        return None
    return first


def _is_plain(mode: Mode) -> bool:
    return not mode.get("is_cross_attn") and mode.get("sliding_window_size") is None
