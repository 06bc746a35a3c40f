"""A host tier under one policy and the calls that a server makes to it, beside a model that is told the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from radix import HOST, KEY_NBYTES, Index, Rows, State
from tests.radix.model import page_keys
from tests.radix.policy_models import GittinsModel, LruModel

CAPACITY = 1024
"""Rows: enough for all pages of a test, and for policies to remember all that have left."""

PAGE_TOKENS = 4096
"""Few pages are deep enough for their cost to differ."""


class Tier:
    """Room for `n_slots` pages. Paths are strings, and a page is named by the path that ends with it.

    Each call is made to the model too, if there is one, and what they decide is compared.
    """

    def __init__(
        self,
        policy: str,
        n_slots: int,
        *,
        model: type[LruModel] | None = None,
        n_groups: int = 1,
        capacity: int = CAPACITY,
        keys: Callable[[str], list[bytes]] = page_keys,
    ) -> None:
        self.index = Index(
            capacity, policies={HOST: policy}, n_groups=n_groups, n_pages=n_slots, page_tokens=PAGE_TOKENS
        )
        self.n_slots = n_slots
        self.free = list(range(n_slots))
        self.keys = keys
        self.model = model(capacity, n_slots, PAGE_TOKENS) if model is not None else None
        self.leased: list[str] = []
        self.arriving: list[str] = []
        self.evicted: list[bytes] = []

    # ---- what a server does ----

    def request(self, path: str, n_tokens: int = 20, *, group: int = 0, is_passing: bool = False) -> int:
        """A request from its arrival to its end, with nothing beside it. Returns how many of its pages were there."""
        self.tick()
        self.ask(path)
        self.look_up(path)
        n_hits = self.n_resident(path)
        self.lease(path)
        self.admit(path, group=group, is_passing=is_passing)
        self.answer(path, n_tokens)
        self.release(path)
        return n_hits

    def tick(self) -> None:
        self.index.tick()
        if self.model is not None:
            self.model.now += 1

    def ask(self, path: str) -> None:
        self.index.asked(self.blob(path))
        if self.model is not None:
            self.model.asked(self.keys(path))
            if isinstance(self.model, GittinsModel):
                self._compare_what_was_learned(self.model)

    def look_up(self, path: str) -> None:
        """What is here of a path is in use in this pass."""
        n = self.n_resident(path)
        self.index.touch(self.rows(path)[:n])
        if self.model is not None:
            self.model.touch(self.keys(path)[:n])

    def use(self, path: str) -> None:
        self.index.used(self.rows(path))
        if self.model is not None:
            self.model.used(self.known(path))

    def lease(self, path: str) -> None:
        """On all pages, which have rows from then on, until it is released."""
        self.index.lease(self.index.insert(self.blob(path)))
        self.leased.append(path)
        if self.model is not None:
            self.model.insert(self.keys(path), None)
            self.model.lease(self.keys(path))

    def release(self, path: str) -> None:
        self.leased.remove(path)
        self.index.release(self.rows(path))
        if self.model is not None:
            self.model.release(self.keys(path))

    def admit(self, path: str, *, group: int = 0, is_passing: bool = False) -> None:
        """What is known of a path and is not here arrives, as far as others can leave."""
        rows = self.rows(path)
        is_absent = self.index.states(rows, HOST) == State.ABSENT
        n_missing = int(is_absent.sum())
        if n_missing > len(self.free):
            self.evict(n_missing - len(self.free), group=group)
        rows = rows[is_absent][: len(self.free)]
        if not len(rows):
            return
        slots, self.free = self.free[: len(rows)], self.free[len(rows) :]
        keys = self.names(self.index.keys_of(rows))
        self.index.begin(rows, HOST, np.array(slots, np.int32))
        self.index.commit(rows, HOST, is_passing=is_passing)
        if self.model is not None:
            self.model.change("begin", keys, HOST, slots)
            self.model.change("commit", keys, HOST)
            if is_passing:
                self.model.pass_by(keys)

    def begin(self, path: str) -> None:
        """The last page of a path is on its way, if it is known and not here and there is room."""
        rows = self.rows(path)[len(path) - 1 :]
        if len(rows) and self.free and self.index.states(rows, HOST)[0] == State.ABSENT:
            slots, self.free = self.free[:1], self.free[1:]
            self.arriving.append(path)
            self.index.begin(rows, HOST, np.array(slots, np.int32))
            if self.model is not None:
                self.model.change("begin", self.keys(path)[-1:], HOST, slots)

    def end(self, path: str, *, has_come: bool) -> None:
        """It has come, or it has not."""
        self.arriving.remove(path)
        rows, keys = self.rows(path)[len(path) - 1 :], self.keys(path)[-1:]
        if has_come:
            self.index.commit(rows, HOST)
        else:
            self.free += self.index.abort(rows, HOST).tolist()
        if self.model is not None:
            self.model.change("commit" if has_come else "abort", keys, HOST)

    def evict(self, n: int, *, group: int = 0) -> list[bytes]:
        """Returns the victims in order."""
        evicted = self.index.evict(n, group=group)
        victims = self.names(evicted.keys)
        if self.model is not None:
            expected, slots = self.model.evict(n, HOST)
            assert victims == expected
            assert evicted.slots.tolist() == slots
        self.free += evicted.slots.tolist()
        self.evicted += victims
        return victims

    def drop(self, path: str) -> None:
        """The last page of a path is found damaged."""
        rows, keys = self.rows(path)[len(path) - 1 :], self.keys(path)[-1:]
        if len(rows) and self.index.states(rows, HOST)[0] == State.RESIDENT:
            self.free += self.index.drop(rows, HOST).tolist()
            if self.model is not None:
                self.model.change("drop", keys, HOST)

    def answer(self, path: str, n_tokens: int) -> None:
        rows = self.rows(path)
        if len(rows) == len(path):
            self.index.answered(int(rows[-1]), n_tokens)
            if self.model is not None:
                self.model.answered(self.keys(path), n_tokens)

    def back(self, path: str, is_backed: bool) -> None:
        """Copies of these pages are below, or are there no more."""
        self.index.set_backed(self.rows(path), is_backed)
        if self.model is not None:
            self.model.back(self.known(path), is_backed)

    def clear(self) -> None:
        for path in tuple(self.arriving):
            self.end(path, has_come=False)
        for path in tuple(self.leased):
            self.release(path)
        self.index.clear()
        self.free = list(range(self.n_slots))
        if self.model is not None:
            self.model.clear()

    # ---- names ----

    def blob(self, path: str) -> bytes:
        return b"".join(self.keys(path))

    def rows(self, path: str) -> Rows:
        return self.index.match(self.blob(path))

    def known(self, path: str) -> list[bytes]:
        return self.keys(path)[: len(self.rows(path))]

    def n_resident(self, path: str) -> int:
        return self.index.resident_prefix(self.rows(path), HOST)

    def names(self, keys: bytes) -> list[bytes]:
        return [keys[i : i + KEY_NBYTES] for i in range(0, len(keys), KEY_NBYTES)]

    # ---- what was learned ----

    def _compare_what_was_learned(self, model: GittinsModel) -> None:
        """To 1e-9; then the model takes the figures over, so that equals stay equal."""
        reuse, expected = self.index._policies[HOST]._reuse, model.reuse  # type: ignore[attr-defined]
        n = len(expected.classes)
        assert reuse.features[:n].tolist() == [list(levels) for levels in expected.classes]
        np.testing.assert_allclose(reuse.entered[:n], expected.entered, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(reuse.reused[:n], expected.reused, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(reuse.worth[:n], expected.table, rtol=1e-9)
        expected.table = reuse.worth[:n].copy()
