"""The reduction over a real group of processes, and what a server of one rank makes of it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch.distributed

from hicache import UNKNOWN
from sgl_lmcache.ranks import GroupRanks, OneRank, ranks_of

N_RANKS = 3


def test_one_rank_agrees_with_itself() -> None:
    ranks = ranks_of(None)
    assert isinstance(ranks, OneRank)
    assert ranks.is_first
    assert ranks.minimum([3, -UNKNOWN, UNKNOWN]) == [3, -UNKNOWN, UNKNOWN]


def take_part(rank: int, meeting_point: str, answers: multiprocessing.Queue[tuple[int, object]]) -> None:
    """One rank's process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=N_RANKS)
    group = torch.distributed.new_group(backend="gloo")
    ranks = ranks_of(group)
    assert isinstance(ranks, GroupRanks)
    said = [rank, -rank, UNKNOWN if rank else 7, -UNKNOWN + rank]
    agreed = [ranks.minimum(said), ranks.minimum([5])]
    alone = ranks_of(torch.distributed.new_subgroups(group_size=1)[0])
    answers.put((rank, (agreed, ranks.is_first, ranks.n_reductions, isinstance(alone, OneRank))))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[list[list[int]], bool, int, bool]]:
    """What each rank of a gloo group got."""
    context = multiprocessing.get_context("forkserver")  # PyTorch is imported once, and has no threads when it forks
    context.set_forkserver_preload(["sgl_lmcache.ranks"])
    meeting_point = str(Path(tmp_path_factory.mktemp("ranks")) / "meeting-point")
    queue = context.Queue()
    processes = [context.Process(target=take_part, args=(rank, meeting_point, queue)) for rank in range(N_RANKS)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found


def test_all_ranks_get_the_minimum_of_each_value(answers: dict[int, tuple[list[list[int]], bool, int, bool]]) -> None:
    for rank in range(N_RANKS):
        agreed, _, n_reductions, _ = answers[rank]
        assert agreed == [[0, 1 - N_RANKS, 7, -UNKNOWN], [5]], "the extremes come through whole"
        assert n_reductions == 2


def test_one_rank_is_the_first(answers: dict[int, tuple[list[list[int]], bool, int, bool]]) -> None:
    assert [answers[rank][1] for rank in range(N_RANKS)] == [True, False, False]


def test_a_group_of_one_needs_no_messages(answers: dict[int, tuple[list[list[int]], bool, int, bool]]) -> None:
    assert all(answers[rank][3] for rank in range(N_RANKS))
