"""Tiers for tests: one that really keeps bytes, and one that wraps another with faults and latency."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from hicache import Batch, Capacity, Health, Tier, TierError
from radix import KEY_NBYTES


def split(keys: bytes) -> list[bytes]:
    """A blob of keys as single keys."""
    return [keys[i : i + KEY_NBYTES] for i in range(0, len(keys), KEY_NBYTES)]


def done(value: int) -> Future[int]:
    future: Future[int] = Future()
    future.set_result(value)
    return future


class MemoryTier(Tier):
    """Keeps pages in a dictionary, up to `limit_pages`; then it stores no more. Answers at once.

    `pages` are what it has, by key. `touched` lists the keys of all `touch` calls, in order; it evicts nothing, so it
    has no other use for them. A load is said to take `load_s_per_page` for each page, whatever it really takes.
    """

    def __init__(self, slab: npt.NDArray[np.uint8], limit_pages: int) -> None:
        self._slab = slab
        self._limit_pages = limit_pages
        self.pages: dict[bytes, bytes] = {}
        self._counts = {"loaded": 0, "stored": 0, "deleted": 0}
        self.touched: list[bytes] = []
        self.load_s_per_page = 0.0
        self.closed = False

    @property
    def name(self) -> str:
        return "memory"

    def exists(self, keys: bytes) -> Future[int]:
        return done(self._prefix(keys))

    def load(self, batch: Batch) -> Future[int]:
        n_pages = self._prefix(batch.keys)
        for key, slot in zip(split(batch.keys)[:n_pages], batch.slots, strict=False):
            self._slab[slot] = np.frombuffer(self.pages[key], dtype=np.uint8)
        self._counts["loaded"] += n_pages
        return done(n_pages)

    def store(self, batch: Batch) -> Future[int]:
        for n_stored, (key, slot) in enumerate(zip(split(batch.keys), batch.slots, strict=True)):
            if key in self.pages:
                continue
            if len(self.pages) == self._limit_pages:
                return done(n_stored)
            self.pages[key] = self._slab[slot].tobytes()
            self._counts["stored"] += 1
        return done(len(batch))

    def touch(self, key: bytes) -> None:
        self.touched.append(key)

    def delete(self, keys: bytes) -> Future[int]:
        n_deleted = sum(self.pages.pop(key, None) is not None for key in split(keys))
        self._counts["deleted"] += n_deleted
        return done(n_deleted)

    def clear(self) -> Future[int]:
        n_pages = len(self.pages)
        self.pages.clear()
        return done(n_pages)

    def expected_load_s(self, n_pages: int) -> float:
        return n_pages * self.load_s_per_page

    def capacity(self) -> Capacity:
        page_nbytes = self._slab.shape[1]
        return Capacity(len(self.pages) * page_nbytes, self._limit_pages * page_nbytes)

    def health(self) -> Health:
        return Health(available=not self.closed, reason="closed" if self.closed else "")

    def stats(self) -> Mapping[str, int]:
        return dict(self._counts)

    def close(self) -> None:
        self.closed = True

    def put(self, keys: bytes, pages: Sequence[bytes]) -> None:
        """Have these pages, as if they had been stored."""
        self.pages.update(zip(split(keys), pages, strict=True))

    def forget_all_but(self, n_pages: int) -> None:
        """Keep only the first that were stored."""
        self.pages = dict(list(self.pages.items())[:n_pages])

    def _prefix(self, keys: bytes) -> int:
        found = 0
        for key in split(keys):
            if key not in self.pages:
                break
            found += 1
        return found


class FaultyTier(Tier):
    """Another tier with faults and latency, both scripted: no clock, no randomness, no sleep.

    `fail_next(n)`: the next n calls of exists, load, store, delete or clear answer with `TierError`.
    `hold()`: answers wait until `release(n)` lets the n oldest through, in order. The inner tier does its work only
    then, as a slow disk would. `close` of the wrapper lets everything through first.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self._failures = 0
        self._misses = 0
        self._held: deque[tuple[Future[int], Callable[[], Future[int]]]] | None = None

    def fail_next(self, n_calls: int) -> None:
        self._failures += n_calls

    def miss_next(self, n_loads: int) -> None:
        """The next n loads find nothing, whatever `exists` has said."""
        self._misses += n_loads

    def hold(self) -> None:
        self._held = deque()

    def release(self, n_calls: int | None = None) -> None:
        """Let the oldest calls through; all of them, and all later ones, without an argument."""
        assert self._held is not None, "nothing is held"
        n_released = len(self._held) if n_calls is None else n_calls
        for _ in range(n_released):
            future, call = self._held.popleft()
            self._run(call, future)
        if n_calls is None:
            self._held = None

    @property
    def n_held(self) -> int:
        return 0 if self._held is None else len(self._held)

    @property
    def name(self) -> str:
        return f"faulty {self.inner.name}"

    def exists(self, keys: bytes) -> Future[int]:
        return self._call(lambda: self.inner.exists(keys))

    def load(self, batch: Batch) -> Future[int]:
        if self._misses:
            self._misses -= 1
            return self._call(lambda: done(0))
        return self._call(lambda: self.inner.load(batch))

    def store(self, batch: Batch) -> Future[int]:
        return self._call(lambda: self.inner.store(batch))

    def touch(self, key: bytes) -> None:
        """Neither held nor failed: a tier may drop it, so no caller can depend on it."""
        self.inner.touch(key)

    def delete(self, keys: bytes) -> Future[int]:
        return self._call(lambda: self.inner.delete(keys))

    def clear(self) -> Future[int]:
        return self._call(self.inner.clear)

    def set_quotas(self, quotas: Mapping[str, int]) -> None:
        """Neither held nor failed."""
        self.inner.set_quotas(quotas)

    @property
    def quotas(self) -> Mapping[str, int]:
        return self.inner.quotas

    def expected_load_s(self, n_pages: int) -> float:
        return self.inner.expected_load_s(n_pages)

    def capacity(self) -> Capacity:
        return self.inner.capacity()

    def health(self) -> Health:
        return self.inner.health()

    def stats(self) -> Mapping[str, int]:
        return self.inner.stats()

    def close(self) -> None:
        if self._held is not None:
            self.release()
        self.inner.close()

    def _call(self, call: Callable[[], Future[int]]) -> Future[int]:
        future: Future[int] = Future()
        if self._held is None:
            self._run(call, future)
        else:
            self._held.append((future, call))
        return future

    def _run(self, call: Callable[[], Future[int]], future: Future[int]) -> None:
        if self._failures:
            self._failures -= 1
            future.set_exception(TierError("the store answered with an injected fault"))
        else:
            future.set_result(call().result())
