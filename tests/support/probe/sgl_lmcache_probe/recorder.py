"""Remembers what bytes each page had when it was written back, and under which key each HBM page lies.

A page that is computed again, in another batch, may be rounded differently, while a lower tier keeps what it was given
first: then the bytes of either are right.

Both are taken from the arguments of the calls that carry them, on the thread that makes them, so they are independent
of the index, the slab and the copies, which is what makes them worth comparing with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

KEY_NBYTES = 32

Pages = NDArray[np.int64]


def split(keys: bytes) -> list[bytes]:
    return [keys[start : start + KEY_NBYTES] for start in range(0, len(keys), KEY_NBYTES)]


@dataclass
class Recorder:
    """buffers: SGLang's KV buffers, one tensor a layer for K and one for V, with a token a row."""

    buffers: Sequence[torch.Tensor]
    page_size: int
    key_of_page: dict[int, bytes] = field(default_factory=dict)
    digests_of_key: dict[bytes, set[int]] = field(default_factory=dict)
    restored: int = 0
    checked: int = 0
    mismatched: int = 0

    def pages(self, device_indices: torch.Tensor) -> Pages:
        first_rows: Pages = device_indices[:: self.page_size].cpu().numpy()
        return first_rows // self.page_size

    def inserted(self, keys: bytes, pages: Pages) -> None:
        """These keys lie in these HBM pages from now on, until the pages are inserted under other keys."""
        self.key_of_page.update(zip(pages.tolist(), split(keys), strict=True))

    def copied(self, keys: bytes, pages: Pages, positions: Iterable[int]) -> None:
        """The pages at these positions of a run are being copied to host memory."""
        run = split(keys)
        for position in positions:
            self.digests_of_key.setdefault(run[position], set()).add(self._digest(int(pages[position])))

    def check(self, keys: bytes, pages: Pages) -> None:
        """These keys have been restored into these pages: compare them with what was copied."""
        for key, page in zip(split(keys), pages.tolist(), strict=True):
            self.restored += 1
            written = self.digests_of_key.get(key)
            if written is None:
                continue
            self.checked += 1
            self.mismatched += self._digest(page) not in written

    def _digest(self, page: int) -> int:
        digest = xxhash.xxh3_64()
        for buffer in self.buffers:
            rows = buffer[page * self.page_size : (page + 1) * self.page_size]
            digest.update(rows.contiguous().view(torch.uint8).numpy())
        return digest.intdigest()
