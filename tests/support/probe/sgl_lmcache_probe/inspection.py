"""The inspection: what a server's cache holds, and whether its books agree with SGLang's and with themselves.

It reads private attributes of our classes on purpose. What it states, a test asserts; nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from radix import HBM, HOST, ROOT, Index, Rows, State, kernels
from sgl_lmcache.pool import describe_pool
from sgl_lmcache_probe import directory, times, write_json
from sgl_lmcache_probe.faults import DISK_CALLS, Trouble
from sgl_lmcache_probe.recorder import KEY_NBYTES, Pages, Recorder, split

if TYPE_CHECKING:
    from hicache import Engine
    from sgl_lmcache.cache import TieredRadixCache
    from sgl_lmcache.linker import Linker

N_ITERATIONS_A_CHECK = 50
"""Invariants are checked on each so-maniest iteration of the scheduler, busy or idle."""

N_ENDS_REMEMBERED = 64
"""Of so many requests the inspection tells how SGLang last let go of them."""


N_ITERATIONS_AHEAD = 2
"""So far from rank 0's iteration lies the first that no rank can have passed, with one to spare."""

DELAYED_CALLS = tuple(f"sgl_lmcache.{name}" for name in times.ENTRY_POINTS)


def register_hooks(rank: int, *, watching: bool) -> Probe:
    """Of this process's only scheduler.

    watching: follow every page and check invariants all along. Without it only what is asked for costs time.
    """
    probe = Probe(rank, watching)
    hooks: list[tuple[str, Callable[..., Any], HookType]] = [
        ("sgl_lmcache.factory.build", probe.after_build, HookType.AFTER),
        ("sglang.srt.managers.scheduler.Scheduler.ingest_requests", probe.after_ingest, HookType.AFTER),
        ("transfer.cpu._Planes.offload", probe.trouble.around_offload, HookType.AROUND),
        ("transfer.cpu._Planes.restore", probe.trouble.before_restore, HookType.BEFORE),
        *(
            (f"transfer.files.System.{name}", partial(probe.trouble.around_disk, name), HookType.AROUND)
            for name in DISK_CALLS
        ),
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
            *((call, probe.trouble.before_call, HookType.BEFORE) for call in DELAYED_CALLS),
        ]
    for target, hook, hook_type in hooks:
        HookRegistry.register(target, hook, hook_type)
    return probe


@dataclass(frozen=True)
class _Request:
    """A test wants an inspection, of this iteration or the first after it."""

    number: int
    iteration: int


class Probe:
    """One per scheduler process; all of it runs on the scheduler thread. Hooked calls come in with `self` explicit."""

    def __init__(self, rank: int, watching: bool) -> None:
        self.scheduler: Any = None
        """Set when it has been built; it does not iterate before."""
        self.trouble = Trouble(directory(), rank)
        self._rank = rank
        self._watching = watching
        self._request: _Request | None = None
        self._n_answered = 0
        self._history = 0
        self._gaps = times.Gaps()
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
        pool, _layout = describe_pool(cache.token_to_kv_pool_allocator.get_kvcache(), cache.page_size)
        self._recorder = Recorder((*pool.k, *pool.v), cache.page_size)

    def around_write_back(
        self,
        write_back: Callable[..., bool],
        linker: Linker,
        keys: bytes,
        parent: bytes | None,
        device_indices: torch.Tensor,
    ) -> bool:
        copying = write_back(linker, keys, parent, device_indices)
        pages = self._recorder.pages(device_indices)
        self._recorder.inserted(keys, pages)
        if copying:
            self._recorder.copied(keys, pages, linker._write_backs[-1].offload.positions.tolist())
        return copying

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
        self.trouble.release()
        reset(linker)
        self._loads.clear()
        self._started.clear()
        self._recorder.key_of_page.clear()
        self._recorder.digests_of_key.clear()

    def after_release(self, _result: None, _cache: TieredRadixCache, req: Any, **_kwargs: Any) -> None:
        reason = req.finished_reason or req.to_finish
        self._end(req.rid, "retracted" if reason is None else type(reason).__name__)

    def after_queue_abort(self, _result: None, _cache: TieredRadixCache, handle: Any) -> None:
        self._end(handle.rid, "FINISH_ABORT")

    def _end(self, rid: str, reason: str) -> None:
        self._ended[rid] = reason
        if len(self._ended) > N_ENDS_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def after_ingest(self, _result: list[Any], scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
        """Once an iteration, also of a server that is paused. All ranks are given the same requests by then."""
        cache = scheduler.tree_cache
        self._n_iterations += 1
        self._gaps.iterated(is_busy=scheduler.last_batch is not None)
        if self._watching and self._n_iterations % N_ITERATIONS_A_CHECK == 0:
            self._n_checks += 1
            violation = _violation(cache)
            if self._first_violation is None:
                self._first_violation = violation
            self._history = _digest(self._history, cache._engine.digest, *_contents(cache._engine).values())
        self._answer(cache)

    def _answer(self, cache: TieredRadixCache) -> None:
        if self._request is None:
            self._request = self._next_request()
        if self._request is not None and self._n_iterations >= self._request.iteration:
            number, self._request = self._request.number, None
            self._n_answered = number
            write_json(directory() / f"answer-{number}-{self._rank}.json", self._inspect(cache))

    def _next_request(self) -> _Request | None:
        path = directory() / "request"
        if not path.exists():
            return None
        number = int(path.read_text())
        if number <= self._n_answered:
            return None
        appointment = directory() / f"request-{number}.at"
        if self._rank == 0:
            iteration = self._n_iterations + N_ITERATIONS_AHEAD
            write_json(appointment, iteration)
            return _Request(number, iteration)
        return _Request(number, int(appointment.read_text())) if appointment.exists() else None

    # ---- the inspection ----

    def _inspect(self, cache: TieredRadixCache) -> dict[str, Any]:
        assert cache.linker is not None
        assert cache.namespace is not None
        return {
            "violation": _violation(cache),
            "first_violation": self._first_violation,
            "n_checks": self._n_checks,
            "n_iterations": self._n_iterations,
            "digest": cache._engine.digest,
            "namespace": cache.namespace.digest,
            "contents": _contents(cache._engine),
            "history": self._history,
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
            "tainted": cache._engine.tainted,
            "tier": _tier(cache._engine),
            "n_delays": self.trouble.n_delays,
            "n_reductions": getattr(cache._ranks, "n_reductions", 0),
            "loop": self._gaps.take(),
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
    linker, below = wrapper.cache_linker, cache._engine.below
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
        "below": 0 if below is None else len(below.fetches) + sum(map(len, below.spills)),
    }


def _tier(engine: Engine) -> dict[str, int]:
    """What the first tier below host memory counts; empty without one."""
    if engine.below is None:
        return {}
    tier = engine.below.tiers[0]
    return {**tier.stats(), "available": int(tier.health().available)}


def _hbm(cache: TieredRadixCache) -> dict[str, int]:
    """Tokens."""
    allocator = cache.token_to_kv_pool_allocator
    return {
        "total": allocator.size,
        "available": allocator.available_size(),
        "evictable": cache.evictable_size(),
        "protected": cache.protected_size(),
    }


def _contents(engine: Engine) -> dict[str, int]:
    """What is where, condensed: equal on two ranks that hold the same. Not 0 when there is something."""
    index = engine.index
    rows = _rows_in_use(index)
    host = rows[index.states(rows, HOST) != State.ABSENT]
    hbm = rows[index.states(rows, HBM) != State.ABSENT]
    by_age = index._policies[HOST].members()
    return {
        "host": _digest(index.keys_of(host), index.slots(host).tobytes(), index.states(host, HOST).tobytes()),
        "host_by_age": _digest(index.keys_of(by_age)),
        "hbm": _digest(index.keys_of(hbm)),
    }


def _digest(*parts: bytes | int) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return digest.intdigest()


def _rows_in_use(index: Index) -> Rows:
    n_touched = int(index._columns.tally[kernels.N_TOUCHED])
    return np.flatnonzero(index._columns.parent[:n_touched] >= ROOT).astype(np.int32)


def _keys_in_hbm(engine: Engine) -> set[bytes]:
    index = engine.index
    in_use = _rows_in_use(index)
    resident = in_use[index.states(in_use, HBM) == State.RESIDENT]
    keys = index.keys_of(resident)
    assert len(keys) == KEY_NBYTES * len(resident)
    return set(split(keys))
