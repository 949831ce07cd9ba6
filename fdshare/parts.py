"""What an object holds, each part with its step of the path: for saying which part of a message cannot travel."""

from __future__ import annotations

import functools
import io
import types
from collections.abc import Iterator
from typing import Any

from fdshare.handle import Moved

__all__ = ["parts_of"]


def _shown(key: object) -> str:
    """Return the repr of a key or an element, cut to 60 characters; its type where that raises."""
    try:
        return f"{key!r:.60}"
    except Exception:  # noqa: BLE001 -- any __repr__ may raise anything
        return f"<{type(key).__name__}>"


def parts_of(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield what ``obj`` holds, each with its step of the path."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{_shown(key)}]", value
        for key in obj:
            yield f".keys()[{_shown(key)}]", key
    elif isinstance(obj, list | tuple):
        for index, item in enumerate(obj):
            yield f"[{index}]", item
    elif isinstance(obj, set | frozenset):
        for item in obj:
            yield f"{{{_shown(item)}}}", item
    elif isinstance(obj, Moved):
        yield "", obj.obj
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        yield ".args", obj.args
        yield ".keywords", obj.keywords
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:
                pass  # not set yet
        for name in obj.__code__.co_names:
            if name in obj.__globals__:
                yield f".{name}", obj.__globals__[name]
    elif not isinstance(obj, type | types.ModuleType):
        for name, value in getattr(obj, "__dict__", {}).items():
            yield f".{name}", value
        for name in _slots(obj):
            try:
                yield f".{name}", getattr(obj, name)
            except Exception:  # noqa: BLE001 -- unset, or a __getattr__ that raises anything
                pass


def _slots(obj: Any) -> Iterator[str]:
    """Yield the names by which ``obj`` holds something beside its ``__dict__``: of slots, and of files below files."""
    if isinstance(obj, io.IOBase):
        yield from ("buffer", "raw")
    for cls in type(obj).__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            mangled = name.startswith("__") and not name.endswith("__")
            yield f"_{cls.__name__.lstrip('_')}{name}" if mangled else name
