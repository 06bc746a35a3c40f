"""When each tier is given pages: through, selective and back by example."""

from __future__ import annotations

import pytest

from hicache import WRITE_POLICIES
from hicache.write_policies import EXPECTED, MAX_CLEANED
from tests.hicache.rig import Rig
from tests.support.keys import path_keys
from tests.support.tiers import split


def serve(rig: Rig, keys: bytes) -> None:
    """A request comes and goes, and computes what it lacks of these pages."""
    rig.engine.tick()
    ticket = rig.engine.open_ticket(keys, None)
    for _ in range(4):
        rig.agree()
    rig.engine.end_prefill(rig.engine.launch(ticket))
    rig.write_back(keys)
    rig.settle()


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'never'.*through, selective, back"):
        Rig(writes=("never",))
    assert set(WRITE_POLICIES) == {"through", "selective", "back"}


# ---- selective ----


def test_selective_takes_a_page_that_a_second_request_uses() -> None:
    rig = Rig(writes=("selective",))
    shared, first, second = path_keys("abc"), path_keys("abcde"), path_keys("abcxy")
    serve(rig, first)
    assert rig.n_stored(first) == [0]
    serve(rig, second)
    assert rig.n_stored(first) == rig.n_stored(second) == rig.n_stored(shared) == [3]
    serve(rig, first)
    assert (rig.n_stored(first), rig.n_stored(second)) == ([5], [3])
    assert rig.memory.stats()["stored"] == 5


def test_selective_takes_a_page_that_is_used_while_hbm_has_it_as_well() -> None:
    """The request asks for nothing below HBM, and its ticket says so."""
    rig = Rig(writes=("selective",))
    keys = path_keys("abc")
    rig.write_back(keys)
    rig.engine.open_ticket(b"", keys[-32:])
    rig.settle()
    assert rig.n_stored(keys) == [3]


def test_selective_takes_a_page_that_is_used_on_its_way_into_host_memory() -> None:
    rig = Rig(writes=("selective",))
    keys = path_keys("abc")
    rig.write_back(keys[:32])
    offload = rig.engine.begin_offload(keys[32:], keys[:32])
    assert offload is not None
    rig.engine.open_ticket(keys[:64], None)
    rig.settle()
    assert rig.n_stored(keys) == [1], "the others have not landed"
    for slot, key in zip(offload.slots, split(keys)[1:], strict=True):
        rig.slab[slot] = list(key)
    rig.engine.finish_offload(offload, landed=True)
    rig.settle()
    assert rig.n_stored(keys) == [2], "nobody has asked for the last page"


def test_selective_takes_what_followers_have_waited_for() -> None:
    """They arrived before there was anything to use."""
    rig = Rig(writes=("selective",))
    keys = path_keys("abc")
    leader, follower = rig.engine.open_ticket(keys, None), rig.engine.open_ticket(keys, None)
    rig.agree()
    assert rig.engine.admit(leader)
    prefill = rig.engine.launch(leader)
    rig.write_back(keys)
    rig.engine.end_prefill(prefill)
    assert rig.n_stored(keys) == [0]
    assert rig.engine.admit(follower)
    rig.engine.launch(follower)
    rig.settle()
    assert rig.n_stored(keys) == [3]


def test_selective_forgets_uses_with_the_slot() -> None:
    rig = Rig(n_slots=4, writes=("selective",))
    keys = path_keys("ab")
    serve(rig, keys)
    serve(rig, keys)
    assert rig.n_stored(keys) == [2]
    rig.memory.clear()
    for path in ("cd", "ef", "gh"):
        serve(rig, path_keys(path))
    assert rig.holds(keys) == 0
    serve(rig, keys)
    assert rig.n_stored(keys) == [0]


def test_selective_offers_again_what_was_not_taken_when_it_is_used_again() -> None:
    rig = Rig(writes=("selective",))
    keys = path_keys("ab")
    serve(rig, keys)
    rig.tier.fail_next(3)  # the store when the request arrives, the probe, and the store when it is launched
    serve(rig, keys + path_keys("abz")[-32:])
    assert (rig.spills.failed, rig.n_stored(keys)) == (4, [0])
    serve(rig, keys)
    assert rig.n_stored(keys) == [2]


def test_pages_of_a_tainted_cache_are_not_given_away_by_their_use() -> None:
    rig = Rig(writes=("selective",))
    keys = path_keys("ab")
    rig.write_back(keys)
    ticket = rig.engine.open_ticket(path_keys("x"), None)
    rig.engine.taint()
    rig.engine.open_ticket(keys, None)
    rig.engine.launch(ticket)
    assert rig.n_stored(keys) == [0]


# ---- back ----


def fill(rig: Rig, *paths: str) -> None:
    for path in paths:
        rig.engine.tick()
        rig.write_back(path_keys(path))


def test_back_takes_nothing_while_host_memory_has_room() -> None:
    rig = Rig(n_slots=32, writes=("back",))
    fill(rig, *(letter * 4 for letter in "abcdefg"))  # which leaves 4 free: an eighth
    rig.settle()
    assert rig.engine.host.n_free == 4
    assert rig.memory.stats()["stored"] == 0


def test_back_takes_what_goes_next_before_it_goes() -> None:
    rig = Rig(n_slots=32, writes=("back",))
    fill(rig, *(letter * 4 for letter in "abcdefg"))
    fill(rig, "hh")
    rig.settle()
    assert rig.engine.host.n_free == 2
    assert rig.n_stored(path_keys("aaaa")) == [4], "a page goes with those above it"
    assert rig.n_stored(path_keys("bbbb")) == [0]
    fill(rig, "hhhh", "iiii")
    rig.settle()
    assert rig.holds(path_keys("aaaa")) == 0
    assert rig.n_stored(path_keys("bbbb")) == [4]


def test_back_loses_nothing_to_evictions_that_come_one_path_at_a_time() -> None:
    rig = Rig(n_slots=32, writes=("back",))
    paths = [first + second * 3 for first in "abcdefgh" for second in "ijkl"]
    for path in paths:
        fill(rig, path)
        rig.agree()
    rig.settle()
    assert rig.engine.stats.evicted > 2 * rig.n_slots
    for path in paths:
        keys = path_keys(path)
        assert rig.holds(keys) == 4 or rig.n_stored(keys) == [4], path


def test_eviction_does_not_wait_for_back() -> None:
    """What is being written is in use. The pages behind it go instead, unwritten."""
    rig = Rig(n_slots=16, writes=("back",))
    rig.tier.hold()
    fill(rig, *"abcdefghijklmnop")
    assert rig.engine.host.n_free == 0
    assert rig.tier.n_held == 2
    fill(rig, *"qrstuvwxyz")
    assert rig.engine.stats.evicted == 10
    assert rig.tier.n_held == 4, "not more than a quarter of host memory is on its way"
    assert rig.holds(path_keys("a")) == rig.holds(path_keys("b")) == 1
    rig.tier.release()
    rig.settle()
    assert rig.n_stored(path_keys("a")) == [1]


def test_back_does_a_bounded_amount_of_work_in_a_call() -> None:
    rig = Rig(n_slots=256, writes=("back",))
    letters = [first + second for first in "abcdefghijklmnop" for second in "abcdefghijklmnop"]
    for name in letters:
        rig.write_back(path_keys([name]))
        rig.engine.tick()
    rig.settle()
    rig.memory.clear()
    rig.engine.clear_below()  # all are to be offered again, and only a call can do it
    n_stored = rig.memory.stats()["stored"]
    rig.write_back(path_keys(["one more"]))
    assert rig.memory.stats()["stored"] - n_stored == MAX_CLEANED


def test_back_is_not_stopped_by_a_tier_that_fails() -> None:
    rig = Rig(n_slots=16, writes=("back",))
    fill(rig, *"abcdefghijklmn")
    rig.tier.fail_next(1)
    fill(rig, "o")
    rig.settle()
    assert (rig.spills.failed, rig.n_stored(path_keys("a"))) == (1, [0])
    rig.settle()
    fill(rig, "p")
    rig.settle()
    assert rig.n_stored(path_keys("a")) == [1]


def test_back_keeps_pages_of_each_quota_ready() -> None:
    rig = Rig(n_slots=64, writes=("back",))
    rig.engine.set_quota("tenant", 4)
    for path in "abcdef":
        keys = path_keys(path)
        rig.engine.close_ticket(rig.engine.open_ticket(keys, None, tenant="tenant"))
        rig.write_back(keys)
        rig.settle()
    assert [rig.n_stored(path_keys(path))[0] for path in "abcdef"] == [1, 1, 1, 0, 0, 0]
    assert [rig.holds(path_keys(path)) for path in "abcdef"] == [0, 0, 1, 1, 1, 1], (
        "and host memory has room for 60 more"
    )


def test_back_cleans_when_fetched_pages_fill_host_memory() -> None:
    rig = Rig(n_slots=16, writes=("back", "through"))
    fetched = path_keys("wxyz")
    fill(rig, *"abcdefghijkl")
    rig.settle()
    rig.engine.close_ticket(rig.engine.open_ticket(fetched, None))  # pages asked for once only would be first in line
    rig.settle()
    rig.put(1, fetched)
    rig.engine.open_ticket(fetched, None)
    rig.settle()
    assert rig.holds(fetched) == 4
    assert [rig.n_stored(path_keys(path))[0] for path in "abc"] == [1, 1, 0]
    assert rig.n_stored(fetched) == [0, 4]


# ---- several tiers ----


def test_each_tier_is_given_pages_by_its_own_policy() -> None:
    rig = Rig(n_slots=32, writes=("through", "selective", "back"))
    keys = path_keys("abcd")
    for path in ("ab", "cd"):
        serve(rig, path_keys(path))
    assert rig.n_stored(path_keys("ab")) == [2, 0, 0]
    serve(rig, path_keys("ab"))
    assert rig.n_stored(path_keys("ab")) == [2, 2, 0]
    fill(rig, *(letter * 4 for letter in "efghijk"))
    rig.settle()
    assert rig.n_stored(path_keys("cd")) == [2, 0, 2]
    assert rig.n_stored(keys) == [2, 2, 0]


@pytest.mark.parametrize(("write", "n_stored"), [("through", 4), ("selective", 4), ("back", 0)])
def test_a_fetched_page_is_brought_into_the_faster_tiers(write: str, n_stored: int) -> None:
    rig = Rig(writes=(write, "through"), batch_pages=4)
    keys = path_keys("abcd")
    rig.put(1, keys)
    rig.engine.open_ticket(keys, None)
    rig.settle()
    assert rig.holds(keys) == 4
    assert rig.n_stored(keys) == [n_stored, 4]
    assert rig.memories[1].stats()["stored"] == 0, "what it has is not written again"


@pytest.mark.parametrize("write", WRITE_POLICIES)
def test_a_page_that_came_from_the_only_tier_is_not_given_to_it(write: str) -> None:
    rig = Rig(writes=(write,))
    keys = path_keys("abcd")
    rig.put(0, keys)
    rig.engine.open_ticket(keys, None)
    rig.settle()
    serve(rig, keys)
    assert rig.holds(keys) == 4
    assert rig.spills.spilled == 0


@pytest.mark.parametrize(("chance", "n_stored"), [(EXPECTED, 2), (EXPECTED - 0.01, 0)])
def test_selective_does_not_wait_for_a_second_use_that_is_expected(
    monkeypatch: pytest.MonkeyPatch, chance: float, n_stored: int
) -> None:
    rig = Rig(writes=("selective",))
    monkeypatch.setattr(rig.engine.index, "chance_of_reuse", lambda row: chance)
    keys = path_keys("ab")
    prefill = rig.engine.launch(rig.engine.open_ticket(keys, None))
    rig.write_back(keys)
    rig.settle()
    assert rig.n_stored(keys) == [0], "it is not known yet how long the answer will be"
    rig.engine.end_prefill(prefill, n_answer_tokens=100)
    rig.settle()
    assert rig.n_stored(keys) == [n_stored]
