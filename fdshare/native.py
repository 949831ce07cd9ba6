"""The operating system's own sockets and polls, whatever stands under their names now.

gevent, eventlet and their like put things of their own into the modules ``socket`` and ``select``, before or after this package
is imported.  Waiting goes by those names, so that it is cooperative where they want that; what must be the system's is here.
"""

from __future__ import annotations

import _socket
import _thread
import importlib.util
import posix
import select
import time
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from socket import socket as Socket  # noqa: N812 -- a class
else:
    import socket as _  # noqa: F401 -- makes the class that is looked for

    Socket = next(
        cls
        for cls in _socket.socket.__subclasses__()
        if (cls.__module__, cls.__qualname__) == ("socket", "socket")
    )

__all__ = [
    "IN",
    "Poll",
    "Socket",
    "allocate_lock",
    "epoll",
    "has_green_threads",
    "is_patched",
    "make_poll",
    "poll",
    "start_new_thread",
    "waitpid",
]


def _original(module: types.ModuleType, name: str) -> Any:
    """Return what a module of C has under this name when it is loaded, None where that is nothing."""
    found = getattr(module, name, None)
    if isinstance(found, types.BuiltinFunctionType):
        return found
    if isinstance(found, type) and found.__module__ == module.__name__:
        return found
    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return getattr(fresh, name, None)


poll: type[select.poll] = _original(select, "poll")
"""poll(2), which blocks the whole thread."""
epoll: type[select.epoll] = _original(select, "epoll")
"""The same of epoll(7), None where there is none: those who put something in place of ``select`` take it away."""


start_new_thread: Callable[[Callable[..., object], tuple[Any, ...]], int] = _original(
    _thread, "start_new_thread"
)
allocate_lock: Callable[[], _thread.LockType] = _original(_thread, "allocate_lock")
"""A thread of the system, for what blocks it whole, and a lock to wait for it with."""
waitpid: Callable[[int, int], tuple[int, int]] = _original(posix, "waitpid")
"""That of the module ``os`` may be another's, which waits by the event loop of the main thread."""
_select = _original(select, "select")


def is_patched() -> bool:
    """Whether waiting lets others of this thread run, who may do anything meanwhile: as beside other threads."""
    return select.select is not _select


def has_green_threads() -> bool:
    """Whether what threading starts are no threads of the system, so that one that blocks would block all."""
    return _thread.start_new_thread is not start_new_thread


IN, OUT = select.POLLIN, select.POLLOUT

_TICK_SECONDS = 0.05


class Poll(Protocol):
    """What is needed of a poll object."""

    def register(self, fd: int, eventmask: int, /) -> None:
        """Look at a descriptor from now on."""

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Wait up to so many milliseconds, None for ever; return the descriptors that have something, and what."""


class _Cooperative:
    """Waits by the ``select`` and ``sleep`` that were put in place, and looks by the system's own poll."""

    def __init__(self) -> None:
        self._poll = poll()
        self._readers: list[int] = []
        self._writers: list[int] = []

    def register(self, fd: int, eventmask: int) -> None:
        self._poll.register(fd, eventmask)
        for event, numbers in ((IN, self._readers), (OUT, self._writers)):
            if eventmask & event:
                numbers.append(fd)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        found = self._poll.poll(0)
        if found or timeout == 0:
            return found
        seconds = None if timeout is None or timeout < 0 else timeout / 1000
        if self._readers or self._writers:
            select.select(self._readers, self._writers, [], seconds)
        else:  # for the end of a connection alone
            time.sleep(_TICK_SECONDS if seconds is None else seconds)
        return self._poll.poll(0)


def make_poll() -> Poll:
    """Return what waits for descriptors: the whole thread, or, where that is wanted, only its caller."""
    return _Cooperative() if is_patched() else poll()
