"""Reads a trace: requests, one JSON object a line, in the form that Mooncake has published.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ..., 1325]}

timestamp is in milliseconds, lengths are in tokens, and `hash_ids` name the blocks of the prompt from its beginning,
512 tokens each, or as many as the line's `block_size` says. Only full blocks can be found again, so only they count:
`hash_ids[:input_length // block_size]`. Other fields are ignored.

An id stands for a block and all before it. So what is kept of a block is the order in which it first appeared, and
nothing here depends on what the ids are. KV depends on the whole prefix: where an id appears behind two different
blocks, which chained ids do not, these are two blocks, and `n_repeated` counts them.

Whatever cannot be read is one sentence that names the line, because a trace that was cut or converted wrongly is the
usual mistake, and half a trace would give figures that look right.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from radix import KEY_NBYTES
from sgl_lmcache.errors import StartError

BLOCK_TOKENS = 512
"""In a block of Mooncake's traces."""

MAX_PROMPT_TOKENS = 2**20
"""The longest prompt that is simulated: HBM has room for so much."""

_FORM = '{"timestamp": 0, "input_length": 1100, "output_length": 20, "hash_ids": [0, 1, 2]}'

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class TraceError(StartError):
    """The trace cannot be used. The message is one sentence that names the line."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of time. Blocks are numbered from 0 in the order of their first appearance.

    times_s: float64[n], since the clock of the trace began. input_tokens, output_tokens: int64[n]. The full blocks of
    request i are `blocks[starts[i] : starts[i + 1]]`, int32. n_blocks: how many there are. n_repeated: how many of them
    have an id that another one has behind another block.
    """

    name: str
    block_tokens: int
    times_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    blocks: NDArray[np.int32]
    n_blocks: int
    n_repeated: int

    def __len__(self) -> int:
        return len(self.times_s)

    def keys(self) -> NDArray[np.uint8]:
        """uint8[n_blocks, 32]: a page key for each block, as evenly spread as the digests of a server are."""
        numbers = (number.to_bytes(8, "little") for number in range(self.n_blocks))
        keys = b"".join(hashlib.blake2b(number, digest_size=KEY_NBYTES).digest() for number in numbers)
        return np.frombuffer(keys, np.uint8).reshape(-1, KEY_NBYTES)


class _Line(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Count
    output_length: _Count
    hash_ids: list[int | str]
    block_size: Annotated[int, msgspec.Meta(ge=1)] = BLOCK_TOKENS


def read(path: Path) -> Trace:
    """The trace in a file. Raises `TraceError`."""
    try:
        with path.open("rb") as file:
            return parse(file, source=str(path), name=path.stem)
    except OSError as error:
        raise TraceError(
            f"{path}: the trace cannot be read ({error.strerror}); name a file with one JSON object a line."
        ) from error


def parse(lines: Iterable[bytes], *, source: str, name: str) -> Trace:
    """The trace in lines of bytes. `source` begins each message. Raises `TraceError`."""
    times_ms: list[float] = []
    input_tokens: list[int] = []
    output_tokens: list[int] = []
    starts, blocks = [0], list[int]()
    numbers: dict[tuple[int, int | str], int] = {}
    block_tokens: int | None = None
    try:
        for line in _decoded(lines):
            block_tokens = line.block_size if block_tokens is None else block_tokens
            _check(line, block_tokens, times_ms[-1] if times_ms else 0.0)
            above = -1
            for block_id in line.hash_ids[: line.input_length // block_tokens]:
                above = numbers.setdefault((above, block_id), len(numbers))
                blocks.append(above)
            times_ms.append(line.timestamp)
            input_tokens.append(line.input_length)
            output_tokens.append(line.output_length)
            starts.append(len(blocks))
    except _LineError as error:
        raise TraceError(f"{source}, line {len(times_ms) + 1}: {error}.") from error
    if block_tokens is None:
        raise TraceError(f"{source}: the trace is empty; it needs one request at least, such as {_FORM}.")
    return Trace(
        name,
        block_tokens,
        np.array(times_ms, np.float64) / 1000,
        np.array(input_tokens, np.int64),
        np.array(output_tokens, np.int64),
        np.array(starts, np.int64),
        np.array(blocks, np.int32),
        n_blocks=len(numbers),
        n_repeated=len(numbers) - len({block_id for _, block_id in numbers}),
    )


class _LineError(Exception):
    """What is wrong with the line after those that have been read."""


def _decoded(lines: Iterable[bytes]) -> Iterator[_Line]:
    """A last line that was cut off, as a server that is killed leaves it, is passed over."""
    decoder = msgspec.json.Decoder(_Line)
    is_over = False
    for line in lines:
        if not line.strip():
            is_over = True
            continue
        if is_over:
            raise _LineError("it is empty, and others follow; remove it")
        try:
            yield decoder.decode(line)
        except msgspec.ValidationError as error:
            raise _LineError(f"{_describe(str(error))}; a line is like {_FORM}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not line.endswith(b"\n"):
                return
            raise _LineError(f"this is not JSON ({error}); a line is like {_FORM}") from error


def _check(line: _Line, block_tokens: int, last_ms: float) -> None:
    n_full = line.input_length // block_tokens
    if line.block_size != block_tokens:
        raise _LineError(
            f"its blocks are of {line.block_size} tokens and those before of {block_tokens}; a trace has one block_size"
        )
    if line.timestamp < last_ms:
        raise _LineError(
            f"its timestamp {line.timestamp:.15g} is before that of the line above, {last_ms:.15g}; sort the requests"
        )
    if len(line.hash_ids) < n_full:
        raise _LineError(
            f"{line.input_length} tokens are {n_full} full blocks of {block_tokens}, and hash_ids has "
            f"{len(line.hash_ids)}; give one id a block"
        )
    if line.input_length > MAX_PROMPT_TOKENS:
        raise _LineError(
            f"input_length is {line.input_length}, and prompts of {MAX_PROMPT_TOKENS} tokens are the longest that are "
            "simulated; remove it"
        )


_MSGSPEC_ERROR = re.compile(r"(.*?)(?: - at `\$\.?([^`]*)`)?", re.DOTALL)


def _describe(error: str) -> str:
    """What msgspec found, in the words of somebody who wrote the line."""
    matched = _MSGSPEC_ERROR.fullmatch(error)
    assert matched is not None
    what, key = matched.groups(default="")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing is not None:
        return f"it has no {missing[1]}"
    mismatch = re.fullmatch(r"Expected `([^`]+)`, got `(\w+)`", what)
    if mismatch is not None:
        return f"{key or 'it'} is of the type {mismatch[2]}, not {mismatch[1].replace(' | ', ' or ')}"
    least = re.fullmatch(r"Expected `\w+` >= ([\d.]+)", what)
    if least is not None:
        return f"{key} is below {float(least[1]):g}"
    most = re.fullmatch(r"Expected `\w+` <= ([\d.]+)", what)
    if most is not None or what == "Integer value out of range":
        return f"{key or 'a number'} is too large to be a number of tokens"
    return f"{key or 'it'} cannot be read ({what})"
