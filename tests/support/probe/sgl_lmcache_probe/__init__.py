"""A plug-in for tests: looks into the scheduler process of a real server, and changes nothing unless it is asked to.

The folder above this package holds a hand-made `*.dist-info`, so putting it on `PYTHONPATH` installs the plug-in for
one server. It works through a folder that the environment variable `SGL_LMCACHE_PROBE_DIR` names:

    facts-<rank>.json        written once, when the scheduler has been built: what SGLang made of its arguments
    stacks-<rank>.txt        gets the stacks of all threads when the process is sent SIGUSR1
    request                  written by a test, holding a number n; looked for once a scheduler iteration
    request-<n>.at           written by rank 0: the iteration in which all ranks answer
    answer-<n>-<rank>.json   the inspection, made on the scheduler thread between two iterations
    hold, faults.json        see `faults.py`; a flush removes `hold`

SGLang's ranks iterate in step: none is past an iteration's input before rank 0 is. So rank 0 chooses an iteration that
is not over for anybody, and the ranks' answers can be compared.

Hooks on our classes are set when a scheduler is about to be built, and only if it runs our backend: in SGLang's other
processes, and in a stock server, none of our modules is imported for it.

`SGL_LMCACHE_PROBE_FREE_NBYTES` is what our cache finds free of this machine's memory, so that a host tier sized from it
takes no more than a test may.

`SGL_LMCACHE_PROBE_TIMES=1` turns on `times.py`, which measures our entry points on the scheduler thread, and turns off
what would be measured with them: following every page, and checking invariants all along.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_lmcache_probe.inspection import Probe

DIRECTORY_VARIABLE = "SGL_LMCACHE_PROBE_DIR"
FREE_VARIABLE = "SGL_LMCACHE_PROBE_FREE_NBYTES"
TIMES_VARIABLE = "SGL_LMCACHE_PROBE_TIMES"

DEFAULT_GC_THRESHOLD = (700, 10, 10)
"""Python's own, from which `sitecustomize.py` departs while SGLang's modules are imported."""

_probe: Probe | None = None


def register() -> None:
    """Entry point. Hooks nothing in a process whose environment names no folder."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    gc.set_threshold(*DEFAULT_GC_THRESHOLD)
    if DIRECTORY_VARIABLE not in os.environ:
        return
    scheduler_init = "sglang.srt.managers.scheduler.Scheduler.__init__"
    HookRegistry.register(scheduler_init, _before_scheduler, HookType.BEFORE)
    HookRegistry.register(scheduler_init, _after_scheduler, HookType.AFTER)


def directory() -> Path:
    return Path(os.environ[DIRECTORY_VARIABLE])


def rank_of_this_process() -> int:
    """Its number among the server's schedulers, whatever they share out: the model or the requests."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(parallel.tp_rank if parallel.tp_size > 1 else parallel.dp_rank or 0)


def write_json(path: Path, value: Any) -> None:
    """Whoever finds the file finds it whole."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


def _before_scheduler(*_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.runtime_context import get_memory

    if get_memory().radix_cache_backend != "sgl_lmcache":
        return
    from sgl_lmcache_probe import inspection, times

    global _probe
    measuring = os.environ.get(TIMES_VARIABLE) == "1"
    if measuring:
        times.register_hooks()
    _probe = inspection.register_hooks(rank_of_this_process(), watching=not measuring)
    if FREE_VARIABLE in os.environ:
        HookRegistry.register("sgl_lmcache.memory.read_memory", _read_memory, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _read_memory() -> Any:
    from sgl_lmcache.memory import Memory

    free_nbytes = int(os.environ[FREE_VARIABLE])
    return Memory(free_nbytes, free_nbytes, FREE_VARIABLE)


def _after_scheduler(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends
    from sglang.srt.runtime_context import get_memory

    rank = rank_of_this_process()
    if _probe is not None:
        _probe.scheduler = scheduler
    memory = get_memory()
    facts = {
        "pid": os.getpid(),
        "backends": registered_radix_cache_backends(),
        "cache_class": type(scheduler.tree_cache).__name__,
        "page_size": scheduler.page_size,
        "enable_overlap": scheduler.enable_overlap,
        "enable_lmcache": scheduler.enable_lmcache,
        "enable_unified_cache_external_linker": memory.enable_unified_cache_external_linker,
        "enable_hierarchical_cache": scheduler.enable_hierarchical_cache,
        "radix_cache_backend": memory.radix_cache_backend,
        "max_total_num_tokens": scheduler.max_total_num_tokens,
    }
    stacks = (directory() / f"stacks-{rank}.txt").open("w")  # for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    write_json(directory() / f"facts-{rank}.json", facts)
