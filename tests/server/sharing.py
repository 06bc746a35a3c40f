"""What tests of servers that share a store have in common, whichever store it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.server.conftest import Fleet, running_together
from tests.server.traffic import Tolerance, prompt, reusable
from tests.support.server import Answer, Server, Setup

BATCHED = Tolerance(0.2)
"""More than stock SGLang differs from itself when prompts are computed with others at once (`tolerances`)."""

LEAST_SHARE = 0.3
"""Of all prompt tokens, so many come from a store that serves."""


def share_from_storage(answers: Sequence[Answer]) -> float:
    return sum(answer.storage_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)


def check_that_servers_share(
    fleet: Fleet, setups: Sequence[Setup], folder: Path, ready: Callable[[Server], None] = lambda _: None
) -> None:
    """Start two, and ask the second what the first has answered: all comes from the store, and the answer is the same.

    ready: waits until a server uses the store. Their schedulers sleep when idle, or they would take all cores from each
    other.
    """
    tokens = prompt("shared", 1500)
    asleep = [replace(setup, arguments=(*setup.arguments, "--sleep-on-idle")) for setup in setups]
    with running_together(fleet, asleep, folder) as (first, second):
        for server in (first, second):
            ready(server)
        cold = first.generate(tokens)
        first.at_rest()
        hit = second.generate(tokens)
        assert (hit.storage_tokens, hit.device_tokens, hit.host_tokens) == (reusable(tokens), 0, 0)
        Tolerance(0.0).check(hit, cold)
        seen = [server.at_rest() for server in (first, second)]
        assert [one.first_violation for one in seen] == [None, None]
