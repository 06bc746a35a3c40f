"""Keys of requests with a LoRA adapter, told apart from those of a caller's own `extra_key`.

SGLang puts an adapter's id behind the caller's `extra_key`, without anything between them. So a request to the base
model whose `extra_key` is that id, which for adapters given at the start is a function of their name and path, has the
adapter's keys and is served the adapter's KV: by SGLang from HBM, and then by us from everywhere. Both forms are
rewritten here, before anybody reads them, so that no `extra_key` can spell the key of an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_lmcache import BACKEND

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def register() -> None:
    """Put the hook in place. It does nothing in a server whose cache is not ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.schedule_batch.Req.__init__", _after_request, HookType.AFTER)


def _after_request(_result: None, req: Req, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if req.extra_key is not None and get_memory().radix_cache_backend == BACKEND:
        req.extra_key = unambiguous_key(req.extra_key, req.lora_id)


def unambiguous_key(extra_key: str, lora_id: str | None) -> str:
    """`extra_key` as SGLang has made it, with the id of the adapter at its end, if there is one.

    What a caller gave comes to stand behind a slash, and an adapter's id, which has none, before it.
    """
    if lora_id is None:
        return f"/{extra_key}"
    return f"{lora_id}/{extra_key.removesuffix(lora_id)}"
