"""Objects that are descriptors and nothing else: how they own them, and how any pickler takes them along.

A subclass keeps its descriptors as :class:`Kept` handles in ``_handles`` and says in ``_options`` what its rebuild
function needs besides.  What it is lives in the kernel, so a copy in another process is the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from select import POLLIN as _POLLIN
from select import poll as _poll
from typing import Any, ClassVar

from fdshare import recycle, reducers
from fdshare.errors import ClosedError
from fdshare.handle import FdHandle, Outside

__all__ = ["Kept", "Readable", "Travelling", "keep", "travels"]


class Kept(FdHandle):
    """A descriptor that closes without a word when its object is dropped, as memory does."""

    __slots__ = ()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def keep(handle: FdHandle) -> Kept:
    """Return the same handle, which will not warn when it is dropped open."""
    handle.__class__ = Kept
    assert isinstance(handle, Kept)
    return handle


class Travelling:
    """One thing in the kernel, reached through one descriptor or two.

    It travels in messages, as an argument of ``multiprocessing.Process`` and in any pickle; ``fdshare.move`` gives it
    away.  Dropping the object lets go of the descriptor, as :meth:`close` does; others keep theirs.
    """

    __slots__ = ("__weakref__", "_handles")

    _handles: tuple[Kept, ...]
    _rebuild: ClassVar[Callable[..., Any]]

    def _options(self) -> tuple[Any, ...]:
        """What the rebuild function is called with, after the descriptors."""
        return ()

    def close(self) -> None:
        """Let go of it in this process; the others keep theirs.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        for handle in getattr(self, "_handles", ()):
            handle.close()

    @property
    def closed(self) -> bool:
        """Whether this object has let go of its descriptor."""
        return self._handles[0].closed

    def _check_open(self) -> None:
        if self._handles[0].closed:
            raise ClosedError(f"this {type(self).__name__} was closed")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._handles[0].fileno()}"
        return f"<{type(self).__name__} {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


class Readable(Travelling):
    """One whose first descriptor is readable while there is what one waits for."""

    __slots__ = ()

    def fileno(self) -> int:
        """Borrow the descriptor's number, for ``fdshare.wait``, selectors and event loops; reading from it breaks the object.

        Raises:
            ClosedError: this object was closed.
        """
        fd = self._handles[0]._fd
        if fd < 0:
            self._check_open()
        return fd

    def _is_readable(self, timeout: float | None) -> bool:
        """Wait until it is, at most ``timeout`` seconds."""
        poll = _poll()
        poll.register(self.fileno(), _POLLIN)
        return bool(poll.poll(0) if timeout == 0 else recycle.poll_idly(poll, timeout))


def reduce_travelling(obj: Travelling, context: reducers.Context) -> reducers.Reduced:
    if obj.closed:
        raise reducers.Refused(obj, "it is closed")
    if context.moving:
        context.consume(obj.close)
    lent = [reducers.lend(obj, context, handle.fileno()) for handle in obj._handles]
    return rebuild_travelling, (type(obj)._rebuild, lent, obj._options())


def rebuild_travelling(
    rebuild: Callable[..., Any], lent: Iterable[tuple[int, int]], options: tuple[Any, ...]
) -> Any:
    # They stay in the message's list as well, which closes them where the rest of the message fails.
    return rebuild(tuple([keep(reducers.take(*place)) for place in lent]), *options)


def travels(cls: type[Travelling], rebuild: Callable[..., Any]) -> None:
    """Say how ``cls`` is rebuilt: ``rebuild(handles, *options)``, a function at the top of a module."""
    cls._rebuild = staticmethod(rebuild)
    reducers.known[cls] = reduce_travelling
