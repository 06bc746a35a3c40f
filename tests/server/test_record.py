"""A server that records itself: the trace has what was sent, in order, and nothing that could be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ARGUMENTS, Fleet, running
from tests.server.traffic import prompt
from tests.support.server import ANSWER_TIMEOUT_S, Server, Setup, wait_for

pytestmark = pytest.mark.server

Line = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def server(fleet: Fleet, folder: Path) -> Iterator[Server]:
    environment = {"SGL_LMCACHE_RECORD": str(folder / "trace.jsonl"), "SGL_LMCACHE_RECORD_LIMIT": "1MiB"}
    arguments = (*ARGUMENTS, "--sleep-on-idle")
    config = "tiers: [{type: host, capacity: 24MiB}]\n"
    with running(fleet, Setup("recording", arguments, config=config, environment=environment), folder) as server:
        yield server


def test_a_server_records_what_it_is_asked(server: Server, folder: Path) -> None:
    """One after another, then an abort, then many at once; the file is read when the server has ended."""
    shared = prompt("shared", 1024)
    asked: list[tuple[list[int], int, dict[str, Any]]] = [
        (shared, 4, {}),
        (shared, 6, {}),  # all of it is in HBM, and nothing has to be computed but its last token
        ([*shared, *prompt("more", 700)], 5, {}),
        (prompt("other", 1100), 3, {}),
        (shared, 2, {"cache_salt": "tenant"}),
        (shared[:500], 7, {}),
        (shared, 1, {"logprob_start_len": 0}),
    ]
    answers = [server.generate(tokens, n_new_tokens, **fields) for tokens, n_new_tokens, fields in asked]
    turn = [*shared, *answers[0].tokens, *prompt("second turn", 600)]
    server.generate(turn, 8)
    abort(server, prompt("aborted", 600))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: server.generate(prompt(number, 100 + number), 5), range(8)))
    server.terminate()
    text = (folder / "trace.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]

    check_form(found, text)
    first = found[: len(asked)]
    assert [line["input_length"] for line in first] == [len(tokens) for tokens, _, _ in asked]
    assert [line["output_length"] for line in first] == [n_new_tokens for _, n_new_tokens, _ in asked]
    ids = [line["hash_ids"] for line in found]
    assert len(set(ids[0])) == 2
    assert ids[0] == ids[1] == ids[2][:2] == ids[6] == ids[7][:2]
    assert not {*ids[0], *ids[2]} & {*ids[3]}
    assert len(set(ids[4])) == 2
    assert not {*ids[4]} & {*ids[0]}
    assert (found[7]["input_length"], found[7]["output_length"]) == (len(turn), 8)
    assert found[8]["input_length"] == 600
    assert 1 <= found[8]["output_length"] < 2000
    assert sorted(line["input_length"] for line in found[9:]) == list(range(100, 108))
    assert all(line["output_length"] == 5 for line in found[9:])


def abort(server: Server, tokens: list[int]) -> None:
    """Ask for much, and give up after the first token."""
    with ExitStack() as stack:
        answers = stack.enter_context(server.stream(tokens, 2000, rid="aborted"))
        next(answers)
        server.abort("aborted")
        assert list(answers)[-1].finish_reason == "abort"
    wait_for("it has ended", lambda: True if "aborted" in server.inspect().ended else None, ANSWER_TIMEOUT_S)


def check_form(found: list[Line], text: str) -> None:
    """Numbers and the names of Mooncake's fields, lines in order of time, full blocks only."""
    names = {"timestamp", "input_length", "output_length", "block_size", "hash_ids"}
    assert set(re.findall(r"[a-z_]+", text)) == names
    assert all(set(line) == names for line in found)
    assert found[0]["timestamp"] == 0
    times = [line["timestamp"] for line in found]
    assert times == sorted(times)
    for line in found:
        assert line["block_size"] == 512
        assert len(line["hash_ids"]) == line["input_length"] // 512
