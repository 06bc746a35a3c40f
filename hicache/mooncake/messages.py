"""What a rank and its client process say to each other: one message each way, over a socket that keeps messages apart.

A call names pages by their keys, 32n bytes, and slots as int32[n] in bytes. A reply says of each page what has become
of it (`hicache.calls`), one byte each.
"""

from __future__ import annotations

from typing import Final

import msgspec

MAX_KEYS: Final = 2048
"""Of a call."""

MAX_NBYTES: Final = 128 << 10
"""Of a message: so many keys with their slots are less, and a socket takes more at once."""


class Pool(msgspec.Struct, frozen=True):
    """A Mooncake Store, and what this process adds to it.

    master, metadata, protocol, devices: as Mooncake's `setup` takes them. address: of this node, without a port; None:
    that from which the master is reached. segment_nbytes: 0 for none. timeout_s: for the master, or another node, to
    answer.
    """

    master: str
    metadata: str = "P2PHANDSHAKE"
    address: str | None = None
    protocol: str = "tcp"
    devices: str = ""
    segment_nbytes: int = 0
    replicas: int = 1
    soft_pin_s: float | None = None
    timeout_s: float = 2.0

    def __str__(self) -> str:
        return f"mooncake at {self.master}"


class Geometry(msgspec.Struct, frozen=True):
    """Of the slab: a page is the first `page_nbytes` of a slot. namespace: hex digits."""

    n_slots: int
    slot_nbytes: int
    page_nbytes: int
    namespace: str


class Start(msgspec.Struct, frozen=True):
    """What the client process is told on its command line. connections: the descriptors of its ends. life: of one on
    which nothing is said, and which ends with the rank."""

    pool: Pool
    geometry: Geometry
    slab_fd: int
    life: int
    connections: tuple[int, ...]


class Connect(msgspec.Struct, tag=True, frozen=True):
    """Join the pool, if that has not been done, and see whether the master answers."""


class Exists(msgspec.Struct, tag=True, frozen=True):
    keys: bytes


class Load(msgspec.Struct, tag=True, frozen=True):
    keys: bytes
    slots: bytes


class Store(msgspec.Struct, tag=True, frozen=True):
    keys: bytes
    slots: bytes


class Delete(msgspec.Struct, tag=True, frozen=True):
    keys: bytes


Call = Connect | Exists | Load | Store | Delete


class Reply(msgspec.Struct, frozen=True):
    """error: why the pool as a whole did not answer; then nothing is said of the pages. news: sentences for the log."""

    found: bytes = b""
    error: str = ""
    news: tuple[str, ...] = ()


class Ready(msgspec.Struct, frozen=True):
    """The first message of each connection. error: why the library cannot be used on this machine."""

    error: str = ""
