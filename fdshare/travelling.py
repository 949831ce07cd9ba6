"""Objects that are descriptors and nothing else: how they own them, and how any pickler takes them along.

A subclass keeps its descriptors as :class:`Kept` handles in ``_handles`` and says in ``_options`` what its rebuild
function needs besides.  What it is lives in the kernel, so a copy in another process is the same thing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from fdshare import recycle, reducers
from fdshare.blocking import TICK_SECONDS, Waker, other_threads
from fdshare.errors import ClosedError
from fdshare.handle import FdHandle, Outside
from fdshare.native import IN, make_poll

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


_waiting: set[tuple[Kept, Waker]] = set()
"""The threads of this process that wait long for a descriptor, each with what ends its wait when that is closed."""


def _after_fork() -> None:
    for _, waker in _waiting:  # of the parent's threads
        waker.close()
    _waiting.clear()


os.register_at_fork(after_in_child=_after_fork)


class Readable(Travelling):
    """One whose first descriptor is readable while there is what one waits for."""

    __slots__ = ()

    def close(self) -> None:
        """Let go of it in this process, where whoever waits for it gets a ClosedError; the others keep theirs.

        Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        super().close()
        if _waiting:
            for handle, waker in tuple(_waiting):
                if handle is self._handles[0]:
                    waker.wake()

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
        poll = make_poll()
        poll.register(self.fileno(), IN)
        if timeout == 0:
            return bool(poll.poll(0))
        if timeout is not None and timeout <= TICK_SECONDS:
            found = bool(recycle.poll_idly(poll, timeout))
        else:
            found = bool(poll.poll(TICK_SECONDS * 1000)) or self._wait_long(poll, timeout)
        self._check_open()
        return found

    def _wait_long(self, poll: Any, timeout: float | None) -> bool:
        """Wait on, after a tick of the timeout; until a close at most."""
        deadline = None if timeout is None else time.monotonic() + timeout - TICK_SECONDS
        self._check_open()
        if not other_threads():  # nobody who could close it meanwhile
            return bool(recycle.poll_idly(poll, None if timeout is None else timeout - TICK_SECONDS))
        try:
            waker = Waker()
        except OSError:  # no descriptor left: look at every tick
            found: object = []
            while not (found or self.closed or (deadline is not None and time.monotonic() >= deadline)):
                found = poll.poll(TICK_SECONDS * 1000)
            return bool(found)
        entry = (self._handles[0], waker)
        with waker:
            _waiting.add(entry)
            try:
                self._check_open()
                poll.register(waker.reader.fileno(), IN)
                return bool(
                    recycle.poll_idly(
                        poll, None if deadline is None else max(0.0, deadline - time.monotonic())
                    )
                )
            finally:
                _waiting.discard(entry)


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
