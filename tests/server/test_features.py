"""Features of SGLang that change how requests are made or where KV lies: it comes back from host memory, and right."""

from __future__ import annotations

from typing import Any

import pytest

from sgl_lmcache.cpu import cpu_environment
from tests.server.conftest import ARGUMENTS, Fleet, check_at_rest
from tests.server.traffic import PAGE_SIZE, Prompt, prompt, push_out, reusable, whole_pages
from tests.support.latent_model import make_latent_model
from tests.support.server import Server, Setup

pytestmark = pytest.mark.server

CONFIG = "tiers: [{type: host, capacity: 24MiB}]\n"
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


# ---- models with latent attention ----


def test_latent_attention(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One latent row a token and layer instead of keys and values a head."""
    model = make_latent_model(tmp_path_factory.mktemp("latent") / "model")
    server = fleet.get(Setup("latent", (*ARGUMENTS, "--model-path", str(model)), config=CONFIG))
    tokens = prompt("latent", 1000)
    cold = server.generate(tokens, 16)
    branch = server.generate(tokens[:500] + prompt("branch", 300))
    push_out(server, "latent")
    restored = server.generate(tokens, 16)
    again = server.generate(tokens[:500] + prompt("branch", 300))
    seen = check_at_rest(server)

    assert (cold.cached_tokens, branch.device_tokens) == (0, whole_pages(500))
    assert (restored.device_tokens, restored.host_tokens) == (0, reusable(tokens))
    assert (restored.tokens, restored.logprobs) == (cold.tokens, cold.logprobs)
    assert again.cached_tokens == reusable(prompt("any", 800))
    assert (again.tokens, again.logprobs) == (branch.tokens, branch.logprobs)
    assert seen.checked >= reusable(tokens) // PAGE_SIZE


# ---- data parallel ----

CORES = "SGLANG_CPU_OMP_THREADS_BIND"
DATA_PARALLEL = Setup(
    "data-parallel",
    (*ARGUMENTS, "--tp", "2", "--dp", "2", "--enable-dp-attention", "--sleep-on-idle"),
    config=CONFIG,
    environment={CORES: cpu_environment({}, n_ranks=2)[CORES]},
)
"""Two schedulers, each with a tree, an HBM pool and half of the host tier, in lock-step by their models' layers."""


def test_data_parallel_attention(fleet: Fleet) -> None:
    """Each rank keeps its own requests' KV; what one has is not found on the other."""
    server = fleet.get(DATA_PARALLEL)
    tokens = prompt("replicas", 800)
    cold = [server.generate(tokens, routed_dp_rank=rank) for rank in (0, 1)]
    on_device = server.generate(tokens, routed_dp_rank=1)
    for rank in (0, 1):
        for number in range(5):
            server.generate(prompt(("replica", rank, number), 1000), 1, routed_dp_rank=rank)
    restored = [server.generate(tokens, routed_dp_rank=rank) for rank in (0, 1)]

    assert [answer.cached_tokens for answer in cold] == [0, 0]
    assert (on_device.device_tokens, on_device.host_tokens) == (reusable(tokens), 0)
    assert [(answer.device_tokens, answer.host_tokens) for answer in restored] == [(0, reusable(tokens))] * 2
    assert {(answer.tokens, answer.logprobs) for answer in [*cold, on_device, *restored]} == {
        (cold[0].tokens, cold[0].logprobs)
    }
    assert [one.hit_tokens["hbm"] for one in server.explain(tokens)] == [reusable(tokens)] * 2
    server.generate(prompt("of one", 800), 1, routed_dp_rank=1)
    assert [one.hit_tokens["hbm"] for one in server.explain(prompt("of one", 800))] == [0, reusable(tokens)]
    [first, second] = server.log_lines("host tier of .* GiB")
    assert first.partition("host tier")[2] == second.partition("host tier")[2]


# ---- sessions, batches, samples ----


def test_a_session_goes_on_from_host_memory(cached: Server) -> None:
    """SGLang puts the turns together; the next one finds the ones before, and so does a branch of an older turn."""
    turns = [prompt(("turn", number), 200) for number in range(3)]
    session = cached.ask("/open_session", capacity_of_str_len=100_000)
    first = _turn(cached, session, turns[0], None)
    push_out(cached, "first turn")
    second = _turn(cached, session, turns[1], first["meta_info"]["id"])
    push_out(cached, "second turn")
    branch = _turn(cached, session, turns[2], first["meta_info"]["id"])
    cached.ask("/close_session", session_id=session)

    context = turns[0] + first["output_ids"]
    known = whole_pages(len(context) - 1), whole_pages(len(context))  # a turn's last token is computed by the next
    for turn, answer, n_known in zip(turns[1:], (second, branch), known, strict=True):
        assert answer["meta_info"]["prompt_tokens"] == len(context + turn)
        assert answer["meta_info"]["cached_tokens_details"]["host"] == n_known
        cached.flush()
        assert list(cached.generate(context + turn).tokens) == answer["output_ids"]


def _turn(server: Server, session: str, tokens: Prompt, after: str | None) -> Any:
    return server.ask(
        "/generate", input_ids=tokens, session_params={"id": session, "rid": after}, sampling_params=GREEDY
    )


def test_a_rid_that_is_used_again(cached: Server) -> None:
    """One after another, with the same and with other tokens: nothing is remembered by the name alone."""
    known, other = prompt("known", 400), prompt("other", 400)
    cold = cached.generate(known, rid="again"), cached.generate(other, rid="again")
    push_out(cached, "rid")
    restored = cached.generate(known, rid="again"), cached.generate(other, rid="again")
    push_out(cached, "rid, once more")
    crossed = cached.generate(other, rid="again"), cached.generate(known, rid="again")

    for answer in (*restored, *crossed):
        assert (answer.device_tokens, answer.host_tokens) == (0, reusable(known))
    assert [answer.tokens for answer in restored] == [answer.tokens for answer in cold]
    assert [answer.tokens for answer in crossed] == [answer.tokens for answer in reversed(cold)]


def test_samples_of_one_prompt_share_its_restore(cached: Server) -> None:
    """For `n` samples SGLang first sends the prompt by itself, without a token to generate."""
    tokens = prompt("samples", 600)
    cold = cached.generate(tokens)
    push_out(cached, "samples")
    before = cached.at_rest().stats["restored"]
    answers = cached.ask("/generate", input_ids=tokens, sampling_params={**GREEDY, "n": 4})
    after = cached.at_rest().stats["restored"]

    assert len(answers) == 4
    assert all(answer["output_ids"] == list(cold.tokens) for answer in answers)
    assert after - before == reusable(tokens) // PAGE_SIZE


def test_logprobs_of_the_prompt_are_computed_where_they_are_asked_for(cached: Server) -> None:
    """SGLang computes anew from the first token whose logprob is wanted, so the hit ends there."""
    tokens = prompt("logprobs", 600)
    cold = cached.generate(tokens, logprob_start_len=0)
    push_out(cached, "logprobs")
    restored = cached.generate(tokens, logprob_start_len=320)
    assert (cold.cached_tokens, restored.host_tokens, restored.device_tokens) == (0, 320, 0)
    assert restored.tokens == cold.tokens
