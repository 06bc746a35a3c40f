"""New weights: from the moment they come in, KV of the old ones must neither be found nor be kept.

SGLang flushes its cache after an update, but not if it is told not to, nor while requests run; and what runs on goes on
computing with what it has read before. So the cache is tainted before the first byte of a weight changes, by hooks on
the scheduler's weight updater, and stays so until everything is dropped (`TieredRadixCache.taint`).

There are six doors to new weights. Disk and IPC updates are one call each. Tensor and distributed updates are only
accepted between `begin_weight_update` and `end_weight_update`, and so is writing weights from outside (P2P, RDMA), so
for those the two ends of the session are what counts. A flush inside a session drops what there is, but does not lift
the taint: more may come. The weight checker can overwrite weights with noise. And a server whose weights' memory is
released (`release_memory_occupation`) has none until it is resumed, when it may hold anything: that is a session as
well, in which nothing may look at the weights.

An update that fails taints like one that succeeds: it may have failed half-way. What it has left is named like other
new weights, by the bits that are there when the taint ends (`namespace.weights_digest`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    from sgl_lmcache.cache import TieredRadixCache

UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
SINGLE_CALLS = ("update_weights_from_disk", "update_weights_from_ipc")


def register() -> None:
    """Put the hooks in place. They do nothing for a scheduler whose cache is not ours."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in SINGLE_CALLS:
        HookRegistry.register(f"{UPDATER}.{name}", before_update, HookType.BEFORE)
        HookRegistry.register(f"{UPDATER}.{name}", after_update, HookType.AFTER)
    HookRegistry.register(f"{UPDATER}.check_weights", before_check, HookType.BEFORE)
    HookRegistry.register(f"{UPDATER}.begin_weight_update", before_session, HookType.BEFORE)
    HookRegistry.register(f"{UPDATER}.end_weight_update", after_session, HookType.AFTER)
    HookRegistry.register(f"{UPDATER}.release_memory_occupation", after_release, HookType.AFTER)
    HookRegistry.register(f"{UPDATER}.resume_memory_occupation", after_resume, HookType.AFTER)


def before_update(updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """The weights are about to change, in one call."""
    cache = _cache_of(updater)
    if cache is not None:
        cache.taint()


def after_update(_result: Any, updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """They have changed, or not."""
    cache = _cache_of(updater)
    if cache is not None:
        cache.weights_updated(is_idle=updater.is_fully_idle(ignore_waiting=True))


def before_check(updater: SchedulerWeightUpdaterManager, request: CheckWeightsReqInput) -> None:
    """Of the checker's actions one changes the weights."""
    if request.action == "reset_tensors":
        before_update(updater)


def before_session(updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """The weights may change from now on, until `after_session`."""
    cache = _cache_of(updater)
    if cache is not None:
        cache.begin_weight_session()


def after_session(result: Any, updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """They will not change any more, if there was a session to end."""
    cache = _cache_of(updater)
    if cache is not None and result.success:
        cache.end_weight_session()
        after_update(result, updater)


def after_release(_result: Any, updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """Memory has been given back; perhaps that of the weights."""
    if _are_away(updater) and updater.memory_saver_adapter.enabled:
        before_session(updater)


def after_resume(result: Any, updater: SchedulerWeightUpdaterManager, *_args: Any) -> None:
    """Memory is there again. Inside an update session its end is what counts."""
    cache = _cache_of(updater)
    if cache is not None and not _are_away(updater) and updater._session is None:
        cache.end_weight_session()
        after_update(result, updater)


def _are_away(updater: SchedulerWeightUpdaterManager) -> bool:
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    return GPU_MEMORY_TYPE_WEIGHTS in updater.offload_tags


def _cache_of(updater: SchedulerWeightUpdaterManager) -> TieredRadixCache | None:
    from sgl_lmcache.cache import TieredRadixCache

    cache = getattr(updater.scheduler, "tree_cache", None)
    return cache if isinstance(cache, TieredRadixCache) else None
