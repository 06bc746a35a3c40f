"""A prompt that has left HBM comes back from host memory: all of it, byte for byte, and with the same answer."""

from __future__ import annotations

import pytest

from tests.server.conftest import Tolerances
from tests.server.traffic import (
    N_HBM_TOKENS,
    PAGE_SIZE,
    Tolerance,
    greatest_gap,
    prompt,
    push_out,
    reusable,
    whole_pages,
)
from tests.support.server import Server

pytestmark = pytest.mark.server


def test_host_hit_answers_as_a_device_hit_does(cached: Server) -> None:
    tokens = prompt("host hit", 1000)
    cold = cached.generate(tokens, 16)
    on_device = cached.generate(tokens, 16)
    push_out(cached, "host hit")
    before = cached.at_rest()
    restored = cached.generate(tokens, 16)
    after = cached.at_rest()

    assert cold.cached_tokens == 0
    assert (on_device.device_tokens, on_device.host_tokens) == (reusable(tokens), 0)
    assert (restored.device_tokens, restored.host_tokens) == (0, reusable(tokens))
    n_pages = reusable(tokens) // PAGE_SIZE
    assert after.restored - before.restored == after.checked - before.checked == n_pages
    assert after.stats["restored"] - before.stats["restored"] == n_pages
    Tolerance(greatest_gap([on_device], [cold])).check(restored, cold)


@pytest.mark.parametrize("n_tokens", [16, 17, 31, 32, 33, 512, 513])
def test_hit_is_whole_pages_short_of_the_last_token(cached: Server, n_tokens: int) -> None:
    tokens = prompt("aligned", n_tokens)
    cold = cached.generate(tokens)
    push_out(cached, "aligned")
    restored = cached.generate(tokens)
    assert (cold.cached_tokens, restored.device_tokens, restored.host_tokens) == (0, 0, reusable(tokens))
    assert restored.tokens == cold.tokens


def test_second_branch_hits_device_and_host_in_one_request(cached: Server, tolerances: Tolerances) -> None:
    shared = prompt("trunk", 512)
    left, right = shared + prompt("left", 256), shared + prompt("right", 256)
    cold_left, cold_right = cached.generate(left), cached.generate(right)
    push_out(cached, "branches")
    hot_left, hot_right = cached.generate(left), cached.generate(right)

    assert (cold_left.cached_tokens, cold_right.device_tokens) == (0, len(shared))
    assert (hot_left.device_tokens, hot_left.host_tokens) == (0, reusable(left))
    assert (hot_right.device_tokens, hot_right.host_tokens) == (len(shared), reusable(right) - len(shared))
    tolerances.alone.check(hot_left, cold_left)
    tolerances.alone.check(hot_right, cold_right)


def test_hit_ends_in_the_middle_of_an_edge(cached: Server, plain: Server, tolerances: Tolerances) -> None:
    known = prompt("edge", 400)
    branch = known[:250] + prompt("off the edge", 200)
    cached.generate(known)
    push_out(cached, "edges")
    answer = cached.generate(branch)
    whole = cached.generate(known)

    assert (answer.device_tokens, answer.host_tokens) == (0, whole_pages(250))
    assert (whole.device_tokens, whole.host_tokens) == (whole_pages(250), reusable(known) - whole_pages(250))
    tolerances.alone.check(answer, plain.generate(branch))
    tolerances.alone.check(whole, plain.generate(known))


def test_tail_that_hbm_has_dropped_is_added_to_the_head_that_it_kept(cached: Server, tolerances: Tolerances) -> None:
    tokens = prompt("long", 2000)
    cold = cached.generate(tokens)
    push_out(cached, "half", n_tokens=N_HBM_TOKENS - 1500)
    answer = cached.generate(tokens)

    assert answer.device_tokens > 0
    assert answer.host_tokens > 0
    assert answer.device_tokens + answer.host_tokens == reusable(tokens)
    tolerances.alone.check(answer, cold)


def test_prompt_in_chunks_restores_its_head(cached: Server, plain: Server, tolerances: Tolerances) -> None:
    """The first chunk brings the host hit, the others follow while the scheduler overlaps them."""
    assert cached.facts()["enable_overlap"]
    head = prompt("head", 1024)
    tokens = head + prompt("chunks", 1400)
    cached.generate(head)
    push_out(cached, "chunks")
    n_lines = len(cached.log_lines("Prefill batch"))
    answer = cached.generate(tokens)
    again = cached.generate(tokens)

    chunks = cached.log_lines("Prefill batch")[n_lines:]
    assert sum("#new-token: 512," in line for line in chunks) >= 2
    assert (answer.device_tokens, answer.host_tokens) == (0, len(head))
    assert again.device_tokens == reusable(tokens)
    reference = plain.generate(tokens)
    tolerances.alone.check(answer, reference)
    tolerances.alone.check(again, reference)


def test_stream_of_a_host_hit_gives_the_same_text(cached: Server) -> None:
    tokens = prompt("stream", 600)
    cold = cached.generate(tokens, 24)
    push_out(cached, "stream")
    with cached.stream(tokens, 24) as answers:
        events = list(answers)

    assert len(events) > 1
    assert (events[-1].device_tokens, events[-1].host_tokens) == (0, reusable(tokens))
    assert (events[-1].text, events[-1].tokens) == (cold.text, cold.tokens)
    assert all(cold.text.startswith(event.text.rstrip("�")) for event in events)


def test_device_hit_does_not_wait_for_its_copies(cached: Server) -> None:
    """Pages on their way to host memory are still in HBM, and whoever hits them there needs nothing else."""
    tokens = prompt("copied", 500)
    before = cached.at_rest()
    with cached.held_copies():
        cold = cached.generate(tokens)
        again = cached.generate(tokens)
        held = cached.inspect()

    assert held.host["incoming"] > 0
    assert (again.device_tokens, again.tokens) == (reusable(tokens), cold.tokens)
    assert held.stats["tickets_expired"] == before.stats["tickets_expired"]


def test_explain_says_what_a_request_will_find(cached: Server) -> None:
    """Of several ranks the first answers. Looking keeps none of them from holding what the others hold."""
    tokens = prompt("explained", 1000)
    cached.generate(tokens, 1)
    push_out(cached, "explained")
    (explanation,) = cached.explain(tokens)
    assert explanation.runs[0].tiers == ("host",)
    assert explanation.hit_tokens["host"] == cached.generate(tokens, 1).host_tokens == reusable(tokens)
