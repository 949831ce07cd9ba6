"""The operating system's own sockets and polls, whatever stands under their names now.

gevent, eventlet and their like put things of their own into the modules ``socket`` and ``select``, before or after this package
is imported.  Waiting goes by those names, so that it is cooperative where they want that; what must be the system's is here.
"""

from __future__ import annotations

import _socket
import _thread
import importlib.util
import select
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from socket import socket as Socket  # noqa: N812 -- a class
else:
    import socket as _  # noqa: F401 -- makes the class that is looked for

    Socket = next(
        cls
        for cls in _socket.socket.__subclasses__()
        if (cls.__module__, cls.__qualname__) == ("socket", "socket")
    )

__all__ = ["Socket", "allocate_lock", "is_patched", "poll", "start_new_thread"]


def _original(module: types.ModuleType, name: str) -> Any:
    """Return what a module of C has under this name when it is loaded."""
    found = getattr(module, name, None)
    if isinstance(found, types.BuiltinFunctionType):
        return found
    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return getattr(fresh, name)


poll: type[select.poll] = _original(select, "poll")
"""poll(2), which blocks the whole thread."""


start_new_thread: Callable[[Callable[..., object], tuple[Any, ...]], int] = _original(
    _thread, "start_new_thread"
)
allocate_lock: Callable[[], _thread.LockType] = _original(_thread, "allocate_lock")
"""A thread of the system, for what blocks it whole, and a lock to wait for it with."""


def is_patched() -> bool:
    """Whether waiting lets others of this thread run, who may do anything meanwhile: as beside other threads."""
    return getattr(select, "poll", None) is not poll
