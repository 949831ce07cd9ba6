"""The main module: who else can import it, and how what is defined there travels.

=========================================== ============================== ================================================
the main module is                          whoever receives               its functions and classes go
=========================================== ============================== ================================================
a script, a module run with ``-m``          imports it                     by name
a package run with ``-m``, a directory,     is a fork of this process, or  by value, with their name: a fork, and a program
a zipapp                                    cannot: it would run again     like this one, takes its own by that
stdin, ``-c``, an interactive session       cannot                         by value
=========================================== ============================== ================================================
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Importable", "find_own", "importable", "with_name"]


class Importable(enum.Enum):
    """By whom the main module can be had."""

    BY_ALL = enum.auto()
    BY_FORKS = enum.auto()
    BY_NOBODY = enum.auto()


def importable() -> Importable:
    """Tell by whom the main module of this process can be had."""
    main = sys.modules.get("__main__")
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        # multiprocessing imports it by its name in a new process, but for these, which have no guard as a rule.
        name = str(spec.name)
        return Importable.BY_FORKS if name == "__main__" or name.endswith(".__main__") else Importable.BY_ALL
    return Importable.BY_ALL if file and os.path.isfile(file) else Importable.BY_NOBODY


def _identity() -> tuple[str, str]:
    main = sys.modules.get("__main__")
    return getattr(getattr(main, "__spec__", None), "name", ""), getattr(main, "__file__", None) or ""


def find_own(name: str) -> Any:
    """Return what the main module of this process has under a qualified name; None for nothing."""
    found: Any = sys.modules.get("__main__")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def with_name(obj: Any, reduced: Any) -> Any:
    """Add its name, if it has one, to what a function or class of the main module is reduced to by value."""
    if type(reduced) is not tuple or len(reduced) != 6 or getattr(obj, "__module__", None) != "__main__":
        return reduced
    if importable() is not Importable.BY_FORKS or find_own(obj.__qualname__) is not obj:
        return reduced
    make, arguments, state, _, _, setter = reduced
    return own_or, (_identity(), obj.__qualname__, make, arguments), (setter, state), None, None, set_new


def own_or(identity: tuple[str, str], name: str, make: Callable[..., Any], arguments: Any) -> Any:
    """Rebuild a function or class of a main module: this process's own where it runs the same, else by value."""
    own = find_own(name) if identity == _identity() else None
    return make(*arguments) if own is None else own


def set_new(obj: Any, state: tuple[Callable[[Any, Any], object], Any]) -> None:
    """Complete one that was made by value."""
    if find_own(obj.__qualname__) is not obj:
        state[0](obj, state[1])
