"""The checksum of a page, bound to its name.

xxh3 over the payload, seeded with the first eight bytes of the page key and of the namespace. So bytes are good only
under their own name: a slot that was swapped, reused or never written, or that holds another model's page, does not
verify, and nothing about names has to be stored with the data.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray


def namespace_seed(namespace: str) -> int:
    """The first eight bytes of a namespace of hex digits, little-endian."""
    return int.from_bytes(bytes.fromhex(namespace[:16]), "little")


def seeds(keys: bytes, namespace: int) -> NDArray[np.uint64]:
    """uint64[n]: the seed of each page of a blob of keys."""
    return np.frombuffer(keys, "<u8")[::4] ^ np.uint64(namespace)


def checksum(payload: memoryview, seed: int) -> int:
    """Of one page. Holds the GIL: 384 KiB take 7 to 15 us."""
    return int(xxhash.xxh3_64_intdigest(payload, seed))
