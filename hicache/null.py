"""A tier that holds nothing: the smallest thing that keeps the contract, and the proof that the contract is small."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

from hicache.tier import Batch, Capacity, Health, Tier, answered


class NullTier(Tier):
    """Takes every page and keeps none."""

    @property
    def name(self) -> str:
        return "null"

    def exists(self, keys: bytes) -> Future[int]:
        return answered(0)

    def load(self, batch: Batch) -> Future[int]:
        return answered(0)

    def store(self, batch: Batch) -> Future[int]:
        return answered(0)

    def touch(self, key: bytes) -> None:
        pass

    def delete(self, keys: bytes) -> Future[int]:
        return answered(0)

    def clear(self) -> Future[int]:
        return answered(0)

    def expected_load_s(self, n_pages: int) -> float:
        return 0.0

    def capacity(self) -> Capacity:
        return Capacity(used_nbytes=0, limit_nbytes=0)

    def health(self) -> Health:
        return Health(available=True, reason="")

    def stats(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass
