"""The tier on a real master: what every tier does, and what is special to a pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from hicache import Tier
from tests.hicache.mooncake.tiers import join, open_tier, random_slab
from tests.hicache.tier_contract import TierContract
from tests.support.mooncake import Master


class TestMooncakeTier(TierContract):
    is_shared = True

    @pytest.fixture(autouse=True)
    def _pool(self, shared_master: Master) -> Iterator[None]:
        self._master = shared_master
        self._slab = random_slab()
        yield
        self._slab.close()

    def open(self, limit_pages: int = 64) -> tuple[Tier, npt.NDArray[np.uint8]]:
        return join(open_tier(self._master.pool(), self._slab)), self._slab.array
