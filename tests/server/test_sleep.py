"""A server that sleeps when it is idle, as `--sleep-on-idle` has it: it looks at nothing for a second at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.server.conftest import CACHED, Fleet, check_at_rest
from tests.server.traffic import prompt, push_out, reusable

pytestmark = pytest.mark.server

SLEEPING = replace(CACHED, name="sleeping", arguments=(*CACHED.arguments, "--sleep-on-idle"))


def test_server_that_sleeps_when_idle(fleet: Fleet) -> None:
    """Nobody asks for the ends of its copies while it sleeps: they wait for the next message, as their HBM pages do."""
    server = fleet.get(SLEEPING)
    tokens = prompt("sleep", 700)
    with server.held_copies():
        cold = server.generate(tokens)
        assert server.inspect().host["incoming"] > 0
    push_out(server, "sleep")
    restored = server.generate(tokens)
    server.flush()

    assert (restored.host_tokens, restored.tokens) == (reusable(tokens), cold.tokens)
    assert check_at_rest(server).host["resident"] == 0
