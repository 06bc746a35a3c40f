"""An engine over tiers that answer when they are told to: for tests of what moves between host memory and them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hicache import Engine, LowerTier, SpillStats, Ticket, Verdict
from radix import Index
from tests.support.clock import Clock
from tests.support.tiers import FaultyTier, MemoryTier, split

TIMEOUT_S = 5.0


@dataclass(eq=False)
class Rig:
    """An engine over a slab whose pages hold their keys. writes: a tier for each, with this write policy.

    tenants: those with a quota below from the start.
    """

    n_slots: int = 32
    batch_pages: int = 2
    fetch_only_if_faster: bool = False
    max_leased_share: float = 1.0
    ticket_timeout_s: float = TIMEOUT_S
    writes: tuple[str, ...] = ("through",)
    tenants: tuple[str, ...] = ()
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.slab = np.zeros((self.n_slots, 32), np.uint8)
        self.memories = [MemoryTier(self.slab, 1000) for _ in self.writes]
        self.tiers = [FaultyTier(memory) for memory in self.memories]
        self.engine = Engine(
            Index(1024, n_groups=4),
            self.n_slots,
            clock=self.clock,
            ticket_timeout_s=self.ticket_timeout_s,
            max_leased_share=self.max_leased_share,
            tiers=[LowerTier(tier, write) for tier, write in zip(self.tiers, self.writes, strict=True)],
            batch_pages=self.batch_pages,
            tenants=self.tenants,
            fetch_only_if_faster=self.fetch_only_if_faster,
        )

    @property
    def memory(self) -> MemoryTier:
        """The first tier's store."""
        return self.memories[0]

    @property
    def tier(self) -> FaultyTier:
        return self.tiers[0]

    @property
    def spills(self) -> SpillStats:
        """What the first tier has been given."""
        assert self.engine.below is not None
        return self.engine.below.spills[0].stats

    def write_back(self, keys: bytes, parent: bytes | None = None) -> None:
        """Down to host memory, and offered to the tiers as their policies say."""
        offload = self.engine.begin_offload(keys, parent)
        if offload is not None:
            for position, slot in zip(offload.positions, offload.slots, strict=True):
                self.slab[slot] = np.frombuffer(split(keys)[position], np.uint8)
            self.engine.finish_offload(offload, landed=True)

    def agree(self) -> None:
        self.engine.tick()
        self.engine.follow(self.engine.report(decides=True))
        self.engine.check_invariants()

    def settle(self) -> None:
        """Whatever has been asked for ends, if the tiers let it."""
        for _ in range(100):
            if not self.engine.is_pending:
                return
            self.agree()
        raise AssertionError("something is under way for ever")

    def put(self, position: int, keys: bytes) -> None:
        """Into the store of one tier, and nowhere else."""
        self.memories[position].put(keys, split(keys))

    def store_below_only(self, keys: bytes) -> None:
        """In the first tier, and nowhere else."""
        self.write_back(keys)
        self.agree()
        assert self.spills.failed == 0
        self.engine.reset()

    def n_stored(self, keys: bytes) -> list[int]:
        """How many pages at the head of a path the store of each tier has."""
        return [memory.exists(keys).result() for memory in self.memories]

    def holds(self, keys: bytes) -> int:
        """How many pages host memory would promise, each with the right bytes."""
        n_pages = self.engine.lookup(keys)
        rows = self.engine.index.match(keys)[:n_pages]
        assert [self.slab[slot].tobytes() for slot in self.engine.index.slots(rows)] == split(keys)[:n_pages]
        return n_pages


def waits(ticket: Ticket) -> bool:
    return ticket.verdict is Verdict.WAIT
