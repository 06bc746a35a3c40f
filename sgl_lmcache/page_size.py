"""The page size, when the user gives none.

SGLang's default is a page of one token, which would make every key, copy and slot as small as a token's KV. With our
backend and no `--page-size`, the smallest power of two from 16 to 64 is taken that makes a page at least 128 KiB, so
that a copy or a disk request is worth its fixed cost, and a partly filled page wastes as little as may be. Attention
backends that insist on another size still get it: SGLang's own resolution runs after this.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sgl_lmcache.errors import RefusedError

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

PAGE_SIZES = (16, 32, 64)
MIN_PAGE_NBYTES = 128 << 10

_KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "bf16": torch.bfloat16}


def choose_page_size(token_nbytes: int) -> int:
    """The page size in tokens for a model whose KV takes `token_nbytes` a token on one rank."""
    for page_size in PAGE_SIZES:
        if page_size * token_nbytes >= MIN_PAGE_NBYTES:
            return page_size
    return PAGE_SIZES[-1]


def check_page_size(page_size: int) -> None:
    """Raises `RefusedError` for a page too small to be worth a key and a copy of its own."""
    if page_size < PAGE_SIZES[0]:
        raise RefusedError(
            f"--page-size {page_size} is below {PAGE_SIZES[0]} tokens; leave it out to have it chosen, "
            f"or give {', '.join(map(str, PAGE_SIZES))} or more"
        )


def set_page_size(server_args: ServerArgs) -> None:
    """Fill in `page_size` before SGLang resolves its arguments. An explicit one is checked and left alone."""
    if server_args.page_size is not None:
        check_page_size(server_args.page_size)
        return
    token_nbytes = _token_nbytes(server_args)
    page_size = PAGE_SIZES[-1] if token_nbytes is None else choose_page_size(token_nbytes)
    server_args.page_size = page_size
    logger.info("sgl_lmcache: page size %d chosen (KV of %s bytes a token)", page_size, token_nbytes)


def _token_nbytes(server_args: ServerArgs) -> int | None:
    """Bytes of KV a token on one rank, read from the model's configuration; None if that cannot be read yet."""
    from sglang.srt.configs.model_config import ModelConfig

    try:
        # A private instance: SGLang keeps its own, and it must be built from resolved arguments.
        config = ModelConfig.from_server_args(server_args)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        logger.warning("sgl_lmcache: the model's configuration could not be read yet (%s)", error)
        return None
    return kv_nbytes_per_token(config, server_args.kv_cache_dtype, server_args.tp_size)


def kv_nbytes_per_token(config: ModelConfig, kv_cache_dtype: str, tp_size: int) -> int:
    """Bytes of KV one token takes on one rank, all layers."""
    dtype: Any = _KV_DTYPES.get(kv_cache_dtype, config.dtype)
    if config.attention_arch.name == "MLA":
        row = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        row = config.get_num_kv_heads(tp_size) * (config.head_dim + config.v_head_dim)
    nbytes: int = config.num_hidden_layers * row * dtype.itemsize
    return nbytes
