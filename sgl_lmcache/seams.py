"""Does the installed SGLang still have everything that this project hangs on?

SGLang promises nobody the names below `sglang.srt`: the next release may rename a method that we override, and Python
would say nothing. The server would start and never ask for a stored page, or free a page that is being copied. So all
of these names stand in one table (`sgl_lmcache/seam_table.py`), with the parameters that we rely on, and this file
compares the table with the installed release.

Invariant: a server with our cache starts only where `require` finds nothing. A parameter too many is a difference like
one too few: SGLang would pass it to an override of ours that does not take it. Whether a difference matters is for a
person to say, who then changes the table.

SGLang's source is read and parsed, not imported. So this runs in a second on a machine without a GPU, in a doctor whose
torch is broken, and before any plug-in or patch has changed what an import would show. What it cannot see is behaviour:
a function that keeps its name and does something else. The tests with real servers are for that.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sgl_lmcache import SGLANG_VERSION
from sgl_lmcache.errors import StartError
from sgl_lmcache.seam_table import SEAMS, Seam

MAX_NAMED = 3
"""A message names this many differences; `sgl-lmcache doctor` shows all."""


def require_version(installed: str | None = None) -> None:
    """Raise `StartError` if this is another release, before a server spends minutes on loading a model."""
    installed = installed_version() if installed is None else installed
    if installed != SGLANG_VERSION:
        raise StartError(_message(installed, differences()))


def require(folder: Path | None = None) -> None:
    """Raise `StartError` if SGLang is not the one that this was written against, by its version or by its seams."""
    require_version()
    found = differences(folder)
    if found:
        raise StartError(_message(SGLANG_VERSION, found))


def _message(installed: str | None, found: list[str]) -> str:
    named = found[:MAX_NAMED]
    if len(found) > MAX_NAMED:
        named.append(f"and {len(found) - MAX_NAMED} more")
    what = "; ".join(named) or "all names are there, but nobody has tried it"
    return (
        f"sgl_lmcache: it extends internals of SGLang {SGLANG_VERSION}, and this is {installed}: {what}. Install "
        f"sglang=={SGLANG_VERSION}; `sgl-lmcache doctor` shows all differences."
    )


def differences(folder: Path | None = None, seams: Iterable[Seam] = SEAMS) -> list[str]:
    """One sentence, without its full stop, for each seam that is missing or different. About a second of parsing.

    folder: SGLang's package folder, by default that of the installed one, which is looked for but not imported.
    """
    folder = package_folder() if folder is None else folder
    if folder is None:
        return ["sglang is not installed"]
    source = Source(folder)
    return [found for seam in seams if (found := _difference(source, seam)) is not None]


def installed_version() -> str | None:
    """The version of the installed SGLang; None without one."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def package_folder() -> Path | None:
    """The folder of the installed SGLang; None without one."""
    spec = importlib.util.find_spec("sglang")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _difference(source: Source, seam: Seam) -> str | None:
    node = source.find(seam.path)
    if node is None:
        return f"{seam.path} is missing ({seam.use})"
    actual = shape_of(node)
    if seam.shape is not None and seam.shape != actual:
        now = "is no function and has no fields" if actual is None else f"is now ({actual})"
        return f"{seam.path}({seam.shape}) {now} ({seam.use})"
    if seam.shape is None and not seam.mentions and isinstance(node, ast.FunctionDef) and not _is_property(node):
        return f"{seam.path} is now a function ({seam.use})"
    silent = sorted(set(seam.mentions) - names_in(node))
    if silent:
        return f"{seam.path} no longer mentions {', '.join(silent)} ({seam.use})"
    return None


def shape_of(node: ast.AST) -> str | None:
    """A function's parameters with their defaults, or a class's fields in order; None for what has neither.

    >>> shape_of(ast.parse("def f(self, key: str, *, start: int = 0) -> None: ...").body[0])
    'self, key, *, start=0'
    """
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for parameter in ast.walk(node.args):
            if isinstance(parameter, ast.arg):
                parameter.annotation = None
        return ast.unparse(node.args)
    if isinstance(node, ast.ClassDef):
        fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
        return ", ".join(field.id for field in fields if isinstance(field, ast.Name)) or None
    return None


def names_in(node: ast.AST) -> set[str]:
    """Every variable, attribute and keyword that occurs in a piece of source."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            found.add(inner.attr)
        elif isinstance(inner, ast.keyword) and inner.arg is not None:
            found.add(inner.arg)
    return found


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


class Source:
    """The definitions in the package below `folder`, found by their dotted names. Parses each file once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, _Module | None] = {}

    def find(self, path: str) -> ast.AST | None:
        """What `path` (`package.module.Class.member`) names: a definition, an assignment or an import; None if nothing.

        A member is looked for in the class, then in its bases.
        """
        owner, _, name = path.rpartition(".")
        whole = self._module(path)
        if whole is not None:
            return whole.tree
        module = self._module(owner)
        if module is not None:
            return module.names.get(name)
        module_name, _, class_name = owner.rpartition(".")
        return self._member(module_name, class_name, name)

    def _member(self, module_name: str, class_name: str, name: str) -> ast.AST | None:
        module = self._module(module_name)
        definition = None if module is None else module.names.get(class_name)
        if module is None or definition is None:
            return None
        if isinstance(definition, ast.ImportFrom):
            return self._member(definition.module or "", class_name, name)
        if not isinstance(definition, ast.ClassDef):
            return None
        members = _first(_members(definition))
        if name in members:
            return members[name]
        bases = (base.id for base in definition.bases if isinstance(base, ast.Name))
        found = (self._member(module_name, base, name) for base in bases)
        return next((member for member in found if member is not None), None)

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> _Module | None:
        parts = name.split(".")[1:]
        candidates = (self._folder.joinpath(*parts, "__init__.py"), self._folder.joinpath(*parts).with_suffix(".py"))
        for file in candidates:
            if file.is_file():
                tree = ast.parse(file.read_text(encoding="utf-8"))
                return _Module(tree, _first(_definitions(tree.body)))
        return None


@dataclass(frozen=True, slots=True)
class _Module:
    tree: ast.Module
    names: dict[str, ast.AST]


def _first(definitions: Iterable[tuple[str, ast.AST]]) -> dict[str, ast.AST]:
    """The first definition of each name: a class before what replaces it, a property's getter before its setter."""
    names: dict[str, ast.AST] = {}
    for name, node in definitions:
        names.setdefault(name, node)
    return names


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """What a module's or a class's own statements define, those below `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse])


def _members(definition: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """A class's definitions, then the attributes that its methods set on `self`."""
    yield from _definitions(definition.body)
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, node
