"""Accepting in an event loop, whichever it is: started together, stopped by a successor, resumed where that one died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fdshare.errors import DecodeError, FdLimitError, PeerClosedError
from fdshare.handle import FdHandle
from fdshare.handover.adoption import Connections
from fdshare.handover.binding import BACKLOG
from fdshare.handover.gated import HandoverSocket
from fdshare.handover.handover import Handover

__all__ = ["Acceptor", "Acceptors", "start_successor"]

logger = logging.getLogger("fdshare.handover")

STOP_SECONDS = 5.0
"""How long the event loop may take to stop accepting; a loop that is blocked for longer keeps what it has."""

LIMIT_PAUSE = 0.1
"""Seconds without adopting after the descriptor limit was met."""


class Acceptor:
    """Accepts on one socket of a Handover, in the running event loop, whichever it is: asyncio's or uvloop's.

    Args:
        sock: what ``Handover.listen`` returned.
        factory: makes the protocol of each connection.
        options: further arguments of ``loop.create_server``, such as ``ssl``.
    """

    def __init__(
        self, sock: HandoverSocket, factory: Callable[[], asyncio.BaseProtocol], **options: Any
    ) -> None:
        self.sock = sock
        self.factory = factory
        self._options = {"backlog": BACKLOG, **options}
        self._server: asyncio.AbstractServer | None = None
        self._wanted = False
        self._coming: weakref.WeakSet[asyncio.BaseProtocol] = weakref.WeakSet()

    @property
    def coming(self) -> bool:
        """Whether a connection was accepted of which its protocol does not know yet, as during a TLS handshake."""
        return bool(self._coming)

    def _expect(self) -> asyncio.BaseProtocol:
        protocol = self.factory()

        def connection_made(transport: asyncio.BaseTransport) -> None:
            del protocol.connection_made
            self._coming.discard(protocol)
            protocol.connection_made(transport)

        with contextlib.suppress(AttributeError, TypeError):  # of one with slots nothing can be noted
            weakref.ref(protocol)
            protocol.connection_made = connection_made  # type: ignore[method-assign]
            self._coming.add(protocol)
        return protocol

    async def start(self) -> None:
        """Accept from now on.

        Raises:
            OSError: no descriptor left.
        """
        self._wanted = True
        copy = (
            self.sock.dup()
        )  # the server closes what it is given, and this one may have to be started again
        try:
            server = await self._make_server(asyncio.get_running_loop(), copy)
        except BaseException:
            copy.close()
            raise
        if self._wanted:
            self._server = server
        else:  # stopped while it was being made
            server.close()

    async def _make_server(
        self, loop: asyncio.AbstractEventLoop, sock: HandoverSocket
    ) -> asyncio.AbstractServer:
        if self.sock.family != socket.AF_UNIX:
            return await loop.create_server(self._expect, sock=sock, **self._options)
        make = loop.create_unix_server
        if sys.version_info >= (3, 13):  # where it would remove the file, which the successor needs
            try:
                return await make(self._expect, sock=sock, cleanup_socket=False, **self._options)
            except TypeError:  # an older uvloop, which does not
                pass
        return await make(self._expect, sock=sock, **self._options)

    def stop(self) -> None:
        """Accept no more."""
        self._wanted = False
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def finish(self) -> None:
        """After retirement: accept what is queued on a socket that the successor did not keep, and close it."""
        if self.sock.fileno() < 0:  # the program has closed it
            return
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                await self.take(self.sock.accept()[0], self.factory)
        self.sock.retire()

    async def take(
        self, connection: socket.socket, factory: Callable[[], asyncio.BaseProtocol]
    ) -> asyncio.BaseProtocol | None:
        """Serve a connection that was accepted elsewhere; return its protocol, None where it was lost."""
        connection.setblocking(False)
        ssl = self._options.get("ssl")
        try:
            loop = asyncio.get_running_loop()
            return (await loop.connect_accepted_socket(factory, connection, ssl=ssl))[1]
        except OSError as error:  # it has gone
            connection.close()
            logger.info("a connection was lost while it was taken over: %s", error)
            return None


class Acceptors:
    """The acceptors of one process: all accept, or none does; and whoever adopts connections of the predecessor.

    Args:
        handover: not ready yet.
        take: called in the event loop with each connection of the predecessor, which it owns, and what came along.
    """

    def __init__(self, handover: Handover, take: Callable[[FdHandle, Any], object]) -> None:
        self.handover = handover
        self._take = take
        self._all: list[Acceptor] = []
        self._paused = False
        self._over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: Connections | None = None

    @property
    def coming(self) -> bool:
        """Whether a connection was accepted of which its protocol does not know yet; told a turn of the loop after the accept."""
        return any(acceptor.coming for acceptor in self._all)

    def add(self, acceptor: Acceptor) -> None:
        """Add one that begins with the others."""
        self._all.append(acceptor)

    async def ready(self, final: Iterable[str] = ()) -> dict[str, Any]:
        """Say ready, and return the final states; nothing is accepted yet.

        Raises:
            HandoverError: as ``Handover.ready``.
        """
        self._loop = asyncio.get_running_loop()
        self.handover.on_stop(self._stop_from_outside, self._resume_from_outside)
        return await self.handover.ready_async(final)

    async def start(self) -> None:
        """Accept, and adopt.

        Raises:
            OSError: no descriptor left.
        """
        await self._start_all()
        if self.handover.adopts:
            self._connections = self.handover.connections()
            self._adopt()

    async def finish(self) -> None:
        """Accept no more, but for what is queued where the successor has not kept the socket; call it once retired, or to end."""
        self._over = True
        self._stop_all()
        if self.handover.retired.is_set():
            for acceptor in self._all:
                await acceptor.finish()

    def close(self) -> None:
        """Accept and adopt no more; the event loop may end."""
        self._over = True
        self._stop_all()
        self._adopt_no_more()
        self._loop = None

    async def _start_all(self) -> None:
        for acceptor in self._all:
            if not self._paused and not self._over:
                await acceptor.start()

    def _stop_all(self) -> None:
        for acceptor in self._all:
            acceptor.stop()

    # --- from the handover's thread ----------------------------------------------------------------------------------------

    def _stop_from_outside(self) -> None:
        async def stop() -> None:
            self._paused = True
            self._stop_all()

        self._in_loop(stop())

    def _resume_from_outside(self) -> None:
        async def resume() -> None:
            self._paused = False
            await self._start_all()

        self._in_loop(resume())

    def _in_loop(self, work: Coroutine[Any, Any, None]) -> None:
        loop = self._loop
        if loop is None:  # it serves no more
            work.close()
            return
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            future.result(STOP_SECONDS)
        except TimeoutError:
            future.cancel()
            raise

    # --- connections of the predecessor ------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        connections = self._connections
        if connections is not None and connections.expected and self._loop is not None:
            self._loop.add_reader(connections.fileno(), self._take_connections, connections, self._loop)

    def _take_connections(self, connections: Connections, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                self._take(*connections.receive(timeout=0))
        except TimeoutError:
            return
        except DecodeError as error:
            logger.warning("a connection of the predecessor was not taken: %s", error)
        except FdLimitError as error:
            logger.warning("a connection of the predecessor has to wait: %s", error)
            loop.remove_reader(connections.fileno())
            loop.call_later(LIMIT_PAUSE, self._adopt)
        except (PeerClosedError, OSError):
            self._adopt_no_more()

    def _adopt_no_more(self) -> None:
        connections, self._connections = self._connections, None
        if connections is not None and connections.expected:
            if self._loop is not None:
                self._loop.remove_reader(connections.fileno())
            connections.close()


async def start_successor(handover: Handover) -> None:
    """Start the next generation without keeping the event loop waiting; where that fails, it is logged."""
    try:
        await asyncio.to_thread(handover.start_successor)
    except OSError as error:
        logger.error("cannot start a successor: %s", error)
