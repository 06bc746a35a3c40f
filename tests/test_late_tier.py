"""A tier that is opened in the background: what it answers before, what it closes, and that it is tried again."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import pytest

from hicache import QuotaError
from hicache.quotas import Quotas
from sgl_lmcache import late_tier
from sgl_lmcache.errors import StartError
from sgl_lmcache.late_tier import LateTier
from tests.hicache.tier_contract import batch, chain
from tests.support.processes import wait_for
from tests.support.tiers import MemoryTier

WAIT_S = 30.0


def memory() -> MemoryTier:
    return MemoryTier(np.zeros((8, 4096), np.uint8), 8)


def test_it_has_nothing_until_it_is_open_and_is_the_tier_from_then_on() -> None:
    before, opened, may_open = memory(), memory(), threading.Event()

    def open_tier() -> MemoryTier:
        assert may_open.wait(WAIT_S)
        return opened

    tier = LateTier("ssd", open_tier, before)
    assert tier.name == "ssd"
    assert (tier.store(batch(2, "a")).result(), tier.exists(chain(2, "a")[0]).result()) == (0, 0)
    assert not tier.health().available
    may_open.set()
    wait_for("it is open", lambda: tier.is_open or None, WAIT_S)
    assert before.closed
    assert tier.store(batch(2, "a")).result() == 2
    assert tier.health().available
    tier.close()
    assert opened.closed


class Quoted(MemoryTier):
    """Has quotas: up to 8 pages together."""

    def __init__(self, **quotas: int) -> None:
        super().__init__(np.zeros((8, 4096), np.uint8), 8)
        self._quotas = Quotas(8)
        self._quotas.update(quotas)

    def set_quotas(self, quotas: Mapping[str, int]) -> None:
        self._quotas.update(quotas)

    @property
    def quotas(self) -> Mapping[str, int]:
        return self._quotas.tenants


def test_quotas_that_were_changed_hold_for_the_tier_to_come() -> None:
    """The configuration says 4 and 4; then came 1 and 7, and, while the tier is not open, 2 for a third."""
    may_open, opened = threading.Event(), Quoted(a=4, b=4)

    def open_tier() -> Quoted:
        assert may_open.wait(WAIT_S)
        return opened

    tier = LateTier("ssd", open_tier, Quoted(a=1, b=7))
    tier.set_quotas({"b": 5, "c": 2})
    wanted = {"a": 1, "b": 5, "c": 2}
    assert tier.quotas == wanted
    may_open.set()
    wait_for("it is open", lambda: tier.is_open or None, WAIT_S)
    assert tier.quotas == opened.quotas == wanted
    with pytest.raises(QuotaError, match="9 pages"):
        tier.set_quotas({"a": 9})
    tier.set_quotas({"a": 0})
    assert opened.quotas["a"] == 0
    tier.close()


def test_quotas_that_the_tier_to_come_cannot_keep_are_told_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    opened = Quoted(a=4)
    tier = LateTier("ssd", lambda: opened, Quoted(b=8))
    wait_for("it is open", lambda: tier.is_open or None, WAIT_S)
    assert opened.quotas == {"a": 4}
    assert "the ssd tier has the quotas of the configuration: a quota of 8 pages is more than the 4" in caplog.text
    tier.close()


def test_what_cannot_be_opened_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_tier, "RETRY_S", 0.0)
    answers: list[StartError | MemoryTier] = [StartError("the disk is full"), StartError("the disk is full"), memory()]

    def open_tier() -> MemoryTier:
        answer = answers.pop(0)
        if isinstance(answer, StartError):
            raise answer
        return answer

    tier = LateTier("ssd", open_tier, memory())
    wait_for("it is open", lambda: tier.is_open or None, WAIT_S)
    assert answers == []
    tier.close()


def test_what_is_opened_after_the_end_is_closed_at_once() -> None:
    before, opened, may_open = memory(), memory(), threading.Event()

    def open_tier() -> MemoryTier:
        assert may_open.wait(WAIT_S)
        return opened

    tier = LateTier("ssd", open_tier, before)
    wait_for("it is opening", lambda: before.closed or None, WAIT_S)
    tier.close()
    may_open.set()
    wait_for("it is closed", lambda: opened.closed or None, WAIT_S)
    assert not tier.is_open
