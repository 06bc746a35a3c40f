"""Imports between the rooms go down only (docs/adr/0001-rooms-and-ownership.md).

They are read from the source, not by importing, so that imports inside functions and under `TYPE_CHECKING` count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("radix", "transfer", "hicache", "sgl_lmcache")
MAY_IMPORT = {
    "radix": set[str](),
    "transfer": set[str](),
    "hicache": {"radix", "transfer"},
    "sgl_lmcache": {"radix", "transfer", "hicache"},
}
FOREIGN = {
    "radix": {"torch", "sglang", "threading", "concurrent", "asyncio", "socket", "time"},
    "transfer": {"sglang"},
    "hicache": {"torch", "sglang"},
    "sgl_lmcache": set[str](),
}
"""What a room must not import from outside: `radix` is pure logic without a clock, and `hicache` sees plain values."""


def imports(source: str) -> Iterator[tuple[int, str]]:
    """The line and the top-level name of every import; a relative import has the name `.`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                yield node.lineno, named.value.partition(".")[0]


def violations(room: str, source: str) -> list[tuple[int, str]]:
    forbidden = FOREIGN[room] | (set(ROOMS) - MAY_IMPORT[room] - {room})
    return [(line, name) for line, name in imports(source) if name in forbidden]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in violations(room, file.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize("folder", ROOMS)
def test_every_module_is_reached_by_its_full_name(folder: str) -> None:
    """Relative imports would hide from a reader, and from the test above, which room is meant."""
    relative = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(file.read_text(encoding="utf-8"))
        if name == "."
    ]
    assert not relative


@pytest.mark.parametrize(
    ("room", "source", "line"),
    [
        ("radix", "import numpy\nimport transfer.slab", 2),
        ("transfer", "from radix import Index", 1),
        ("hicache", "def f():\n    from sgl_lmcache.config import load", 2),
        ("hicache", "if TYPE_CHECKING:\n    import torch", 2),
        ("transfer", "import importlib\nimportlib.import_module('sglang.srt')", 2),
        ("radix", "import os, threading", 1),
    ],
)
def test_an_import_upwards_is_found(room: str, source: str, line: int) -> None:
    assert [found for found, _ in violations(room, source)] == [line]


def test_imports_downwards_are_not_found() -> None:
    assert not violations("hicache", "import hicache.tier\nfrom radix import Index\nimport transfer, numpy")
    assert not violations("sgl_lmcache", "import sglang, torch, hicache, radix, transfer")
