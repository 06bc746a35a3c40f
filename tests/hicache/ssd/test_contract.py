"""The SSD tier keeps the contract that all tiers keep."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hicache import Tier
from hicache.ssd import SsdTier, limit_for
from tests.hicache.tier_contract import PAGE_NBYTES, TierContract


class TestSsdTier(TierContract):
    @pytest.fixture(autouse=True)
    def _folder(self) -> Iterator[None]:
        self.folder = Path(tempfile.mkdtemp())
        yield
        shutil.rmtree(self.folder)

    def make_tier(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> Tier:
        return SsdTier.open(
            self.folder,
            namespace="0123456789abcdef",
            member=(0, 1),
            page_nbytes=PAGE_NBYTES,
            slab=slab,
            limit_nbytes=limit_for(limit_pages, 1, PAGE_NBYTES),
            server="a",
        )
