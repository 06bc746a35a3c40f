"""Copies that end when a test says so: no thread decides anything, so a run can be repeated and shrunk.

The bytes are moved by the real `CpuCopies`, but as late as the contract allows. An offload reads HBM only when it ends,
so a page that was unlocked or reused too early is written down wrong. A restore fills its layers when the forward
waits for them and is not done before the test ends it; until then its slots must keep their bytes, as a stream that
runs late would still read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from transfer.copies import DevicePool, Int32Array, Int64Array
from transfer.cpu import CpuCopies
from transfer.errors import CopyError
from transfer.layout import PageLayout
from transfer.slab import Slab

GARBAGE = 0xA5


@dataclass(eq=False)
class SteppedOffload:
    owner: SteppedCopies
    pages: Int64Array
    slots: Int32Array
    failed: BaseException | None = None
    ended: bool = False

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        if not self.ended:  # whoever blocks for a copy has all the time there is
            self.owner.end_offload(self.owner.offloads.index(self))
        if self.failed is not None:
            raise CopyError("The offload failed.") from self.failed


@dataclass(eq=False)
class SteppedRestore:
    owner: SteppedCopies
    pages: Int64Array
    slots: Int32Array
    promised: np.ndarray
    """The slots' bytes when the restore was started."""
    failed: BaseException | None = None
    arrived: bool = False
    ended: bool = False

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.wait_layer(0)

    def wait_layer(self, layer: int) -> None:
        if self.failed is not None:
            raise CopyError(f"Layer {layer} will not arrive.") from self.failed
        if not self.arrived:
            self.owner.inner.restore(self.pages, self.slots).wait()
            self.arrived = True


@dataclass(eq=False)
class SteppedCopies:
    """As `transfer.Copies`; the test calls `end_offload`, `end_restore` and `fail_restores`."""

    pool: DevicePool
    layout: PageLayout
    slab: Slab
    offloads: list[SteppedOffload] = field(default_factory=list)
    """Those that run, oldest first."""
    restores: list[SteppedRestore] = field(default_factory=list)
    fail_restores: bool = False
    """Whether restores started from now on fail before their first layer."""

    def __post_init__(self) -> None:
        self.inner = CpuCopies(self.pool, self.layout, self.slab, n_threads=1)

    def offload(self, pages: Int64Array, slots: Int32Array) -> SteppedOffload:
        copy = SteppedOffload(self, pages.copy(), slots.copy())
        self.offloads.append(copy)
        return copy

    def restore(self, pages: Int64Array, slots: Int32Array) -> SteppedRestore:
        copy = SteppedRestore(self, pages.copy(), slots.copy(), self.slab.array[slots].copy())
        if self.fail_restores:
            copy.failed = OSError("injected")
        self.restores.append(copy)
        return copy

    def end_offload(self, index: int, *, landed: bool = True) -> None:
        """Any of those that run may end first: lanes and streams keep an order, the contract does not."""
        copy = self.offloads.pop(index)
        if landed:
            self.inner.offload(copy.pages, copy.slots).wait()
        else:
            self.slab.array[copy.slots] = GARBAGE
            copy.failed = OSError("injected")
        copy.ended = True

    def end_restore(self, index: int) -> None:
        copy = self.restores.pop(index)
        held = self.slab.array[copy.slots]
        assert np.array_equal(held, copy.promised), "a slot was given away while a restore could still read it"
        copy.ended = True

    def quiesce(self) -> None:
        while self.offloads:
            self.end_offload(0)
        while self.restores:
            self.end_restore(0)

    def close(self) -> None:
        self.inner.close()
