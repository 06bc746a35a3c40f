"""Chained page keys, as SGLang makes them, for paths given as sequences of page contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def path_keys(pages: Iterable[object], parent: bytes = b"") -> bytes:
    """32 bytes a page, root side first; each covers all pages before it."""
    last, keys = parent, []
    for page in pages:
        last = hashlib.sha256(last + repr(page).encode()).digest()
        keys.append(last)
    return b"".join(keys)
