"""What is asked of a server about a prompt and about itself, and what it answers: types, and the words for them.

The command line, the HTTP server and the schedulers all use these, so nothing heavy is imported here. Between the HTTP
server and the schedulers a question travels in the `rid` of SGLang's question for its internal state, which it has no
other use for, and the answer in that state, as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

MARK: Final = "sgl_lmcache "
"""What a question's `rid` begins with."""

STATE_KEY: Final = "sgl_lmcache"
"""Where our answer stands in SGLang's internal state."""

MAX_TOKENS: Final = 262_144
"""Of a prompt. Hashing them keeps the scheduler for some 35 ms."""

MAX_WAITING: Final = 4
"""Questions about prompts that are not answered yet; of each HTTP process."""

EXPLAIN_PATH: Final = "/sgl_lmcache/explain"
LIVE_PATH: Final = "/health/sgl_lmcache/live"
READY_PATH: Final = "/health/sgl_lmcache/ready"
"""SGLang's keys do not close what is below /health, so that probes need none."""


class Ask(Struct, frozen=True, tag="explain"):
    """Explain a prompt. tokens: int32, little-endian. extra_key: SGLang's, without the adapter that `lora_id` names."""

    id: str
    tokens: bytes
    cache_salt: str | None = None
    extra_key: str | None = None
    lora_id: str | None = None


class AskAgain(Struct, frozen=True, tag="again"):
    """The same as was asked with this id, if that is remembered: tiers may have answered by now."""

    id: str


class AskHealth(Struct, frozen=True, tag="health"):
    """What serves, and what does not."""

    id: str


Question = Ask | AskAgain | AskHealth


def to_rid(question: Question) -> str:
    return MARK + msgspec.json.encode(question).decode()


def from_rid(rid: str | None) -> Question | None:
    """None: it is no question of ours."""
    if rid is None or not rid.startswith(MARK):
        return None
    question: Question = msgspec.json.decode(rid[len(MARK) :], type=Question)
    return question


class TierHealth(Struct, frozen=True):
    """state: `ok`, `given_up`, `new_weights`, `disagreement` (what is kept is not used until a flush)."""

    tier: str
    state: str


class Health(Struct, frozen=True):
    id: str
    tiers: tuple[TierHealth, ...]


class Run(Struct, frozen=True):
    """Tokens `start` to `end` of the prompt, whole pages but for its end, with one answer.

    tiers: where they are, fastest first. reason: why they are nowhere, see `REASONS`; empty if they are somewhere.
    tier: which one the reason is about. seconds_ago: since the last of them left.
    """

    start: int
    end: int
    tiers: tuple[str, ...] = ()
    reason: str = ""
    tier: str | None = None
    seconds_ago: float | None = None


class Explanation(Struct, frozen=True, tag="explanation"):
    """Of one data-parallel replica.

    hit_tokens: how many would be found now, by the tier that they would come from. compute_tokens: the rest.
    changed_at: the first token of the page in which the prompt departs from what was seen before, if the rest of it was
    seen behind another prefix, or in another namespace. down: tiers that are given up, so that what they have does not
    count. waiting: tiers that have not answered. stopped: why nothing below HBM is used, empty if it is.
    """

    id: str
    replica: int
    page_size: int
    n_tokens: int
    hit_tokens: dict[str, int]
    compute_tokens: int
    runs: tuple[Run, ...]
    changed_at: int | None = None
    down: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    stopped: str = ""


class Unknown(Struct, frozen=True, tag="unknown"):
    """Nothing of this id is remembered."""

    id: str
    replica: int


class Answers(Struct, frozen=True):
    """What the endpoint answers: one explanation a data-parallel replica."""

    replicas: tuple[Explanation, ...]


REASONS: Final[Mapping[str, str]] = {
    "never_seen": "never seen",
    "other_namespace": "seen in another namespace (cache_salt, extra_key or adapter) only",
    "prefix_changed": "seen behind another prefix",
    "forgotten": "asked for before; not kept, or what became of it is forgotten",
    "evicted": "evicted from {tier} for want of room",
    "over_quota": "evicted from {tier} because of a quota",
    "damaged": "found damaged on {tier}, and dropped",
    "cleared": "deleted from {tier}",
    "flushed": "dropped by a flush",
    "new_weights": "dropped because new weights came in",
    "disagreement": "dropped because ranks had come to disagree",
    "gone": "given to {tier}, which does not have it any more",
    "behind": "given to {tier}, which lacks a page above it",
    "tier_down": "given to {tier}, which is given up",
    "not_answered": "given to {tier}, which has not answered",
    "arriving": "on its way into {tier}",
    "not_shown": "of too many kinds to be shown",
    "partial_page": "less than a page: never kept",
}
"""By what a run's `reason` says, the words for it."""


def decode(body: bytes) -> Answers:
    """Raises msgspec.MsgspecError for what is no answer of ours."""
    return msgspec.json.decode(body, type=Answers)


def words(run: Run) -> str:
    """What is to be said of a run that is nowhere, without when."""
    text = REASONS.get(run.reason, run.reason)
    return text.format(tier=run.tier)


def summary(explanation: Explanation) -> str:
    """One sentence, or two."""
    found = ", ".join(f"{n:,} from {tier}" for tier, n in explanation.hit_tokens.items() if n)
    n_hit = sum(explanation.hit_tokens.values())
    text = f"{n_hit:,} of {explanation.n_tokens:,} tokens would be found now"
    text += f" ({found}), {explanation.compute_tokens:,} are to be computed."
    if not found:
        text = f"Nothing would be found now: all {explanation.n_tokens:,} tokens are to be computed."
    if explanation.changed_at is not None:
        text += f" The prompt departs from what was seen before in the page at token {explanation.changed_at:,}."
    return text


def answers(state: Mapping[str, Any], question: Question) -> bool:
    """Whether an internal state has an answer to this question, if only that there is none."""
    answer = state.get(STATE_KEY, "")
    return answer is None or (isinstance(answer, dict) and answer.get("id") == question.id)
