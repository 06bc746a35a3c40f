"""Copies on a machine whose "device" pool is host memory: threads around a compiled batched memcpy.

Two lanes, one a direction, so that a restore, which a forward waits for, never queues behind offloads. A lane has
`n_threads` threads, each with a queue of its own; a batch is cut by pages into one part a thread. So the parts of one
batch run side by side, and the batches of one lane stay in order. A restore runs layer by layer, one compiled call a
layer and part; an offload, which nobody reads before its end, is one call a part.

The fence costs nothing here: forwards on the CPU are synchronous, so when `offload` is called the bytes have been
written, and when `restore` is called no forward touches its destinations.

The invariant: a batch is done when each of its parts has ended, well or badly. Its progress is plain integers that
pollers read without a lock; the condition is for those who block.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from transfer import kernels
from transfer.copies import Copy, DevicePool, Int32Array, Int64Array, LayerwiseCopy, checked_batch
from transfer.errors import CopyError, LayoutError
from transfer.layout import PageLayout
from transfer.slab import Slab

MAX_DEFAULT_N_THREADS = 4
"""Two threads were measured to fill a two-core machine's bus (docs/adr/0004-page-layout-and-slab.md); 4 is a guess."""

Step = Callable[[], None]
"""One compiled call: a layer of a part, or all of it."""


class CpuCopies:
    """`Copies` between a pool of CPU tensors and a slab. Keeps the pool's and the slab's memory alive.

    `n_threads` is the number of threads a direction; by default one for each processor that the calling thread may
    use, 4 at most. Raises `LayoutError` when pool, slab and layout do not match.
    """

    def __init__(self, pool: DevicePool, layout: PageLayout, slab: Slab, *, n_threads: int | None = None) -> None:
        if n_threads is None:
            n_threads = min(MAX_DEFAULT_N_THREADS, len(os.sched_getaffinity(0)))
        if n_threads < 1:
            raise ValueError(f"n_threads must be at least 1, not {n_threads}.")
        pool.check(layout)
        slab.check(layout)
        if pool.k[0].device.type != "cpu":
            raise LayoutError(f"A pool on {pool.k[0].device} needs the copies of that device.")
        self._pool, self._array = pool, slab.array
        self._layers = _layers_of(pool, layout, slab)
        self._whole = _Planes.joined(self._layers)
        self._offloads = _Lane("offload", n_threads)
        self._restores = _Lane("restore", n_threads)

    def offload(self, pages: Int64Array, slots: Int32Array) -> Copy:
        def steps(pages: Int64Array, slots: Int64Array) -> list[Step]:
            return [partial(self._whole.offload, pages, slots)]

        return self._start(self._offloads, pages, slots, steps)

    def restore(self, pages: Int64Array, slots: Int32Array) -> LayerwiseCopy:
        def steps(pages: Int64Array, slots: Int64Array) -> list[Step]:
            return [partial(layer.restore, pages, slots) for layer in self._layers]

        return self._start(self._restores, pages, slots, steps)

    def quiesce(self) -> None:
        self._offloads.quiesce()
        self._restores.quiesce()

    def close(self) -> None:
        self._offloads.close()
        self._restores.close()

    def _start(
        self,
        lane: "_Lane",
        pages: Int64Array,
        slots: Int32Array,
        steps: Callable[[Int64Array, Int64Array], list[Step]],
    ) -> "_Batch":
        own_pages, own_slots = checked_batch(pages, slots, n_pages=self._pool.n_pages, n_slots=len(self._array))
        n = own_pages.size
        n_parts = min(lane.n_threads, n)
        bounds = [n * part // n_parts for part in range(n_parts + 1)] if n else []
        parts = [steps(own_pages[a:b], own_slots[a:b]) for a, b in itertools.pairwise(bounds)]
        return lane.start(parts)


@dataclass(frozen=True, eq=False)
class _Planes:
    """Where some planes (K or V of one layer) lie on both sides: addresses of row 0 and bytes from row to row.

    A row is a page on the device side and a slot on the slab's; a plane has `nbytes` of each.
    """

    device: Int64Array
    device_strides: Int64Array
    slab: Int64Array
    slab_strides: Int64Array
    nbytes: Int64Array

    @classmethod
    def joined(cls, parts: Sequence["_Planes"]) -> "_Planes":
        names = ("device", "device_strides", "slab", "slab_strides", "nbytes")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def offload(self, pages: Int64Array, slots: Int64Array) -> None:
        kernels.copy_rows(self.slab, self.slab_strides, slots, self.device, self.device_strides, pages, self.nbytes)

    def restore(self, pages: Int64Array, slots: Int64Array) -> None:
        kernels.copy_rows(self.device, self.device_strides, pages, self.slab, self.slab_strides, slots, self.nbytes)


def _layers_of(pool: DevicePool, layout: PageLayout, slab: Slab) -> list[_Planes]:
    """One `_Planes` a layer: K and V, or the latent rows alone for MLA."""
    layers = []
    for layer in range(layout.n_layers):
        first = slab.address + layer * layout.layer_nbytes
        planes = [(pool.k[layer].data_ptr(), layout.k_nbytes, first, slab.slot_nbytes, layout.k_nbytes)]
        if pool.v:
            v_first = first + layout.k_nbytes
            planes.append((pool.v[layer].data_ptr(), layout.v_nbytes, v_first, slab.slot_nbytes, layout.v_nbytes))
        layers.append(_Planes(*np.array(planes, dtype=np.int64).T.copy()))
    return layers


class _Batch:
    """The handle of one batch: `steps_done[p]` counts the finished steps of part p, written by its thread only."""

    def __init__(self, n_parts: int) -> None:
        self.failed: BaseException | None = None
        self._steps_done = [0] * n_parts
        self._n_running = n_parts
        self._changed = threading.Condition()

    def done(self) -> bool:
        return self._n_running == 0

    def wait(self) -> None:
        self._block_until(self.done)
        if self.failed is not None:
            raise CopyError("A copy between the device pool and the slab failed.") from self.failed

    def wait_layer(self, layer: int) -> None:
        def arrived() -> bool:
            return all(n > layer for n in self._steps_done)

        if not arrived():
            self._block_until(lambda: arrived() or self.failed is not None)
        if not arrived():
            raise CopyError(f"Layer {layer} will not arrive.") from self.failed

    def step_done(self, part: int) -> None:
        self._steps_done[part] += 1
        with self._changed:
            self._changed.notify_all()

    def part_ended(self, failure: BaseException | None) -> bool:
        """Returns True when this was the last part to end."""
        with self._changed:
            if failure is not None:
                self.failed = failure
            self._n_running -= 1
            self._changed.notify_all()
            return self._n_running == 0

    def _block_until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            with self._changed:
                self._changed.wait_for(condition)


@dataclass(frozen=True, eq=False)
class _Part:
    batch: _Batch
    number: int
    steps: list[Step]


class _Lane:
    """The threads of one direction. `start`, `quiesce` and `close` belong to one thread."""

    def __init__(self, name: str, n_threads: int) -> None:
        self.n_threads = n_threads
        self._n_pending = 0
        self._changed = threading.Condition()
        self._queues: list[queue.SimpleQueue[_Part | None]] = [queue.SimpleQueue() for _ in range(n_threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(parts,), name=f"sgl-lmcache-copy-{name}-{i}", daemon=True)
            for i, parts in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, parts: list[list[Step]]) -> _Batch:
        if not self._queues:
            raise CopyError("These copies are closed.")
        batch = _Batch(len(parts))
        if parts:
            with self._changed:
                self._n_pending += 1
        for number, (steps, parts_of_thread) in enumerate(zip(parts, self._queues, strict=False)):
            parts_of_thread.put(_Part(batch, number, steps))
        return batch

    def quiesce(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._n_pending == 0)

    def close(self) -> None:
        for parts in self._queues:
            parts.put(None)
        for thread in self._threads:
            thread.join()
        self._queues, self._threads = [], []

    def _run(self, parts: "queue.SimpleQueue[_Part | None]") -> None:
        while (part := parts.get()) is not None:
            failure: BaseException | None = None
            try:
                for step in part.steps:
                    step()
                    part.batch.step_done(part.number)
            except Exception as error:  # noqa: BLE001  the thread's outermost loop: the batch carries the failure
                failure = error
            if part.batch.part_ended(failure):
                self._retire()

    def _retire(self) -> None:
        with self._changed:
            self._n_pending -= 1
            self._changed.notify_all()
