"""Programs of ``asyncio.start_server`` that are restarted without losing a connection.

    with Handover("/run/app/control") as handover:
        service = Service(handover)
        await service.start_server(handle, "http", host, port)
        await service.serve()

``serve`` says ready, accepts until a successor is, and returns when what was accepted has been handled.

An HTTP server must do one thing more, since its clients keep connections: once ``service.retiring`` is set, answer with
``Connection: close``, and close with :func:`linger`.  A connection that is closed while its client sends the next request is
a failed request.  One on which nothing comes can be moved to the successor instead: :meth:`Service.read_or_move`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fdshare import FdHandle, FdShareError
from fdshare.handover import Handover, HandoverSocket
from fdshare.handover.loop import Acceptor, Acceptors, start_successor

__all__ = ["Service", "linger"]

T = TypeVar("T")

logger = logging.getLogger("fdshare.handover")

DRAIN_SECONDS = 30.0
"""How long a retired service goes on handling what it has accepted, unless told otherwise: what servers usually allow."""

TICK_SECONDS = 0.02
"""Pause between two looks at the TLS handshakes that are under way when the service retires."""

LINGER_SECONDS = 2.0
"""How long a client may take to notice that its connection has ended."""

Callback = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


class Service:
    """Servers of one process behind one Handover.

    Args:
        handover: not ready yet; it stays the caller's.
        drain: seconds to handle what was accepted, once a successor serves or the process is to end.
    """

    def __init__(self, handover: Handover, *, drain: float = DRAIN_SECONDS) -> None:
        self.handover = handover
        self.drain = drain
        self._acceptors = Acceptors(handover, self._take)
        self._streams: dict[str, tuple[Acceptor, Callable[[bytes], asyncio.BaseProtocol]]] = {}
        self._handlers: set[asyncio.Task[Any]] = set()
        self._ending = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- before serving ----------------------------------------------------------------------------------------------------

    async def start_server(
        self,
        callback: Callback,
        name: str,
        host: str | None,
        port: int,
        *,
        limit: int = 2**16,
        ssl: Any = None,
    ) -> HandoverSocket:
        """Listen for TCP connections, as ``asyncio.start_server``; accepting begins with :meth:`serve`.

        Args:
            callback: called with reader and writer of each connection.
            name, host, port: as for ``Handover.listen``.
            limit, ssl: as for ``asyncio.start_server``.

        Raises:
            ValueError, OSError: as ``Handover.listen``.
        """
        sock = self.handover.listen(name, host, port)
        self._add_streams(name, sock, callback, limit, ssl)
        return sock

    async def start_unix_server(
        self,
        callback: Callback,
        name: str,
        path: str,
        *,
        mode: int = 0o600,
        limit: int = 2**16,
        ssl: Any = None,
    ) -> HandoverSocket:
        """Listen at a path, as ``asyncio.start_unix_server``; accepting begins with :meth:`serve`.

        Raises:
            ValueError, OSError: as ``Handover.listen_unix``.
        """
        sock = self.handover.listen_unix(name, path, mode=mode)
        self._add_streams(name, sock, callback, limit, ssl)
        return sock

    def _add_streams(self, name: str, sock: HandoverSocket, callback: Callback, limit: int, ssl: Any) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._handlers.add(task)
            task.add_done_callback(self._handlers.discard)
            result = callback(reader, writer)
            if result is not None:
                await result

        def make(unread: bytes = b"") -> asyncio.BaseProtocol:
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader(limit=limit, loop=loop)
            if unread:
                reader.feed_data(unread)
            return asyncio.StreamReaderProtocol(reader, handle, loop=loop)

        acceptor = Acceptor(sock, make, ssl=ssl)
        self._streams[name] = acceptor, make
        self._acceptors.add(acceptor)

    # --- serving ---------------------------------------------------------------------------------------------------------

    @property
    def retiring(self) -> bool:
        """Whether a successor serves, or the process is to end: answer what has come, and keep no connection."""
        return self._ending.is_set()

    def end(self) -> None:
        """Let :meth:`serve` stop accepting, drain and return; to be called in the event loop.

        Raises:
            nothing.
        """
        self._ending.set()

    async def serve(
        self,
        *,
        final: Iterable[str] = (),
        on_ready: Callable[[dict[str, Any]], object] | None = None,
        signals: bool = True,
    ) -> bool:
        """Say ready, serve until a successor does, and drain; return whether there is a successor.

        Args:
            final: as for ``Handover.ready``.
            on_ready: called with the final states once nobody else serves, before anything is accepted here.
            signals: let SIGTERM and SIGINT end the service, and SIGHUP start a successor with this process's own command.

        Raises:
            HandoverError: as ``Handover.ready``: this process must not serve.
            OSError: no descriptor left.
        """
        loop = asyncio.get_running_loop()
        installed = self._install_signals(loop) if signals else []
        watching = loop.create_task(self._watch())
        try:
            states = await self._acceptors.ready(final)
            if on_ready is not None:
                on_ready(states)
            await self._acceptors.start()
            await self._ending.wait()
            await self._acceptors.finish()
            await self._drain()
        finally:
            self._acceptors.close()
            watching.cancel()
            for number in installed:
                loop.remove_signal_handler(number)
        return self.handover.retired.is_set()

    async def _watch(self) -> None:
        await self.handover.retired
        self._ending.set()

    def _install_signals(self, loop: asyncio.AbstractEventLoop) -> list[int]:
        if threading.current_thread() is not threading.main_thread():
            return []
        loop.add_signal_handler(signal.SIGTERM, self.end)
        loop.add_signal_handler(signal.SIGINT, self.end)
        loop.add_signal_handler(signal.SIGHUP, self._start_successor)
        return [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

    def _start_successor(self) -> None:
        self._keep(asyncio.get_running_loop().create_task(start_successor(self.handover)))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)  # the loop holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.drain
        while (left := deadline - loop.time()) > 0:
            await asyncio.sleep(
                0
            )  # between accepting and the handler's first step a turn passes here and there
            busy, coming = self._tasks | self._handlers, self._acceptors.coming
            if busy:
                pause = min(left, TICK_SECONDS) if coming else left
                await asyncio.wait(busy, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            elif coming:
                await asyncio.sleep(TICK_SECONDS)
            else:
                break
        for task in self._handlers:
            task.cancel()
        if self._handlers:
            logger.warning("%d connections were not done after %g s", len(self._handlers), self.drain)
            await asyncio.wait(set(self._handlers))

    # --- connections that move -------------------------------------------------------------------------------------------------

    async def read_or_move(
        self, read: Awaitable[T], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> T | None:
        """Wait for ``read``, the beginning of a request; should this service retire first, move the connection instead.

        What was read of it so far moves along.  It stays here where the successor takes none (``Handover(adopt=True)``), where
        something is still to be written, and where TLS is spoken.

        Args:
            read: a read that takes nothing from the buffer unless it is complete, such as ``reader.readuntil(...)``.
            name: the listener's.

        Returns:
            what ``read`` gives; None where the connection has moved, and there is nothing more to do for it.

        Raises:
            asyncio.IncompleteReadError: and all else that ``read`` raises.
        """
        reading = asyncio.ensure_future(read)
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() or not self.handover.successor_adopts or name not in self.handover.kept:
                return await reading
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            if reading.done() or not self._give_away(reader, writer, name):
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                return await reading
            return None
        finally:
            reading.cancel()
            ending.cancel()

    def _give_away(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> bool:
        transport = writer.transport
        if transport.get_extra_info("sslcontext") or transport.get_write_buffer_size() or reader.at_eof():
            return False
        # Not aio.detach, which spends both: where nothing can be sent, the handler must go on with them.
        unread = bytes(reader._buffer)  # type: ignore[attr-defined]
        try:
            with FdHandle.dup(transport.get_extra_info("socket")) as handle:
                self.handover.send_connection(handle, {"name": name, "unread": unread}, timeout=0)
        except (FdShareError, OSError) as error:
            logger.info("a connection stays: %s", error)
            return False
        transport.abort()  # closes this copy; nothing is sent
        return True

    def _take(self, handle: FdHandle, data: Any) -> None:
        try:
            acceptor, make = self._streams[data["name"]]
            unread = bytes(data["unread"])
        except (KeyError, TypeError) as error:  # a listener that is no more, or another program's data
            logger.info("a connection of the predecessor was closed: %r", error)
            handle.close()
            return

        def factory() -> asyncio.BaseProtocol:
            return make(unread)

        self._keep(asyncio.get_running_loop().create_task(acceptor.take(handle.to_socket(), factory)))


async def linger(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float = LINGER_SECONDS
) -> None:
    """Close a connection after the last answer so that nothing which the client sends meanwhile turns it into a reset.

    Sends the end, and reads until the client's: a socket that is closed with something unread takes back what was sent.

    Args:
        timeout: seconds that the client may take.

    Raises:
        asyncio.CancelledError: the task was cancelled.
    """
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(timeout):
            if writer.can_write_eof():
                writer.write_eof()
            while await reader.read(2**16):
                pass
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
