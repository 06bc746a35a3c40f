"""What a call may move, and how long it may take: an answer is never of a call that Mooncake has given up."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hicache.mooncake.owners import FRESH_S, Owners
from hicache.mooncake.process import DRAIN_S, GIVE_UP_S, KILL_AFTER_S, N_LANES, SLACK_S, piece_pages
from tests.support.clock import Clock


@given(st.floats(0.01, 10.0))
def test_a_call_is_over_or_killed_before_mooncake_gives_it_up(timeout_s: float) -> None:
    n_rounds = math.ceil(2 * piece_pages(timeout_s) / N_LANES)
    assert n_rounds * (max(1, math.ceil(timeout_s)) + SLACK_S) <= DRAIN_S < KILL_AFTER_S < GIVE_UP_S


def test_a_node_that_has_failed_is_asked_again_after_a_pause_and_serves_or_waits_longer() -> None:
    clock = Clock()
    owners = Owners(clock, 1.0)
    assert owners.all_serve
    assert owners.failed({"a:1"}) == ["a:1"]
    assert not owners.may_ask("a:1")
    assert owners.may_ask("b:1")
    assert not owners.all_serve
    clock.now_s += 1.0
    assert owners.may_ask("a:1")
    assert owners.failed({"a:1"}) == [], "that is no news"
    clock.now_s += 1.0
    assert not owners.may_ask("a:1")
    clock.now_s += 1.0
    assert owners.served({"a:1"}) == ["a:1"]
    assert owners.all_serve
    assert owners.served({"a:1"}) == []


def test_a_node_that_has_served_lately_is_not_connected_to() -> None:
    clock = Clock()
    owners = Owners(clock, 0.2)
    nowhere = "127.0.0.1:not a port"
    owners.served({nowhere})
    assert owners.unreachable({nowhere}) == set()
    clock.now_s += FRESH_S
    assert owners.unreachable({nowhere}) == {nowhere}


def test_a_machine_that_refuses_the_connection_is_there() -> None:
    """With a metadata server the port in a node's name is one that nobody listens on."""
    assert Owners(Clock(), 0.5).unreachable({"127.0.0.1:1"}) == set()
