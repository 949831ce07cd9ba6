"""uvicorn, restarted without losing a request: ``run("app:app", control, host=..., port=...)`` in place of ``uvicorn.run``.

A second process with the same ``control`` takes the socket over once its application has started up, and the first one ends:
new connections go to the second; on those it has, the first one answers each request that comes with ``Connection: close``, and
hands the idle ones on, so that none is closed while its client sends the next request.  WebSockets and HTTP/2 connections
are told to go away, as at every end of a uvicorn.

uvicorn's own processes (``workers``, ``reload``) are its own way of restarting, and are not for this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from fdshare import FdHandle, FdShareError
from fdshare.handover import Handover, HandoverSocket
from fdshare.handover.loop import Acceptor, Acceptors, start_successor

if TYPE_CHECKING:
    from uvicorn import Config, Server

__all__ = ["make_server", "run"]

logger = logging.getLogger("uvicorn.error")

DRAIN_SECONDS = 30.0
"""How long a retired server goes on answering on the connections that it has, unless told otherwise; uvicorn's own way of closing
what is left comes after that."""

TICK_SECONDS = 0.05
"""Pause between two looks at the connections of a retired server."""

CLOSE = (b"connection", b"close")

STARTUP_FAILURE = 3
"""The exit status of a uvicorn whose application did not start up."""


def run(
    app: Any,
    control: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    uds: str | None = None,
    name: str = "http",
    drain: float = DRAIN_SECONDS,
    **settings: Any,
) -> None:
    """Serve ``app`` until a successor does, or a signal comes; the successor is this program, started again.

    SIGHUP starts it with the command of this process; SIGTERM and SIGINT end this process without a successor.

    Args:
        app: as for ``uvicorn.run``.
        control: the path by which generations find each other.
        host, port: as for ``uvicorn.run``.
        uds: the path of an AF_UNIX socket in their place.
        name: of the listener, as systemd's unit may call it.
        drain: seconds that a retired server answers on the connections that it has.
        settings: what else ``uvicorn.Config`` takes.

    Raises:
        ValueError: a setting that makes uvicorn start processes of its own.
        HandoverError, TimeoutError, OSError: as Handover.
        SystemExit: the application did not start up; the predecessor serves on.
    """
    import uvicorn

    config = uvicorn.Config(app, host=host, port=port, uds=uds, **settings)
    if config.workers > 1 or config.should_reload:
        raise ValueError("workers and reload are uvicorn's own ways to restart: leave them out")
    with Handover(control, adopt=True) as handover:
        sock = (
            handover.listen(name, host, port, backlog=config.backlog)
            if uds is None
            else handover.listen_unix(name, uds, mode=0o666, backlog=config.backlog)
        )
        server = make_server(config, handover, sock, drain=drain)
        server.run()
        if not server.started:  # as older uvicorns leave it to their own run()
            raise SystemExit(STARTUP_FAILURE)


def make_server(
    config: Config, handover: Handover, *sockets: HandoverSocket, drain: float = DRAIN_SECONDS
) -> Server:
    """Return a ``uvicorn.Server`` for sockets of a Handover; its ``run`` or ``serve`` says ready once the application is up.

    Args:
        config: host, port, uds and fd in it are not used.
        handover: closed by the server's end.
        sockets: what its ``listen`` returned.
        drain: as for :func:`run`.

    Raises:
        ImportError: there is no uvicorn.
    """
    server: Server = _server_class()(config, handover, sockets, drain)
    return server


@functools.cache
def _server_class() -> Any:
    import uvicorn

    class HandoverServer(uvicorn.Server):
        def __init__(
            self, config: Config, handover: Handover, sockets: tuple[HandoverSocket, ...], drain: float
        ) -> None:
            super().__init__(config)
            self.handover = handover
            self.listening = sockets
            self.drain = drain
            self.own_tasks: set[asyncio.Task[None]] = set()

        # --- beginning ----------------------------------------------------------------------------------------------------

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=[])  # the application; accepting is ours
            if self.should_exit:
                return
            loop = asyncio.get_running_loop()
            self.acceptors = Acceptors(self.handover, self.take)
            for sock in self.listening:
                options = {"ssl": self.config.ssl, "backlog": self.config.backlog}
                self.acceptors.add(Acceptor(sock, self.make_protocol, **options))
            await self.acceptors.ready()
            await self.acceptors.start()
            if threading.current_thread() is threading.main_thread():
                loop.add_signal_handler(signal.SIGHUP, self.start_successor)
            for sock in self.listening:
                logger.info("Generation %d serves at %s", self.handover.generation, sock.getsockname())

        def start_successor(self) -> None:
            self.keep(asyncio.get_running_loop().create_task(start_successor(self.handover)))

        def keep(self, task: asyncio.Task[None]) -> None:
            self.own_tasks.add(task)  # the loop holds tasks weakly
            task.add_done_callback(self.own_tasks.discard)

        def make_protocol(self) -> Any:
            # As the function of that name in uvicorn.Server.startup.
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=asyncio.get_running_loop(),
            )

        def take(self, handle: FdHandle, data: Any) -> None:
            """Serve a connection on which the predecessor had nothing to do."""
            self.keep(asyncio.get_running_loop().create_task(self.take_idle(handle.to_socket())))

        async def take_idle(self, connection: socket.socket) -> None:
            acceptor = Acceptor(self.listening[0], self.make_protocol)
            protocol: Any = await acceptor.take(connection, self.make_protocol)
            if protocol is not None and protocol.timeout_keep_alive_task is None:
                protocol.timeout_keep_alive_task = asyncio.get_running_loop().call_later(
                    self.config.timeout_keep_alive, protocol.timeout_keep_alive_handler
                )

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or self.handover.retired.is_set()

        # --- ending ---------------------------------------------------------------------------------------------------------

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if threading.current_thread() is threading.main_thread():
                asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            await self.acceptors.finish()
            if self.handover.retired.is_set():
                await self.retire()
            self.acceptors.close()
            await super().shutdown(sockets=[])
            # Not later: uvicorn ends by the signal that has come, and this process with it.
            await asyncio.to_thread(self.handover.close)

        async def retire(self) -> None:
            """Answer what comes on the connections that there are, with a word that it is the last answer."""
            logger.info("A successor serves; %d connections are left", len(self.server_state.connections))
            self.config.encoded_headers = [*self.config.encoded_headers, CLOSE]
            self.server_state.default_headers.append(CLOSE)  # for requests that are being answered already
            patient = _patient_protocols()
            for connection in list(self.server_state.connections):
                if not isinstance(connection, patient):
                    connection.shutdown()
            begun = time.monotonic()
            ticks = 0
            await asyncio.sleep(0)  # what was accepted in this very turn of the loop
            while (
                self.server_state.connections or self.acceptors.coming
            ) and time.monotonic() < begun + self.drain:
                for connection in list(self.server_state.connections):
                    if isinstance(connection, patient):
                        self.give_away(connection)
                if self.should_exit:  # a signal: it is in a hurry
                    break
                await asyncio.sleep(TICK_SECONDS)
                ticks += 1
                if ticks % round(1 / TICK_SECONDS) == 0:
                    await super().on_tick(0)  # keeps the date

        def give_away(self, connection: Any) -> None:
            transport = connection.transport
            if (
                not self.handover.successor_adopts
                or not _is_idle(connection)
                or transport.is_closing()
                or transport.get_write_buffer_size()
                or transport.get_extra_info("sslcontext")
            ):
                return
            transport.pause_reading()
            try:
                with FdHandle.dup(transport.get_extra_info("socket")) as handle:
                    self.handover.send_connection(handle, timeout=0)
            except (FdShareError, OSError) as error:
                logger.info("An idle connection stays: %s", error)
                with contextlib.suppress(RuntimeError):
                    transport.resume_reading()
                return
            transport.abort()  # closes this copy; nothing is sent

    return HandoverServer


def _patient_protocols() -> tuple[type, ...]:
    """The protocols whose answers can say ``Connection: close``."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    found: list[type] = [H11Protocol]
    with contextlib.suppress(ImportError):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        found.append(HttpToolsProtocol)
    return tuple(found)


def _is_idle(connection: Any) -> bool:
    """Whether a connection was answered to the end, and nothing of a further request was read."""
    cycle = connection.cycle
    if cycle is None or connection.timeout_keep_alive_task is None or cycle.scope is not connection.scope:
        return False
    parser = getattr(connection, "conn", None)  # h11 keeps what is not a whole request yet
    return not (parser.trailing_data[0] if parser is not None else connection.pipeline)
