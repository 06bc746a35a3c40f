"""Reading traces: what they mean, and one sentence for each way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_lmcache.simulate.trace import MAX_PROMPT_TOKENS, TraceError, parse, read
from tests.simulate.traces import BLOCK, encode, line, lines, trace_of, write


def test_a_line_of_mooncake_s_trace() -> None:
    text = b'{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 1325]}'
    trace = parse([text], source="s", name="n")
    assert (trace.block_tokens, len(trace), trace.n_blocks) == (512, 1, 2)
    assert trace.times_s.tolist() == [27.482]
    assert trace.input_tokens.tolist() == [1100]
    assert trace.blocks.tolist() == [0, 1]


def test_blocks_are_numbered_as_they_appear_and_only_full_ones_count() -> None:
    trace = trace_of([line([7, 3], rest=1), line([7, 3, 9]), line([], rest=3), line([7, 5])])
    assert trace.blocks.tolist() == [0, 1, 0, 1, 2, 0, 3]
    assert trace.starts.tolist() == [0, 2, 5, 5, 7]
    assert (trace.n_blocks, trace.n_repeated) == (4, 0)


def test_an_id_behind_another_block_is_another_block() -> None:
    """KV depends on the whole prefix. Flat digests of a block's text would repeat like this."""
    trace = trace_of(lines(["a", "x"], ["b", "x"], ["x"], ["a", "x"]))
    assert trace.blocks.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert trace.n_repeated == 2


def test_keys_depend_on_the_order_of_appearance_alone() -> None:
    first, second = trace_of(lines([1, 2], [1, 3])), trace_of(lines(["x", "a"], ["x", "b"]))
    assert np.array_equal(first.keys(), second.keys())
    assert first.keys().shape == (3, 32)
    assert len(np.unique(first.keys(), axis=0)) == 3


def test_other_fields_and_ids_that_are_left_over_are_ignored() -> None:
    trace = trace_of([line([1, 2, 3], input_length=2 * BLOCK, turn=4)])
    assert trace.blocks.tolist() == [0, 1]


def test_blank_lines_at_the_end_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", lines([1]))
    path.write_bytes(path.read_bytes() + b"\n  \n\n")
    assert len(read(path)) == 1
    assert read(path).name == "t"


GOOD = line([1, 2], at_ms=5)


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (b"{\n", "this is not JSON"),
        (b"\xff\xfe\n", "this is not JSON"),
        (b"[1]", "it is of the type array, not object"),
        (b"\n", "it is empty, and others follow"),
        *(
            (without(field), f"it has no {field}")
            for field in ("timestamp", "input_length", "output_length", "hash_ids")
        ),
        ({**GOOD, "input_length": -1}, "input_length is below 0"),
        ({**GOOD, "output_length": -7}, "output_length is below 0"),
        ({**GOOD, "timestamp": -0.5}, "timestamp is below 0"),
        ({**GOOD, "block_size": 0}, "block_size is below 1"),
        ({**GOOD, "output_length": 2**54}, "output_length is too large"),
        ({**GOOD, "output_length": 2**70}, "too large to be a number of tokens"),
        ({**GOOD, "input_length": 2**70}, "too large to be a number of tokens"),
        ({**GOOD, "input_length": "12"}, "input_length is of the type str, not int"),
        ({**GOOD, "input_length": 1.5}, "input_length is of the type float, not int"),
        ({**GOOD, "hash_ids": [1, None]}, "hash_ids[1] is of the type null, not int or str"),
        ({**GOOD, "hash_ids": 3}, "hash_ids is of the type int, not array"),
        ({**GOOD, "hash_ids": [1]}, "128 tokens are 2 full blocks of 64, and hash_ids has 1"),
        ({**GOOD, "block_size": 8}, "its blocks are of 8 tokens and those before of 64"),
        (without("block_size"), "its blocks are of 512 tokens and those before of 64"),
        ({**GOOD, "timestamp": 4.5}, "its timestamp 4.5 is before that of the line above, 5;"),
        (
            line([], at_ms=5, input_length=MAX_PROMPT_TOKENS + 4, hash_ids=list(range(MAX_PROMPT_TOKENS))),
            "prompts of 1048576 tokens are the longest",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_the_line(wrong: bytes | dict[str, Any], says: str) -> None:
    text = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    with pytest.raises(TraceError) as raised:
        parse([*encode([GOOD, GOOD]), text, *encode([GOOD])], source="traces/x.jsonl", name="x")
    message = str(raised.value)
    assert message.startswith("traces/x.jsonl, line 3: ")
    assert says in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("text", [b"", b"\n\n"])
def test_an_empty_trace_is_said_to_be_empty(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(text)
    with pytest.raises(TraceError, match=r"the trace is empty; it needs one request"):
        read(path)


def test_a_last_line_that_was_cut_off_is_passed_over_and_no_other() -> None:
    cut = encode([GOOD])[0][:30]
    assert len(parse([*encode([GOOD]), cut], source="s", name="n")) == 1
    with pytest.raises(TraceError, match=r"line 2: this is not JSON"):
        parse([*encode([GOOD]), cut + b"\n", *encode([GOOD])], source="s", name="n")
    with pytest.raises(TraceError, match="the trace is empty"):
        parse([cut], source="s", name="n")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.jsonl: the trace cannot be read \(No such file or directory\)"):
        read(tmp_path / "none.jsonl")
