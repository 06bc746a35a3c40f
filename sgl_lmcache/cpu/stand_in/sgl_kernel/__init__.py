"""A package of the name `sgl_kernel` for machines without a GPU, where the real one cannot be loaded.

SGLang imports names from `sgl_kernel` and its submodules at many places, also where it then never calls them. Here each
submodule and each name exists, and calling one raises an error that says its name. What SGLang asks for on
`torch.ops.sgl_kernel` is not there, so its own checks for an Intel AMX build answer no.

This folder is on no search path unless CPU mode puts it there, so the real package is never hidden by accident.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn


class MissingKernel:
    """A name of `sgl_kernel`, with attributes that are names too. Anything but a call is harmless."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> MissingKernel:
        return _missing(self._name, attribute)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} was called in SGLang's CPU mode, which has no sgl_kernel.")

    def __repr__(self) -> str:
        return f"<{self._name}, missing in CPU mode>"


class SubmoduleFinder(MetaPathFinder, Loader):
    """Finds every submodule, at any depth, as an empty package in which every name exists."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__dict__["__getattr__"] = lambda attribute: _missing(name, attribute)


def _missing(owner: str, attribute: str) -> MissingKernel:
    # Double underscores are Python's own questions ("__path__", "__wrapped__"): a name of ours would be a wrong answer.
    if attribute.startswith("__"):
        raise AttributeError(f"{owner} has no attribute {attribute}")
    return MissingKernel(f"{owner}.{attribute}")


def __getattr__(attribute: str) -> MissingKernel:
    return _missing(__name__, attribute)


sys.meta_path.insert(0, SubmoduleFinder())
