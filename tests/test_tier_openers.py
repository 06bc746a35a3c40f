"""What the configuration says of a tier reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache.ssd import SsdTier
from hicache.ssd.endurance import smallest_limit
from sgl_lmcache.config import Config
from sgl_lmcache.config_file import parse
from sgl_lmcache.errors import StartError
from sgl_lmcache.namespace import Namespace
from sgl_lmcache.tiers import Place, tier_openers
from tests.hicache.ssd.stores import PAGE_NBYTES, SLOT_NBYTES, make_slab

NAMESPACE = Namespace("default", "a model", "", "a layout", "", (0, 1), is_eagle=False, origin="0")


def config(folder: Path, **keys: object) -> Config:
    ssd = {"type": "ssd", "path": str(folder), "capacity": "64MiB", **keys}
    return parse({"tiers": [{"type": "host"}, ssd]}, source="test")


def opened(config: Config) -> SsdTier:
    """By rank 1 of 2."""
    (opener,) = tier_openers(config, Place(1, 2, make_slab(), -1, PAGE_NBYTES))
    tier = opener.open(NAMESPACE)
    assert isinstance(tier, SsdTier)
    tier.close()
    return tier


def test_the_ssd_tier_has_its_ranks_part_of_the_budget(tmp_path: Path) -> None:
    assert opened(config(tmp_path, endurance="1GB"))._volume.spec.endurance_nbytes == 5 * 10**8
    assert opened(config(tmp_path))._volume.endurance is None


def test_the_ssd_tier_has_its_quotas_as_parts_of_its_slots(tmp_path: Path) -> None:
    """The same part on each rank, whatever the map and the log take of the capacity."""
    tier = opened(config(tmp_path, quotas={"a": "25%", "b": "32MiB", "c": "16MiB"}))
    n_slots = tier._volume.geometry.n_slots
    assert tier.quotas == {"a": n_slots // 4, "b": n_slots // 2, "c": n_slots // 4}
    assert opened(config(tmp_path)).quotas == {}


def test_a_budget_that_is_too_small_stops_the_server_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^sgl_lmcache: an endurance of 1,000 bytes a day and rank .*2 ranks\.$"):
        opened(config(tmp_path, endurance=2000))
    opened(config(tmp_path, endurance=2 * smallest_limit(SLOT_NBYTES)))
