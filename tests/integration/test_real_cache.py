"""Our cache over SGLang's real tree, allocator and pool: bytes and books are checked throughout."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from radix import HBM, State
from tests.support.real_cache import RealCache, request
from tests.support.tiers import split

PAGE = 16


@pytest.fixture(params=["rust", "python"])
def tree_core(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def real(tree_core: str) -> Iterator[RealCache]:
    cache = RealCache(n_device_pages=48, n_slots=120, page_size=PAGE, tree_core=tree_core)
    yield cache
    cache.close()


def tokens(seed: int, n_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n_tokens)]


def run(real: RealCache, rid: str, prompt: list[int], **kwargs: str) -> tuple[int, int]:
    """One request from arrival to release. (device hit, host hit) in tokens."""
    req = request(rid, prompt, **kwargs)
    real.arrive(req)
    real.iterate()
    hit = real.admit(req)
    assert hit is not None
    real.settle()
    return hit


def tree_keys(real: RealCache) -> set[bytes]:
    """All page keys in SGLang's tree, read from its nodes."""
    core = real.cache.tree_core
    keys: set[bytes] = set()
    stack = [core.root_node]
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        if node is not core.root_node:
            keys.update(bytes.fromhex(digest) for digest in node.hash_value)
    return keys


def index_keys(real: RealCache, tier: int) -> set[bytes]:
    index = real.engine.index
    rows = index._columns.residency.nonzero()[0].astype("int32")
    return set(split(index.keys_of(rows[index.states(rows, tier) == State.RESIDENT])))


def test_cold_then_device_hit_then_host_hit(real: RealCache) -> None:
    prompt = tokens(1, 20 * PAGE)
    assert run(real, "cold", prompt) == (0, 0)
    assert run(real, "device", prompt) == (19 * PAGE, 0)
    for seed in range(2, 6):
        run(real, f"other {seed}", tokens(seed, 20 * PAGE))
    assert run(real, "host", prompt) == (0, 19 * PAGE)
    assert run(real, "device again", prompt) == (19 * PAGE, 0)
    real.check()


def test_a_branch_restores_the_shared_pages_only(real: RealCache) -> None:
    shared = tokens(1, 10 * PAGE)
    run(real, "first", shared + tokens(2, 6 * PAGE))
    for seed in range(3, 7):
        run(real, f"other {seed}", tokens(seed, 20 * PAGE))
    # The branch leaves the first path in the middle of what was one node, and not at a page's end.
    branch = shared[: 10 * PAGE - 5] + tokens(8, 60)
    assert run(real, "branch", branch) == (0, 9 * PAGE)
    real.check()


def test_device_and_host_hits_add_up(real: RealCache) -> None:
    prompt = tokens(1, 24 * PAGE)
    run(real, "long", prompt)
    for seed in range(3, 7):
        run(real, f"other {seed}", tokens(seed, 20 * PAGE))
    assert run(real, "head", prompt[: 10 * PAGE + 1]) == (0, 10 * PAGE)
    assert run(real, "whole", prompt) == (10 * PAGE, 13 * PAGE)
    real.check()


@pytest.mark.parametrize("kwargs", [{"cache_salt": "tenant"}, {"extra_key": "tenant"}])
def test_a_salt_or_an_extra_key_never_shares(real: RealCache, kwargs: dict[str, str]) -> None:
    prompt = tokens(1, 20 * PAGE)
    run(real, "open", prompt)
    for seed in range(3, 7):
        run(real, f"other {seed}", tokens(seed, 20 * PAGE))
    assert run(real, "salted", prompt, **kwargs) == (0, 0)


def test_pages_that_host_memory_evicted_while_hot_in_hbm_are_written_back_with_the_next_page(tree_core: str) -> None:
    real = RealCache(n_device_pages=64, n_slots=24, page_size=PAGE, tree_core=tree_core)
    prompt = tokens(1, 20 * PAGE + 1)
    run(real, "first", prompt)
    run(real, "pushes the first out of host memory", tokens(2, 24 * PAGE))
    assert real.engine.lookup(real.page_keys(prompt)) == 0
    # The first is still whole in HBM; SGLang offers only the page that is new.
    longer = prompt + tokens(3, PAGE)
    real.iterate()
    assert run(real, "extended", longer) == (20 * PAGE, 0)
    assert real.engine.lookup(real.page_keys(longer)) == 21
    real.check()
    real.close()


def test_pages_that_host_memory_evicted_are_kept_again_when_hbm_is_hit_and_are_there_when_hbm_evicts(
    tree_core: str,
) -> None:
    real = RealCache(n_device_pages=64, n_slots=24, page_size=PAGE, tree_core=tree_core)
    prompt = tokens(1, 20 * PAGE + 1)
    run(real, "first", prompt)
    run(real, "pushes the first out of host memory", tokens(2, 24 * PAGE))
    assert real.engine.lookup(real.page_keys(prompt)) == 0
    real.iterate()
    assert run(real, "the same", prompt) == (20 * PAGE, 0), "it brings no page that SGLang would offer"
    assert real.engine.lookup(real.page_keys(prompt)) == 20
    real.check()
    n_offered = real.engine.stats.offered
    run(real, "once more", prompt)
    assert real.engine.stats.offered == n_offered, "what is kept is not offered again"
    for seed in (3, 4):
        run(real, f"pushes it out of HBM {seed}", tokens(seed, 2 * PAGE))
    real.cache.evict(EvictParams(num_tokens=1000 * PAGE))
    real.iterate()
    assert run(real, "back", prompt) == (0, 20 * PAGE)
    real.check()
    real.close()


def test_flush_drops_hbm_and_host_memory_with_copies_in_flight(real: RealCache) -> None:
    prompt = tokens(1, 20 * PAGE)
    for rid in ("first", "after the flush"):
        req = request(rid, prompt)
        real.arrive(req)
        real.iterate()
        assert real.admit(req) == (0, 0)
        real.arrive(request("waits", prompt))
        real.cache.reset()
        real.allocator.clear()
        real.check()
        assert len(real.engine.index) == 0


def test_an_aborted_request_leaves_nothing_behind(real: RealCache) -> None:
    prompt = tokens(1, 20 * PAGE)
    run(real, "first", prompt)
    waiting = request("aborted", prompt)
    real.arrive(waiting)
    real.cache.release_aborted_request(waiting.handle)
    assert real.cache._waiting == {}
    assert real.cache.linker is not None
    assert real.cache.linker.tails == {}
    assert real.cache.linker.hit_markers == {}
    real.check()


@pytest.mark.parametrize("seed", range(2))
def test_500_random_branching_requests(tree_core: str, seed: int) -> None:
    rng = random.Random(seed)
    real = RealCache(n_device_pages=40, n_slots=200, page_size=PAGE, tree_core=tree_core)
    prompts = [tokens(1, 3 * PAGE)]
    host_hits = prompt_tokens = 0
    waiting = []
    for number in range(500):
        base = rng.choice(prompts[-40:])
        prompt = base[: rng.randrange(len(base) // 2, len(base) + 1)] + tokens(
            rng.randrange(10**6), rng.randrange(1, 6 * PAGE)
        )
        prompts.append(prompt[: 24 * PAGE])
        req = request(f"{seed}/{number}", prompts[-1])
        real.arrive(req)
        waiting.append(req)
        # Up to three requests wait at once; some of them are aborted instead of served.
        while len(waiting) > rng.randrange(4):
            served = waiting.pop(rng.randrange(len(waiting)))
            if rng.random() < 0.1:
                real.cache.release_aborted_request(served.handle)
                continue
            real.iterate()
            hit = real.admit(served) if real.cache.check_prefetch_progress(served.handle) else None
            if hit is None:
                real.cache.release_aborted_request(served.handle)
                continue
            host_hits += hit[1]
            prompt_tokens += len(served.tokens)
        if number % 10 == 0:
            real.cache.check_invariants()
    for req in waiting:
        real.cache.release_aborted_request(req.handle)
    real.settle()
    real.check()
    assert real.engine.stats.evicted > 500
    assert host_hits > 0.1 * prompt_tokens, (host_hits, prompt_tokens)
    if tree_core == "python":
        assert tree_keys(real) == index_keys(real, HBM)
    real.close()


def test_pages_locked_by_their_write_back_give_way_when_hbm_is_short(real: RealCache) -> None:
    """Stock SGLang would find them evictable, and abort or retract a request for want of them otherwise."""
    first, second = request("first", tokens(1, 40 * PAGE)), request("second", tokens(2, 40 * PAGE))
    real.arrive(first)
    real.arrive(second)
    real.iterate()
    assert real.admit(first) is not None
    assert real.cache.linker is not None
    assert real.cache.linker.pending_offloads, "nothing has been acknowledged in between"
    assert real.admit(second) is not None
    real.settle()
    real.check()


def test_a_prompt_longer_than_host_memory_is_not_offered_whole_again_and_again(tree_core: str) -> None:
    real = RealCache(n_device_pages=64, n_slots=8, page_size=PAGE, tree_core=tree_core)
    prompt = tokens(1, 20 * PAGE + 1)
    run(real, "first", prompt)
    offered = real.engine.stats.offered
    run(real, "longer", prompt + tokens(2, 2 * PAGE))
    assert real.engine.stats.offered - offered == 2
    real.check()
    real.close()
