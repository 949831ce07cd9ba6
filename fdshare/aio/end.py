"""What an AsyncChannel is beside its messages: an end of a connection, which belongs to an event loop and changes hands."""

from __future__ import annotations

import select
from collections.abc import Awaitable
from functools import partial

from fdshare import reducers
from fdshare.aio.held import Held
from fdshare.aio.passing import Unwaiting, pass_on
from fdshare.aio.waiting import AsyncioWaits, Waits
from fdshare.channel import Channel
from fdshare.credentials import PeerCredentials
from fdshare.firstuse import OnFirstUse
from fdshare.transport import Transport

__all__ = ["AsyncEnd"]

BURST = 64
"""Messages that a channel moves in a row before it lets the other tasks run, which takes as long as moving two."""


class AsyncEnd(Held):
    """One end of a connection in an event loop."""

    _input = OnFirstUse(lambda end: _input_of(end._transport.sock.fileno()))

    def __init__(self, channel: Channel | AsyncEnd) -> None:
        if isinstance(channel, AsyncEnd):
            channel._leave_loop()
        super().__init__()
        self._credit = BURST
        source: Channel = channel._inner if isinstance(channel, AsyncEnd) else channel
        self._inner: Unwaiting = pass_on(source, Unwaiting)
        self._transport = self._inner._transport

    def __init_subclass__(cls) -> None:
        reducers.known[cls] = reduce_async_end

    def to_sync(self) -> Channel:
        """Spend this end into a Channel, with whatever has arrived; tasks that wait here get ClosedError.

        Raises:
            ClosedError: it is closed.
            RuntimeError: the event loop of another thread still runs with it.
        """
        self._leave_loop()
        return pass_on(self._inner, Channel)

    def _pause(self, waits: Waits) -> Awaitable[None]:
        """Let the other tasks have their time."""
        # At once: a call that is given up meanwhile has let them run, too.  Were it not to count, timeouts that an event loop
        # rounds to nothing (uvloop below half a millisecond) would end each of the calls that follow here.
        self._credit = BURST
        return waits.sleep(0)

    def _make_waits(self) -> Waits:
        self._transport.check_open()  # and not fileno(): the number stays here
        return AsyncioWaits(self._transport.sock.fileno(), partial(_fetch, self._transport))

    # --- the descriptor ---------------------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Whether something can be received now: a message, or the end of the connection.

        Raises:
            ClosedError: this side is closed.
            OSError: this end is write-only.
        """
        self._inner._check(self.readable, "write-only")
        transport = self._transport
        if transport.arrived is not None or transport.greeting is not None:
            return transport.has_message()
        return bool(self._input.poll(0)) and transport.has_message()

    @property
    def readable(self) -> bool:
        """Whether this end can receive."""
        return self._inner.readable

    @property
    def writable(self) -> bool:
        """Whether this end can send."""
        return self._inner.writable

    @property
    def max_inflight(self) -> int:
        """Most bytes of large messages sent here and not yet taken; may be set."""
        return self._inner.max_inflight

    @max_inflight.setter
    def max_inflight(self, value: int) -> None:
        self._inner.max_inflight = value

    @property
    def max_untaken(self) -> float:
        """Most descriptors sent here and not yet taken; infinite where only the system bounds them.  May be set."""
        return self._inner.max_untaken

    @max_untaken.setter
    def max_untaken(self, value: float) -> None:
        self._inner.max_untaken = value

    @property
    def peer(self) -> PeerCredentials:
        """Who is at the other end: pid, uid and gid as the kernel noted them when the connection was made.

        Raises:
            ClosedError: this side is closed.
            OSError: the system does not tell.
        """
        return self._inner.peer

    def __repr__(self) -> str:
        return repr(self._inner).replace("Channel", type(self).__name__, 1)


def _input_of(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return poll


def _fetch(transport: Transport) -> bool:
    """Take a packet that needs no care off the socket, so that the loop's poller has nothing more to report.

    Returns:
        False where nothing has come: another task or process has taken it.
    """
    if transport.plain and transport.arrived is None:
        try:
            for transport.arrived in transport.arrivals_now:  # noqa: B020 -- an attribute as target, see transport.py
                break
        except BlockingIOError:
            return False
        except OSError:
            pass  # whoever waits will see
    return True


def reduce_async_end(end: AsyncEnd, context: reducers.Context) -> reducers.Reduced:
    if end.closed:
        raise reducers.Refused(end, "it is closed")
    if context.moving:
        context.consume(end.close)
    return rebuild_async_end, (type(end), end._inner)


def rebuild_async_end(cls: type[AsyncEnd], channel: Channel) -> AsyncEnd:
    return reducers.built(cls(channel))


def _reduce_unwaiting(channel: Unwaiting, context: reducers.Context) -> reducers.Reduced:
    return reducers.known[Channel](channel, context)


reducers.known[Unwaiting] = _reduce_unwaiting
