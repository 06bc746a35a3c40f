"""Where a prompt was found: SGLang's split, with what came from below by tier, and the time that it saved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hicache import PrefillSpeed, Ticket
from sgl_lmcache.hits import Hits
from tests.hicache.rig import Rig
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.tiers import MemoryTier

PAGE = 16


class NamedTier(MemoryTier):
    """A memory tier that is called otherwise."""

    def __init__(self, slab: npt.NDArray[np.uint8], name: str) -> None:
        super().__init__(slab, 1000)
        self._name = name

    @property
    def name(self) -> str:
        return self._name


def request(n_tokens: int, *, device: int = 0, host: int = 0, storage: int = 0, retracted: bool = False) -> Any:
    return SimpleNamespace(
        origin_input_ids=range(n_tokens),
        cached_tokens_device=device,
        cached_tokens_host=host,
        cached_tokens_storage=storage,
        retracted_stain=retracted,
    )


@pytest.fixture
def speed() -> PrefillSpeed:
    """A tenth of a second a page."""
    speed = PrefillSpeed()
    speed.observe([(0, 10)], 1.0)
    return speed


@pytest.fixture
def rig() -> Rig:
    """Two tiers: the first has `ab`, the second all of `abcd`."""
    rig = Rig(writes=("through", "through"), clock=Clock())
    for position, name in enumerate(("ssd", "valkey")):
        rig.memories[position] = rig.tiers[position].inner = NamedTier(rig.slab, name)
    rig.put(0, path_keys("ab"))
    rig.put(1, path_keys("abcd"))
    return rig


def fetched(rig: Rig, path: str) -> Ticket:
    ticket = rig.engine.open_ticket(path_keys(path), None)
    rig.settle()
    return ticket


def test_what_is_found_and_what_is_not_make_the_prompt(speed: PrefillSpeed, rig: Rig) -> None:
    hits = Hits(speed, PAGE)
    hits.launched(request(100, device=32, host=16), rig.engine.open_ticket(b"", None))
    assert (hits.n_requests, hits.hit_tokens, hits.miss_tokens) == (1, {"hbm": 32, "host": 16}, 52)
    assert hits.saved_s == pytest.approx({"hbm": 0.2, "host": 0.1})


def test_what_was_fetched_is_of_the_tiers_that_brought_it(speed: PrefillSpeed, rig: Rig) -> None:
    hits = Hits(speed, PAGE)
    hits.launched(request(100, storage=64), fetched(rig, "abcd"))
    assert hits.hit_tokens == {"hbm": 0, "host": 0, "faulty ssd": 32, "faulty valkey": 32}
    assert hits.miss_tokens == 36
    assert hits.saved_s == pytest.approx({"hbm": 0.0, "host": 0.0, "faulty ssd": 0.2, "faulty valkey": 0.2})


def test_what_one_tier_lacks_after_all_counts_for_the_next(speed: PrefillSpeed, rig: Rig) -> None:
    hits = Hits(speed, PAGE)
    rig.tiers[0].miss_next(1)
    hits.launched(request(100, storage=64), fetched(rig, "abcd"))
    assert hits.hit_tokens == {"hbm": 0, "host": 0, "faulty valkey": 64}


def test_what_hbm_had_of_a_fetch_is_not_counted_for_the_tier(speed: PrefillSpeed, rig: Rig) -> None:
    """It was fetched because host memory is closed under prefixes."""
    rig.engine.skip_offload(path_keys("a"))
    ticket = rig.engine.open_ticket(path_keys("abcd")[32:], path_keys("a"))
    rig.settle()
    hits = Hits(speed, PAGE)
    hits.launched(request(100, device=16, storage=48), ticket)
    assert hits.hit_tokens == {"hbm": 16, "host": 0, "faulty ssd": 16, "faulty valkey": 32}


def test_pages_that_land_after_sglang_was_told_are_not_counted(speed: PrefillSpeed, rig: Rig) -> None:
    hits = Hits(speed, PAGE)
    hits.launched(request(100, storage=48), fetched(rig, "abcd"))
    assert sum(hits.hit_tokens.values()) == 48
    assert hits.miss_tokens == 52


def test_a_retracted_request_is_counted_once(speed: PrefillSpeed, rig: Rig) -> None:
    hits = Hits(speed, PAGE)
    ticket = rig.engine.open_ticket(b"", None)
    hits.launched(request(100, device=32), ticket)
    hits.launched(request(100, device=64, retracted=True), ticket)
    assert (hits.n_requests, hits.hit_tokens["hbm"], hits.miss_tokens) == (1, 32, 68)


def test_nothing_is_said_to_be_saved_before_a_prefill_was_measured(rig: Rig) -> None:
    hits = Hits(PrefillSpeed(), PAGE)
    hits.launched(request(100, device=32), rig.engine.open_ticket(b"", None))
    assert hits.saved_s == {"hbm": 0.0, "host": 0.0}
