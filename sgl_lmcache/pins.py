"""The pins of the configuration: files of token ids, turned into page keys as SGLang computes them."""

from __future__ import annotations

from pathlib import Path

import msgspec
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from hicache import Engine, PinError
from sgl_lmcache.config import Config, TokenIds
from sgl_lmcache.errors import StartError
from sgl_lmcache.keys import to_blob


def apply_pins(engine: Engine, config: Config, *, page_size: int, is_eagle: bool) -> None:
    """Set all pins of a configuration. Raises `StartError` with one sentence."""
    for position, pin in enumerate(config.pins):
        key = f"pins[{position}]"
        keys = page_keys(_token_ids(Path(pin.tokens), key), pin.salt, page_size=page_size, is_eagle=is_eagle)
        if not keys:
            raise StartError(
                f"sgl_lmcache: {key}.tokens: {pin.tokens} has less than a page of {page_size} tokens, so there is "
                "nothing to pin; give it more, or remove it."
            )
        try:
            engine.pin(keys, pin.ttl)
        except PinError as error:
            raise StartError(f"sgl_lmcache: {key}: {error}.") from error


def page_keys(token_ids: list[int], salt: str, *, page_size: int, is_eagle: bool) -> bytes:
    """32 bytes for each whole page of a prompt that begins with these tokens, of requests with this cache salt."""
    key, _ = RadixKey(token_ids, None, cache_salt=salt or None).maybe_to_bigram_view(is_eagle)
    n_tokens = len(key) // page_size * page_size
    return to_blob(get_storage_hash_str(key[:n_tokens], None, page_size=page_size)) if n_tokens else b""


def _token_ids(path: Path, key: str) -> list[int]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=TokenIds)
    except OSError as error:
        raise StartError(
            f"sgl_lmcache: {key}.tokens: {path} cannot be read ({error.strerror}); name a file that it may read."
        ) from error
    except msgspec.MsgspecError as error:
        raise StartError(
            f"sgl_lmcache: {key}.tokens: {path} is not a JSON list of token ids ({error}); write one such as [1, 2, 3]."
        ) from error
