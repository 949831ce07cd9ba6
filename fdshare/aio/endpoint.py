"""``connect`` and ``Listener`` for event loops: those of ``fdshare.endpoint``, which never wait here."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Self

from fdshare import endpoint, reducers
from fdshare.addresses import DEFAULT_BACKLOG, Address
from fdshare.aio.channel import AsyncChannel
from fdshare.aio.end import BURST
from fdshare.aio.held import Held
from fdshare.aio.waiting import AsyncioWaits, Waits, always
from fdshare.codec import Codec
from fdshare.credentials import Policy, same_user
from fdshare.errors import ClosedError
from fdshare.handle import FdHandle
from fdshare.inflight import DEFAULT_MAX_INFLIGHT

__all__ = ["Listener", "connect"]

_log = logging.getLogger("fdshare")

CONNECT_TICK_SECONDS = 0.002
"""How soon a full backlog is tried again: nothing but a blocking connect could wait for it."""

MAX_CONNECT_TICK_SECONDS = 0.1
"""The longest pause between two tries; each is twice as long as the one before."""


async def connect(
    address: Address,
    *,
    allow: Policy = same_user,
    codec: Codec | None = None,
    transport: str | None = None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
) -> AsyncChannel:
    """Connect to a listener; arguments are those of ``fdshare.connect``, with ``asyncio.timeout`` in place of its timeout.

    Raises:
        FileNotFoundError, ConnectionRefusedError: nobody listens there.
        AccessDeniedError: another user listens there.
        PermissionError: this user may not connect.
        OSError: EPROTOTYPE: the listener has another transport.
        ValueError: a bad address or transport.
    """
    pause = CONNECT_TICK_SECONDS
    while True:
        try:
            return AsyncChannel(
                endpoint.connect(
                    address,
                    timeout=0.0,
                    allow=allow,
                    codec=codec,
                    transport=transport,
                    max_inflight=max_inflight,
                    max_untaken=max_untaken,
                )
            )
        except TimeoutError:
            pass
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_CONNECT_TICK_SECONDS)


class Listener(Held):
    """Listens at an address, and gives an :class:`AsyncChannel` for each peer that is admitted.

    Several tasks may accept at once; they have their turn in order.  Listeners travel in messages, and arrive as such.

    Args:
        address: as for ``fdshare.Listener``; or one of those, which is spent.
        backlog, allow, codec, mode, transport, max_inflight, max_untaken: as for ``fdshare.Listener``; unused where that
            is given.

    Raises:
        OSError: EADDRINUSE where somebody listens there; what the directory says.
        ValueError: a bad address, mode or transport, or not a listening AF_UNIX socket.
    """

    _make_channel: type[AsyncChannel] = AsyncChannel

    def __init__(
        self,
        address: Address | FdHandle | socket.socket | int | endpoint.Listener,
        *,
        backlog: int = DEFAULT_BACKLOG,
        allow: Policy = same_user,
        codec: Codec | None = None,
        mode: int = 0o600,
        transport: str | None = None,
        max_inflight: int = DEFAULT_MAX_INFLIGHT,
        max_untaken: int | None = None,
    ) -> None:
        super().__init__()
        self._credit = BURST
        self._inner: endpoint.Listener = (
            address
            if isinstance(address, endpoint.Listener)
            else endpoint.Listener(
                address,
                backlog=backlog,
                allow=allow,
                codec=codec,
                mode=mode,
                transport=transport,
                max_inflight=max_inflight,
                max_untaken=max_untaken,
            )
        )

    def __init_subclass__(cls) -> None:
        reducers.known[cls] = reduce_async_listener

    async def accept(self) -> AsyncChannel:
        """Wait for the next peer that is admitted.  Cancelled, it has taken nobody.

        The peer need not have said anything: what is wrong with its hello is an error of the channel's first ``recv``.

        Raises:
            ClosedError: the listener is closed, also while it waited.
            FdLimitError: no descriptor left; who has connected stays queued.
        """
        listener, waits = self._inner, self._enter()
        turn = waits.receiving
        if turn.taken:
            await turn.wait()
        else:
            turn.taken = True
        try:
            while True:
                if not self._credit:  # many at once, or somebody was refused
                    self._credit = BURST  # at once, see AsyncEnd._pause
                    await waits.sleep(0)
                listener._check_open()
                sock = listener._accept_now()
                if sock is None:
                    await waits.readable()
                    self._credit = BURST
                    continue
                self._credit -= 1
                channel = listener._admit(sock)
                if channel is not None:
                    return self._make_channel(channel)
                self._credit = 0  # it takes milliseconds where hundreds of descriptors have come with it
        finally:
            turn.leave()

    def __aiter__(self) -> Self:
        """Return itself: iterating yields a channel for each peer, until the listener is closed."""
        return self

    async def __anext__(self) -> AsyncChannel:
        """Accept the next peer, until the listener is closed; as the blocking one where no descriptor is left.

        Raises:
            OSError: accepting has failed for good.
        """
        pause = endpoint.FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self.accept()
            except ClosedError:
                raise StopAsyncIteration from None
            except OSError as error:
                if error.errno not in endpoint.EXHAUSTED:
                    raise
                if pause == endpoint.FIRST_PAUSE_SECONDS:
                    _log.warning("accepting at %r pauses: %s", self.address, error)
            await self._enter().sleep(pause)
            pause = min(2 * pause, endpoint.MAX_PAUSE_SECONDS)

    def _make_waits(self) -> Waits:
        self._inner._check_open()  # and not fileno(): the number stays here
        return AsyncioWaits(self._inner._door.sock.fileno(), always)

    @property
    def address(self) -> str:
        """Where it listens, as it was given; an abstract name begins with a zero byte."""
        return self._inner.address

    def __repr__(self) -> str:
        return f"<aio.{repr(self._inner)[1:]}"


def reduce_async_listener(listener: Listener, context: reducers.Context) -> reducers.Reduced:
    if context.moving:
        context.consume(listener._leave_loop)
    return rebuild_async_listener, (type(listener), listener._inner)


def rebuild_async_listener(cls: type[Listener], listener: endpoint.Listener) -> Listener:
    return reducers.built(cls(listener))


reducers.known[Listener] = reduce_async_listener
