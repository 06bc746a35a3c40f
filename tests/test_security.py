"""What docs/security.md says about memory, files and logs."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from transfer.slab import Slab

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sgl_lmcache", "hicache", "radix", "transfer")
WRITES_FILES = {"sgl_lmcache/cpu/model.py", "sgl_lmcache/simulate/report.py"}
"""The generator of models for the demo and the tests; what a simulation was asked to write."""

READS_MACHINE = {"sgl_lmcache/doctor.py", "sgl_lmcache/disk.py"}
"""The doctor tries whether a port is free and what a folder takes, and ends."""

RECORDS = "sgl_lmcache/record.py"
"""Only if it is asked to."""

CONFIDENTIAL = {"anchor", "cache_salt", "extra_key", "hashes", "key", "keys", "new_input_tokens", "prompt", "salt"}
CONFIDENTIAL |= {"text", "token_ids", "tokens"}


def test_the_slab_has_no_path_and_is_not_inherited() -> None:
    slab = Slab(1, 4096)
    try:
        assert os.readlink(f"/proc/self/fd/{slab.fd}") == "/memfd:sgl-lmcache-slab (deleted)"
        assert os.fstat(slab.fd).st_nlink == 0
        assert not os.get_inheritable(slab.fd)
    finally:
        slab.close()


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_log_line_holds_what_a_request_sent(path: Path) -> None:
    for function, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if function.startswith("logger."):
            names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            attributes = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
            assert not (names | attributes) & CONFIDENTIAL, ast.unparse(call)


def test_only_the_ssd_tier_and_a_recording_write_files_while_it_serves() -> None:
    found = {
        (str(path.relative_to(ROOT)), function)
        for path in sources()
        for function, call in calls(ast.parse(path.read_text(encoding="utf-8")))
        if function.endswith((".write_text", ".write_bytes", ".mkdir", ".mkstemp", ".mkdtemp", "socket.socket"))
        or (function.split(".")[-1] == "open" and any(_writes(argument) for argument in call.args))
        or _makes(function, call)
    }
    files = {where for where, _ in found}
    assert files >= WRITES_FILES
    serving = {where for where in files - WRITES_FILES if where not in READS_MACHINE}
    assert serving
    assert all(
        where in ("transfer/files.py", RECORDS) or where.startswith(("hicache/ssd/", "hicache/mooncake/"))
        for where in serving
    )
    talking = {where for where, function in found if function == "socket.socket"}
    assert talking - READS_MACHINE == {"hicache/mooncake/client.py", "hicache/mooncake/store.py"}, (
        "a process of its own"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_made_is_for_its_owner_only(path: Path) -> None:
    for function, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if _makes(function, call):
            assert ast.literal_eval(call.args[2]) == 0o600, ast.unparse(call)
        elif function.endswith(".mkdir") and str(path.relative_to(ROOT)) not in WRITES_FILES:
            modes = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "mode"]
            assert modes == [0o700], ast.unparse(call)


def _makes(function: str, call: ast.Call) -> bool:
    """Whether this may make a file: flags that are not spelt out may say so."""
    if function != "os.open":
        return False
    named = {node.attr for node in ast.walk(call.args[1]) if isinstance(node, ast.Attribute)}
    return "O_CREAT" in named or not named


def _writes(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Constant) and argument.value in ("w", "wb", "a", "ab", "x", "xb", "r+b")
