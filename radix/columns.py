"""The index's memory: one row a page, one array a property.

A radix tree of Python objects costs hundreds of bytes a page and gives the garbage collector millions of objects to
walk. Here a page is a row number, and the tree is the `parent` column. Everything is allocated once, at the index's
capacity, as zeroed memory that the operating system supplies when it is first touched: nothing ever grows, so no call
ever pays for a rehash or a copy, and an index that is a tenth full costs a tenth, but for the hash table.

Edges are not stored. Rows of a run that was inserted together are adjacent, so a walk tries row + 1 first and goes to
the hash table only where the tree branches. That is what a radix tree's edges are for, without edges to split.

Row numbers are reused. Rows never handed out yet go before freed ones, which keeps runs adjacent; freed rows are a
stack linked through `parent`, and a run freed leaf first comes back in its old order.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

Rows = NDArray[np.int32]
"""Row numbers, 1-D and C-contiguous. A run of them is in path order, root side first."""

ROOT: Final = -1
"""The row above all first pages."""

NONE: Final = -1
"""No row, no slot."""


class Columns(NamedTuple):
    """All arrays of an index, as one argument of its kernels. Owned by `Index`; policies read them and write none."""

    key: NDArray[np.uint64]
    """[capacity, 4]: 32 bytes."""
    parent: NDArray[np.int32]
    """[capacity]: `ROOT` for a first page. Below it in a free row: `kernels.FREE_LINK` - the next free row."""
    depth: NDArray[np.int32]
    """[capacity]: position from the root, 0-based."""
    residency: NDArray[np.uint8]
    """[capacity]: bits 2t and 2t + 1 are the `State` on tier t."""
    slot: NDArray[np.int32]
    """[capacity]: the place in host memory, or `NONE`."""
    group: NDArray[np.uint8]
    """[capacity]: whose page it is (`Index`), the same for all pages below one first page."""
    backed: NDArray[np.uint8]
    """[capacity]: 1 if a copy of it is believed to be on a tier below host memory."""
    leases: NDArray[np.int32]
    last_use: NDArray[np.int64]
    """[capacity]: in ticks of the index's logical clock."""
    n_children: NDArray[np.int32]
    """[capacity]: rows whose parent this is."""
    tier_children: NDArray[np.int32]
    """[capacity, n_tiers]: those of them that are not ABSENT on the tier."""
    table: NDArray[np.int32]
    """[a power of two, at least 2 * capacity]: row + 1, or 0. Open addressing; a key's home is its first 8 bytes."""
    counts: NDArray[np.int64]
    """[n_tiers, 3]: rows in use, by tier and `State`."""
    held: NDArray[np.int64]
    """[n_groups, n_tiers]: rows that are not ABSENT."""
    tally: NDArray[np.int64]
    """[4]: the fields are named in `kernels.py`."""

    @property
    def nbytes(self) -> int:
        """Address space, whether touched or not."""
        return sum(column.nbytes for column in self)


def allocate(capacity: int, n_tiers: int, n_groups: int) -> Columns:
    """Columns with no row in use."""
    table_size = 1 << (2 * capacity - 1).bit_length()
    return Columns(
        key=np.zeros((capacity, 4), np.uint64),
        parent=np.zeros(capacity, np.int32),
        depth=np.zeros(capacity, np.int32),
        residency=np.zeros(capacity, np.uint8),
        slot=np.zeros(capacity, np.int32),
        group=np.zeros(capacity, np.uint8),
        backed=np.zeros(capacity, np.uint8),
        leases=np.zeros(capacity, np.int32),
        last_use=np.zeros(capacity, np.int64),
        n_children=np.zeros(capacity, np.int32),
        tier_children=np.zeros((capacity, n_tiers), np.int32),
        table=np.zeros(table_size, np.int32),
        counts=np.zeros((n_tiers, 3), np.int64),
        held=np.zeros((n_groups, n_tiers), np.int64),
        tally=np.array([0, NONE, 0, 0], np.int64),
    )


# ---- types for the compiler ----


def _array(scalar: types.Type, ndim: int = 1) -> types.Array:
    return types.Array(scalar, ndim, "C")


ROWS_T: Final = _array(types.int32)
BYTES_T: Final = _array(types.uint8)
STAMPS_T: Final = _array(types.int64)
BLOB_T: Final = types.Array(types.uint64, 2, "C", readonly=True)
COLUMNS_T: Final = types.NamedTuple(
    (
        _array(types.uint64, 2),
        ROWS_T,
        ROWS_T,
        BYTES_T,
        ROWS_T,
        BYTES_T,
        BYTES_T,
        ROWS_T,
        STAMPS_T,
        ROWS_T,
        _array(types.int32, 2),
        ROWS_T,
        _array(types.int64, 2),
        _array(types.int64, 2),
        STAMPS_T,
    ),
    Columns,
)

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(returns: types.Type, *arguments: types.Type) -> Callable[[Function], Function]:
    """Compile for exactly these types when the module is imported, or load it from the cache beside the file.

    The cache notices a change of the kernel's own file only. So what a kernel calls or takes constants from lies in its
    own file, but for what is in the types: a change of `Columns` changes every signature.

    Kernels neither allocate nor own arrays, so the compiler's reference counting is off (`_nrt`): with it, every use of
    an `inlined` function counts references to all columns, which made a loop over 2,048 rows 30 times slower.
    """
    compile_it: Any = njit(returns(*arguments), cache=True, _nrt=False)
    return lambda function: compile_it(function)


def inlined(function: Function) -> Function:
    """A part of kernels in the same file, compiled with them."""
    return njit(forceinline=True, _nrt=False)(function)  # type: ignore[no-any-return]
