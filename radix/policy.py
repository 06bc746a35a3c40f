"""The contract of an eviction policy, and the register of those there are.

A policy orders the RESIDENT pages of one tier and proposes victims. It decides; `Index` applies. It may read all
columns of the index and writes only its own, which it allocates once, at the index's capacity.

To add one: a file with a class that keeps this contract, and a line in `POLICIES`.
"""

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from radix.columns import Columns, Rows
from radix.lru import Lru


class Policy(Protocol):
    """Told of every change to the RESIDENT pages of its tier, after the columns show it. Never called for no rows."""

    def admitted(self, rows: Rows) -> None:
        """These have become RESIDENT. They may include rows it has: they count once."""

    def touched(self, rows: Rows) -> None:
        """These, in path order, are in use now. Rows that are not RESIDENT on its tier are to be skipped."""

    def removed(self, rows: Rows) -> None:
        """These are no longer RESIDENT. Their keys and parents can still be read; the rows may be reused afterwards."""

    def victims(self, n: int, now: int) -> Rows:
        """Up to n rows to evict now, in order; the tier itself is as before. One compiled call: this is the hot path.

        A victim is RESIDENT, has no lease and a `last_use` other than `now`, and all its children that are not ABSENT
        on the tier come before it. Fewer than n only if no more can be taken.
        """

    def order(self, n: int) -> Rows:
        """The first n of all rows in line for eviction, whether they may go now or not. One compiled call."""

    def members(self) -> Rows:
        """All rows it holds, each once, first in line for eviction first. Slow: for checks."""

    def reserve(self, n_rows: int) -> None:
        """Write zeros into the memory of the first `n_rows` rows, while it holds none."""

    @property
    def nbytes(self) -> int:
        """Of its columns."""


POLICIES: Final[Mapping[str, Callable[[Columns, int], Policy]]] = {
    "lru": Lru,
}
"""By the name in the configuration; called with the index's columns and the number of the tier."""


def make_policy(name: str, columns: Columns, tier: int) -> Policy:
    """Raises ValueError, naming the known policies, for any other."""
    if name not in POLICIES:
        raise ValueError(f"unknown eviction policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](columns, tier)
