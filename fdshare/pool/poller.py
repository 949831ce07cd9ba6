"""``Poller``: an epoll where there is one, with the least Python in between; ``selectors`` elsewhere."""

from __future__ import annotations

import select
import selectors
from typing import Any

from fdshare import native, system

__all__ = ["Poller"]


class _SelectorPoller:
    """For systems without epoll: a change made while another thread polls is seen at its next turn only."""

    sees_changes = False

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, data: Any) -> None:
        """Watch a descriptor; ``data`` is what :meth:`poll` returns for it."""
        self._selector.register(fd, selectors.EVENT_READ, data)

    def unregister(self, fd: int) -> None:
        """Stop watching it."""
        self._selector.unregister(fd)

    def mask(self, fd: int) -> bool:
        """Do not: another thread could not undo it while this one polls."""
        return False

    def unmask(self, fd: int) -> None:
        """There is nothing to undo."""

    def poll(self, timeout: float | None) -> list[Any]:
        """Wait up to ``timeout`` seconds (None: for ever); return the data of what is readable."""
        return [key.data for key, _ in self._selector.select(timeout)]

    def filenos(self) -> list[int]:
        """Borrow its descriptors that a fork inherits: a kqueue is not."""
        return []

    def close(self) -> None:
        """Close it."""
        self._selector.close()


class _EpollPoller:
    """The same with epoll, which sees changes at once."""

    sees_changes = True

    def __init__(self) -> None:
        self._epoll = native.epoll()
        self._data: dict[int, Any] = {}

    def register(self, fd: int, data: Any) -> None:
        """Watch a descriptor; ``data`` is what :meth:`poll` returns for it."""
        self._epoll.register(fd, select.EPOLLIN)
        self._data[fd] = data  # last: another thread masks nothing that is not there

    def unregister(self, fd: int) -> None:
        """Stop watching it."""
        del self._data[fd]
        self._epoll.unregister(fd)

    def mask(self, fd: int) -> bool:
        """Watch a descriptor no more for a while; return whether it was watched."""
        if fd not in self._data:
            return False
        self._epoll.modify(fd, 0)
        return True

    def unmask(self, fd: int) -> None:
        """Watch it again; what came meanwhile is told."""
        if fd in self._data:
            self._epoll.modify(fd, select.EPOLLIN)

    def poll(self, timeout: float | None) -> list[Any]:
        """Wait up to ``timeout`` seconds (None: for ever); return the data of what is readable."""
        data = self._data
        return [data.get(fd) for fd, _ in self._epoll.poll(timeout)]

    def filenos(self) -> list[int]:
        """Borrow its descriptors that a fork inherits."""
        return [self._epoll.fileno()]

    def close(self) -> None:
        """Close it."""
        self._epoll.close()


def Poller() -> _EpollPoller | _SelectorPoller:  # noqa: N802 -- makes one
    """Return the best poller that there is now; where the pool's thread is a greenlet, that goes by selectors.

    Beside real threads it must be the system's own, however others wait: a selector of gevent belongs to the event loop of the
    thread that registers, and the pool's own thread would wait in it for nothing.
    """
    green = native.is_patched() and native.has_green_threads()
    return _EpollPoller() if system.HAVE_EPOLL and not green else _SelectorPoller()
