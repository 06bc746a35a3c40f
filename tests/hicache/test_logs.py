"""Lines that come back all the time are counted instead of written."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.logs import BURST, CHANGE, PERIOD_S, RateLimit, get_logger
from tests.support.clock import Clock

ROOT = Path(__file__).resolve().parents[2]


def record(line: int, text: str = "%s pages") -> logging.LogRecord:
    return logging.LogRecord("hicache", logging.WARNING, "tier.py", line, text, (3,), None)


def test_a_burst_is_written_and_then_one_line_a_period_that_counts_the_others() -> None:
    clock = Clock()
    limit = RateLimit(clock)
    assert [limit.filter(record(1)) for _ in range(BURST + 7)] == [True] * BURST + [False] * 7
    assert limit.filter(record(2)), "another place has its own"
    clock.now_s += PERIOD_S
    later = record(1)
    assert limit.filter(later)
    assert later.getMessage() == "3 pages (and 7 such lines before it that were not written)"
    assert not limit.filter(record(1))
    clock.now_s += PERIOD_S
    assert limit.filter(again := record(1))
    assert "and 1 such" in again.getMessage()


def test_a_change_of_state_is_always_written_so_that_the_last_line_is_true() -> None:
    limit = RateLimit(Clock())
    changes = [record(1) for _ in range(3 * BURST)]
    for one in changes:
        vars(one).update(CHANGE)
    assert all(limit.filter(one) for one in changes)
    assert limit.filter(record(1)), "and takes nothing from others"


@given(pauses=st.lists(st.floats(0, 3 * PERIOD_S), max_size=60))
def test_nothing_is_lost_from_the_count_and_the_rate_is_kept(pauses: list[float]) -> None:
    clock = Clock()
    limit = RateLimit(clock)
    written = counted = 0
    for pause_s in pauses:
        clock.now_s += pause_s
        one = record(1)
        if limit.filter(one):
            written += 1
            found = re.search(r"and (\d+) such", one.getMessage())
            counted += int(found[1]) if found else 0
    clock.now_s += PERIOD_S
    last = record(1)
    assert limit.filter(last)
    found = re.search(r"and (\d+) such", last.getMessage())
    assert written + counted + (int(found[1]) if found else 0) == len(pauses)
    assert written <= BURST + sum(pauses) / PERIOD_S + 1e-6


def test_a_logger_has_one_limit(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("hicache.test")
    assert get_logger("hicache.test") is logger
    for _ in range(3 * BURST):
        logger.warning("again")
    assert len(caplog.records) == BURST


def test_all_of_our_loggers_are_limited() -> None:
    """But for two that speak once, before a server has begun."""
    others = {
        str(path.relative_to(ROOT))
        for package in ("radix", "hicache", "transfer", "sgl_lmcache")
        for path in (ROOT / package).rglob("*.py")
        if "logging.getLogger" in path.read_text(encoding="utf-8")
    }
    assert others == {"hicache/logs.py", "sgl_lmcache/page_size.py", "sgl_lmcache/cpu/backend.py"}
