"""The residency table: which tiers there are, the states of a page on a tier, and every legal change of state.

    begin   ABSENT               -> INCOMING     its bytes are on their way into the tier
    commit  INCOMING             -> RESIDENT     they have arrived
    abort   INCOMING             -> ABSENT       they will not arrive
    drop    RESIDENT             -> ABSENT       evicted, lost or found damaged
    put     ABSENT or RESIDENT   -> RESIDENT     known to be there, by someone else's doing

A page has one state on each tier, and the states on different tiers are independent. Anything not in this table is an
`IllegalTransition`. Only `begin` and `commit` bring a page into host memory, because only there the index
keeps slots; `put` serves the tiers that keep their own books.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

HBM: Final = 0
HOST: Final = 1
"""The fastest two tiers; lower tiers are numbered from 2 in their configured order."""

MAX_TIERS: Final = 4
"""Two bits a tier in one byte a page."""


class State(IntEnum):
    """Of one page on one tier. The values are the two bits in the residency column."""

    ABSENT = 0
    INCOMING = 1
    RESIDENT = 2


ABSENT: Final = int(State.ABSENT)
INCOMING: Final = int(State.INCOMING)
RESIDENT: Final = int(State.RESIDENT)
"""The same as plain numbers, for the hot paths: an enum's member is slow to look up and to compare with a column."""


@dataclass(frozen=True)
class Transition:
    """A legal change of state, named for the method of `Index` that makes it."""

    name: str
    sources: tuple[State, ...]
    target: State

    @cached_property
    def source_bits(self) -> int:
        """Bit s is set if the transition may start from state s."""
        return sum(1 << state for state in self.sources)


BEGIN: Final = Transition("begin", (State.ABSENT,), State.INCOMING)
COMMIT: Final = Transition("commit", (State.INCOMING,), State.RESIDENT)
ABORT: Final = Transition("abort", (State.INCOMING,), State.ABSENT)
DROP: Final = Transition("drop", (State.RESIDENT,), State.ABSENT)
PUT: Final = Transition("put", (State.ABSENT, State.RESIDENT), State.RESIDENT)
