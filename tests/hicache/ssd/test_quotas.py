"""Quotas of an SSD: who keeps what, through restarts."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache import QuotaError, SsdTier
from hicache.quotas import OTHERS, digest_of
from hicache.ssd import limit_for
from hicache.ssd.keeper import Keeper
from hicache.ssd.sizes import OUTSIDE_NBYTES
from radix import HOST
from radix.departures import QUOTA
from tests.hicache.ssd.stores import SLOT_NBYTES, Slab, make_slab, open_tier, pages, part, settle, wait_until
from tests.support.clock import Clock

N_SLOTS = 64


def share(n_pages: int, n_slots: int = N_SLOTS) -> int:
    """The least size that is so many slots of a store."""
    return -(-n_pages * limit_for(n_slots, 1, SLOT_NBYTES) // n_slots)


def held(tier: SsdTier, tenant: str) -> int:
    """How many pages of a tenant with a quota it has; of all the others for one without."""
    volume = tier._volume
    return volume.pages.index.held(HOST, volume.quotas.group_of(tenant))


class Store:
    """A store that is opened again and again."""

    def __init__(self, folder: Path, n_slots: int, **quotas: int) -> None:
        self._folder = folder
        self._slab: Slab = make_slab()
        self._n_slots = n_slots
        self.tier = self._open(quotas)

    def _open(self, quotas: dict[str, int]) -> SsdTier:
        shares = {tenant: share(n_pages, self._n_slots) for tenant, n_pages in quotas.items()}
        tier = open_tier(self._folder, self._slab, n_slots=self._n_slots, quotas=shares)
        assert tier.quotas == quotas
        settle(tier)
        return tier

    def restart(self, **quotas: int) -> None:
        self.tier.close()
        self.tier = self._open(quotas)

    def store(self, tenant: str, path: str, n_pages: int, first: int = 0) -> int:
        batch = replace(part(pages(n_pages, path), first, n_pages), tenant=tenant)
        n_stored = self.tier.store(batch).result(timeout=30)
        settle(self.tier)
        self.tier.check_invariants()
        return n_stored

    def has(self, path: str) -> int:
        return self.tier.exists(pages(N_SLOTS, path).keys).result(timeout=30)

    def held(self, tenant: str) -> int:
        return held(self.tier, tenant)

    def close(self) -> None:
        self.tier.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert not list(tmp_path.glob("*/*/map.db-wal")), "a test has left its store open"


def fill(store: Store, n_pages: int = N_SLOTS) -> None:
    """With paths of tenants that have no quota."""
    for number in range(n_pages // 8):
        store.store("", f"other {number}", 8)


def test_a_tenant_at_its_quota_evicts_its_own_though_there_is_room(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=12)
    store.store("b", "b", 8)
    assert [store.store("a", f"a {number}", 8) for number in range(4)] == [8] * 4
    assert store.held("a") == 12
    assert [store.has(path) for path in ("b", "a 0", "a 1", "a 2", "a 3")] == [8, 0, 0, 4, 8]
    assert (store.tier.stats()["evicted_quota"], store.tier.stats()["evicted"]) == (20, 0)
    left = store.tier._volume.pages.departures.find(pages(8, "a 0").keys)
    assert left.reason.tolist() == [QUOTA] * 8
    store.close()


def test_a_burst_of_others_does_not_touch_what_is_within_a_quota(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=16, b=16)
    store.store("a", "a", 16)
    for number in range(10):
        assert store.store("b", f"b {number}", 16) == 16
    fill(store, 2 * N_SLOTS)
    assert (store.has("a"), store.held("a"), store.held("b")) == (16, 16, 16)
    assert store.held("") == 32
    assert store.tier.shares() == [(32, N_SLOTS), (16, 16), (16, 16)]
    store.close()


def test_what_a_quota_leaves_idle_is_used_and_given_back(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=32)
    fill(store)
    assert store.held("") == N_SLOTS
    for number in range(4):
        assert store.store("a", f"a {number}", 8) == 8
    assert (store.held("a"), store.held("")) == (32, 32)
    assert [store.has(f"other {number}") for number in range(8)] == [0] * 4 + [8] * 4, "the oldest gave it back"
    assert store.tier.stats()["evicted_quota"] == 32
    store.close()


def test_quotas_of_all_there_is_leave_others_nothing(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=32, b=32)
    fill(store)
    store.store("a", "a", 32)
    store.store("b", "b", 32)
    assert (store.held("a"), store.held("b"), store.held("")) == (32, 32, 0)
    assert store.store("c", "c", 8) == 0
    assert store.tier.stats()["skipped_full"] == 8
    store.close()


def test_what_the_quota_is_too_small_for_is_not_stored_and_counted(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=5, b=0)
    assert store.store("a", "a", 8) == 5
    assert store.store("b", "b", 8) == 0
    assert store.tier.stats()["skipped_quota"] == 3 + 8
    assert store.tier.stats()["skipped_full"] == 0
    assert (store.has("a"), store.held("a"), store.held("b")) == (5, 5, 0)
    store.close()


def test_pages_below_a_first_page_are_its_tenants_whatever_their_batch_says(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=6)
    store.store("a", "a", 4)
    store.store("", "a", 8, first=4)
    assert store.held("a") == 6
    store.close()


def test_pages_count_for_their_tenant_after_a_restart(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=24, b=16)
    store.store("a", "a", 24)
    store.store("b", "b", 10)
    fill(store, 24)
    store.restart(b=16, a=24)
    assert (store.held("a"), store.held("b"), store.held("")) == (24, 10, 24)
    fill(store, 2 * N_SLOTS)
    assert (store.has("a"), store.has("b")) == (24, 10)
    store.store("a", "another", 16)
    assert (store.held("a"), store.has("another")) == (24, 16)
    store.close()


def test_a_tenant_that_has_lost_its_quota_counts_with_the_others_until_it_has_one_again(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=24)
    store.store("a", "a", 24)
    store.restart()
    assert store.held("") == 24
    store.restart(b=3, a=30)
    assert (store.held("a"), store.held("b"), store.held("")) == (24, 0, 0)
    store.close()


def test_a_tenant_with_a_quota_elsewhere_is_known_when_it_gets_one_here(folder: Path) -> None:
    store = Store(folder, N_SLOTS)
    store.store("a", "a", 8)
    store.tier.set_quotas({"a": 20})
    store.store("a", "another", 4)
    assert (store.held("a"), store.held("")) == (4, 8), "until the store is opened again"
    store.restart(a=20)
    assert (store.held("a"), store.held("")) == (12, 0)
    store.close()


@pytest.mark.parametrize("first", [0, 6])
def test_a_path_that_was_nobodys_is_its_tenants_from_the_next_start_on(folder: Path, first: int) -> None:
    """A prompt's first page is used for as long as the prompt is: it must not stay nobody's for ever."""
    store = Store(folder, N_SLOTS)
    store.store("", "a", 6)
    store.restart(a=20)
    assert store.held("a") == 0
    assert store.store("a", "a", 10, first=first) == 10 - first
    store.restart(a=20)
    assert (store.held("a"), store.held("")) == (10, 0)
    store.close()


def test_what_is_above_a_smaller_quota_leaves_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is stored, so it is not left to the keeper's rounds."""
    monkeypatch.setattr(Keeper, "_keep_quotas", lambda _: None)
    store = Store(folder, N_SLOTS, a=40)
    for number in range(5):
        store.store("a", f"a {number}", 8)
    store.restart(a=10)
    assert store.held("a") == 10
    assert [store.has(f"a {number}") for number in range(5)] == [0, 0, 0, 2, 8], "the least recently used went"
    assert store.tier.stats()["evicted_quota"] == 30
    store.restart(a=10)
    assert store.held("a") == 10
    store.close()


def test_a_quota_can_be_changed_while_it_serves(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=40)
    store.store("a", "a", 40)
    store.tier.set_quotas({"a": 4})
    wait_until(lambda: store.held("a") == 4)
    assert store.has("a") == 4
    with pytest.raises(QuotaError, match="61 pages is more than the 60 that other"):
        store.tier.set_quotas({"b": 61})
    store.tier.set_quotas({"b": 40, "a": 24})
    assert store.tier.quotas == {"a": 24, "b": 40}
    assert store.store("b", "b", 40) == 40
    assert store.store("a", "a", 24) == 24
    store.close()


def test_a_tenant_gets_its_room_from_what_there_is_if_the_store_cannot_grow(folder: Path) -> None:
    """Half of the directory is taken by something else: the others' part is less than it was to be."""
    (folder / "foreign").write_bytes(bytes(OUTSIDE_NBYTES + 32 * SLOT_NBYTES))
    store = Store(folder, N_SLOTS, a=16)
    fill(store)
    n_slots = store.tier.stats()["n_slots"]
    assert n_slots < 40
    assert store.store("a", "a", 16) == 16
    fill(store)
    assert (store.has("a"), store.held("a"), store.held("")) == (16, 16, n_slots - 16)
    store.close()


def test_a_store_that_is_made_anew_has_the_same_parts_of_its_new_slots(tmp_path: Path) -> None:
    """The one before was made for a smaller capacity, and so could not use all of this one."""
    open_tier(tmp_path, make_slab(), n_slots=16).close()
    clock, limit_nbytes = Clock(), limit_for(1024, 1, SLOT_NBYTES)
    quotas = {"a": limit_nbytes // 4, "b": limit_nbytes // 8}
    tier = open_tier(tmp_path, make_slab(), limit_nbytes=limit_nbytes, quotas=quotas, clock=clock)
    settle(tier)
    assert tier.quotas == {"a": 16, "b": 8}
    tier.set_quotas({"b": 32})
    shutil.rmtree(tmp_path)
    clock.now_s += 2.5
    wait_until(lambda: not tier.health().available)
    clock.now_s += 1.5
    wait_until(lambda: tier.health().available)
    settle(tier)
    assert tier.quotas == {"a": 256, "b": 512}
    assert tier.store(replace(pages(100, "a"), tenant="a")).result(timeout=30) == 100
    assert held(tier, "a") == 100
    tier.check_invariants()
    tier.close()


def test_a_store_of_before_there_were_quotas_is_opened_as_before(folder: Path) -> None:
    store = Store(folder, N_SLOTS)
    store.store("", "a", 10)
    store.store("", "b", 10)
    store.close()
    (path,) = folder.glob("*/*/map.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("ALTER TABLE pages DROP COLUMN tenant")
    store = Store(folder, N_SLOTS, a=16)
    assert (store.has("a"), store.has("b")) == (10, 10)
    assert (store.held("a"), store.held("")) == (0, 20)
    assert store.store("a", "new", 12) == 12
    store.restart(a=16)
    assert (store.held("a"), store.held("")) == (12, 20)
    assert store.tier.stats()["map_rejected"] == 0
    store.close()


def test_the_map_has_no_name_of_a_tenant_and_that_of_nobody_else(folder: Path) -> None:
    store = Store(folder, N_SLOTS, **{"a secret salt": 16})
    store.store("a secret salt", "a", 4)
    store.store("", "b", 4)
    store.close()
    (path,) = folder.glob("*/*/map.db")
    assert b"a secret salt" not in path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as db:
        noted = [tenant for (tenant,) in db.execute("SELECT tenant FROM pages WHERE tenant IS NOT NULL")]
    assert noted == [digest_of("a secret salt")]


def test_a_slot_that_another_path_gets_forgets_whose_it_was(folder: Path) -> None:
    store = Store(folder, N_SLOTS, a=32)
    for number in range(32):
        store.store("a", f"a {number}", 1)
    store.tier.clear().result(timeout=30)
    for number in range(N_SLOTS // 2):
        store.store("", f"other {number}", 2)
    store.restart(a=32)
    assert (store.held("a"), store.held("")) == (0, N_SLOTS)
    store.close()
    (path,) = folder.glob("*/*/map.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM pages WHERE tenant IS NOT NULL").fetchone() == (0,)


def test_a_damaged_map_breaks_nothing(folder: Path) -> None:
    """A tenant in the middle of a path means nothing; a page that has lost its parent is the first of a path."""
    store = Store(folder, N_SLOTS, a=32)
    store.store("a", "a", 6)
    store.store("", "b", 6)
    store.close()
    (path,) = folder.glob("*/*/map.db")
    b_keys = [pages(6, "b").keys[at : at + 32] for at in range(0, 192, 32)]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE pages SET tenant = ? WHERE key = ?", (digest_of("a"), b_keys[3]))
        db.execute("UPDATE pages SET parent = ?, tenant = ? WHERE key = ?", (bytes(32), digest_of("a"), b_keys[5]))
    store = Store(folder, N_SLOTS, a=32)
    store.tier.check_invariants()
    assert store.has("b") == 5
    assert (store.held("a"), store.held("")) == (6 + 1, 5)
    assert store.tier.stats()["crashes"] == 0
    store.close()


TENANTS = st.sampled_from(["a", "b", "c"])
QUOTAS = st.fixed_dictionaries({}, optional={"a": st.integers(0, 12), "b": st.integers(0, 12)})


class QuotaMachine(RuleBasedStateMachine):
    """Three tenants in a store of 24 slots; two of them may have quotas."""

    @initialize(quotas=QUOTAS)
    def open(self, quotas: dict[str, int]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.quotas = quotas

        self.store = Store(self.folder, 24, **quotas)

    def held(self) -> dict[str, int]:
        return {tenant: self.store.held(tenant) for tenant in self.quotas}

    @rule(tenant=TENANTS, number=st.integers(0, 3), n_pages=st.integers(1, 9))
    def put(self, tenant: str, number: int, n_pages: int) -> None:
        before = self.held()
        n_stored = self.store.store(tenant, f"{tenant} {number}", n_pages)
        assert n_stored <= n_pages
        if tenant in self.quotas and self.quotas[tenant] == 0:
            assert self.store.held(tenant) == 0
        after = self.held()
        before.pop(tenant, None)
        after.pop(tenant, None)
        assert after == before, "a tenant has lost pages to another"

    @rule(tenant=TENANTS, number=st.integers(0, 3))
    def use(self, tenant: str, number: int) -> None:
        self.store.tier.touch(pages(1, f"{tenant} {number}").keys)

    @rule(tenant=st.sampled_from(["a", "b"]), n_pages=st.integers(0, 12))
    def change(self, tenant: str, n_pages: int) -> None:
        if tenant in self.quotas:
            self.store.tier.set_quotas({tenant: n_pages})
            self.quotas[tenant] = n_pages
            wait_until(lambda: self.store.held(tenant) <= n_pages)

    @rule(quotas=QUOTAS)
    def restart(self, quotas: dict[str, int]) -> None:
        self.quotas = quotas
        self.store.restart(**quotas)
        by_tenant = {
            tenant: sum(self.store.has(f"{tenant} {number}") for number in range(4)) for tenant in ("a", "b", "c")
        }
        for tenant in quotas:
            assert self.store.held(tenant) == by_tenant[tenant], "the map knows whose they are"

    @invariant()
    def no_tenant_is_above_its_quota(self) -> None:
        if hasattr(self, "store"):
            assert all(n_pages <= self.quotas[tenant] for tenant, n_pages in self.held().items())
            others = self.store.tier._volume.pages.index.held(HOST, OTHERS)
            assert others + sum(self.held().values()) <= 24
            self.store.tier.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


TestQuotaMachine = QuotaMachine.TestCase
TestQuotaMachine.settings = settings(max_examples=30, stateful_step_count=25)
