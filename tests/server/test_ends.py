"""However a request or the cache's content ends, nothing of it is left: no lease, no ticket, no slot, no HBM page.

The `cached` fixture asserts that after each test; what is asserted here is that the thing under test has happened.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.server.conftest import Tolerances
from tests.server.traffic import N_HBM_TOKENS, PAGE_SIZE, prompt, push_out, reusable, whole_pages
from tests.support.server import ANSWER_TIMEOUT_S, Inspection, Server, wait_for

pytestmark = pytest.mark.server


@pytest.mark.parametrize("way", ["close the connection", "abort_request"])
@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding"])
def test_aborted_request_leaves_nothing(cached: Server, phase: str, way: str) -> None:
    """The request has a host hit at its head, so while it waits it holds leases."""
    rid = f"{phase}, {way}"
    head = prompt(rid, 500)
    tokens = head + prompt((rid, "tail"), 3000 if phase == "prefilling" else 100)
    cached.generate(head, 1)
    if phase != "waiting":
        push_out(cached, rid)

    with ExitStack() as stack:
        if phase == "waiting":
            _occupy_hbm(cached, stack)
        answers = stack.enter_context(cached.stream(tokens, N_HBM_TOKENS - len(tokens) - PAGE_SIZE, rid=rid))
        if phase == "decoding":
            next(answers)
        seen = wait_for(phase, lambda: _in_phase(cached, rid, phase), ANSWER_TIMEOUT_S)
        if phase == "waiting":
            assert seen.host["leases"] >= whole_pages(len(head)) // PAGE_SIZE
        if way == "abort_request":
            cached.abort(rid)
            assert list(answers)[-1].finish_reason == "abort"

    seen = wait_for("it has ended", lambda: _ended(cached, rid), ANSWER_TIMEOUT_S)
    assert seen.ended[rid] == "FINISH_ABORT"


def _occupy_hbm(server: Server, stack: ExitStack) -> None:
    """Keep HBM full, until the stack is left, with requests that run for long. Leaving aborts them, and waits."""
    threads = stack.enter_context(ThreadPoolExecutor(4))
    rids = [f"occupy {number}" for number in range(4)]
    for rid in rids:
        threads.submit(server.generate, prompt(rid, 100), 900, rid=rid)
        stack.callback(server.abort, rid)
    wait_for("HBM is full", lambda: _any_decoding(server, rids), ANSWER_TIMEOUT_S)


def _any_decoding(server: Server, rids: list[str]) -> bool | None:
    return True if len(set(rids) & set(server.inspect().requests["decoding"])) >= 3 else None


def _in_phase(server: Server, rid: str, phase: str) -> Inspection | None:
    seen = server.inspect()
    return seen if rid in seen.requests[phase] else None


def _ended(server: Server, rid: str) -> Inspection | None:
    seen = server.inspect()
    return seen if rid in seen.ended and not any(rid in rids for rids in seen.requests.values()) else None


def test_flush_empties_hbm_and_host(cached: Server) -> None:
    tokens = prompt("flush", 500)
    cold = cached.generate(tokens)
    full = cached.at_rest()
    cached.flush()
    empty = cached.at_rest()
    again = cached.generate(tokens)

    assert full.host["resident"] == full.mirror["tree"] == whole_pages(len(tokens) + len(cold.tokens) - 1) // PAGE_SIZE
    assert (empty.host["resident"], empty.mirror["tree"], empty.hbm["evictable"]) == (0, 0, 0)
    assert (again.cached_tokens, again.tokens) == (0, cold.tokens)


def test_flush_behind_traffic(cached: Server) -> None:
    """SGLang keeps the flush until the last request has ended, and then does it in the same breath."""
    before = cached.at_rest()
    prompts = [prompt(("flushed", number), 300) for number in range(16)]
    n_rounds = 5
    for _ in range(n_rounds):
        with ThreadPoolExecutor() as threads:
            traffic = threads.submit(cached.generate_all, prompts, 4)
            wait_for("traffic", lambda: any(cached.inspect().requests.values()) or None, ANSWER_TIMEOUT_S)
            cached.flush()
        empty = cached.at_rest()
        assert (empty.host["resident"], empty.mirror["tree"]) == (0, 0)
        assert sum(answer.cached_tokens for answer in traffic.result()) == 0
    assert cached.at_rest().stats["resets"] - before.stats["resets"] == n_rounds


def test_flush_with_copies_in_flight(cached: Server) -> None:
    """The flush waits for the copies, which read the pages that it is about to free."""
    tokens = prompt("in flight", 700)
    with cached.held_copies():
        cold = cached.generate(tokens)
        held = cached.inspect()
        cached.flush()
    empty = cached.at_rest()
    again = cached.generate(tokens)
    push_out(cached, "in flight")

    assert held.host["incoming"] > 0
    assert empty.unfinished_at_reset - held.unfinished_at_reset == held.open["write_backs"] > 0
    assert (empty.host["resident"], empty.mirror["tree"]) == (0, 0)
    assert (again.cached_tokens, again.tokens) == (0, cold.tokens)
    assert cached.generate(tokens).host_tokens == reusable(tokens)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_flush_of_a_paused_server_with_copies_in_flight(cached: Server, mode: str) -> None:
    """While it is paused SGLang does not ask for the ends of copies, so the flush must not depend on that."""
    tokens = prompt(("paused", mode), 700)
    with cached.held_copies():
        cold = cached.generate(tokens)
        held = cached.inspect()
        cached.pause(mode)
        cached.flush()
        empty = cached.inspect()
        cached.resume()
    again = cached.generate(tokens)
    push_out(cached, "paused")

    assert held.host["incoming"] > 0
    assert (empty.host["incoming"], empty.host["resident"], empty.open["write_backs"]) == (0, 0, 0)
    assert (again.cached_tokens, again.tokens) == (0, cold.tokens)
    assert cached.generate(tokens).host_tokens == reusable(tokens)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_request_goes_on_after_a_pause(cached: Server, tolerances: Tolerances, mode: str) -> None:
    """Retracted, it holds nothing, and the flush succeeds; in its place it does, and the flush is refused."""
    tokens = prompt(("goes on", mode), 500)
    cold = cached.generate(tokens, 40)
    with cached.stream(tokens, 40) as answers:
        next(answers)
        before = cached.inspect()
        cached.pause(mode)
        flushed = cached.try_flush()
        after = cached.inspect()
        cached.resume()
        *_, last = answers

    assert flushed == (mode == "retract")
    assert after.stats["resets"] - before.stats["resets"] == int(flushed)
    assert (after.host["resident"] == 0) == flushed
    tolerances.batched.check(last, cold)


def test_refused_flush_changes_nothing(cached: Server) -> None:
    tokens = prompt("refused", 500)
    cold = cached.generate(tokens, 40)
    with cached.stream(tokens, 40) as answers:
        next(answers)
        before = cached.inspect()
        assert not cached.try_flush()
        after = cached.inspect()
        *_, last = answers

    assert after.stats["resets"] == before.stats["resets"]
    assert after.contents["host"] == before.contents["host"] != 0
    assert last.tokens == cold.tokens
    assert cached.generate(tokens).device_tokens == reusable(tokens)
