"""The inspection: what a server's cache holds, and whether its books agree with SGLang's and with themselves.

It reads private attributes of our classes on purpose. What it states, a test asserts; nothing is judged here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from radix import HBM, HOST, State, kernels
from sgl_lmcache_probe import directory, times, write_json
from sgl_lmcache_probe.recorder import KEY_NBYTES, Pages, Recorder, split

if TYPE_CHECKING:
    from hicache import Engine
    from sgl_lmcache.cache import TieredRadixCache
    from sgl_lmcache.linker import Linker

N_ITERATIONS_A_CHECK = 50
"""Invariants are checked on each so-maniest iteration of the scheduler, busy or idle."""

N_ENDS_REMEMBERED = 64
"""Of so many requests the inspection tells how SGLang last let go of them."""


def register_hooks(*, watching: bool) -> Probe:
    """Of this process's only scheduler.

    watching: follow every page and check invariants all along. Without it only what is asked for costs time.
    """
    probe = Probe(watching)
    hooks: list[tuple[str, Callable[..., Any], HookType]] = [
        ("sgl_lmcache.factory.build", probe.after_build, HookType.AFTER),
        ("sgl_lmcache.cache.TieredRadixCache.check_hicache_events", probe.after_events, HookType.AFTER),
        ("sgl_lmcache.cache.TieredRadixCache.on_release", probe.after_release, HookType.AFTER),
        ("sgl_lmcache.cache.TieredRadixCache.release_aborted_request", probe.after_queue_abort, HookType.AFTER),
    ]
    if watching:
        hooks += [
            ("sgl_lmcache.linker.Linker.write_back", probe.around_write_back, HookType.AROUND),
            ("sgl_lmcache.linker.Linker.load", probe.after_load, HookType.AFTER),
            ("sgl_lmcache.linker.Linker.start_layer_wise_loading", probe.around_start, HookType.AROUND),
            ("sgl_lmcache.linker.Linker.finish_layer_wise_loading", probe.after_finish, HookType.AFTER),
            ("sgl_lmcache.linker.Linker.reset", probe.around_reset, HookType.AROUND),
            ("transfer.cpu._Planes.offload", wait_while_held, HookType.BEFORE),
        ]
    for target, hook, hook_type in hooks:
        HookRegistry.register(target, hook, hook_type)
    return probe


def wait_while_held(*_args: Any) -> None:
    """Runs on a copy thread."""
    while (directory() / "hold").exists():
        time.sleep(0.005)


class Probe:
    """One per scheduler process; all of it runs on the scheduler thread. Hooked calls come in with `self` explicit."""

    def __init__(self, watching: bool) -> None:
        self.scheduler: Any = None
        """Set when it has been built; it does not iterate before."""
        self._watching = watching
        self._unfinished_at_reset = 0
        self._ended: dict[str, str] = {}
        self._recorder = Recorder((), 1)
        self._loads: dict[str, tuple[bytes, Pages]] = {}
        self._started: dict[int, list[tuple[bytes, Pages]]] = {}
        self._n_iterations = 0
        self._n_checks = 0
        self._first_violation: str | None = None

    # ---- hooks ----

    def after_build(self, cache: Any, *_args: Any) -> None:
        pool = cache.token_to_kv_pool_allocator.get_kvcache()
        self._recorder = Recorder((*pool.k_buffer, *pool.v_buffer), cache.page_size)

    def around_write_back(
        self,
        write_back: Callable[..., None],
        linker: Linker,
        keys: bytes,
        parent: bytes | None,
        device_indices: torch.Tensor,
    ) -> None:
        write_back(linker, keys, parent, device_indices)
        pages = self._recorder.pages(device_indices)
        self._recorder.inserted(keys, pages)
        offload = linker._write_backs[-1].offload
        if offload is not None:
            self._recorder.copied(keys, pages, offload.positions.tolist())

    def after_load(self, queued: bool, _linker: Linker, rid: str, transfers: list[Any]) -> None:
        (kv,) = transfers
        if queued:
            self._loads[rid] = (bytes.fromhex("".join(kv.keys)), self._recorder.pages(kv.device_indices))

    def around_start(self, start: Callable[[Linker], int], linker: Linker) -> int:
        started = [self._loads[rid] for rid in linker._queued]
        self._loads.clear()
        index = start(linker)
        if index >= 0:
            self._started[index] = started
        return index

    def after_finish(self, landed: bool, _linker: Linker, index: int) -> None:
        for keys, pages in self._started.pop(index, []):
            if landed:
                self._recorder.check(keys, pages)

    def around_reset(self, reset: Callable[[Linker], None], linker: Linker) -> None:
        self._unfinished_at_reset += len(linker._write_backs)
        (directory() / "hold").unlink(missing_ok=True)
        reset(linker)
        self._loads.clear()
        self._started.clear()
        self._recorder.key_of_page.clear()
        self._recorder.digest_of_key.clear()

    def after_release(self, _result: None, _cache: TieredRadixCache, req: Any, **_kwargs: Any) -> None:
        reason = req.finished_reason or req.to_finish
        self._end(req.rid, "retracted" if reason is None else type(reason).__name__)

    def after_queue_abort(self, _result: None, _cache: TieredRadixCache, handle: Any) -> None:
        self._end(handle.rid, "FINISH_ABORT")

    def _end(self, rid: str, reason: str) -> None:
        self._ended[rid] = reason
        if len(self._ended) > N_ENDS_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def after_events(self, _result: None, cache: TieredRadixCache) -> None:
        self._n_iterations += 1
        if self._watching and self._n_iterations % N_ITERATIONS_A_CHECK == 0:
            self._n_checks += 1
            violation = _violation(cache)
            if self._first_violation is None:
                self._first_violation = violation
        request = directory() / "request"
        if request.exists():
            number = request.read_text()
            request.unlink()
            write_json(directory() / f"answer-{number}.json", self._inspect(cache))

    # ---- the inspection ----

    def _inspect(self, cache: TieredRadixCache) -> dict[str, Any]:
        assert cache.linker is not None
        return {
            "violation": _violation(cache),
            "first_violation": self._first_violation,
            "n_checks": self._n_checks,
            "n_iterations": self._n_iterations,
            "stats": asdict(cache._engine.stats),
            "host": _host(cache._engine),
            "requests": _requests(self.scheduler),
            "ended": dict(self._ended),
            "unfinished_at_reset": self._unfinished_at_reset,
            "open": _open(cache),
            "hbm": _hbm(cache),
            "mirror": self._mirror(cache) if self._watching else {},
            "restored": self._recorder.restored,
            "checked": self._recorder.checked,
            "mismatched": self._recorder.mismatched,
            "times": times.measured(),
        }

    def _mirror(self, cache: TieredRadixCache) -> dict[str, int]:
        """SGLang's tree, by the pages that it holds, against the pages that the index has in HBM."""
        recorder = self._recorder
        in_tree = recorder.pages(cache.all_values_flatten()).tolist()
        known = {recorder.key_of_page[page] for page in in_tree if page in recorder.key_of_page}
        mirrored = _keys_in_hbm(cache._engine)
        return {
            "tree": len(in_tree),
            "index": len(mirrored),
            "tree_unknown": len(in_tree) - len(known),
            "tree_only": len(known - mirrored),
            "index_only": len(mirrored - known),
        }


def _violation(cache: TieredRadixCache) -> str | None:
    try:
        cache.check_invariants()
    except AssertionError as error:
        return str(error) or repr(error)
    return None


def _requests(scheduler: Any) -> dict[str, list[str]]:
    """Names of requests by what SGLang does with them now. A batch just launched counts as running."""
    batches = [scheduler.running_batch, *filter(None, [scheduler.last_batch])]
    chunked = [] if scheduler.chunked_req is None else [scheduler.chunked_req.rid]
    running = {req.rid for batch in batches for req in batch.reqs if not req.finished()}
    return {
        "waiting": [req.rid for req in scheduler.waiting_queue],
        "prefilling": chunked,
        "decoding": sorted(running.difference(chunked)),
    }


def _host(engine: Engine) -> dict[str, int]:
    return {
        "capacity": engine.host.n_slots,
        "free": engine.host.n_free,
        "incoming": engine.index.count(HOST, State.INCOMING),
        "resident": engine.host.n_resident,
        "leases": int(engine.index._columns.tally[kernels.N_LEASES]),
    }


def _open(cache: TieredRadixCache) -> dict[str, int]:
    """What is under way, or promised, or remembered for a request that has not ended. All 0 in a server at rest."""
    wrapper = cache.linker
    assert wrapper is not None
    linker = wrapper.cache_linker
    return {
        "tickets": len(cache._engine._tickets),
        "waiting": len(cache._waiting),
        "tails": len(wrapper.tails),
        "hit_markers": len(wrapper.hit_markers),
        "pending_offloads": len(wrapper.pending_offloads),
        "write_backs": len(linker._write_backs),
        "queued_loads": len(linker._queued),
        "running_loads": len(linker._running),
        "private_loads": len(wrapper.private_load_indices),
        "copying": cache._engine._n_copying,
    }


def _hbm(cache: TieredRadixCache) -> dict[str, int]:
    """Tokens."""
    allocator = cache.token_to_kv_pool_allocator
    return {
        "total": allocator.size,
        "available": allocator.available_size(),
        "evictable": cache.evictable_size(),
        "protected": cache.protected_size(),
    }


def _keys_in_hbm(engine: Engine) -> set[bytes]:
    index = engine.index
    n_touched = int(index._columns.tally[kernels.N_TOUCHED])
    in_use = np.flatnonzero(index._columns.depth[:n_touched] >= 0).astype(np.int32)
    resident = in_use[index.states(in_use, HBM) == State.RESIDENT]
    keys = index.keys_of(resident)
    assert len(keys) == KEY_NBYTES * len(resident)
    return set(split(keys))
