"""Stores that wait: each is answered once, and at once where the queue has no room for any of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hicache.ssd import SsdTier
from hicache.workers import Work
from tests.hicache.ssd.stores import SLOT_NBYTES, make_slab, open_tier, pages, settle, wait_until
from tests.support.disk import Disk


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def tier(tmp_path: Path, disk: Disk) -> SsdTier:
    """With room for 8 pages in its queue, and a segment."""
    tier = open_tier(tmp_path, make_slab(), n_slots=160, system=disk, max_queued_nbytes=8 * SLOT_NBYTES)
    assert tier.store(pages(4, "first", 50)).result() == 4
    settle(tier)
    return tier


def test_a_store_that_only_joins_a_write_is_answered_once(
    tier: SsdTier, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write ends just after the store has joined it."""
    workers = tier._volume.workers
    submit = workers.submit

    def submit_late(work: Sequence[Work]) -> None:
        if not work:
            disk.let_go()
            wait_until(lambda: tier._stores.queued_nbytes == 0)
        submit(work)

    disk.hold()
    first = tier.store(pages(4, "a"))
    wait_until(lambda: disk.n_held == 1)
    monkeypatch.setattr(workers, "submit", submit_late)
    second = tier.store(pages(4, "a", 10))
    assert first.result(timeout=20) == second.result(timeout=20) == 4
    settle(tier)
    wait_until(lambda: not workers._under_way)
    assert tier.stats()["crashes"] == 0
    tier.check_invariants()
    tier.close()


def test_one_answer_that_fails_costs_no_other(tier: SsdTier, disk: Disk) -> None:
    disk.hold()
    first = tier.store(pages(2, "a"))
    wait_until(lambda: disk.n_held == 1)
    wrong = tier.store(pages(2, "a", 10))
    last = tier.store(pages(2, "a", 20))
    wait_until(lambda: tier._stores.n_waiting == 0)
    wrong.set_result(99)
    disk.let_go()
    assert first.result(timeout=20) == last.result(timeout=20) == 2
    wait_until(lambda: tier.stats()["crashes"] == 1)
    tier.close()


def test_a_full_queue_answers_at_once_and_keeps_nothing(tier: SsdTier, disk: Disk) -> None:
    disk.hold()
    first = tier.store(pages(8, "a"))
    wait_until(lambda: disk.n_held >= 1)
    for n in range(3):
        refused = tier.store(pages(5, f"b{n}"))
        assert refused.done()
        assert refused.result() == 0
    assert tier.stats()["skipped_pressure"] == 15
    assert tier._stores.n_waiting == 0
    disk.let_go()
    assert first.result(timeout=20) == 8
    tier.close()
