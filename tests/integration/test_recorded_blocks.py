"""What a recording is told of a request: the keys of its blocks, wherever their pages lie, with SGLang's own tree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

from radix import KEY_NBYTES, Index
from sgl_lmcache import factory, record
from sgl_lmcache.blocks import block_ends
from sgl_lmcache.config import Config, Record
from sgl_lmcache.wrapper import Tail
from tests.support.clock import Clock
from tests.support.real_cache import RealCache, Request, request

PAGE = 16


@pytest.fixture
def real() -> Iterator[RealCache]:
    cache = RealCache(n_device_pages=256, n_slots=256, page_size=PAGE)
    yield cache
    cache.close()


@pytest.mark.parametrize("n_tokens", [1, 511, 512, 513, 1023, 1024, 1025, 1600])
@pytest.mark.parametrize("n_in_hbm", [0, 16, 496, 512, 528, 1008, 1500])
@pytest.mark.parametrize("indexed", [True, False])
def test_the_keys_of_blocks_wherever_their_pages_are(
    real: RealCache, n_tokens: int, n_in_hbm: int, indexed: bool
) -> None:
    tokens = list(range(100, 100 + n_tokens))
    if n_in_hbm:
        first = request("first", [*tokens[:n_in_hbm], *range(9000, 9040)])
        real.arrive(first)
        real.admit(first)
        real.settle()
    asked = request("asked", tokens)
    real.match(asked)
    tail = tail_of(real, asked)
    index = real.engine.index if indexed else Index(16)
    keys = real.page_keys(tokens)
    expected = b"".join(keys[(32 * n - 1) * 32 : 32 * n * 32] for n in range(1, n_tokens // 512 + 1))
    assert block_ends(tail, index, real.cache.tree_core, PAGE) == expected
    real.cache.release_aborted_request(asked.handle)


def test_what_a_match_leaves_out_keeps_its_tenant(real: RealCache) -> None:
    """A request that wants the logprobs of its whole prompt matches nothing, and has the same blocks all the same."""
    found = []
    for number, (salt, n_matched) in enumerate([("a", 0), ("a", 1199), ("b", 0), (None, 0)]):
        asked = request(str(number), range(100, 1300), cache_salt=salt)
        result = real.cache.match_prefix(MatchPrefixParams(key=real.key(asked)[:n_matched], req=asked))
        asked.last_node = result.last_device_node
        found.append(block_ends(tail_of(real, asked), real.engine.index, real.cache.tree_core, PAGE))
        real.cache.release_aborted_request(asked.handle)
    assert len(found[0]) == 2 * KEY_NBYTES
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_cache_tells_the_recorder_of_every_request(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "trace.jsonl"
    recorder = record.start(path, replica=(0, 1), page_size=PAGE, limit_nbytes=1 << 20, clock=clock)
    cache = RealCache(n_device_pages=256, n_slots=256, page_size=PAGE, recorder=recorder)
    shared = list(range(100, 1200))
    for number, tokens in enumerate([shared, shared, [*shared, *range(5000, 5600)]]):
        clock.now_s = float(number)
        asked = request(str(number), tokens)
        asked.output_ids_through_stop = tuple(range(number))
        cache.arrive(asked)
        cache.admit(asked)
        cache.settle()
    aborted = request("aborted", shared)
    cache.arrive(aborted)
    cache.arrive(aborted)  # it has been retracted
    cache.cache.release_aborted_request(aborted.handle)
    cache.close()

    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["input_length"] for line in found] == [1100, 1100, 1700, 1100]
    assert [line["output_length"] for line in found] == [0, 1, 2, 0]
    assert [line["timestamp"] for line in found] == [0, 1000, 2000, 2000]
    ids = [line["hash_ids"] for line in found]
    assert ids[0] == ids[1] == ids[3] == ids[2][:2]
    assert len(set(ids[2])) == 3


def tail_of(real: RealCache, asked: Request) -> Tail:
    assert real.cache.linker is not None
    return real.cache.linker.tails[asked.rid]


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        ({"attn_tp_rank": 0}, "trace.jsonl"),
        ({"attn_tp_rank": 1}, None),
        ({"attn_tp_rank": 0, "dp_rank": 1, "dp_size": 2}, "trace.dp1.jsonl"),
        ({"attn_tp_rank": 1, "dp_rank": 1, "dp_size": 2}, None),
        ({"attn_tp_rank": 0, "dp_rank": 3, "attn_dp_size": 4}, "trace.dp3.jsonl"),
    ],
)
def test_one_rank_of_each_replica_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: dict[str, int], name: str | None
) -> None:
    alone = {"dp_rank": None, "dp_size": 1, "attn_dp_size": 1}
    monkeypatch.setattr(factory, "get_parallel", lambda: SimpleNamespace(**(alone | rank)))
    recorder = factory._recorder(Config(record=Record(str(tmp_path / "trace.jsonl"))), PAGE)
    assert (recorder is None) == (name is None)
    if recorder is not None:
        recorder.close()
    assert [file.name for file in tmp_path.iterdir()] == ([] if name is None else [name])
    assert factory._recorder(Config(), PAGE) is None
