"""Quotas: what one tenant does costs another nothing."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hicache import Batch, QuotaError
from hicache import quotas as quotas_module
from hicache.quotas import NOBODY, OTHERS, Quotas, Tenants, digest_of
from radix import HOST, MAX_GROUPS, Index
from tests.hicache.rig import Rig
from tests.support.keys import path_keys


def rig(n_slots: int, **quotas: int) -> Rig:
    made = Rig(n_slots=n_slots, writes=())
    for tenant, n_pages in quotas.items():
        made.engine.set_quota(tenant, n_pages)
    return made


def serve(rig: Rig, tenant: str, path: str) -> None:
    """A request of a tenant, whose prompts begin with a letter of its own."""
    keys = path_keys(path)
    rig.engine.close_ticket(rig.engine.open_ticket(keys, None, tenant=tenant))
    rig.write_back(keys)
    rig.engine.hbm_evicted(keys)
    rig.agree()


def held(rig: Rig, tenant: str) -> int:
    return rig.engine.index.held(HOST, rig.engine.host.quotas.group_of(tenant))


def test_a_tenant_at_its_quota_evicts_its_own() -> None:
    host = rig(10, a=3)
    serve(host, "b", "bcd")
    for path in ("apq", "axy", "auvw"):
        serve(host, "a", path)
    assert held(host, "a") == 3
    assert host.holds(path_keys("bcd")) == 3, "there is room for seven more, and they are not a's"
    assert host.holds(path_keys("auv")) == 3


def test_a_burst_of_others_does_not_touch_what_is_within_a_quota() -> None:
    host = rig(8, a=4)
    serve(host, "a", "abc")
    for letter in "pqrstuvwxyz":
        serve(host, "b", letter * 3)
    assert host.holds(path_keys("abc")) == 3


def test_what_a_quota_leaves_idle_is_used_and_given_back() -> None:
    host = rig(8, a=4)
    for letter in "pqrs":
        serve(host, "b", letter * 2)
    assert held(host, "b") == 8
    serve(host, "a", "abcd")
    assert (held(host, "a"), held(host, "b")) == (4, 4)
    assert [host.holds(path_keys(letter * 2)) for letter in "pqrs"] == [0, 0, 2, 2], "the oldest gave it back"


def test_two_tenants_with_all_of_it_leave_others_nothing() -> None:
    host = rig(6, a=3, b=3)
    serve(host, "c", "xyz")
    serve(host, "a", "abc")
    serve(host, "b", "bcd")
    assert (held(host, "a"), held(host, "b"), held(host, "c")) == (3, 3, 0)
    serve(host, "c", "xyz")
    assert held(host, "c") == 0
    assert host.holds(path_keys("abc")) == 3


def test_a_path_longer_than_the_quota_is_kept_as_far_as_it_goes() -> None:
    host = rig(10, a=3)
    serve(host, "a", "abcdefgh")
    assert host.holds(path_keys("abcdefgh")) == 3


def test_a_smaller_quota_evicts_at_once_and_a_larger_one_gives_room() -> None:
    host = rig(10, a=6)
    serve(host, "a", "abcdef")
    host.engine.set_quota("a", 2)
    assert held(host, "a") == 2
    host.engine.set_quota("a", 9)
    serve(host, "a", "abcdefgh")
    assert held(host, "a") == 8


def test_pages_of_a_tenant_that_come_from_below_count() -> None:
    host = Rig(n_slots=10)
    host.engine.set_quota("a", 3)
    keys = path_keys("abcdef")
    host.put(0, keys)
    host.engine.open_ticket(keys, None, tenant="a")
    host.settle()
    assert held(host, "a") == 3


def test_pages_that_requests_wait_for_are_not_given_back_before_they_are_used() -> None:
    host = rig(4, a=2)
    serve(host, "b", "wxyz")
    waiting = host.engine.open_ticket(path_keys("wxyz"), None, tenant="b")
    serve(host, "a", "ab")
    assert held(host, "a") == 0
    host.engine.close_ticket(waiting)
    serve(host, "a", "ab")
    assert (held(host, "a"), held(host, "b")) == (2, 2)


def test_tenants_are_told_apart_after_a_flush() -> None:
    host = rig(10, a=3)
    serve(host, "a", "abcde")
    host.engine.reset()
    serve(host, "a", "abcde")
    assert held(host, "a") == 3


def tenants_below(rig: Rig) -> list[str]:
    """What each batch has said that the tier was given, in order; the tier is made to tell it."""
    told: list[str] = []
    store, load = rig.memory.store, rig.memory.load

    def telling_store(batch: Batch) -> Future[int]:
        told.append(batch.tenant)
        return store(batch)

    def telling_load(batch: Batch) -> Future[int]:
        told.append(f"load {batch.tenant}")
        return load(batch)

    rig.memory.store, rig.memory.load = telling_store, telling_load  # type: ignore[method-assign]
    return told


def test_tiers_below_are_told_whose_pages_they_are_given() -> None:
    host = Rig(n_slots=20, tenants=("b",))
    host.engine.set_quota("a", 3)
    told = tenants_below(host)
    serve(host, "a", "ab")
    serve(host, "b", "bc")
    serve(host, "c", "cd")
    assert told == ["a", "b", ""]
    host.engine.reset()
    host.engine.open_ticket(path_keys("bc"), None, tenant="b")
    host.settle()
    assert told[3:] == ["load b"]


def test_pages_below_what_hbm_has_are_their_tenants_too() -> None:
    """A request brings only what HBM lacks of its path, which may begin in the middle."""
    host = Rig(n_slots=20)
    host.write_back(path_keys("ab"))
    host.engine.set_quota("a", 10)
    told = tenants_below(host)
    keys = path_keys("abcd")
    host.engine.close_ticket(host.engine.open_ticket(keys[64:], keys[32:64], tenant="a"))
    host.write_back(keys[64:], keys[32:64])
    host.agree()
    assert told == ["a"]


def test_a_quota_below_is_the_tiers_own() -> None:
    host = Rig(n_slots=20)
    told = tenants_below(host)
    set_below: list[Mapping[str, int]] = []
    host.memory.set_quotas = set_below.append  # type: ignore[method-assign, assignment]
    host.engine.set_quota("a", 7, tier="faulty memory")
    assert (set_below, host.engine.host.quotas.tenants) == ([{"a": 7}], {})
    serve(host, "a", "ab")
    assert told == ["a"]


def test_a_quota_on_a_tier_that_keeps_none_is_refused() -> None:
    host = Rig(n_slots=20)
    with pytest.raises(QuotaError, match="memory tier keeps no quotas"):
        host.engine.set_quota("a", 7, tier="faulty memory")
    with pytest.raises(QuotaError, match="no ssd tier; there are: host, faulty memory"):
        host.engine.set_quota("a", 7, tier="ssd")
    with pytest.raises(QuotaError, match="no ssd tier; there is only host"):
        rig(10).engine.set_quota("a", 7, tier="ssd")
    host.engine.set_quota("a", 7, tier="host")
    assert host.engine.host.quotas.tenants == {"a": 7}


def test_quotas_that_cannot_be_given_are_refused_and_nothing_changes() -> None:
    quotas = Quotas(10)
    quotas.set("a", 6)
    for tenant, n_pages, what in (
        ("b", 5, "4 that other"),
        ("a", 11, "10 that other"),
        ("", 1, "cache_salt"),
        ("b", -1, "0 "),
    ):
        with pytest.raises(QuotaError, match=what):
            quotas.set(tenant, n_pages)
    assert quotas.tenants == {"a": 6}
    assert (quotas.rest, quotas.group_of("b")) == (4, OTHERS)
    quotas.set("b", 4)
    assert quotas.rest == 0


def test_several_quotas_are_given_together_or_not_at_all() -> None:
    quotas = Quotas(10)
    quotas.update({"a": 6, "b": 4})
    quotas.update({"a": 1, "b": 9})
    assert quotas.tenants == {"a": 1, "b": 9}
    with pytest.raises(QuotaError, match="8 pages is more than the 7 that other"):
        quotas.update({"a": 3, "b": 8})
    assert quotas.tenants == {"a": 1, "b": 9}


def test_quotas_are_the_same_parts_of_a_tier_of_another_size() -> None:
    quotas = Quotas(10)
    quotas.update({"a": 6, "b": 3})
    quotas.resize(25)
    assert (dict(quotas.tenants), quotas.rest, quotas.limit(OTHERS)) == ({"a": 15, "b": 7}, 3, 25)


def test_a_digest_stands_for_its_tenant_and_for_nobody_else() -> None:
    quotas = Quotas(10)
    quotas.set("a", 3)
    quotas.set("\ud800", 3)
    assert quotas.group_of_digest(digest_of("a")) == quotas.group_of("a")
    assert quotas.group_of_digest(digest_of("\ud800")) == quotas.group_of("\ud800"), "whatever a client sends"
    assert quotas.group_of_digest(digest_of("b")) == OTHERS
    assert quotas.group_of_digest(NOBODY) == OTHERS
    assert digest_of("") == NOBODY


def test_paths_that_nobody_begins_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas_module, "MAX_PATHS", 2)
    tenants = Tenants(["a"])
    for first in (b"1", b"2", b"1", b"3"):
        tenants.begins("a", first)
    assert [tenants.of(first) for first in (b"1", b"2", b"3")] == ["a", "", "a"]


@given(
    limits=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    stores=st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)), max_size=30
    ),
)
def test_room_comes_from_who_has_too_much(limits: tuple[int, int], stores: list[tuple[int, int, int, int]]) -> None:
    """The rule alone, over books in which some pages of each group may not leave, and some slots linger."""
    quotas = Quotas(12)
    for tenant, limit in zip("ab", limits, strict=True):
        quotas.set(tenant, limit)
    books = CountedBooks(12)
    for group, n_wanted, n_stuck, n_lingering in stores:
        books.n_stuck, books.n_lingering = n_stuck, min(n_lingering, 12 - sum(books.held))
        before, books.n_for_quota = list(books.held), 0
        room = quotas.make_room(group, n_wanted, books)
        assert 0 <= room.n_pages <= room.n_within_quota <= n_wanted
        others = [at for at in (1, 2) if at != group]
        assert [books.held[at] for at in others] == [before[at] for at in others], "a tenant has paid for another"
        assert books.held[OTHERS] >= min(before[OTHERS], quotas.rest) or group == OTHERS
        if group == OTHERS:
            assert books.n_for_quota == 0
        else:
            n_borrowed = before[OTHERS] - books.held[OTHERS]
            assert n_borrowed <= books.n_for_quota <= n_borrowed + before[group] - books.held[group]
        books.held[group] += room.n_pages
        assert sum(books.held) <= 12
        assert all(books.held[at] <= limits[at - 1] for at in (1, 2))
        if not n_stuck and not n_lingering:
            assert room.n_pages == min(n_wanted, quotas.limit(group), 12 - sum(books.held[at] for at in others))


class CountedBooks:
    """How many pages each group has. n_stuck: so many of each may not leave. n_lingering: slots that nobody has."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.held = [0, 0, 0]
        self.n_for_quota = 0
        self.n_stuck = self.n_lingering = 0

    @property
    def n_free(self) -> int:
        return self.n_slots - sum(self.held) - self.n_lingering

    def n_held(self, group: int) -> int:
        return self.held[group]

    def evict(self, n_pages: int, group: int, *, for_quota: bool = False) -> None:
        n_evicted = max(0, min(n_pages, self.held[group] - self.n_stuck))
        self.held[group] -= n_evicted
        self.n_for_quota += n_evicted if for_quota else 0


def test_more_tenants_than_can_be_told_apart_are_refused() -> None:
    quotas = Quotas(1000)
    for number in range(MAX_GROUPS - 1):
        quotas.set(f"t{number}", 1)
    with pytest.raises(QuotaError, match=f"{MAX_GROUPS - 1} tenants have a quota"):
        quotas.set("one more", 1)
    assert quotas.set("t3", 5) == 4


def test_a_group_follows_from_the_first_page_for_good() -> None:
    index = Index(16, n_groups=3)
    keys = path_keys("abc")
    index.assign(keys[:32], 2)
    rows = index.insert(keys[:64])
    more = index.insert(keys[64:], int(rows[-1]))
    assert index.groups(rows).tolist() == [2, 2]
    assert index.groups(more).tolist() == [2]
    assert index.groups(index.insert(path_keys("x"))).tolist() == [0]
