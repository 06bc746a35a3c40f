"""The ranks of one server that hold shards of the same pages, and how they come to one answer.

Every rank runs the same scheduler on the same requests, so what follows from the calls alone is the same everywhere and
needs no message. What a rank sees only for itself (how far its copies are, what its clock says) is put into one small
vector, and the element-wise minimum over the ranks is the answer of all. One such reduction is made in a scheduler
iteration at most, and none when there is nothing to ask: its cost is a round trip between processes, whatever its size.

The vector has a fixed length, so ranks that no longer agree on anything else can still exchange it. It carries a digest
of all decisions taken so far for that case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed


class Ranks(Protocol):
    """All ranks call these in the same order, from their scheduler threads."""

    @property
    def is_first(self) -> bool:
        """Whether this rank's clock counts."""

    def minimum(self, values: Sequence[int]) -> list[int]:
        """The minimum over the ranks of each value, from -2**62 to 2**62. Blocks until every rank has called it."""


class OneRank:
    """A server of one rank: what it says is agreed."""

    is_first = True

    def minimum(self, values: Sequence[int]) -> list[int]:
        return list(values)


class GroupRanks:
    """The ranks of a process group of SGLang's with CPU tensors (gloo)."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group
        self.is_first = torch.distributed.get_rank(group) == 0
        self.n_reductions = 0

    def minimum(self, values: Sequence[int]) -> list[int]:
        self.n_reductions += 1
        vector = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(vector, op=torch.distributed.ReduceOp.MIN, group=self._group)
        agreed: list[int] = vector.tolist()
        return agreed


def ranks_of(group: torch.distributed.ProcessGroup | None) -> Ranks:
    """The ranks of SGLang's attention tensor-parallel group, over which the KV of one token is sharded."""
    if group is None or torch.distributed.get_world_size(group) == 1:
        return OneRank()
    return GroupRanks(group)
