"""The table of seams: true of the installed SGLang, complete for our own sources, and able to say what differs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_lmcache import BACKEND, SGLANG_VERSION, plugin, seams
from sgl_lmcache.errors import StartError
from sgl_lmcache.seam_table import SEAMS, Seam

OURS = Path(seams.__file__).parent
NOT_SEAMS = {"sglang.srt.plugins", "sglang.launch_server"}
"""The group of our entry point, which GENERAL_PLUGINS_GROUP names, and a command line."""

PATHS = {seam.path for seam in SEAMS}
NAMES = {path.rpartition(".")[2] for path in PATHS}


# ---- the installed SGLang ----


def test_the_installed_sglang_has_them_all() -> None:
    assert seams.differences() == []


def test_no_seam_stands_twice() -> None:
    assert len(PATHS) == len(SEAMS) > 150
    assert all(seam.use for seam in SEAMS)


def test_neither_sglang_nor_torch_is_imported() -> None:
    """A doctor has to run where neither can be."""
    program = (
        "import sys; from sgl_lmcache import seams; assert not seams.differences();"
        "print([name for name in sys.modules if name.partition('.')[0] in ('sglang', 'torch')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- another SGLang ----


PACKAGE = {
    "srt/__init__.py": "",
    "srt/base.py": "class Base:\n    def inherited(self, key): ...\n",
    "srt/cache.py": """
from sglang.srt.base import Base
from sglang.srt.elsewhere import Kind as Kind
if True:
    LIMIT: int = 3
class Hit(NamedTuple):
    tail: list[str]
    n_tokens: int = 0
class Cache(Base):
    page_size: int
    def __init__(self, params: object) -> None:
        self.tree = params
    @property
    def size(self) -> int: ...
    @decorated(by=1)
    def evict(self, n: int, *, strict: bool = False) -> None:
        self.listener.on_evict(n)
Cache = rebuilt(Cache)
async def serve(port=1): ...
""",
}

HOLDS = (
    Seam("sglang.srt.cache.Cache.evict", "self, n, *, strict=False", "for us"),
    Seam("sglang.srt.cache.Cache.evict", None, "for us", ("listener", "on_evict")),
    Seam("sglang.srt.cache.Cache.inherited", "self, key", "for us"),
    Seam("sglang.srt.cache.Cache.page_size", None, "for us"),
    Seam("sglang.srt.cache.Cache.tree", None, "for us"),
    Seam("sglang.srt.cache.Cache.size", None, "for us"),
    Seam("sglang.srt.cache.Cache", None, "for us"),
    Seam("sglang.srt.cache.Hit", "tail, n_tokens", "for us"),
    Seam("sglang.srt.cache.Kind", None, "for us"),
    Seam("sglang.srt.cache.LIMIT", None, "for us"),
    Seam("sglang.srt.cache.serve", "port=1", "for us"),
    Seam("sglang.srt.cache", None, "for us"),
)

DIFFERS = (
    (Seam("sglang.srt.cache.Cache.gone", "self", "for us"), "sglang.srt.cache.Cache.gone is missing (for us)"),
    (Seam("sglang.srt.cache.Gone.evict", "self", "for us"), "sglang.srt.cache.Gone.evict is missing (for us)"),
    (Seam("sglang.srt.gone.Cache", None, "for us"), "sglang.srt.gone.Cache is missing (for us)"),
    (
        Seam("sglang.srt.cache.Cache.evict", "self, n", "for us"),
        "sglang.srt.cache.Cache.evict(self, n) is now (self, n, *, strict=False) (for us)",
    ),
    (
        Seam("sglang.srt.cache.Cache.evict", "self, n, strict=False", "for us"),
        "sglang.srt.cache.Cache.evict(self, n, strict=False) is now (self, n, *, strict=False) (for us)",
    ),
    (Seam("sglang.srt.cache.Cache.evict", None, "for us"), "sglang.srt.cache.Cache.evict is now a function (for us)"),
    (
        Seam("sglang.srt.cache.Cache.evict", None, "for us", ("on_evict", "on_free")),
        "sglang.srt.cache.Cache.evict no longer mentions on_free (for us)",
    ),
    (
        Seam("sglang.srt.cache.Hit", "n_tokens, tail", "for us"),
        "sglang.srt.cache.Hit(n_tokens, tail) is now (tail, n_tokens) (for us)",
    ),
    (
        Seam("sglang.srt.cache.Cache.tree", "self", "for us"),
        "sglang.srt.cache.Cache.tree(self) is no function and has no fields (for us)",
    ),
)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    for name, text in PACKAGE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.mark.parametrize("seam", HOLDS, ids=lambda seam: f"{seam.path}-{seam.shape}")
def test_a_seam_that_holds(other: Path, seam: Seam) -> None:
    assert seams.differences(other, [seam]) == []


@pytest.mark.parametrize(("seam", "sentence"), DIFFERS, ids=lambda value: getattr(value, "path", ""))
def test_a_difference_is_named(other: Path, seam: Seam, sentence: str) -> None:
    assert seams.differences(other, [seam]) == [sentence]


def test_every_row_of_the_table_can_fail() -> None:
    """A changed expectation is found, row by row: no row says nothing."""
    wrong = []
    for seam in SEAMS:
        if seam.mentions:
            wrong.append(replace(seam, mentions=("no_such_name",)))
        elif seam.shape is not None:
            wrong.append(replace(seam, shape=f"{seam.shape}, more"))
        else:
            wrong.append(replace(seam, path=f"{seam.path}_gone"))
    assert len(seams.differences(seams=wrong)) == len(wrong)


def test_a_server_is_stopped_with_the_version_and_the_first_differences(other: Path) -> None:
    with pytest.raises(StartError) as raised:
        seams.require(other)
    message = str(raised.value)
    assert f"internals of SGLang {SGLANG_VERSION}, and this is {SGLANG_VERSION}: " in message
    assert message.count(" is missing (") == seams.MAX_NAMED
    assert f"; and {len(SEAMS) - seams.MAX_NAMED} more." in message


def test_another_version_stops_a_server_even_where_nothing_differs() -> None:
    with pytest.raises(StartError, match=r"and this is 0\.5\.99: all names are there, but nobody has tried it"):
        seams.require_version("0.5.99")


def test_the_plug_in_asks_before_a_model_is_loaded_and_before_the_cache_is_built(
    monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    monkeypatch.setattr(seams, "package_folder", lambda: other)
    with pytest.raises(StartError, match=" is missing "):
        plugin._build(SimpleNamespace())
    monkeypatch.setattr(seams, "installed_version", lambda: "0.5.99")
    with pytest.raises(StartError, match=r"this is 0\.5\.99"):
        plugin._before_resolution(SimpleNamespace(radix_cache_backend=BACKEND, disable_radix_cache=False))
    plugin._before_resolution(SimpleNamespace(radix_cache_backend=None, disable_radix_cache=False))


# ---- our own sources ----


@dataclass(frozen=True)
class File:
    path: Path
    tree: ast.Module

    @property
    def imports(self) -> dict[str, str]:
        """Names from SGLang -> their dotted paths, imports in functions and under TYPE_CHECKING included."""
        nodes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom))
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in nodes
            if (node.module or "").partition(".")[0] == "sglang"
            for alias in node.names
        }


@cache
def files() -> tuple[File, ...]:
    return tuple(File(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(OURS.rglob("*.py")))


def test_every_import_from_sglang_is_in_the_table() -> None:
    used = {path for file in files() for path in file.imports.values()}
    assert len(used) > 30
    assert used <= PATHS
    whole = [
        alias.name
        for file in files()
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.partition(".")[0] == "sglang"
    ]
    assert not whole, "import the names: a whole module hides what is used of it"


def test_every_dotted_name_of_sglang_is_in_the_table() -> None:
    """The targets of hooks are strings."""
    named = {
        node.value
        for file in files()
        if file.path.name != "seam_table.py"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"sglang(\.\w+)+", node.value)
    }
    assert len(named) >= 3
    assert named - NOT_SEAMS <= PATHS


def extended() -> Iterator[tuple[File, ast.ClassDef, str]]:
    """Our classes that extend one of SGLang's, with that class's path."""
    for file in files():
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef):
                bases = (base.id for base in node.bases if isinstance(base, ast.Name))
                yield from ((file, node, file.imports[base]) for base in bases if base in file.imports)


def methods(definition: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}


def test_every_overridden_method_is_in_the_table_with_the_parameters_of_ours() -> None:
    shapes = {seam.path: seam.shape for seam in SEAMS}
    found = 0
    folder = seams.package_folder()
    assert folder is not None
    source = seams.Source(folder)
    for file, definition, base in extended():
        for name, method in methods(definition).items():
            path = f"{base}.{name}"
            if source.find(path) is None:
                continue
            found += 1
            assert path in shapes, f"{file.path.name} overrides {path}"
            assert names(shapes[path]) == names(seams.shape_of(method)) or method.args.kwarg, path
    assert found > 20


def names(shape: str | None) -> list[str]:
    """Parameter names and kinds. What ours are called does not matter where SGLang passes them by position."""
    assert shape is not None
    function = ast.parse(f"def f({shape}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    n_positional = len(function.args.args)
    return [str(n_positional), *(argument.arg for argument in function.args.kwonlyargs)]


def test_everything_inherited_from_sglang_is_in_the_table() -> None:
    """`self.x` and `super().x` in a class of ours, where `x` is not ours."""
    found = set()
    for _, definition, base in extended():
        own = set(methods(definition)) | assigned(definition)
        for node in ast.walk(definition):
            owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.Attribute) and (owner == "super()" or (owner == "self" and node.attr not in own)):
                found.add(f"{base}.{node.attr}")
    assert len(found) > 15
    assert found <= PATHS


def assigned(definition: ast.ClassDef) -> set[str]:
    """What our class itself puts on `self`."""
    stored = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return stored - NAMES


READ_BY = {
    "cache.py": r"self\.tree_core|params|request|req|get_\w+\(\)",
    "wrapper.py": r"self\.cache\.tree_core|self\.cache|core|key|req|result|kv|path\[.*\]",
    "linker.py": r"kv",
    "blocks.py": r"tree_core|req|tail\.req",
    "factory.py": r"ctx|parallel|adapter|get_\w+\(\)",
    "namespace.py": r"server_args|model_config|layer",
    "adapters.py": r"req|get_\w+\(\)|HookRegistry|HookType",
    "weights.py": r"updater|request|result|HookRegistry|HookType",
    "refusals.py": r"ctx|setup\.(execution\.)?\w+",
    "plugin.py": r"server_args|memory|HookRegistry|HookType",
    "page_size.py": r"server_args|config",
    "pool.py": r"pool",
    "hits.py": r"req",
    "hicache_gauges.py": r"reporter|memory|HookRegistry|HookType",
    "traces.py": r"req|tail\.req|context|self\._context",
    "explainer.py": r"req|key|tail\.req",
    "endpoints.py": r"(self\._)?manager|self\._state\(\)|watchdog|server_args|output|adapters\[name\]|Hook\w+",
    "cpu/mode.py": r"HookRegistry|HookType",
}
"""The expressions in each file that are objects of SGLang's."""

PLAIN = {"_replace", "to_json_string", "append", "startswith", "itemsize", "name", "offload", "rows_are_pages"}
PLAIN |= {"tobytes", "get_internal_state_communicator"}
"""Attributes of Python's and torch's own objects at the ends of such chains, and of ours; and one that SGLang makes of
a name in a list, for which the row of its own caller stands."""


def test_every_attribute_of_an_object_of_sglangs_is_in_the_table() -> None:
    read = {
        (name, f"{file.path.name}: {ast.unparse(node)}")
        for file in files()
        for node, roots in chains(file)
        for name in links(node, roots)
    }
    assert len({name for name, _ in read}) > 50
    assert {where for name, where in read if name not in NAMES | PLAIN} == set()


def chains(file: File) -> Iterator[tuple[ast.Attribute, str]]:
    """The longest chains of attributes that begin with an object of SGLang's."""
    roots = READ_BY.get(str(file.path.relative_to(OURS)))
    if roots is None:
        return
    inner = {id(node.value) for node in ast.walk(file.tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner and re.match(rf"({roots})\.", ast.unparse(node)):
            yield node, roots


def links(node: ast.expr, roots: str) -> list[str]:
    """The attributes behind the root, the last one first."""
    found: list[str] = []
    while not re.fullmatch(roots, ast.unparse(node)):
        if isinstance(node, ast.Attribute):
            found.append(node.attr)
            node = node.value
        else:
            assert isinstance(node, ast.Call), ast.unparse(node)
            node = node.func
    return found


def test_no_row_is_left_over() -> None:
    """A name that none of our sources contains is used by nobody, unless SGLang's function calls us."""
    text = "\n".join(file.path.read_text(encoding="utf-8") for file in files() if file.path.name != "seam_table.py")
    words = set(re.findall(r"\w+", text))
    unused = {seam.path for seam in SEAMS if not seam.mentions and seam.path.rpartition(".")[2] not in words}
    assert unused == set()


def test_what_stands_in_for_a_class_of_sglangs_has_its_methods() -> None:
    """Our linker and layer counter extend nothing, so only this and a server would notice a changed call."""
    stand_ins = {"Linker": "UnifiedCacheLinker", "LayerCounter": "LayerWiseLoadCounter"}
    (file,) = (file for file in files() if file.path.name == "linker.py")
    ours = {node.name: methods(node) for node in file.tree.body if isinstance(node, ast.ClassDef)}
    for seam in SEAMS:
        owner, _, name = seam.path.rpartition(".")
        for our_name, original in stand_ins.items():
            if owner.endswith(f".{original}") and seam.shape is not None:
                assert seams.shape_of(ours[our_name][name]) == seam.shape, seam.path
