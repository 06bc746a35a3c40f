"""Traces for tests: written by hand as blocks, or generated as conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_lmcache.simulate.trace import Trace, parse

BLOCK = 64
"""Tokens in a block of these traces."""


def line(ids: Sequence[Hashable], *, at_ms: float = 0, rest: int = 0, **other: object) -> dict[str, Any]:
    """A request whose prompt has these full blocks, and `rest` tokens more."""
    fields: dict[str, Any] = {
        **{"timestamp": at_ms, "input_length": len(ids) * BLOCK + rest, "output_length": 1},
        **{"hash_ids": [*ids, *(["tail"] if rest else [])], "block_size": BLOCK},
    }
    return {**fields, **other}


def lines(*requests: Sequence[Hashable]) -> list[dict[str, Any]]:
    """One request a second."""
    return [line(ids, at_ms=1000 * number) for number, ids in enumerate(requests)]


def encode(requests: Sequence[Mapping[str, Any]]) -> list[bytes]:
    return [json.dumps(request).encode() + b"\n" for request in requests]


def trace_of(requests: Sequence[Mapping[str, Any]]) -> Trace:
    return parse(encode(requests), source="trace", name="trace")


def blocks(*requests: Sequence[Hashable]) -> Trace:
    """A trace of requests with these blocks."""
    return trace_of(lines(*requests))


def write(path: Path, requests: Sequence[Mapping[str, Any]]) -> Path:
    path.write_bytes(b"".join(encode(requests)))
    return path


def conversations(n_requests: int, *, seed: int, block_size: int = BLOCK) -> list[dict[str, Any]]:
    """Users take turns: each prompt is a shared beginning, what was said before, and something new."""
    rng = random.Random(seed)
    users: list[list[int]] = []
    next_id, at_ms = 100, 0
    requests = []
    for _ in range(n_requests):
        if not users or rng.random() < 0.3:
            users.append(list(range(10 * rng.randrange(3), 10 * rng.randrange(3) + 3))[: rng.randrange(3)])
        history = rng.choice(users[-12:])
        n_new = rng.randrange(1, 8)
        history += range(next_id, next_id + n_new)
        next_id += n_new
        at_ms += rng.randrange(2000)
        rest = rng.randrange(block_size)
        request = line(history, at_ms=at_ms, rest=rest, block_size=block_size)
        requests.append({**request, "input_length": len(history) * block_size + rest})
    return requests
