"""Page keys as SGLang gives them (a list of 64-digit hex strings) and as everything below takes them (one object)."""

from __future__ import annotations

from collections.abc import Sequence

from radix import KEY_NBYTES


def to_blob(hashes: Sequence[str]) -> bytes:
    """n hex strings -> 32n raw bytes, in the same order. One join and one decode, both in C."""
    return bytes.fromhex("".join(hashes))


def to_hashes(keys: bytes, n_pages: int) -> list[str]:
    """The first n pages of a blob as SGLang's hex strings."""
    digits = keys[: n_pages * KEY_NBYTES].hex()
    return [digits[start : start + 2 * KEY_NBYTES] for start in range(0, len(digits), 2 * KEY_NBYTES)]
