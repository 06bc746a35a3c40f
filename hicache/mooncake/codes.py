"""The error codes of Mooncake Store that the tier tells apart (ErrorCode in Mooncake's `types.h`, 0.3.13)."""

from __future__ import annotations

from typing import Final

NO_AVAILABLE_HANDLE: Final = -200
INVALID_PARAMS: Final = -600
REPLICA_IS_NOT_READY: Final = -703
OBJECT_NOT_FOUND: Final = -704
OBJECT_ALREADY_EXISTS: Final = -705
LEASE_EXPIRED: Final = -707
RPC_FAIL: Final = -900
RPC_TIMEOUT: Final = -901

GONE: Final = frozenset({REPLICA_IS_NOT_READY, OBJECT_NOT_FOUND, LEASE_EXPIRED})
"""There is no such object, or not yet, or it was evicted while it was read."""

OF_THE_MASTER: Final = {RPC_FAIL: "cannot be reached (RPC_FAIL)", RPC_TIMEOUT: "does not answer (RPC_TIMEOUT)"}


def describe(code: int) -> str:
    return OF_THE_MASTER.get(code, f"refuses (error {code})")
