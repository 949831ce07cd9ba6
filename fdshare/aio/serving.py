"""``serve``: a task for each peer of a listener, and an end that lets them finish.

accept --> has the peer said hello in time? --no--> closed, logged
                                            \\--yes-> handler(channel) --> the channel is closed

close: no more peers --> each handler finds the end after what it has received already --> grace --> cancelled
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from fdshare import endpoint
from fdshare.addresses import DEFAULT_BACKLOG, Address
from fdshare.aio.channel import AsyncChannel
from fdshare.aio.endpoint import Listener
from fdshare.codec import Codec
from fdshare.credentials import Policy, same_user
from fdshare.endpoint import EXHAUSTED, FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS
from fdshare.errors import ClosedError, PeerClosedError
from fdshare.handle import FdHandle
from fdshare.inflight import DEFAULT_MAX_INFLIGHT

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Server", "Serving", "serve"]

HELLO_SECONDS = 10.0
"""How long a peer may take for its hello, which ``connect`` sends at once: time for a machine that swaps, no more."""

GRACE_SECONDS = 5.0
"""How long handlers may take to finish after the end, unless told otherwise; service managers kill after 10 to 90."""

Handler = Callable[[AsyncChannel], Awaitable[object]]

_log = logging.getLogger("fdshare")


class Server:
    """A listener whose peers are being served; made by :func:`serve`.  Leaving its context closes it, gracefully."""

    def __init__(self, handler: Handler, listener: Listener, hello_timeout: float, grace: float) -> None:
        self.listener = listener
        """Where peers come from."""
        self._handler = handler
        self._hello_timeout = hello_timeout
        self._grace = grace
        self._channels: dict[asyncio.Task[None], AsyncChannel] = {}
        self._closing = False
        self._accepting = asyncio.create_task(self._accept(), name=f"fdshare: accept at {listener.address!r}")

    @property
    def connections(self) -> int:
        """How many peers are being served now."""
        return len(self._channels)

    async def serve_forever(self) -> None:
        """Wait until the server is closed.  Cancelled, it goes on serving.

        Raises:
            OSError: accepting has failed for good.
        """
        await asyncio.shield(self._accepting)

    def close(self) -> None:
        """Stop listening; who is being served is told the end, after what has been received already.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        self._closing = True
        self.listener.close()
        for channel in self._channels.values():
            channel._end_input()

    async def aclose(self, grace: float | None = None) -> None:
        """Close, and wait for the handlers to finish.

        Args:
            grace: seconds after which they are cancelled; None is what ``serve`` was told.

        Raises:
            OSError: as close(2).
        """
        self.close()
        handlers = tuple(self._channels)
        try:
            if handlers:
                await asyncio.wait(handlers, timeout=self._grace if grace is None else grace)
        finally:
            for task in handlers:
                task.cancel()
            await asyncio.gather(self._accepting, *handlers, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _accept(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                channel = await self.listener.accept()
            except ClosedError:
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                if pause == FIRST_PAUSE_SECONDS:
                    _log.warning("accepting at %r pauses: %s", self.listener.address, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            task = asyncio.create_task(self._serve(channel))
            self._channels[task] = channel
            task.add_done_callback(self._done)

    async def _serve(self, channel: AsyncChannel) -> None:
        address = self.listener.address
        try:
            async with asyncio.timeout(self._hello_timeout):
                await channel._hello()
        except TimeoutError:
            _log.info("a peer at %r did not say hello within %g s", address, self._hello_timeout)
            return
        except OSError as error:
            _log.info("a peer at %r did not say hello: %s", address, error)
            return
        try:
            await self._handler(channel)
        except PeerClosedError as error:
            _log.debug("a peer at %r has gone while it was served: %s", address, error)
        except Exception:  # noqa: BLE001 -- whatever it was, it ends this connection alone
            _log.exception("the handler of a connection at %r failed", address)

    def _done(self, task: asyncio.Task[None]) -> None:
        with suppress(OSError):
            self._channels.pop(task).close()


class Serving(Coroutine[Any, Any, None]):
    """What :func:`serve` returns: ``async with`` serves in the block, ``await`` gives the server, a task of it serves on."""

    def __init__(self, start: Callable[[], Awaitable[Server]]) -> None:
        self._start = start
        self._server: Server | None = None
        self._forever: Coroutine[Any, Any, None] | None = None

    def __await__(self) -> Generator[Any, Any, Server]:  # type: ignore[override]  # not what a task of it returns
        return self._start().__await__()

    async def __aenter__(self) -> Server:
        self._server = await self._start()
        return self._server

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self._server.aclose()

    async def _serve_forever(self) -> None:
        async with self as server:
            await server.serve_forever()

    def send(self, value: Any) -> Any:
        """Go on as a task's coroutine."""
        if self._forever is None:
            self._forever = self._serve_forever()
        return self._forever.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error in a task's coroutine."""
        if self._forever is None:
            self._forever = self._serve_forever()
        return self._forever.throw(*error)

    def close(self) -> None:
        """End a task's coroutine."""
        if self._forever is not None:
            self._forever.close()


def serve(
    handler: Handler,
    address: Address | FdHandle | socket.socket | int | Listener | endpoint.Listener,
    *,
    backlog: int = DEFAULT_BACKLOG,
    allow: Policy = same_user,
    codec: Codec | None = None,
    mode: int = 0o600,
    transport: str | None = None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
    hello_timeout: float = HELLO_SECONDS,
    grace: float = GRACE_SECONDS,
) -> Serving:
    """Serve each peer that connects, in a task of its own::

        async with serve(handler, path) as server:   # until the block is left
        server = await serve(handler, path)          # until await server.aclose()
        asyncio.run(serve(handler, path))            # until cancelled, as by Ctrl-C

    What a handler raises is logged and ends that one connection.

    Args:
        handler: an ``async def`` that takes an AsyncChannel, which is closed when it returns.
        address, backlog, allow, codec, mode, transport, max_inflight, max_untaken: as for :class:`Listener`, or a listener,
            which is spent.
        hello_timeout: seconds that a peer may take to say hello; the handler is called only then.
        grace: seconds that handlers may take to finish once the server is closed, before they are cancelled.

    Raises:
        OSError, ValueError: as for Listener, when it begins.
    """

    async def start() -> Server:
        listener = (
            address
            if isinstance(address, Listener)
            else Listener(
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
        return Server(handler, listener, hello_timeout, grace)

    return Serving(start)
