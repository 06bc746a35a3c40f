"""The scheduler's side of explanations: what it notes of prompts that arrive, and what it answers about one.

Everything here is on the scheduler thread, and answers read only: a rank that is asked goes on holding what the others
hold. Only the first rank of a replica is asked, and only it asks its tiers. What shared stores have comes later than
the first answer; the HTTP server then asks again, by the question's id, and the keys are not hashed twice.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from hicache import Engine, Fate, Inquiry, Whereabouts
from hicache.tier import true_prefix
from radix import HBM, KEY_NBYTES
from radix.departures import (
    CAPACITY,
    CLEARED,
    DAMAGED,
    DISAGREEMENT,
    FLUSH,
    NOT_KNOWN,
    QUOTA,
    WEIGHTS,
)
from radix.windows import Windows
from sgl_lmcache.adapters import unambiguous_key
from sgl_lmcache.blocks import unmatched
from sgl_lmcache.explanation import (
    MAX_WAITING,
    Ask,
    AskAgain,
    AskHealth,
    Explanation,
    Health,
    Question,
    Run,
    TierHealth,
    Unknown,
)
from sgl_lmcache.keys import to_blob

if TYPE_CHECKING:
    from sgl_lmcache.wrapper import Tail

MAX_RUNS: Final = 256
"""Of an answer. Each costs some microseconds, and more than a few can only come of a prompt made up of many."""

MAX_ANSWER_TOKENS: Final = 4096
"""Of what HBM has of a prompt that arrives so much, at its end, is noted again: answers come in without being noted."""

REASON_NAMES: Final = {
    NOT_KNOWN: "gone",
    CAPACITY: "evicted",
    QUOTA: "over_quota",
    DAMAGED: "damaged",
    CLEARED: "cleared",
    FLUSH: "flushed",
    WEIGHTS: "new_weights",
    DISAGREEMENT: "disagreement",
}

FATE_NAMES: Final = {
    Fate.NEVER_SEEN: "never_seen",
    Fate.OTHER_NAMESPACE: "other_namespace",
    Fate.MOVED: "prefix_changed",
    Fate.FORGOTTEN: "forgotten",
    Fate.BEHIND: "behind",
    Fate.NOT_ANSWERED: "not_answered",
    Fate.DOWN: "tier_down",
    Fate.ARRIVING: "arriving",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A question that has been put to the tiers."""

    tokens: NDArray[np.int64]
    space: int
    inquiry: Inquiry


class Explainer:
    """See the module's text. One for a cache.

    replica: its number among the data-parallel ones. speaks: whether this rank is the one that answers for it; others
    note nothing and answer nothing.
    """

    def __init__(self, engine: Engine, *, page_size: int, is_eagle: bool, replica: int, speaks: bool) -> None:
        self._engine = engine
        self._page_size = page_size
        self._is_eagle = is_eagle
        self._replica = replica
        self._speaks = speaks
        self._windows = Windows(2 * engine.host.n_slots * page_size if speaks else 0)
        self._secret = secrets.token_bytes(32)
        self._asked: dict[str, _Asked] = {}

    # ---- what is noted ----

    def arrived(self, tail: Tail) -> None:
        """A request has arrived: its tokens are seen from now on."""
        req = tail.req
        if not self._speaks or req.positional_embed_overrides is not None:
            return
        start, keys = self._keys(tail)
        n_matched, n_pages = start + len(keys) // KEY_NBYTES, len(req.origin_input_ids) // self._page_size
        if n_matched == n_pages - 1 and not self._is_eagle:  # of a last page that is whole, SGLang matches no token
            keys += unmatched(tail, n_matched, n_pages, self._page_size)
        tokens = _numbers(req.origin_input_ids)[start * self._page_size :]
        self._windows.note(tokens, keys, self._page_size, self._space(req.extra_key, req.cache_salt or None))

    def _keys(self, tail: Tail) -> tuple[int, bytes]:
        """From which page on a prompt is noted, and the keys from there on, as far as it was matched."""
        n_above = tail.device_hit_len // self._page_size
        row = None if tail.anchor is None else self._engine.index.row_of(tail.anchor)
        if row is None:
            return n_above, tail.keys
        start = max(0, n_above - MAX_ANSWER_TOKENS // self._page_size)
        return start, self._engine.index.keys_of(self._engine.index.path(row)[start:]) + tail.keys

    def _space(self, extra_key: str | None, cache_salt: str | None) -> int:
        """A number for a namespace, which nobody outside can compute. An empty salt is none, as for SGLang."""
        parts = (
            b"-" if part is None else b"+" + part.encode("utf-8", "surrogatepass") for part in (extra_key, cache_salt)
        )
        digests = (blake2b(part, key=self._secret, digest_size=8).digest() for part in parts)
        return int.from_bytes(blake2b(b"".join(digests), key=self._secret, digest_size=8).digest(), "little")

    # ---- what is answered ----

    def answer(self, question: Question) -> Health | Explanation | Unknown | None:
        """None: another rank answers."""
        if not self._speaks:
            return None
        match question:
            case AskHealth():
                return self.health(question.id)
            case Ask():
                return self._explain(question.id, self._ask(question))
            case AskAgain():
                asked = self._asked.get(question.id)
                return Unknown(question.id, self._replica) if asked is None else self._explain(question.id, asked)

    def health(self, id: str = "") -> Health:
        """Costs microseconds: tiers answer from what they know."""
        engine = self._engine
        stopped = self._stopped
        tiers = [TierHealth("host", stopped or "ok")]
        if engine.below is not None:
            for tier in engine.below.tiers:
                tiers.append(TierHealth(tier.name, "given_up" if not tier.health().available else stopped or "ok"))
        return Health(id, tuple(tiers))

    @property
    def _stopped(self) -> str:
        return REASON_NAMES[self._engine.taint_reason] if self._engine.tainted else ""

    def _ask(self, question: Ask) -> _Asked:
        tokens = np.frombuffer(question.tokens, "<i4").astype(np.int64)
        extra_key = question.extra_key
        if question.lora_id is not None:
            extra_key = (extra_key or "") + question.lora_id
        if extra_key is not None:
            extra_key = unambiguous_key(extra_key, question.lora_id)
        cache_salt = question.cache_salt or None
        key = RadixKey(array("q", tokens.tobytes()), extra_key, cache_salt=cache_salt)
        key, _ = key.maybe_to_bigram_view(self._is_eagle)
        n_tokens = len(key) // self._page_size * self._page_size
        keys = b""
        if n_tokens:
            keys = to_blob(get_storage_hash_str(key[:n_tokens], None, page_size=self._page_size))
        asked = _Asked(tokens, self._space(extra_key, cache_salt), self._engine.inquire(keys))
        self._asked[question.id] = asked
        if len(self._asked) > MAX_WAITING:
            del self._asked[next(iter(self._asked))]
        return asked

    def _explain(self, id: str, asked: _Asked) -> Explanation:
        inquiry = asked.inquiry
        windows = self._windows.find(asked.tokens, inquiry.keys, self._page_size, asked.space)
        found = inquiry.look(self._engine.index, self._engine.host.departures, windows)
        names = self._tier_names()
        n_tokens = len(asked.tokens)
        hits = self._hits(found, n_tokens, names)
        if not inquiry.waiting:
            self._asked.pop(id, None)
        return Explanation(
            id=id,
            replica=self._replica,
            page_size=self._page_size,
            n_tokens=n_tokens,
            hit_tokens=hits,
            compute_tokens=n_tokens - sum(hits.values()),
            runs=tuple(self._runs(found, n_tokens, names)),
            changed_at=self._changed_at(found),
            down=tuple(inquiry.down),
            waiting=tuple(inquiry.waiting),
            stopped=self._stopped,
        )

    def _tier_names(self) -> list[str]:
        below = self._engine.below
        return ["hbm", "host", *(tier.name for tier in (below.tiers if below is not None else ()))]

    def _hits(self, found: Whereabouts, n_tokens: int, names: list[str]) -> dict[str, int]:
        """How many tokens would come from each tier, each page from the fastest that has it."""
        on = found.on & np.uint16(1 << HBM) if self._engine.tainted else found.on
        n_pages = min(true_prefix(on != 0), max(0, n_tokens - 1) // self._page_size)
        hits = {}
        for tier, name in enumerate(names):
            here = (on[:n_pages] & np.uint16(1 << tier)) != 0
            here &= (on[:n_pages] & np.uint16((1 << tier) - 1)) == 0
            hits[name] = int(np.count_nonzero(here)) * self._page_size
        return hits

    def _changed_at(self, found: Whereabouts) -> int | None:
        unknown = ~found.is_known_by_name
        fates = found.fate[unknown]
        if not ((fates == Fate.MOVED) | (fates == Fate.OTHER_NAMESPACE)).any():
            return None
        return int(unknown.argmax()) * self._page_size

    def _runs(self, found: Whereabouts, n_tokens: int, names: list[str]) -> Iterator[Run]:
        """Neighbours of which the same is to be said are one run; of more than `MAX_RUNS` the rest is one more."""
        n_pages, now_s = len(found.on), self._engine.clock()
        starts = _starts(found)
        if len(starts):
            last_s = np.fmax.reduceat(found.at_s, starts).tolist()
            ends = [*starts[1:].tolist(), n_pages]
            for number, (first, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
                start_token = first * self._page_size
                if number == MAX_RUNS:
                    yield Run(start_token, n_pages * self._page_size, reason="not_shown")
                    break
                yield self._run(found, first, (start_token, end * self._page_size), names, now_s - last_s[number])
        if n_pages * self._page_size < n_tokens:
            yield Run(n_pages * self._page_size, n_tokens, reason="partial_page")

    def _run(self, found: Whereabouts, page: int, span: tuple[int, int], names: list[str], ago_s: float) -> Run:
        """What is said of `page` holds for all of the span. ago_s: nan if that is not known."""
        on, fate, tier = int(found.on[page]), Fate(int(found.fate[page])), int(found.tier[page])
        if on:
            return Run(*span, tuple(name for number, name in enumerate(names) if on >> number & 1))
        about = names[tier] if fate >= Fate.LEFT and tier < len(names) else None
        if fate != Fate.LEFT:
            return Run(*span, reason=FATE_NAMES[fate], tier=about)
        ago = None if math.isnan(ago_s) else max(0.0, ago_s)
        return Run(*span, reason=REASON_NAMES[int(found.reason[page])], tier=about, seconds_ago=ago)


def _starts(found: Whereabouts) -> NDArray[np.int64]:
    """The pages of which another thing is to be said than of the page before, the first page included."""
    missing = found.on == 0
    differs = np.ones(len(missing), np.bool_)
    differs[1:] = found.on[1:] != found.on[:-1]
    for column in (found.fate, found.tier, found.reason):
        differs[1:] |= missing[1:] & (column[1:] != column[:-1])
    return np.flatnonzero(differs)


def _numbers(tokens: array[int]) -> NDArray[np.int64]:
    """A view, if they are of 8 bytes."""
    return np.frombuffer(tokens, f"i{tokens.itemsize}").astype(np.int64, copy=False)
