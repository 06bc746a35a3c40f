"""After new weights, nothing that was computed with the old ones comes out of host memory, then or later.

Two models of one shape, OLD and NEW, answer a prompt differently, so an answer from KV of the other one shows. HBM is
SGLang's business: without a flush it goes on serving old KV from there, so tests push it out before they ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sgl_lmcache.cpu.model import TINY, make_model
from tests.server import weight_ways
from tests.server.conftest import Tolerances
from tests.server.traffic import prompt, push_out, reusable
from tests.server.weight_ways import Way
from tests.support.server import ANSWER_TIMEOUT_S, Answer, Server, wait_for

pytestmark = pytest.mark.server

TOKENS = prompt("weights", 500)
WAYS = [weight_ways.from_disk, weight_ways.from_tensors, weight_ways.from_a_group]


@dataclass(frozen=True)
class Models:
    """Two folders, and what a server without any KV answers with either to `TOKENS`."""

    old: Path
    new: Path
    old_answer: Answer
    new_answer: Answer


@pytest.fixture
def models(cached: Server) -> Iterator[Models]:
    """The server runs the old model and is empty, and does so again after the test."""
    old, new = make_model(TINY), make_model(replace(TINY, name="tiny-new", seed=1))
    weight_ways.from_disk(cached, new, flush_cache=True)
    new_answer = cached.generate(TOKENS)
    weight_ways.from_disk(cached, old, flush_cache=True)
    old_answer = cached.generate(TOKENS)
    cached.flush()
    assert (old_answer.cached_tokens, new_answer.cached_tokens) == (0, 0)
    assert old_answer.tokens != new_answer.tokens
    yield Models(old, new, old_answer, new_answer)
    cached.ask("/continue_generation")  # a test that has failed may have left it paused, or a session open
    with suppress(AssertionError):
        weight_ways.end(cached)
    weight_ways.from_disk(cached, old, flush_cache=True)


def remember(server: Server) -> None:
    """`TOKENS` are in host memory and nowhere else."""
    server.generate(TOKENS)
    push_out(server, "known")
    server.at_rest()


def check_forgotten(server: Server, expected: Answer) -> None:
    """Nothing of `TOKENS` comes from host memory, and their answer is right once HBM has none of them."""
    push_out(server, "unknown")
    answer = server.generate(TOKENS)
    assert (answer.device_tokens, answer.host_tokens) == (0, 0)
    assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)


def check_kept_again(server: Server, expected: Answer) -> None:
    """The tier works, and what it has is right."""
    server.generate(TOKENS)
    push_out(server, "kept again")
    answer = server.generate(TOKENS)
    assert (answer.device_tokens, answer.host_tokens) == (0, reusable(TOKENS))
    assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize("way", WAYS)
def test_update_with_flush(cached: Server, models: Models, way: Way) -> None:
    remember(cached)
    way(cached, models.new, flush_cache=True)

    check_forgotten(cached, models.new_answer)
    check_kept_again(cached, models.new_answer)


@pytest.mark.parametrize("way", WAYS)
def test_update_without_flush(cached: Server, models: Models, way: Way) -> None:
    """From the update to the next flush the tier answers nothing and keeps nothing."""
    remember(cached)
    way(cached, models.new, flush_cache=False)

    check_forgotten(cached, models.new_answer)
    check_forgotten(cached, models.new_answer)
    cached.flush()
    check_kept_again(cached, models.new_answer)


def test_old_kv_in_hbm_does_not_move_to_host_memory(cached: Server, models: Models) -> None:
    """A prompt that hits old KV in HBM inserts a mixture, which nobody may find once HBM has dropped it."""
    head = TOKENS[:320]
    cached.generate(head)
    weight_ways.from_disk(cached, models.new, flush_cache=False)
    mixed = cached.generate(TOKENS)

    assert mixed.device_tokens == len(head)
    assert mixed.logprobs != models.new_answer.logprobs
    check_forgotten(cached, models.new_answer)


@pytest.mark.parametrize("way", WAYS)
def test_write_backs_that_land_after_the_update(cached: Server, models: Models, way: Way) -> None:
    with cached.held_copies():
        cached.generate(TOKENS)
        assert cached.inspect().host["incoming"] > 0
        way(cached, models.new, flush_cache=False)
    cached.at_rest()

    check_forgotten(cached, models.new_answer)


def test_update_that_fails(cached: Server, models: Models) -> None:
    """It may have failed half-way, so it counts as one that succeeded, and the answers are the old ones."""
    remember(cached)
    cached.ask_refused("/update_weights_from_disk", model_path="/nonexistent", flush_cache=True)
    check_forgotten(cached, models.old_answer)
    cached.flush()
    check_kept_again(cached, models.old_answer)


def test_a_new_version_of_the_same_weights_is_no_update(cached: Server, models: Models) -> None:
    remember(cached)
    assert cached.ask("/update_weight_version", new_version="same weights, other name")["success"]
    answer = cached.generate(TOKENS)
    assert (answer.host_tokens, answer.tokens) == (reusable(TOKENS), models.old_answer.tokens)


# ---- what new weights are called ----


def names_after(server: Server, way: Way, model: Path, version: str) -> set[str]:
    """Of the namespaces that an update begins, one on each rank."""
    way(server, model, flush_cache=True)
    assert server.ask("/update_weight_version", new_version=version)["success"]
    return names(server)


def names(server: Server) -> set[str]:
    """Of the namespaces of all ranks."""
    found = {rank.namespace for rank in server.ranks_at_rest()}
    assert len(found) == server.setup.n_ranks
    return found


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_known_by_themselves(cached: Server, models: Models, way: Way) -> None:
    """Whichever way they came: a version that a trainer gives to other weights again changes nothing."""
    new = names_after(cached, way, models.new, "1")
    old = names_after(cached, weight_ways.from_disk, models.old, "1")
    again = names_after(cached, weight_ways.from_disk, models.new, "2")
    assert new == again
    assert not new & old


def test_an_update_that_fails_is_called_by_what_it_leaves(cached: Server, models: Models) -> None:
    old = names_after(cached, weight_ways.from_disk, models.old, "1")
    cached.ask_refused("/update_weights_from_disk", model_path="/nonexistent", weight_version="2", flush_cache=True)
    cached.flush()
    assert names(cached) == old


def test_half_of_an_update_has_a_name_of_its_own(cached: Server, models: Models) -> None:
    old = names_after(cached, weight_ways.from_disk, models.old, "1")
    half = names_after(cached, from_half_of_the_tensors, models.new, "1")
    new = names_after(cached, weight_ways.from_tensors, models.new, "1")
    assert len(old | half | new) == 3 * cached.setup.n_ranks


def from_half_of_the_tensors(server: Server, model: Path, *, flush_cache: bool) -> None:
    weight_ways.begin(server)
    weight_ways.load_tensors(server, model, flush_cache=flush_cache, halves=1)
    weight_ways.end(server)


def test_update_calls_outside_a_session_change_nothing(cached: Server, models: Models) -> None:
    remember(cached)
    cached.ask_refused("/update_weights_from_tensor", serialized_named_tensors=["AAAA"])
    cached.ask_refused("/end_weight_update")
    answer = cached.generate(TOKENS)
    assert (answer.host_tokens, answer.tokens) == (reusable(TOKENS), models.old_answer.tokens)


def test_weights_checker_that_resets_weights(cached: Server, models: Models) -> None:
    """A tool of SGLang's that fills the model with random numbers."""
    remember(cached)
    assert cached.ask("/weights_checker", action="reset_tensors")["success"]
    answer = cached.generate(TOKENS)
    assert answer.host_tokens == 0
    assert answer.tokens != models.old_answer.tokens


# ---- inside a session ----


def test_requests_between_the_calls_of_a_session(cached: Server, models: Models) -> None:
    """SGLang serves them, with half of the weights. A flush in the middle does not make what follows it good."""
    remember(cached)
    weight_ways.begin(cached)
    assert cached.generate(TOKENS).host_tokens == 0
    push_out(cached, "begun")
    weight_ways.load_tensors(cached, models.new, flush_cache=True)
    push_out(cached, "loaded")
    assert cached.generate(TOKENS).host_tokens == 0
    weight_ways.end(cached)

    check_forgotten(cached, models.new_answer)
    check_forgotten(cached, models.new_answer)
    cached.flush()
    check_kept_again(cached, models.new_answer)


def test_session_in_which_weights_are_written_from_outside(cached: Server, models: Models) -> None:
    """P2P and RDMA writers make no call of their own: the session's ends are all that can be seen."""
    remember(cached)
    weight_ways.begin(cached)
    weight_ways.end(cached)
    check_forgotten(cached, models.old_answer)
    cached.flush()
    check_kept_again(cached, models.old_answer)


# ---- while requests run ----

LONG = prompt("running", 300)
N_LONG = 240
"""Tokens that take about a second to decode, so that what is done meanwhile is done to a running request."""


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def wait_until_decoding(server: Server, rid: str) -> None:
    def poll() -> bool | None:
        return rid in server.inspect().requests["decoding"] or None

    wait_for(f"{rid} is decoded", poll, ANSWER_TIMEOUT_S)


def test_update_waits_for_running_requests(cached: Server, models: Models, thread: ThreadPoolExecutor) -> None:
    """They end with the weights with which they began."""
    alone = cached.generate(LONG, N_LONG)
    remember(cached)
    running = thread.submit(cached.generate, LONG, N_LONG, rid="running")
    wait_until_decoding(cached, "running")
    weight_ways.from_disk(cached, models.new, flush_cache=True)
    assert running.result().tokens == alone.tokens
    assert cached.generate(LONG).cached_tokens == 0

    check_forgotten(cached, models.new_answer)
    check_kept_again(cached, models.new_answer)


def test_update_of_a_server_paused_in_place(cached: Server, models: Models, thread: ThreadPoolExecutor) -> None:
    """The flush is refused, and the request goes on with KV of both models. Nobody may ever find that."""
    remember(cached)
    cached.generate(LONG[:160])
    running = thread.submit(cached.generate, LONG, N_LONG, rid="in place")
    wait_until_decoding(cached, "in place")
    cached.ask("/pause_generation", mode="in_place")
    refusal = cached.ask_refused("/update_weights_from_disk", model_path=str(models.new), flush_cache=True)
    cached.ask("/continue_generation")
    answer = running.result()

    assert "cache was not flushed" in refusal
    assert len(answer.tokens) == N_LONG
    push_out(cached, "in place")
    whole = LONG + list(answer.tokens)
    assert cached.generate(whole).cached_tokens == 0
    check_forgotten(cached, models.new_answer)
    cached.flush()
    check_kept_again(cached, models.new_answer)


@pytest.mark.parametrize("flush_cache", [True, False], ids=["flush", "no-flush"])
def test_update_of_a_server_paused_by_retraction(
    cached: Server, models: Models, thread: ThreadPoolExecutor, tolerances: Tolerances, flush_cache: bool
) -> None:
    """The running request goes back to the queue, and is computed anew, with a flush by the new weights alone."""
    remember(cached)
    running = thread.submit(cached.generate, LONG, N_LONG, rid="retracted")
    wait_until_decoding(cached, "retracted")
    cached.ask("/pause_generation", mode="retract")
    weight_ways.from_disk(cached, models.new, flush_cache=flush_cache)
    cached.ask("/continue_generation")
    answer = running.result()
    push_out(cached, "retracted")
    whole = LONG + list(answer.tokens)
    again = cached.generate(whole)

    if flush_cache:
        assert again.host_tokens == reusable(whole)
        cached.flush()
        cold = cached.generate(whole)
        assert cold.cached_tokens == 0
        tolerances.batched.check(again, cold)  # what decoding has written is rounded otherwise than by prefill
    else:
        assert again.cached_tokens == 0
        check_forgotten(cached, models.new_answer)
        cached.flush()
    check_kept_again(cached, models.new_answer)


def test_update_of_a_server_that_was_paused_by_aborts(
    cached: Server, models: Models, thread: ThreadPoolExecutor
) -> None:
    remember(cached)
    running = thread.submit(cached.generate, LONG, N_LONG, rid="aborted")
    wait_until_decoding(cached, "aborted")
    cached.ask("/pause_generation", mode="abort")
    assert running.result().finish_reason == "abort"
    weight_ways.from_disk(cached, models.new, flush_cache=True)
    cached.ask("/continue_generation")

    assert cached.generate(LONG).cached_tokens == 0
    check_forgotten(cached, models.new_answer)
    check_kept_again(cached, models.new_answer)
