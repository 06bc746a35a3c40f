"""The clairvoyant bound against every choice there is, and the policies against the bound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix import POLICIES
from sgl_lmcache.simulate.bound import clairvoyant_hits
from sgl_lmcache.simulate.machine import Machine
from sgl_lmcache.simulate.replay import Plan, replay
from tests.simulate.traces import blocks, conversations, trace_of

Paths = list[list[str]]


@st.composite
def paths(draw: st.DrawFn, max_requests: int, max_depth: int) -> Paths:
    """Requests with chained ids: each id is its whole path in a tree with two branches everywhere."""
    ways = draw(st.lists(st.lists(st.sampled_from("ab"), max_size=max_depth), min_size=1, max_size=max_requests))
    return [["".join(way[: depth + 1]) for depth in range(len(way))] for way in ways]


def most_hits(requests: Sequence[Sequence[str]], capacity: int) -> int:
    """By trying every set of blocks that could be held after each request."""
    best = {frozenset[str](): 0}
    for request in requests:
        following: dict[frozenset[str], int] = {}
        for held, hits in best.items():
            found = next((depth for depth, block in enumerate(request) if block not in held), len(request))
            there = sorted(held.union(request))
            choices = chain.from_iterable(combinations(there, size) for size in range(min(capacity, len(there)) + 1))
            for kept in map(frozenset, choices):
                following[kept] = max(following.get(kept, 0), hits + found)
        best = following
    return max(best.values())


@settings(max_examples=60)
@given(paths(max_requests=6, max_depth=3), st.integers(1, 4))
def test_it_is_the_most_that_any_choice_could_hit(requests: Paths, capacity: int) -> None:
    assert clairvoyant_hits(blocks(*requests), capacity).sum() == most_hits(requests, capacity)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(requests=paths(max_requests=40, max_depth=6), capacity=st.integers(1, 20))
def test_no_policy_hits_more(policy: str, requests: Paths, capacity: int) -> None:
    trace = blocks(*requests)
    hits = replay(trace, Plan(policy, capacity), Machine(), progress=lambda _: None).hits
    assert hits.sum() <= clairvoyant_hits(trace, capacity).sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_everything_every_policy_reaches_it(policy: str) -> None:
    trace = trace_of(conversations(60, seed=1))
    hits = replay(trace, Plan(policy, trace.n_blocks), Machine(), progress=lambda _: None).hits
    assert hits.sum(axis=1).tolist() == clairvoyant_hits(trace, trace.n_blocks).tolist()
    assert hits.sum() > 100


def test_a_loop_by_hand() -> None:
    """Three prompts of one block take turns, and there is room for two. lru would hit nothing at all."""
    trace = blocks(*(["a"], ["b"], ["c"]) * 3)
    assert clairvoyant_hits(trace, 2).tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 0]
    assert clairvoyant_hits(trace, 3).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_of_blocks_that_are_used_together_next_the_deepest_goes() -> None:
    trace = blocks(["a", "b", "c"], ["a", "b", "c"])
    assert [clairvoyant_hits(trace, n).tolist() for n in (1, 2, 3)] == [[0, 1], [0, 2], [0, 3]]


def test_blocks_that_never_come_back_take_no_room() -> None:
    trace = blocks(["a", "b"], [f"scan {n}" for n in range(10)], ["a", "b"])
    assert clairvoyant_hits(trace, 2).tolist() == [0, 0, 2]


def test_requests_without_a_full_block() -> None:
    assert clairvoyant_hits(blocks([], ["a"], [], ["a"]), 1).tolist() == [0, 0, 0, 1]
