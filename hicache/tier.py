"""The contract of a tier below host memory: SSD, or a store shared with other servers.

A tier keeps pages by name and moves them between itself and slots of the slab. The engine talks to every tier through
these methods and through nothing else, so a new tier is one file here and one line in the registry of kinds.

What every tier promises:

- A call returns at once with a future; the I/O happens on threads of the tier. A tier that knows the answer already, as
  one whose map is in memory does for `exists`, returns a future that is done. Only the thread that owns the engine
  calls a tier, so no method needs to be safe against another.
- Batches are in prefix order, root side first, and an answer is always the length of a prefix: the pages before it are
  good, what lies behind it is unknown. A load of ten pages that answers 7 has filled the first seven slots and has
  left the other three in any state.
- `load` fills a slot only with bytes whose checksum and name it has verified. Anything else is a miss.
- A miss is a value, never an error. What goes wrong with the store ends as `TierError` in the future, and the engine
  then treats the whole batch as missing. No other exception may come out of a tier.
- The caller keeps the slots of a batch leased until the future is done, cancelled or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from hicache.quotas import QuotaError, Share
from radix import KEY_NBYTES
from radix.departures import Remembered

ROOT_KEY = bytes(KEY_NBYTES)
"""Stands for the root where a parent's key is expected."""


class TierError(Exception):
    """A tier's store failed: the sentence says which store, what it was asked for, and how it answered."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A run of pages on one path.

    keys: n raw page keys of 32 bytes each, root side first, in one object.
    parents: the key of each page's parent, likewise 32n bytes; 32 zero bytes stand for the root.
    tenant: the cache salt of the path's requests if it has a quota on any tier, otherwise empty. It is part of every
    key already; tiers use it for accounting.
    slots: int32[n], the slab slots that hold the bytes, or are to receive them.
    depth: how many pages lie above the first one, so page i of the batch has `depth + i` above it. Of pages last used
    together a tier evicts the deepest first.
    """

    keys: bytes
    parents: bytes
    tenant: str
    slots: NDArray[np.int32]
    depth: int

    def __post_init__(self) -> None:
        n_pages = len(self.slots)
        if len(self.keys) != KEY_NBYTES * n_pages or len(self.parents) != KEY_NBYTES * n_pages:
            raise ValueError(
                f"a batch of {n_pages} slots needs {KEY_NBYTES * n_pages} bytes of keys and of parents, "
                f"got {len(self.keys)} and {len(self.parents)}"
            )
        if self.depth < 0:
            raise ValueError(f"a batch cannot begin at depth {self.depth}")

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def below(cls, parent: bytes | None, keys: bytes, slots: NDArray[np.int32], depth: int, tenant: str = "") -> Batch:
        """The run `keys` below the page `parent` (None: the root)."""
        parents = ((parent or ROOT_KEY) + keys)[: len(keys)]
        return cls(keys, parents, tenant, slots, depth)

    def part(self, start: int, end: int) -> Batch:
        """Its pages `start` to `end`."""
        keys = slice(start * KEY_NBYTES, end * KEY_NBYTES)
        return Batch(self.keys[keys], self.parents[keys], self.tenant, self.slots[start:end], self.depth + start)


def batches(run: Batch, n_pages: int) -> Iterator[tuple[int, Batch]]:
    """`run` in batches of at most n_pages, in path order, each with where it ends in the run."""
    for start in range(0, len(run), n_pages):
        end = min(start + n_pages, len(run))
        yield end, run.part(start, end)


def true_prefix(flags: NDArray[np.bool_]) -> int:
    """How many flags are set before the first that is not."""
    return len(flags) if flags.all() else int(flags.argmin())


def pending() -> Future[int]:
    """A call that cannot be cancelled: it is done when no thread is at its slots any more."""
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()
    return future


def answered(value: int) -> Future[int]:
    """A call that is done."""
    future: Future[int] = Future()
    future.set_result(value)
    return future


def answer_of(future: Future[int]) -> int:
    """The answer of a call that is done: 0 if the tier has failed, which it has counted and reported itself."""
    try:
        return future.result(timeout=0)
    except (TierError, CancelledError):
        return 0


def has_answered(future: Future[int]) -> bool:
    """Whether a call is done, and did not fail."""
    return future.done() and not future.cancelled() and future.exception() is None


def total(futures: Sequence[Future[int]]) -> Future[int]:
    """Done when all of these are, of which there is one at least: their sum, or the error of the first that failed."""
    whole: Future[int] = Future()
    n_ended = count(1)  # one step of it is atomic, and threads of several tiers take them

    def end(_: Future[int]) -> None:
        if next(n_ended) < len(futures):
            return
        error = next(filter(None, (future.exception() for future in futures)), None)
        if error is None:
            whole.set_result(sum(future.result() for future in futures))
        else:
            whole.set_exception(error)

    for future in futures:
        future.add_done_callback(end)
    return whole


@dataclass(frozen=True, slots=True)
class Capacity:
    """How full a tier is, in bytes of its own store (padding, maps and logs included)."""

    used_nbytes: int
    limit_nbytes: int


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a tier takes calls now. A quarantined one answers every load with 0 and every store with 0, at once."""

    available: bool
    reason: str


class Tier(ABC):
    """One store below host memory. See the module's text for what each method promises."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The tier's name in logs and metrics, such as `ssd`."""

    @abstractmethod
    def exists(self, keys: bytes) -> Future[int]:
        """How many pages at the head of `keys` the store holds, as far as it knows without reading them."""

    @abstractmethod
    def load(self, batch: Batch) -> Future[int]:
        """Fill the batch's slots. Answers how many pages at its head are in place and verified."""

    @abstractmethod
    def store(self, batch: Batch) -> Future[int]:
        """Persist the batch from its slots. Answers how many pages at its head are stored, or were already.

        A page becomes visible to `exists` and `load` only when all its bytes are in the store.
        """

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """The page `key` and those above it are in use, so they are the last to be evicted.

        Advice: a tier that is busy or does not hold the page may drop it. Never blocks and never fails.
        """

    @abstractmethod
    def delete(self, keys: bytes) -> Future[int]:
        """Forget these pages, in any order. Answers how many of them were there."""

    @abstractmethod
    def clear(self) -> Future[int]:
        """Forget all pages. Answers how many there were.

        Loads of before may still run, and may end short; no load or store is asked for until the future is done.
        """

    def set_quotas(self, quotas: Mapping[str, int]) -> None:
        """Let the pages of these tenants hold so many slots from now on (`hicache.quotas`); others keep theirs.

        quotas: pages by cache salt. Never blocks. Raises QuotaError, with nothing changed; a tier whose store is not
        this server's alone always does.
        """
        raise QuotaError(f"the {self.name} tier keeps no quotas, as others store there too; the host and ssd tiers do")

    @property
    def quotas(self) -> Mapping[str, int]:
        """Pages by cache salt, of the tenants that have a quota here. Never blocks."""
        return {}

    def shares(self) -> Sequence[Share]:
        """By group, that of all without a quota first; empty of a tier that keeps no quotas. Never blocks."""
        return ()

    @abstractmethod
    def expected_load_s(self, n_pages: int) -> float:
        """Seconds that loading `n_pages` would take if asked for now, behind what is queued, at the measured speed.

        0.0 while nothing has been measured. Never blocks.
        """

    @abstractmethod
    def capacity(self) -> Capacity:
        """Never blocks."""

    @abstractmethod
    def health(self) -> Health:
        """Never blocks."""

    @abstractmethod
    def stats(self) -> Mapping[str, int]:
        """Counters since the start, by name. Never blocks."""

    def departed(self, keys: bytes) -> Remembered | None:
        """What the store remembers of pages of these that have left it. None: nothing of any. Never blocks."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Finish or cancel what is queued, then release the store. Blocks; calling it again does nothing.

        When it returns no thread of the tier reads or writes a slot any more.
        """
