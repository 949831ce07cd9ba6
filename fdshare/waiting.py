"""Waiting on many channels at once: ``wait`` for a few, ``ChannelSet`` for thousands."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable, Iterator
from typing import Any

from fdshare import recycle
from fdshare.blocking import TICK_SECONDS, Waker, other_threads
from fdshare.channel import Channel
from fdshare.closing import Closing
from fdshare.errors import ClosedError
from fdshare.handle import HasFileno, Outside, as_fd
from fdshare.native import IN, make_poll
from fdshare.transports import has_read_ahead

__all__ = ["ChannelSet", "wait"]


def _is_ready(obj: Any) -> bool:
    """Whether what was found readable has a message, and not a notice alone."""
    if not isinstance(obj, Channel) or obj.closed:
        return True
    obj._check(obj._readable, "write-only")
    return obj._transport.has_message()


def _has_in_hand(channel: Channel) -> bool:
    transport = channel._transport
    if transport.greeting is None:
        return transport.arrived is not None
    return not transport.closed and (transport.arrived is not None or transport.greeting.failure is not None)


def wait(objects: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Wait until one of the objects is ready to be read, or at its end; return the ready ones, in their order.

    Args:
        objects: channels, sockets, FdHandles, descriptors, anything with ``fileno()``.
        timeout: seconds; None waits for ever, 0 only looks.

    Raises:
        ClosedError: one of the channels is closed.
        TypeError, ValueError: one has no descriptor.
    """
    objects = list(objects)
    deadline = None if timeout is None else time.monotonic() + timeout
    poll = make_poll()
    numbers = [as_fd(obj) for obj in objects]
    for number in numbers:
        poll.register(number, IN)
    while True:
        ready = [obj for obj in objects if isinstance(obj, Channel) and has_read_ahead(obj._transport)]
        if ready:
            return ready
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        found = {number for number, _ in recycle.poll_idly(poll, left)}
        ready = [
            obj for obj, number in zip(objects, numbers, strict=True) if number in found and _is_ready(obj)
        ]
        if ready or left == 0:
            return ready


class ChannelSet(Closing):
    """Many channels, one persistent epoll (kqueue or poll elsewhere): waiting costs what is ready, not what is registered.

    Args:
        channels: the first members.

    Raises:
        OSError: no descriptor left for the epoll.
    """

    def __init__(self, channels: Iterable[HasFileno] = ()) -> None:
        self._selector = selectors.DefaultSelector()
        # Whether what was closed must be taken out: poll reports it for ever, where epoll and kqueue forget it.
        self._keeps_closed = not hasattr(self._selector, "fileno")
        self._numbers: dict[HasFileno, int] = {}
        self._wakers: set[Waker] = set()
        self._touched: list[HasFileno] = []
        """Those that were added or reported since the last select: what comes next may be in hand, where no epoll sees it."""
        for channel in channels:
            self.add(channel)

    def add(self, channel: HasFileno) -> None:
        """Watch ``channel`` (or anything with ``fileno()``); twice is harmless.

        Raises:
            ClosedError: it is closed, or the set is.
            OSError: it cannot be watched.
        """
        number = as_fd(channel)
        self._check_open()
        known = self._selector.get_map().get(number)
        if known is not None:
            if known.data is channel:
                return
            self.discard(known.data)  # closed since, and its number used again
        self._selector.register(number, selectors.EVENT_READ, channel)
        self._numbers[channel] = number
        self._touched.append(channel)

    def discard(self, channel: HasFileno) -> None:
        """Stop watching ``channel``; harmless where it is not watched, or was closed meanwhile, or the set was.

        Raises:
            TypeError: it is nothing that a set could hold, such as a list.
        """
        number = self._numbers.pop(channel, None)
        if number is not None:
            self._selector.unregister(number)

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait until channels can be received from; return those, at least one unless the time was up.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Raises:
            ClosedError: the set is closed, also by another thread while this one waited.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        in_hand = [
            channel for channel in self._touched if isinstance(channel, Channel) and _has_in_hand(channel)
        ]
        if in_hand:
            in_hand = [channel for channel in dict.fromkeys(in_hand) if channel in self._numbers]
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                found = self._select(0 if in_hand else left)
            except (ValueError, TypeError):
                self._check_open()
                raise
            if not found:
                self._check_open()
            if self._keeps_closed:
                found = self._without_closed(found)
            ready = [channel for channel in found if _is_ready(channel)]
            if in_hand:
                ready = in_hand + [channel for channel in ready if channel not in in_hand]
            if ready or left == 0:
                self._touched = ready.copy()
                return ready

    def _select(self, timeout: float | None) -> list[HasFileno]:
        """Ask the selector; a close of the set by another thread ends the wait."""
        if timeout is not None and timeout <= TICK_SECONDS:
            return [key.data for key, _ in recycle.idly(self._selector.select, timeout)]
        deadline = None if timeout is None else time.monotonic() + timeout
        found = self._selector.select(TICK_SECONDS)
        if found:
            return [key.data for key, _ in found]
        self._check_open()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not other_threads():  # nobody who could close it meanwhile
            return [key.data for key, _ in recycle.idly(self._selector.select, left)]
        try:
            waker = Waker()
        except OSError:  # no descriptor left: the caller looks again after this tick
            return [key.data for key, _ in self._selector.select(TICK_SECONDS)]
        with waker:
            number = waker.reader.fileno()
            self._wakers.add(waker)
            try:
                self._selector.register(number, selectors.EVENT_READ, waker)
                found = recycle.idly(self._selector.select, left)
            finally:
                self._wakers.discard(waker)
                if number in (self._selector.get_map() or ()):
                    self._selector.unregister(number)
        return [key.data for key, _ in found if key.data is not waker]

    def _check_open(self) -> None:
        if self._selector.get_map() is None:
            raise ClosedError("this ChannelSet was closed")

    def _without_closed(self, found: list[HasFileno]) -> list[HasFileno]:
        for channel in found:
            if isinstance(channel, Channel) and channel.closed:
                self.discard(channel)
        return [channel for channel in found if channel in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, channel: object) -> bool:
        return channel in self._numbers

    def __iter__(self) -> Iterator[Any]:
        return iter(self._numbers)

    def __repr__(self) -> str:
        return f"<ChannelSet {'closed' if self._selector.get_map() is None else f'of {len(self)}'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Outside.reduce(self)  # which says that it does not travel

    def close(self) -> None:
        """Close the set; its channels stay open.

        Raises:
            OSError: as close(2).
        """
        self._numbers.clear()
        self._selector.close()
        for waker in tuple(self._wakers):
            waker.wake()
