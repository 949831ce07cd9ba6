"""How the tasks of an event loop wait for one channel: for its socket, for their turn, for time to pass, and for a thread.

:class:`Waits` is all that an AsyncChannel knows of an event loop; :class:`AsyncioWaits` is asyncio's; others have theirs.

The loop's selector is told of the socket when a task first waits, and then left alone, so that a wait costs no system call but
the loop's own.  When the socket is ready and no task waits, the selector is told to forget it: polling is level-triggered and
would spin.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 -- for run_in_executor, which would import it late: see preload.py
import os
import select
import socket
from asyncio import get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fdshare import native, recycle, system
from fdshare.blocking import TICK_SECONDS

__all__ = ["AsyncioWaits", "InLoop", "Turn", "Waits", "always"]

T = TypeVar("T")


class Event(Protocol):
    """An event of any event loop."""

    def set(self) -> Any:
        """Let those who wait go on."""

    def is_set(self) -> bool:
        """Whether it was set."""

    async def wait(self) -> Any:
        """Wait until it is set."""


class Turn:
    """A lock that is given in the order in which it was asked for, and costs nothing while nobody else wants it.

    To take it: ``if turn.taken: await turn.wait()``, ``else: turn.taken = True``; to give it on: ``turn.leave()``.
    """

    __slots__ = ("_make_event", "_queue", "taken")

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self.taken = False
        self._make_event = make_event
        self._queue: deque[Event] = deque()

    async def wait(self) -> None:
        """Take the turn after those who have asked before."""
        event = self._make_event()
        self._queue.append(event)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                self.leave()
            else:
                self._queue.remove(event)
            raise

    def leave(self) -> None:
        """Let the next have it."""
        if self._queue:
            self._queue.popleft().set()
        else:
            self.taken = False


class Waits(Protocol):
    """How the tasks of one event loop wait for one channel."""

    sending: Turn
    receiving: Turn

    def is_here(self) -> bool:
        """Whether the event loop that runs now is the one it was made in."""

    def readable(self) -> Awaitable[None]:
        """Wait until the socket has something to read, or for :meth:`leave`; one task at a time."""
        ...

    def writable(self) -> Awaitable[None]:
        """Wait until the socket has room, or for :meth:`leave`; one task at a time."""
        ...

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Let ``seconds`` pass; 0 lets the other tasks run."""
        ...

    async def run(self, function: Callable[[], T], discard: Callable[[T], object]) -> T:
        """Return what ``function`` returns in a thread.

        A task that is cancelled meanwhile still waits for its end, and gives the result to ``discard``.
        """
        ...

    def leave(self, close: Callable[[], object] | None) -> None:
        """Wake who waits, forget the socket, and then call ``close``, in another thread's loop a little later.

        Raises:
            RuntimeError: ``close`` is None, and the event loop runs in another thread.
        """


class Nowhere:
    """Stands for the waits of a channel on which nobody has waited yet."""

    def __init__(self) -> None:
        self.sending = self.receiving = Turn(asyncio.Event)

    def is_here(self) -> bool:
        return False

    def _never(self, *arguments: Any) -> Any:
        raise NotImplementedError

    readable = writable = sleep = _never

    async def run(self, function: Callable[[], T], discard: Callable[[T], object]) -> T:
        raise NotImplementedError

    def leave(self, close: Callable[[], object] | None) -> None:
        if close is not None:
            close()


class AsyncioWaits:
    """How the tasks of one asyncio event loop wait for one socket.

    Args:
        fd: the socket's number.
        fetch: called when it seems readable; False where there is nothing after all.
    """

    def __init__(self, fd: int, fetch: Callable[[], bool]) -> None:
        self.sending = Turn(asyncio.Event)
        self.receiving = Turn(asyncio.Event)
        self._loop = loop = get_running_loop()
        self._pid = os.getpid()
        self._reader = _Direction(loop, fd, fetch, writing=False)
        self._writer = _Direction(loop, fd, always, writing=True)
        self.readable = self._reader.ready
        self.writable = self._writer.ready
        self.sleep = asyncio.sleep

    def is_here(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    async def run(self, function: Callable[[], T], discard: Callable[[T], object]) -> T:
        future = self._loop.run_in_executor(None, function)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not future.cancelled() and future.exception() is None:
                discard(future.result())
            raise cancelled
        return future.result()

    def leave(self, close: Callable[[], object] | None) -> None:
        loop = self._loop
        # A forked child shares the poller in the kernel with its parent, and must not touch it.
        if loop.is_closed() or self._pid != os.getpid():
            if close is not None:
                close()
        elif loop.is_running() and asyncio._get_running_loop() is not loop:
            if close is None:
                raise RuntimeError(f"this channel is in use by the event loop of another thread, {loop!r}")
            # A garbage collector runs anywhere; the loop must have forgotten the number before that is free again.
            try:
                loop.call_soon_threadsafe(self._leave, close)
            except RuntimeError:  # it was closed just now
                close()
        else:
            self._leave(close)

    def _leave(self, close: Callable[[], object] | None) -> None:
        self._reader.forget()
        self._writer.forget()
        if close is not None:
            close()


class InLoop:
    """What the tasks of an event loop wait for: it belongs to that loop from the first wait on, until another one takes it."""

    def __init__(self) -> None:
        self._waits: Waits = _NOWHERE

    def _make_waits(self) -> Waits:
        """Return how to wait in the event loop that runs now.

        Raises:
            ClosedError
        """
        raise NotImplementedError

    def _enter(self) -> Waits:
        if not self._waits.is_here():
            self._leave_loop()
            self._waits = self._make_waits()
        return self._waits

    def _leave_loop(self, close: Callable[[], object] | None = None) -> None:
        """Leave the event loop, and then call ``close``.

        Raises:
            RuntimeError: there is no ``close``, and the event loop of another thread still runs.
        """
        waits = self._waits
        waits.leave(close)
        self._waits = _NOWHERE


_NOWHERE: Waits = Nowhere()


def always() -> bool:
    """Agree that the socket is ready."""
    return True


class _Direction:
    """Reading or writing: at most one task that waits for it."""

    __slots__ = ("_create_future", "_fd", "_fetch", "_loop", "_nested", "_unwatch", "_waiter", "_writing")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, fetch: Callable[[], bool], *, writing: bool
    ) -> None:
        self._loop = loop
        self._create_future = loop.create_future
        self._fd = fd
        self._fetch = fetch
        self._writing = writing
        self._waiter: asyncio.Future[None] | None = None
        self._unwatch: Callable[[], object] | None = None  # set while the loop watches
        self._nested: select.epoll | None = None

    def ready(self) -> asyncio.Future[None]:
        """Return what is done when the socket is ready, or at :meth:`forget`."""
        if self._unwatch is None:
            self._watch()
        waiter = self._waiter = self._create_future()
        if recycle.kept and not self._writing:  # as recycle.idly does where a thread waits
            timer = self._loop.call_later(recycle.STEADY_SECONDS, recycle.trim_unused)
            waiter.add_done_callback(lambda waiter: timer.cancel())
        return waiter

    def _watch(self) -> None:
        loop, fd = self._loop, self._fd
        try:
            nested = self._nest() if _sets_nonblocking(loop) else None
        except OSError:  # no descriptor left: look again and again
            self._unwatch = loop.call_later(TICK_SECONDS, self._wake).cancel
            return
        if self._writing and nested is None:
            loop.add_writer(fd, self._on_event)
            self._unwatch = lambda: loop.remove_writer(fd)
        else:
            number = fd if nested is None else nested
            loop.add_reader(number, self._on_event)
            self._unwatch = lambda: loop.remove_reader(number)

    def _nest(self) -> int:
        """Return an epoll that is readable when the socket is ready."""
        if self._nested is None:
            nested = native.epoll()
            nested.register(self._fd, select.EPOLLOUT if self._writing else select.EPOLLIN)
            self._nested = nested
        return self._nested.fileno()

    def _on_event(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._forget_socket()
        elif self._fetch():
            waiter.set_result(None)

    def _forget_socket(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def forget(self) -> None:
        """Wake who waits, and leave nothing of the socket in the loop."""
        self._wake()
        if self._nested is not None:
            self._nested.close()
            self._nested = None

    def _wake(self) -> None:
        self._forget_socket()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_setting: dict[type, bool] = {asyncio.SelectorEventLoop: False}


def _sets_nonblocking(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop sets O_NONBLOCK on what it watches, as libuv does.

    The flag would be set for every process that shares the socket.  Such a loop watches an epoll that watches the socket.
    """
    found = _setting.get(type(loop))
    if found is None:
        ours, other = socket.socketpair()
        with ours, other:
            loop.add_reader(ours.fileno(), always)
            found = system.HAVE_EPOLL and not os.get_blocking(ours.fileno())
            loop.remove_reader(ours.fileno())
        _setting[type(loop)] = found
    return found
