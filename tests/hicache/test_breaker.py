from __future__ import annotations

from hicache.breaker import CALM_S, JITTER, Breaker
from tests.support.clock import Clock

STEP_S = 1 / 64


def pause_s(breaker: Breaker, clock: Clock) -> float:
    """Trip it, and see when it is due; then the trial goes well."""
    assert breaker.trip("a reason")
    began_at_s = clock.now_s
    while not breaker.is_due:
        clock.now_s += STEP_S
    breaker.close()
    return clock.now_s - began_at_s


def test_a_breaker_that_soon_trips_again_waits_longer() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for longest_s in (1, 2, 4, 8, 16, 32, 60, 60):
        assert longest_s * (1 - JITTER) - STEP_S <= pause_s(breaker, clock) <= longest_s + STEP_S
    clock.now_s += CALM_S
    assert pause_s(breaker, clock) <= 1 + STEP_S


def test_servers_that_share_a_store_do_not_come_back_all_at_once() -> None:
    clock = Clock()
    breakers = [Breaker(clock) for _ in range(64)]
    for breaker in breakers:
        breaker.trip("a reason")
    n_due = []
    for _ in range(64):
        clock.now_s += STEP_S
        n_due.append(sum(breaker.is_due for breaker in breakers))
    assert n_due[-1] == 64
    assert len({n for n in n_due if 0 < n < 64}) > 4
