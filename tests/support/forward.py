"""A model without layers: its KV is a function of the tokens, of whose they are, and of the weights' version.

So the right bytes of every page are known at any time, and wrong ones are seen wherever they come from. What a request
computes on top of KV of other weights is right for nobody: it is written down as noise, and must never be kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from transfer.layout import PageLayout
from transfer.slab import Slab

MODULUS = 65_521
NOISE = -1
"""In the place of a version: computed on top of another version's KV."""

Values = NDArray[np.int64]


def kv_of(tokens: Sequence[int], tenant: str = "", version: int = 0) -> Values:
    """int64[len]: the KV of each token, from 0 to 65,520, a function of its whole prefix."""
    weights = np.arange(1, len(tokens) + 1, dtype=np.int64) * 7919 % MODULUS
    seed = zlib.crc32(f"{tenant}/{version}".encode()) % MODULUS
    values: Values = (seed + np.cumsum((np.asarray(tokens, dtype=np.int64) + 1) * weights)) % MODULUS
    return values


class Forward:
    """Writes KV into SGLang's pool, and knows what each row was given and by which version of the weights."""

    def __init__(self, pool: MHATokenToKVPool) -> None:
        self._pool = pool
        n_rows = len(pool.k_buffer[0])
        self.version = 0
        self._value: Values = np.zeros(n_rows, np.int64)
        self._version: Values = np.full(n_rows, NOISE, np.int64)

    def compute(self, tokens: Sequence[int], tenant: str, rows: Values, start: int) -> None:
        """The forward of tokens[start:] behind the KV in rows[:start]. rows: int64[len(tokens)]."""
        new = rows[start:]
        pure = bool((self._version[rows[:start]] == self.version).all())
        self._value[new] = kv_of(tokens, tenant, self.version)[start:] + (0 if pure else MODULUS)
        self._version[new] = self.version if pure else NOISE
        values = torch.from_numpy(self._value[new].astype(np.float32))[:, None, None]
        for layer, (k, v) in enumerate(zip(self._pool.k_buffer, self._pool.v_buffer, strict=True)):
            k[new], v[new] = values + layer, -values - layer

    def restored(self, tokens: Sequence[int], tenant: str, rows: Values, start: int, end: int) -> None:
        """rows[start:end] came out of host memory: only KV of the present weights may."""
        self._value[rows[start:end]] = kv_of(tokens, tenant, self.version)[start:end]
        self._version[rows[start:end]] = self.version

    def check(self, tokens: Sequence[int], tenant: str, rows: Values, *, pure: bool) -> None:
        """The KV in `rows` is what belongs to the head of `tokens`. pure: of the present weights, all of it."""
        versions = self._version[rows]
        assert not pure or (versions == self.version).all(), f"KV of versions {set(versions.tolist())} is served"
        for version in set(versions.tolist()) - {NOISE}:
            of_version = versions == version
            right = kv_of(tokens, tenant, version)[: len(rows)][of_version]
            assert np.array_equal(self._value[rows[of_version]], right), "KV of another prompt or tenant"
        values = self._value[rows].astype(np.float32)[:, None, None]
        for layer, (k, v) in enumerate(zip(self._pool.k_buffer, self._pool.v_buffer, strict=True)):
            assert (k[rows].numpy() == values + layer).all(), f"K of layer {layer} is not what was written"
            assert (v[rows].numpy() == -values - layer).all(), f"V of layer {layer} is not what was written"


def page_values(slab: Slab, layout: PageLayout, slots: NDArray[np.int32]) -> Values:
    """int64[n, page_size]: the KV in these slots. AssertionError for bytes that no forward could have written."""
    pages = layout.view(slab.tensor)[torch.from_numpy(slots.astype(np.int64))].numpy()
    values = pages[:, 0, 0, :, 0, 0]
    for layer in range(layout.n_layers):
        right = (values + layer)[:, :, None, None]
        assert (pages[:, layer, 0] == right).all(), f"layer {layer} of a page in host memory is not of that page"
        assert (pages[:, layer, 1] == -right).all(), f"layer {layer} of a page in host memory is not of that page"
    found: Values = values.astype(np.int64)
    return found
