"""What a server answers about a prompt, with SGLang's own tree and keys, and a tier below host memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from radix.departures import CAPACITY, Departures
from sgl_lmcache.adapters import unambiguous_key
from sgl_lmcache.explainer import FATE_NAMES, MAX_ANSWER_TOKENS, MAX_RUNS, REASON_NAMES, Explainer
from sgl_lmcache.explanation import (
    MAX_WAITING,
    REASONS,
    Ask,
    AskAgain,
    AskHealth,
    Explanation,
    Health,
    Question,
    Run,
    TierHealth,
    Unknown,
    words,
)
from sgl_lmcache.namespace import Namespace
from tests.support.clock import Clock
from tests.support.real_cache import RealCache, request
from tests.support.tiers import FaultyTier, MemoryTier
from transfer.slab import Slab

PAGE = 16
TIER = "faulty memory"


def open_tier(slab: Slab, _namespace: Namespace) -> FaultyTier:
    return FaultyTier(MemoryTier(slab.array, 1000))


@pytest.fixture
def real() -> Iterator[RealCache]:
    cache = RealCache(64, 128, page_size=PAGE, max_len=8192, clock=Clock(), open_tiers=[(open_tier, "through")])
    yield cache
    cache.close()


def prompt(seed: object, n_tokens: int) -> list[int]:
    return random.Random(str(seed)).choices(range(100, 150_000), k=n_tokens)


def serve(real: RealCache, tokens: list[int], *, cache_salt: str | None = None, extra_key: str | None = None) -> None:
    one = request(f"{random.random()}", tokens, cache_salt=cache_salt, extra_key=extra_key)
    real.arrive(one)
    for _ in range(100):
        if real.cache.check_prefetch_progress(one.handle):
            break
        real.settle()
    assert real.admit(one) is not None
    for _ in range(5):
        real.settle()


def answer(real: RealCache, question: Question) -> object:
    assert real.cache.explainer is not None
    return real.cache.explainer.answer(question)


def explain(
    real: RealCache,
    tokens: list[int],
    *,
    cache_salt: str | None = None,
    extra_key: str | None = None,
    lora_id: str | None = None,
) -> Explanation:
    question = Ask("id", np.array(tokens, "<i4").tobytes(), cache_salt, extra_key, lora_id)
    explanation = answer(real, question)
    assert isinstance(explanation, Explanation)
    assert explanation.compute_tokens + sum(explanation.hit_tokens.values()) == len(tokens)
    ends = [(run.start, run.end) for run in explanation.runs]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == len(tokens)
    return explanation


def said(explanation: Explanation) -> list[tuple[int, int, tuple[str, ...], str]]:
    return [(run.start, run.end, run.tiers, run.reason) for run in explanation.runs]


def test_of_a_whole_page_at_the_end_the_last_token_is_computed_again(real: RealCache) -> None:
    tokens = prompt(1, 320)
    serve(real, tokens)
    explanation = explain(real, tokens)
    assert said(explanation) == [(0, 320, ("hbm", "host", TIER), "")]
    assert explanation.hit_tokens == {"hbm": 304, "host": 0, TIER: 0}
    assert explain(real, [*tokens, 1]).hit_tokens["hbm"] == 320
    short = explain(real, [1, 2, 3])
    assert said(short) == [(0, 3, (), "partial_page")]


def test_what_is_promised_is_what_a_request_finds(real: RealCache) -> None:
    """Over prompts that push each other out of HBM and host memory, with a common beginning."""
    chance = random.Random(5)
    start = prompt("common", 160)
    for number in range(60):
        tokens = start + prompt(chance.randrange(12), chance.randrange(1, 500))
        hits = explain(real, tokens).hit_tokens
        one = request(str(number), tokens)
        real.arrive(one)
        for _ in range(100):
            if real.cache.check_prefetch_progress(one.handle):
                break
            real.settle()
        found = real.admit(one)
        assert found is not None
        assert found[0] == hits["hbm"]
        assert found[1] == hits["host"] + hits[TIER]
        real.settle()


@pytest.mark.parametrize("n_cut", [16, 21, 100])
def test_a_chat_that_is_cut_at_the_front(real: RealCache, n_cut: int) -> None:
    tokens = prompt(1, 960)
    serve(real, tokens)
    cut = tokens[:160] + tokens[160 + n_cut :]
    explanation = explain(real, cut)
    assert explanation.changed_at == explanation.hit_tokens["hbm"] == 160
    assert {run.reason for run in explanation.runs[1:]} <= {"prefix_changed", "never_seen", "partial_page"}
    moved = sum(run.end - run.start for run in explanation.runs if run.reason == "prefix_changed")
    assert moved > 600


def test_an_answer_is_known_by_its_tokens_from_the_next_turn_on(real: RealCache) -> None:
    asked, answered = prompt("question", 320), prompt("answer", 320)
    one = request("first", asked)
    real.arrive(one)
    while not real.cache.check_prefetch_progress(one.handle):
        real.settle()
    one.tokens = asked + answered  # the end of a generation, as far as the cache is concerned
    real.admit(one)
    real.settle()
    turn = asked + answered + prompt("next", 64)
    serve(real, turn)
    moved = explain(real, [1] * 16 + answered)
    assert [run.reason for run in moved.runs][-1] == "prefix_changed"
    assert len(answered) < MAX_ANSWER_TOKENS


@pytest.mark.parametrize("lora_id", [None, "0123abcd"])
def test_namespaces_are_told_apart(real: RealCache, lora_id: str | None) -> None:
    tokens = prompt(1, 640)
    extra_key = unambiguous_key("kind" + (lora_id or ""), lora_id)
    serve(real, tokens, cache_salt="s", extra_key=extra_key)
    own = explain(real, tokens, cache_salt="s", extra_key="kind", lora_id=lora_id)
    assert own.hit_tokens["hbm"] == 624
    others: list[dict[str, str]] = [
        *({}, {"cache_salt": "s"}, {"extra_key": "kind"}),
        *({"cache_salt": "t", "extra_key": "kind"}, {"cache_salt": "s", "extra_key": "kind", "lora_id": "other"}),
    ]
    for fields in others:
        explanation = explain(real, tokens, **fields)
        assert {run.reason for run in explanation.runs} == {"other_namespace"}
        assert explanation.changed_at == 0


def test_an_empty_salt_is_none(real: RealCache) -> None:
    tokens = prompt(1, 320)
    serve(real, tokens)
    assert explain(real, tokens, cache_salt="").hit_tokens["hbm"] == 304


def test_new_weights_stop_what_is_below_hbm_and_take_all(real: RealCache) -> None:
    tokens = prompt(1, 320)
    serve(real, tokens)
    real.cache.taint()
    explanation = explain(real, tokens)
    assert explanation.stopped == "new_weights"
    assert explanation.hit_tokens == {"hbm": 304, "host": 0, TIER: 0}
    assert answer(real, AskHealth("1")) == Health(
        "1", (TierHealth("host", "new_weights"), TierHealth(TIER, "new_weights"))
    )
    real.cache.reset()
    explanation = explain(real, tokens)
    assert (explanation.stopped, said(explanation)) == ("", [(0, 320, (), "new_weights")])


def test_a_tier_that_is_late_is_asked_for_again_and_questions_are_forgotten(real: RealCache) -> None:
    tokens = prompt(1, 320)
    (tier,) = real.tiers
    assert isinstance(tier, FaultyTier)
    serve(real, tokens)
    tier.hold()
    assert explain(real, tokens).waiting == (TIER,)
    tier.release()
    again = answer(real, AskAgain("id"))
    assert isinstance(again, Explanation)
    assert (again.waiting, again.runs[0].tiers) == ((), ("hbm", "host", TIER))
    assert answer(real, AskAgain("id")) == Unknown("id", 0)
    tier.hold()
    for number in range(MAX_WAITING + 1):
        answer(real, Ask(str(number), np.array(tokens, "<i4").tobytes()))
    assert answer(real, AskAgain("0")) == Unknown("0", 0)
    assert isinstance(answer(real, AskAgain("1")), Explanation)
    tier.release()


def test_a_tier_that_is_given_up(real: RealCache) -> None:
    (tier,) = real.tiers
    assert isinstance(tier, FaultyTier)
    tier.close()
    assert answer(real, AskHealth("1")) == Health("1", (TierHealth("host", "ok"), TierHealth(TIER, "given_up")))
    assert explain(real, prompt(1, 64)).down == (TIER,)


def test_only_the_first_rank_answers(real: RealCache) -> None:
    silent = Explainer(real.engine, page_size=PAGE, is_eagle=False, replica=0, speaks=False)
    assert silent.answer(AskHealth("1")) is None
    assert silent.answer(Ask("1", b"\1\0\0\0")) is None


def test_explaining_touches_nothing(real: RealCache) -> None:
    tokens = prompt(1, 640)
    serve(real, tokens)
    before = (real.engine.digest, str(real.engine.stats), real.engine.index.eviction_order(1000).tolist())
    for asked in (tokens, tokens[16:], prompt(2, 640)):
        explain(real, asked)
    assert before == (real.engine.digest, str(real.engine.stats), real.engine.index.eviction_order(1000).tolist())
    real.check()


def test_of_very_many_runs_the_rest_is_one(real: RealCache) -> None:
    """Every second page has left."""
    tokens = prompt(1, 16 * 3 * MAX_RUNS + 5)
    keys = real.page_keys(tokens)
    real.engine.host.departures = Departures(10_000)
    for start in range(0, len(keys), 64):
        real.engine.host.departures.left(keys[start : start + 32], 1, CAPACITY, 0.0)
    runs = explain(real, tokens).runs
    assert len(runs) == MAX_RUNS + 2
    assert {(run.reason, run.seconds_ago) for run in runs[:MAX_RUNS:2]} == {("evicted", 0.0)}
    assert [run.reason for run in runs[-2:]] == ["not_shown", "partial_page"]


def test_every_reason_has_words() -> None:
    given = {*REASON_NAMES.values(), *FATE_NAMES.values(), "partial_page", "not_shown"}
    assert given == set(REASONS)
    for reason in given:
        assert "{" not in words(Run(0, 1, reason=reason, tier="ssd"))
