"""Families from outside: modules that a variable names.

They import `ascend_runtime`, which is this package's name on ranks and in plain Python. In ComfyUI the pack is loaded
under another name, and `ascend_runtime` would not be found, or be a second copy whose classes are not these. So there
the name stands for this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

from .family import Family

NAME = "ascend_runtime"
OWN = __package__.rpartition(".")[0]  # what this package is called here


class _SameModules(MetaPathFinder, Loader):
    """Resolves `ascend_runtime` and its submodules to the modules of this package."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == NAME or fullname.startswith(NAME + ".") else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # Python's own, which `exec_module` replaces

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = import_module(OWN + module.__name__.removeprefix(NAME))


def family_in(module: str, variable: str) -> Family:
    """The `FAMILY` of a module. Raises ValueError, which names the variable, where there is none."""
    if OWN != NAME and not any(isinstance(finder, _SameModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SameModules())
    try:
        found = import_module(module).FAMILY
    except Exception as error:  # of whatever the module does
        why = (
            f"{variable} names {module!r}, which cannot be imported as a module with a FAMILY "
            f"({type(error).__name__}: {error}). Correct the module, or the variable."
        )
        raise ValueError(why) from error
    if not isinstance(found, Family):
        raise ValueError(f"{variable} names {module!r}, whose FAMILY is not an ascend_runtime.models.family.Family.")
    return found
