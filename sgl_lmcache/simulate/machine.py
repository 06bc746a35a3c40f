"""What is assumed of the machine: how fast a prefill is, how fast bytes move, and how large a page is.

    prefill    seconds = (new tokens + pairs of a new token and one before it / 30,000) / tokens a second
    moving     seconds = latency + bytes / bytes a second, behind what the same tier is moving in the same direction

The first term of a prefill is the work for each token (projections, experts), the second that for each pair
(attention). In a model like Llama 3.1 8B a token costs 16 GFLOP, and each token before it 0.5 MFLOP more: behind 30,000
tokens one costs twice as much as at the beginning.

The figures below are round ones of common hardware: PCIe 4 x16 between HBM and host memory, an NVMe drive, 10 Gbit/s to
a Valkey, 25 Gbit/s between the nodes of a Mooncake Store. Those of a real machine are said with `--assume`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final

from sgl_lmcache.quantities import Nbytes, Seconds, decode_nbytes, decode_seconds

CONTEXT_TOKENS: Final = 30_000
"""Behind so many tokens, one costs twice as much as at the beginning."""

TOKENS_PER_S: Final = 10_000.0
"""Of a prefill at short context: a model of 8 billion parameters on a data centre's GPU."""

TOKEN_NBYTES: Final = Nbytes(128 << 10)
"""KV of one token: Llama 3.1 8B in bf16, 2 x 32 layers x 8 heads x 128 x 2 bytes."""


@dataclass(frozen=True, slots=True)
class TierModel:
    """One tier. read, write: bytes a second out of it, towards HBM, and into it. latency: seconds that each call takes
    before its first byte. capacity: bytes, in place of what the configuration says."""

    read: float
    write: float
    latency: float
    capacity: int | None = None


TIER_MODELS: Final[Mapping[str, TierModel]] = MappingProxyType(
    {
        "host": TierModel(read=25e9, write=25e9, latency=0.0),
        "ssd": TierModel(read=3e9, write=2e9, latency=1e-4),
        "valkey": TierModel(read=1.2e9, write=1.2e9, latency=1e-3),
        "mooncake": TierModel(read=3e9, write=3e9, latency=5e-4),
    }
)
"""By the type of the tier."""


_WHATS: Final = tuple(known.name for known in fields(TierModel))


@dataclass(frozen=True, slots=True)
class Machine:
    """See the module's text. tiers: by the type of the tier."""

    token_nbytes: int = TOKEN_NBYTES
    tokens_per_s: float = TOKENS_PER_S
    tiers: Mapping[str, TierModel] = field(default_factory=lambda: dict(TIER_MODELS))

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute the tokens `start` to `end` of a prompt."""
        pairs = (end**2 - start**2) / 2
        return ((end - start) + pairs / CONTEXT_TOKENS) / self.tokens_per_s

    def restore_s(self, nbytes: int) -> float:
        """Seconds to copy so much from host memory into HBM."""
        speed = self.tiers["host"]
        return speed.latency + nbytes / speed.read if nbytes else 0.0


@dataclass(frozen=True, slots=True)
class Assumption:
    """One of `--assume`: of a tier, one field of its model."""

    tier: str
    what: str
    value: Nbytes | Seconds


def assumption(text: str) -> Assumption:
    """`TIER.WHAT=VALUE`, for argparse."""
    name, _, value = text.partition("=")
    tier, _, what = name.partition(".")
    if tier not in TIER_MODELS or what not in _WHATS:
        raise argparse.ArgumentTypeError(
            f"{text} is not TIER.WHAT=VALUE with a TIER of {', '.join(TIER_MODELS)} and a WHAT of {', '.join(_WHATS)}; "
            "write it like ssd.read=6GB"
        )
    if tier == "host" and what == "capacity":
        raise argparse.ArgumentTypeError(f"{text}: the host tier's capacity is said with --capacity, or in --config")
    return Assumption(tier, what, seconds(value) if what == "latency" else nbytes(value))


def nbytes(text: str) -> Nbytes:
    """A size as in the configuration, for argparse."""
    try:
        return Nbytes(decode_nbytes(int(text) if text.isdecimal() else text, least=1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def seconds(text: str) -> Seconds:
    """A duration as in the configuration, for argparse."""
    try:
        return decode_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def assume(assumptions: Iterable[Assumption]) -> Mapping[str, TierModel]:
    """The tiers, with these in the place of the defaults; of two that say the same, the last counts."""
    models = dict(TIER_MODELS)
    for said in assumptions:
        changed: dict[str, Any] = {said.what: said.value}
        models[said.tier] = replace(models[said.tier], **changed)
    return models
