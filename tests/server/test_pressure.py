"""Write-back that is slower than what requests produce: pages are skipped, and requests do not wait for copies."""

from __future__ import annotations

import pytest

from tests.server.traffic import N_HBM_TOKENS, PAGE_SIZE, prompt, push_out, reusable, whole_pages
from tests.support.inspection import Faults
from tests.support.server import Server

pytestmark = pytest.mark.server

N_PROMPTS = 60
N_TOKENS = 300


def test_requests_go_on_while_copies_stand_still(cached: Server) -> None:
    """Four times what HBM holds. A request that waited for a copy here would wait for ever.

    What is being copied is locked in HBM, and is at most half of it; the rest of HBM serves.
    """
    before = cached.at_rest()
    with cached.held_copies():
        for number in range(N_PROMPTS):
            cached.generate(prompt(("stand still", number), N_TOKENS), 4)
        held = cached.inspect()
    after = cached.at_rest()
    push_out(cached, "flow again")
    tokens = prompt("flow again", 500)
    cached.generate(tokens)
    push_out(cached, "and again")
    kept = cached.generate(tokens)

    n_pages = N_PROMPTS * whole_pages(N_TOKENS) // PAGE_SIZE
    n_skipped = held.stats["skipped_pressure"] - before.stats["skipped_pressure"]
    assert n_pages * PAGE_SIZE > 4 * N_HBM_TOKENS
    assert held.stats["offloaded"] == before.stats["offloaded"]
    assert held.host["incoming"] <= N_HBM_TOKENS // PAGE_SIZE // 2 + N_TOKENS // PAGE_SIZE
    assert n_skipped >= n_pages - held.host["incoming"]
    assert after.stats["offloaded"] - before.stats["offloaded"] == held.host["incoming"]
    assert kept.host_tokens == reusable(tokens)


def test_request_that_needs_locked_pages_waits_for_no_more_than_those(cached: Server) -> None:
    """One that takes most of HBM, while half of it is being copied slowly."""
    large = prompt("large", N_HBM_TOKENS - 64)
    with cached.probe.faults(Faults(copy_delay_s=0.1)):
        for number in range(12):
            cached.generate(prompt(("locked", number), N_TOKENS), 4)
        answer = cached.generate(large, 4)
    assert len(answer.tokens) == 4
    assert answer.cached_tokens == 0
