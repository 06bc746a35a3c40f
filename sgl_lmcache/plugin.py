"""The plug-in's entry point: SGLang calls `register` in every one of its processes, before it resolves arguments.

Without our flag every hook that is registered here returns at once:

- before `ServerArgs.resolve_once`: choose the page size, and stop a server whose configuration is wrong before it loads
  a model;
- before `Scheduler.__init__`: SGLang's configuration has been published, its scheduler has not read it yet. Switching
  its external-linker and LMCache flags on there makes the scheduler call the cache's prefetch, load and event methods.
  They cannot be given on the command line together with a backend of one's own;
- around the calls that bring new weights: see `sgl_lmcache.weights`;
- after `Req.__init__`: see `sgl_lmcache.adapters`;
- before the schedulers are launched, and around the scheduler's `get_internal_state`: see `sgl_lmcache.endpoints`;
- before the scheduler makes its metrics collector, and after it has read HiCache's figures: see
  `sgl_lmcache.hicache_gauges`.

SGLang logs what a plug-in raises and goes on without it, so the factory checks that the second hook has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_lmcache import BACKEND

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`. Called once a process, by SGLang."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_lmcache import adapters, cpu, endpoints, hicache_gauges, weights

    register_radix_cache_backend(BACKEND, _build)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.resolve_once", _before_resolution, HookType.BEFORE)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _before_scheduler, HookType.BEFORE)
    weights.register()
    adapters.register()
    endpoints.register()
    hicache_gauges.register()
    cpu.install()


def _before_resolution(server_args: ServerArgs) -> None:
    if server_args.radix_cache_backend != BACKEND or server_args.disable_radix_cache:
        return
    if getattr(server_args, "_resolution_finished", False):
        return
    from sgl_lmcache import seams
    from sgl_lmcache.config_file import from_environment
    from sgl_lmcache.page_size import set_page_size

    seams.require_version()
    config = from_environment()
    set_page_size(server_args)
    if config.metrics is not None:
        from sgl_lmcache.metrics_port import open_port

        open_port(config.metrics.listen)


def _before_scheduler(*_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_context, get_memory

    memory = get_memory()
    if memory.radix_cache_backend == BACKEND and not memory.disable_radix_cache:
        get_context().override(BACKEND, enable_unified_cache_external_linker=True, enable_lmcache=True)


def _build(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    from sgl_lmcache import seams

    # First: the factory's own imports may be what is missing.
    seams.require()
    from sgl_lmcache.factory import build

    return build(ctx)
