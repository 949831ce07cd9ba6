"""What an AsyncChannel is beside its messages: an end of a connection, which belongs to an event loop and changes hands."""

from __future__ import annotations

import select
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from fdshare import reducers
from fdshare.aio.passing import Unwaiting, pass_on
from fdshare.aio.waiting import AsyncioWaits, InLoop, Waits
from fdshare.channel import Channel
from fdshare.credentials import PeerCredentials
from fdshare.firstuse import OnFirstUse
from fdshare.handle import Outside
from fdshare.transport import Transport

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["AsyncEnd"]

BURST = 64
"""Messages that a channel moves in a row before it lets the other tasks run, which takes as long as moving two."""


class AsyncEnd(InLoop):
    """One end of a connection in an event loop."""

    _input = OnFirstUse(lambda end: _input_of(end.fileno()))

    def __init__(self, channel: Channel | AsyncEnd) -> None:
        if isinstance(channel, AsyncEnd):
            channel._leave_loop()
        super().__init__()
        self._credit = BURST
        source: Channel = channel._channel if isinstance(channel, AsyncEnd) else channel
        self._channel: Unwaiting = pass_on(source, Unwaiting)
        self._transport = self._channel._transport

    def __init_subclass__(cls) -> None:
        reducers.known[cls] = reduce_async_end

    def to_sync(self) -> Channel:
        """Spend this end into a Channel, with whatever has arrived; tasks that wait here get ClosedError.

        Raises:
            ClosedError: it is closed.
            RuntimeError: the event loop of another thread still runs with it.
        """
        self._leave_loop()
        return pass_on(self._channel, Channel)

    def _make_waits(self) -> Waits:
        return AsyncioWaits(self._channel.fileno(), partial(_fetch, self._transport))

    # --- the descriptor ---------------------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Whether something can be received now: a message, or the end of the connection.

        Raises:
            ClosedError: this side is closed.
            OSError: this end is write-only.
        """
        self._channel._check(self.readable, "write-only")
        transport = self._transport
        if transport.arrived is not None or transport.greeting is not None:
            return transport.has_message()
        return bool(self._input.poll(0)) and transport.has_message()

    def fileno(self) -> int:
        """Borrow the descriptor's number; reading from it breaks the channel.

        Raises:
            ClosedError: this side is closed.
        """
        return self._channel.fileno()

    def close(self) -> None:
        """Close this end at once; tasks that wait in it get ClosedError, the peer PeerClosedError.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        if not self._transport.closed:
            self._leave_loop(self._transport.close)

    async def aclose(self) -> None:
        """Close this end, as :meth:`close` does: what was sent is with the kernel, so there is nothing to wait for.

        Raises:
            OSError: as close(2).
        """
        self.close()

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return self._transport.closed

    @property
    def readable(self) -> bool:
        """Whether this end can receive."""
        return self._channel.readable

    @property
    def writable(self) -> bool:
        """Whether this end can send."""
        return self._channel.writable

    @property
    def transport(self) -> str:
        """How packets are kept apart: "seqpacket" by the kernel, "stream" by length-prefixed frames."""
        return self._transport.name

    @property
    def max_inflight(self) -> int:
        """Most bytes of large messages sent here and not yet taken; may be set."""
        return self._channel.max_inflight

    @max_inflight.setter
    def max_inflight(self, value: int) -> None:
        self._channel.max_inflight = value

    @property
    def peer(self) -> PeerCredentials:
        """Who is at the other end: pid, uid and gid as the kernel noted them when the connection was made.

        Raises:
            ClosedError: this side is closed.
            OSError: the system does not tell.
        """
        return self._channel.peer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return repr(self._channel).replace("Channel", type(self).__name__, 1)

    def __del__(self) -> None:
        if "_transport" in vars(self) and not self._transport.closed:  # unset where __init__ raised
            text = f"unclosed {self!r}"
            try:
                self.close()
            finally:
                warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


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
    return rebuild_async_end, (type(end), end._channel)


def rebuild_async_end(cls: type[AsyncEnd], channel: Channel) -> AsyncEnd:
    return reducers.built(cls(channel))


def _reduce_unwaiting(channel: Unwaiting, context: reducers.Context) -> reducers.Reduced:
    return reducers.known[Channel](channel, context)


reducers.known[Unwaiting] = _reduce_unwaiting
