"""A tier that is opened in the background: for weights that change while the server runs.

Opening a store takes milliseconds on a healthy disk and for ever on one that hangs, and so does closing the one before.
Neither may keep the scheduler. Until the tier is open it has nothing and takes nothing; if it cannot be opened, it is
tried again from time to time.

It keeps the quotas of the tier before it, which may have been changed since the configuration was read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final

from hicache import Batch, Capacity, Health, NullTier, QuotaError, Tier
from hicache.logs import get_logger
from hicache.quotas import Share
from sgl_lmcache.errors import StartError

logger = get_logger(__name__)

RETRY_S: Final = 30.0


class LateTier(Tier):
    """name: of the tier to come. open_tier: opens it, or raises `StartError`; called on a thread of this object's.

    before: the tier that it takes the place of, which is closed first. The engine must not use that any more.
    """

    def __init__(self, name: str, open_tier: Callable[[], Tier], before: Tier) -> None:
        self._name = name
        self._open_tier = open_tier
        self._before = before
        self._inner: Tier = NullTier()
        self._quotas = dict(before.quotas)
        """Those that the tier to come is to keep."""
        self._reason = "it is being opened"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._open, name="sgl-lmcache-open", daemon=True).start()

    def _open(self) -> None:
        try:
            self._before.close()
            while not self._closed.is_set() and not self._try_open():
                self._closed.wait(RETRY_S)
        except Exception:
            logger.exception("sgl_lmcache: the %s tier was not opened, by a bug: nothing is kept there", self._name)

    def _try_open(self) -> bool:
        try:
            opened = self._open_tier()
        except StartError as error:
            if self._reason != str(error):
                logger.error("sgl_lmcache: nothing is kept below host memory until this is put right: %s", error)
            self._reason = str(error)
            return False
        with self._lock:
            is_wanted = not self._closed.is_set()
            if is_wanted:
                self._give_quotas(opened)
                self._inner = opened
        if not is_wanted:
            opened.close()
        return True

    def _give_quotas(self, opened: Tier) -> None:
        if not self._quotas:
            return
        try:
            opened.set_quotas(self._quotas)
        except QuotaError as error:
            logger.error("sgl_lmcache: the %s tier has the quotas of the configuration: %s", self._name, error)

    @property
    def is_open(self) -> bool:
        return not isinstance(self._inner, NullTier)

    # ---- the tier, or one that has nothing ----

    @property
    def name(self) -> str:
        return self._name

    def exists(self, keys: bytes) -> Future[int]:
        return self._inner.exists(keys)

    def load(self, batch: Batch) -> Future[int]:
        return self._inner.load(batch)

    def store(self, batch: Batch) -> Future[int]:
        return self._inner.store(batch)

    def touch(self, key: bytes) -> None:
        self._inner.touch(key)

    def delete(self, keys: bytes) -> Future[int]:
        return self._inner.delete(keys)

    def clear(self) -> Future[int]:
        return self._inner.clear()

    def set_quotas(self, quotas: Mapping[str, int]) -> None:
        """Those that are given before the tier is open are given to it then; if they cannot be, the log says so."""
        with self._lock:
            if self.is_open:
                self._inner.set_quotas(quotas)
            else:
                self._quotas |= quotas

    @property
    def quotas(self) -> Mapping[str, int]:
        return self._inner.quotas if self.is_open else self._quotas

    def shares(self) -> Sequence[Share]:
        return self._inner.shares()

    def expected_load_s(self, n_pages: int) -> float:
        return self._inner.expected_load_s(n_pages)

    def capacity(self) -> Capacity:
        return self._inner.capacity()

    def health(self) -> Health:
        return self._inner.health() if self.is_open else Health(available=False, reason=self._reason)

    def stats(self) -> Mapping[str, int]:
        return self._inner.stats()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        self._inner.close()
