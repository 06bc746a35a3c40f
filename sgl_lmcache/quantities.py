"""Sizes, durations and shares as people write them in YAML and on command lines."""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

_BINARY_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}

_SIZE_UNITS = {**_BINARY_UNITS, "TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}

_DURATION_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_MAX_DURATION_S = 10_000 * 86400.0


class Nbytes(int):
    """A size in bytes, at least 1. In YAML: a whole number of bytes, or a number with a unit (`1.5GiB`, `2GB`).

    `str` gives it as YAML that means exactly the same."""

    def __str__(self) -> str:
        for unit, factor in _BINARY_UNITS.items():
            if self % factor == 0:
                return f"{self // factor}{unit}"
        return f"{int(self)}B"


class NbytesOrNone(Nbytes):
    """A size in bytes that may be 0."""

    def __str__(self) -> str:
        return super().__str__() if self else "0B"


class Quota(str):
    """A part of a tier. In YAML: a size (`8GiB`), or a share of the tier, from 0% to 100% (`40%`). It is that text."""

    __slots__ = ()

    @property
    def percent(self) -> float:
        """0 for a size."""
        return float(self[:-1]) if self.endswith("%") else 0.0

    @property
    def nbytes(self) -> int:
        """0 for a share."""
        return 0 if self.endswith("%") else decode_nbytes(str(self), least=1)

    def of(self, nbytes: int) -> int:
        """How many bytes of a tier of so many."""
        return self.nbytes or int(nbytes * self.percent / 100)


class Seconds(float):
    """A finite duration in seconds, above 0. In YAML: a number of seconds, or a number with a unit (`500ms`, `2m`).

    `str` gives it as YAML that means exactly the same."""

    def __str__(self) -> str:
        return f"{Decimal(repr(float(self))).normalize():f}s"


def decode(kind: type, value: Any) -> Any:
    """For msgspec: what a value in YAML is as one of the classes above. Raises ValueError with the words for it."""
    if kind is Quota:
        return _decode_quota(value)
    if issubclass(kind, Nbytes):
        return kind(decode_nbytes(value, least=0 if kind is NbytesOrNone else 1))
    assert kind is Seconds, kind
    return decode_seconds(value)


def decode_nbytes(value: Any, least: int) -> int:
    """Bytes of a size as it stands in YAML. Raises ValueError that says what is wrong and what would be right."""
    example = "write a whole number of bytes or a size such as 8GiB, 512MiB or 1.5GiB"
    if isinstance(value, str):
        number, unit = _split_quantity(value, _SIZE_UNITS, example)
        value = int(Decimal(number) * _SIZE_UNITS[unit])
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {quote(value)}, which is not a size; {example}")
    if value < least:
        if least == 0:
            raise ValueError("is below 0; write a size such as 8GiB, or 0 for none")
        raise ValueError("is not above 0; write a size such as 8GiB (the host tier's may be left out)")
    return int(value)


def _decode_quota(value: Any) -> Quota:
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", value.strip()) if isinstance(value, str) else None
    if percent is None:
        return Quota(Nbytes(decode_nbytes(value, least=1)))
    if float(percent[1]) > 100:
        raise ValueError(f"is {quote(value)}, which is more than there is; write a share such as 40%, or a size")
    return Quota(f"{percent[1]}%")


def decode_seconds(value: Any) -> Seconds:
    """The same for a duration."""
    example = "write a number of seconds or a duration such as 500ms, 5s, 2m or 7d"
    if isinstance(value, str):
        number, unit = _split_quantity(value, _DURATION_UNITS, example)
        value = float(number) * _DURATION_UNITS[unit]
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {quote(value)}, which is not a duration; {example}")
    if not (0 < value < _MAX_DURATION_S):
        raise ValueError(f"is {value}, which is not above 0 and below 10,000 days; {example}")
    return Seconds(value)


def _split_quantity(text: str, units: Collection[str], example: str) -> tuple[str, str]:
    """The number and its unit. Raises `ValueError` that proposes the unit that was meant, or else the example."""
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    if matched is None:
        raise ValueError(f"is {quote(text)}, which cannot be read; {example}")
    number, unit = matched.groups()
    if unit not in units:
        near = [name for name in units if name.lower() == unit.lower()]
        near += [name for name in units if name.lower().startswith(unit.lower())]
        raise ValueError(f"is {quote(text)}; " + (f"did you mean {number}{near[0]}? ({example})" if near else example))
    return number, unit


def quote(value: object) -> str:
    """As messages show what stands in a file."""
    return "empty" if value is None else f'"{value}"'
