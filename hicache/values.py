"""How a page looks in a store that servers share, Valkey or Mooncake: its name and its value.

    name     sgl-lmcache:<namespace>:<key>, both in hex digits. No braces: in a Valkey cluster they would be a hash tag,
             and pin every page of a namespace to one node.
    value    a header of 32 bytes, then the payload:

             offset  0  8 bytes   magic
                     8  uint16    version of the format
                    10  uint16    codec: 0, the payload as it is in the slot
                    12  uint32    reserved, 0
                    16  uint64    length of the payload in bytes
                    24  uint64    checksum of the payload, bound to the page's name (`hicache.checksum`)

All numbers are little-endian. A value is good if its header is what this module would write, but for the checksum, and
the checksum is that of the payload under this name.
"""

from __future__ import annotations

import struct
from typing import Final

from radix import KEY_NBYTES

PREFIX: Final = "sgl-lmcache:"
HEADER_NBYTES: Final = 32
FORMAT_VERSION: Final = 1

_MAGIC: Final = b"sglpage\n"
_CODEC_NONE: Final = 0
_HEADER: Final = struct.Struct("<8sHHIQQ")
_KEY_DIGITS: Final = 2 * KEY_NBYTES


def names(namespace: str, keys: bytes) -> list[str]:
    """The names of n pages. keys: 32n bytes."""
    head, digits = f"{PREFIX}{namespace}:", keys.hex()
    return [head + digits[at : at + _KEY_DIGITS] for at in range(0, len(digits), _KEY_DIGITS)]


def header(payload_nbytes: int, checksum: int) -> bytes:
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, _CODEC_NONE, 0, payload_nbytes, checksum)


def checksum_in(found: bytes, payload_nbytes: int) -> int | None:
    """The checksum that a header names. None: it is not the header of such a page, or one of another version."""
    if len(found) != HEADER_NBYTES or found[:24] != header(payload_nbytes, 0)[:24]:
        return None
    return int.from_bytes(found[24:], "little")


def is_other_version(found: bytes) -> bool:
    """Whether a header is one of ours, but of a version that this one does not read."""
    return found[:8] == _MAGIC and int.from_bytes(found[8:10], "little") != FORMAT_VERSION
