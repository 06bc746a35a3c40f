import numpy as np
import numpy.typing as npt
import pytest

from hicache import Batch, NullTier, Tier, TierError
from tests.hicache.tier_contract import TierContract, batch, chain
from tests.support.tiers import FaultyTier, MemoryTier


class TestNullTier(TierContract):
    keeps = False

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return NullTier()


class TestMemoryTier(TierContract):
    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return MemoryTier(slab, limit_pages)


class TestFaultyTierWithoutFaults(TierContract):
    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return FaultyTier(MemoryTier(slab, limit_pages))


def faulty() -> FaultyTier:
    return FaultyTier(MemoryTier(np.zeros((64, 4096), dtype=np.uint8), 64))


def test_an_injected_fault_is_a_tier_error_and_passes() -> None:
    tier = faulty()
    tier.fail_next(1)
    with pytest.raises(TierError, match="injected"):
        tier.store(batch(2, "a")).result()
    assert tier.store(batch(2, "a")).result() == 2


def test_held_calls_take_effect_when_released() -> None:
    tier = faulty()
    tier.hold()
    stored = tier.store(batch(3, "a"))
    found = tier.exists(chain(3, "a")[0])
    assert not stored.done()
    assert tier.n_held == 2
    tier.release(1)
    assert stored.result() == 3
    assert not found.done()
    tier.release()
    assert found.result() == 3
    assert tier.exists(chain(3, "a")[0]).result() == 3


def test_a_batch_whose_sizes_disagree_is_refused() -> None:
    keys, parents = chain(3, "a")
    with pytest.raises(ValueError, match="a batch of 2 slots needs 64 bytes of keys"):
        Batch(keys, parents, "", np.arange(2, dtype=np.int32), depth=0)
    with pytest.raises(ValueError, match="cannot begin at depth -1"):
        Batch(keys, parents, "", np.arange(3, dtype=np.int32), depth=-1)
