"""What the whole list of refusals rests on: a real start ends with its sentence. Two rows, for a start takes long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.conftest import Fleet, check_does_not_start
from tests.server.traffic import N_HBM_TOKENS
from tests.support.server import Setup

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        # The user's own argument, which our hook's override hides in the published configuration.
        (("--enable-lmcache",), "LMCache would keep the same pages; leave --enable-lmcache out."),
        (("--enable-streaming-session",), "streaming sessions keep KV outside the radix cache"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_a_refused_combination_stops_the_start(
    fleet: Fleet, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    setup = Setup("refused", ("--max-total-tokens", str(N_HBM_TOKENS), *arguments))
    refusal = r"sgl_lmcache does not run here: [^\n]*" + re.escape(sentence)
    check_does_not_start(fleet, setup, tmp_path, refusal)
