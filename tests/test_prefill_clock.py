"""What is taken for the time of a prefill, by the order in which SGLang's scheduler makes its calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hicache import PrefillSpeed
from sgl_lmcache.prefill_clock import MAX_RUNNING, PrefillClock
from tests.support.clock import Clock

PAGE = 16


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.speed = PrefillSpeed()
        self.prefills = PrefillClock(self.speed, PAGE, self.clock)

    def launch(self, *reqs: SimpleNamespace) -> None:
        self.prefills.begin()
        self.prefills.launched(reqs)

    def predicts(self, n_pages: int) -> float | None:
        return self.speed.predict(0, n_pages)


def req(rid: str, start: int, end: int, whole: int | None = None) -> SimpleNamespace:
    """A request of which pages start to end are computed now, and which has `whole` of them."""
    fill_ids = range((end if whole is None else whole) * PAGE)
    return SimpleNamespace(rid=rid, prefix_len=start * PAGE, extend_end=end * PAGE, full_untruncated_fill_ids=fill_ids)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_prefill_lasts_from_its_launch_to_its_checkpoint(rig: Rig) -> None:
    assert rig.predicts(10) is None
    rig.launch(req("a", 0, 10))
    rig.clock.now_s += 2.0
    rig.prefills.computed(req("a", 0, 10))
    assert rig.predicts(10) == pytest.approx(2.0)


def test_decoding_is_not_taken_for_a_prefill(rig: Rig) -> None:
    rig.prefills.launched([req("a", 10, 11)])
    rig.clock.now_s += 2.0
    rig.prefills.computed(req("a", 10, 11))
    assert rig.predicts(10) is None


def test_batches_that_overlap_do_not_count_each_others_time(rig: Rig) -> None:
    """The second is launched while the first is computed; each takes two seconds."""
    rig.launch(req("a", 0, 10))
    rig.launch(req("b", 0, 10))
    for rid in "ab":
        rig.clock.now_s += 2.0
        rig.prefills.computed(req(rid, 0, 10))
    assert rig.predicts(10) == pytest.approx(2.0)


def test_chunks_are_measured_as_one_whatever_is_published_between(rig: Rig) -> None:
    """With overlap a chunk is published before its forward has ended."""
    for start in (0, 10, 20):
        rig.launch(req("a", start, start + 10, whole=30))
        if start < 20:
            rig.prefills.computed(req("a", start, start + 10, whole=30))
        rig.clock.now_s += 2.0
    rig.prefills.computed(req("a", 20, 30))
    assert rig.predicts(30) == pytest.approx(6.0)


def test_batches_that_nobody_hears_of_again_do_not_pile_up(rig: Rig) -> None:
    for number in range(10 * MAX_RUNNING):
        rig.launch(req(f"lost {number}", 0, 10))
    assert len(rig.prefills._running) == MAX_RUNNING
    rig.clock.now_s += 50.0
    rig.launch(req("a", 0, 10))
    rig.clock.now_s += 2.0
    rig.prefills.computed(req("a", 0, 10))
    assert rig.predicts(10) == pytest.approx(2.0)
