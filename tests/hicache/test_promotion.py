"""What comes up from below for one request does not flush host memory; what is asked for twice stays."""

from __future__ import annotations

from tests.hicache.rig import Rig
from tests.support.keys import path_keys

HOT = ("abcd", "efgh", "ijkl")
SCAN = [f"{chr(0x100 + number)}xy" for number in range(40)]


def fetch(rig: Rig, path: str) -> None:
    """A request for what is below: it is fetched, used and done with."""
    ticket = rig.engine.open_ticket(path_keys(path), None)
    rig.settle()
    assert rig.holds(path_keys(path)) == len(path)
    rig.engine.close_ticket(ticket)
    rig.agree()


def rig_with_hot_pages() -> Rig:
    """Host memory of 16 pages, 12 of them in use by conversations that go on."""
    rig = Rig(n_slots=16)
    for path in HOT:
        for _ in range(2):
            ticket = rig.engine.open_ticket(path_keys(path), None)
            rig.write_back(path_keys(path))
            rig.engine.close_ticket(ticket)
            rig.settle()
    for path in SCAN:
        rig.put(0, path_keys(path))
    return rig


def test_a_scan_of_a_lower_tier_leaves_what_is_in_use() -> None:
    rig = rig_with_hot_pages()
    for path in SCAN:
        fetch(rig, path)
    assert [rig.holds(path_keys(path)) for path in HOT] == [4, 4, 4]
    rig.engine.check_invariants()


def test_a_scan_of_what_is_computed_does_push_out_what_is_in_use() -> None:
    """By `lru`, that is; so the test above is about what comes from below."""
    rig = rig_with_hot_pages()
    rig.memory.clear()
    for path in SCAN[:8]:
        rig.write_back(path_keys(path))
        rig.settle()
    assert [rig.holds(path_keys(path)) for path in HOT] != [4, 4, 4]


def test_what_is_asked_for_again_soon_is_kept_like_any_other() -> None:
    rig = rig_with_hot_pages()
    fetch(rig, SCAN[0])
    fetch(rig, SCAN[20])
    assert rig.holds(path_keys(SCAN[0])) < len(SCAN[0]), "room for four pages beside the hot ones, and it went first"
    fetch(rig, SCAN[0])
    for path in SCAN[30:34]:
        fetch(rig, path)
    assert rig.holds(path_keys(SCAN[0])) == len(SCAN[0]), "it is in use now, and the oldest of the others is not"
