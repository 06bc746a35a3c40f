"""Many requests for one cold document: it is computed once, and whatever happens to who computes it, the others go on.

What was computed is what SGLang did not find: prompt tokens less cached tokens, over all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import Tolerances
from tests.server.traffic import PAGE_SIZE, prompt, push_out, reusable, whole_pages
from tests.support.inspection import Faults
from tests.support.server import ANSWER_TIMEOUT_S, Answer, Server, wait_for

pytestmark = pytest.mark.server

N_USERS = 64
N_DOCUMENT_TOKENS = 6 * 512 + 320 + 1
"""Six chunks of prefill, one with room for others, and a token behind the last whole page, which everybody computes."""

MAX_COMPUTED = 1.1
"""Over what one of them would compute alone."""


@pytest.mark.parametrize("n_behind", [1, 9])
def test_64_users_of_one_cold_prompt(
    cached: Server, tolerances: Tolerances, record_property: Callable[[str, object], None], n_behind: int
) -> None:
    """Of a prompt that ends inside a page everybody computes that piece, so the bound holds without those."""
    tokens = prompt(("users", n_behind), N_DOCUMENT_TOKENS - 1 + n_behind)
    before = cached.at_rest()
    answers = cached.generate_all([tokens] * N_USERS, 2)
    after = cached.at_rest()

    n_computed = _n_computed(answers)
    for answer in answers:
        tolerances.batched.check(answer, answers[0])
    record_property("computed over one prompt", n_computed / len(tokens))
    assert n_computed - (N_USERS - 1) * n_behind <= len(tokens)
    assert n_behind > 1 or n_computed <= MAX_COMPUTED * len(tokens)
    assert after.stats["followers"] > before.stats["followers"], "none of them came before it was computed"
    assert after.stats["followers_expired"] == before.stats["followers_expired"]
    assert after.host["resident"] == whole_pages(len(tokens) + 1) // PAGE_SIZE


def test_16_questions_over_one_cold_document(cached: Server) -> None:
    document = prompt("document", N_DOCUMENT_TOKENS - 1)
    questions = [prompt(("question", number), 24) for number in range(16)]
    answers = cached.generate_all([document + question for question in questions], 2)
    needed = len(document) + sum(map(len, questions))
    assert needed <= _n_computed(answers) <= MAX_COMPUTED * needed


def _abort(server: Server, leader: str) -> None:
    server.abort(leader)


def _retract(server: Server, _leader: str) -> None:
    server.pause("retract")
    server.resume()


@pytest.mark.parametrize("end", [_abort, _retract])
def test_end_of_the_leader_lets_another_lead(
    cached: Server, tolerances: Tolerances, end: Callable[[Server, str], None]
) -> None:
    """While it is prefilled in chunks. What it has computed by then is in the tree, and is not computed again.

    No name is the head of another: SGLang ends all requests whose names begin with the one it is told to end.
    """
    tokens = prompt(end.__name__, N_DOCUMENT_TOKENS)
    before = cached.at_rest()
    with ThreadPoolExecutor(16) as threads:
        with cached.probe.faults(Faults(call_delay_s=1.0)):
            sent = [threads.submit(cached.generate, tokens, 2, rid=f"{end.__name__} {n:02}") for n in range(16)]
            leader = wait_for("one leads the others", lambda: _leader(cached), ANSWER_TIMEOUT_S)
            end(cached, leader)
        answers = [future.result() for future in sent]
    ended = [answer for answer in answers if answer.rid == leader]
    others = [answer for answer in answers if answer.rid != leader]
    after = cached.at_rest()

    assert [answer.finish_reason == "abort" for answer in ended] == [end is _abort]
    for answer in others:
        tolerances.batched.check(answer, others[0])
    assert _n_computed(others) <= MAX_COMPUTED * len(tokens)
    assert after.stats["followers_expired"] == before.stats["followers_expired"]


def test_leader_that_fails_lets_another_lead(cached: Server, tolerances: Tolerances) -> None:
    """Its head comes from host memory, and the copy fails: SGLang ends it with an error when its batch has begun."""
    head = prompt("head of the failing", 512)
    tokens = head + prompt("the failing", N_DOCUMENT_TOKENS - len(head))
    cached.generate(head, 1)
    push_out(cached, "the failing")
    with cached.probe.faults(Faults(n_failing_restores=1)), ThreadPoolExecutor(16) as threads:
        sent = [threads.submit(cached.generate, tokens, 2) for _ in range(16)]

    failures = [str(failure) for future in sent if (failure := future.exception()) is not None]
    served = [future.result() for future in sent if future.exception() is None]
    assert 1 <= len(failures) < len(sent)
    assert all("External KV cache load failed" in failure for failure in failures)
    for answer in served:
        tolerances.batched.check(answer, served[0])
    assert _n_computed(served) <= MAX_COMPUTED * len(tokens)
    assert cached.generate(tokens).device_tokens == reusable(tokens)


def _n_computed(answers: Sequence[Answer]) -> int:
    return sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)


def _leader(server: Server) -> str | None:
    """Who is prefilled in chunks while others wait."""
    requests = server.inspect().requests
    return requests["prefilling"][0] if requests["prefilling"] and requests["waiting"] else None
