"""asyncio's own connections travel: out of one process's event loop and into another's, without the peer noticing.

    detach:  flush what was written --> stop reading --> take what was read and not used --> a second descriptor --> abort
    send:    MovedStream(socket, unread)
    open:    a transport that does not read yet --> the unread bytes to its protocol --> read

Everything here is asyncio's public interface, so it holds for uvloop too.  A connection with TLS has its state in the memory
of this process and is refused.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from fdshare import reducers
from fdshare.closing import Closing
from fdshare.errors import ClosedError, NotSendableError, PeerClosedError
from fdshare.handle import FdHandle, Outside, own, to_socket

__all__ = ["MovedStream", "detach", "detach_transport"]

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.001, 0.02
"""The pauses between looks whether everything written is with the kernel; asyncio tells of that only down to a low-water mark."""

DEFAULT_LIMIT = 2**16
"""The limit of a StreamReader's buffer, bytes: asyncio's own."""


class MovedStream(Closing):
    """A connection on its way from one event loop to another: its socket, and what was read of it and not used.

    Sending it gives it away, as ``fdshare.move`` does: it is closed here once the message is with the kernel, and stays as it is
    where the send failed, for another try or for :meth:`open`.  Pickled for a pool that is not fdshare's, it stays too: close it.

    Args:
        sock: a connected stream socket, which belongs to this object now.
        unread: bytes that were read already; whoever opens it gets them first.
    """

    def __init__(self, sock: socket.socket, unread: bytes = b"") -> None:
        self._sock = sock
        self._unread = bytes(unread)

    @property
    def unread(self) -> bytes:
        """What was read and not used."""
        return self._unread

    @property
    def closed(self) -> bool:
        """Whether it was closed, sent, opened, or taken as a socket."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """Borrow the descriptor's number.

        Raises:
            ClosedError: it was closed, sent, opened, or taken as a socket.
        """
        if self.closed:
            raise ClosedError("this stream was closed, sent or opened")
        return self._sock.fileno()

    def to_socket(self) -> socket.socket:
        """Consume it into its socket, which is non-blocking; :attr:`unread` is then the caller's to look after.

        Raises:
            ClosedError: it was closed, sent, opened, or taken as a socket.
        """
        self.fileno()
        return to_socket(own(self._sock.detach))

    async def open(self, *, limit: int = DEFAULT_LIMIT) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Consume it into a reader, which gives the unread bytes first, and a writer.  Cancelled, it has done nothing.

        Args:
            limit: of the reader's buffer, bytes.

        Raises:
            ClosedError: it was closed, sent, opened, or taken as a socket.
            OSError: no descriptor left, or the event loop cannot take the socket.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        transport, protocol = await self.connect(lambda: asyncio.StreamReaderProtocol(reader, loop=loop))
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def connect(self, protocol_factory: Callable[[], ProtocolT]) -> tuple[asyncio.Transport, ProtocolT]:
        """Consume it into a transport with a protocol of your own, which gets the unread bytes first; as :meth:`open` otherwise.

        Args:
            protocol_factory: returns the protocol.

        Raises:
            ClosedError, OSError: as :meth:`open`.
        """
        loop = asyncio.get_running_loop()
        # Of a duplicate: asyncio closes what it was given where it fails or is cancelled.
        sock = to_socket(FdHandle.dup(self.fileno()))
        try:
            transport, early = await loop.create_connection(_NotYet, sock=sock)
        except BaseException:
            sock.close()
            raise
        self._sock.close()
        transport.pause_reading()
        protocol = protocol_factory()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        received = self._unread + early.received
        if received:
            protocol.data_received(received)
        if early.ended and not protocol.eof_received():
            transport.close()
        elif not early.ended:
            transport.resume_reading()
        return transport, protocol

    def close(self) -> None:
        """Close the connection, if it is still here.

        Raises:
            OSError: as close(2).
        """
        self._sock.close()

    def __repr__(self) -> str:
        return f"<MovedStream {'closed' if self.closed else f'fd={self._sock.fileno()}'} unread={len(self._unread)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


class _NotYet(asyncio.Protocol):
    """Stands in for a protocol that must not be told anything yet, and keeps what comes: uvloop reads at once."""

    received = b""
    ended = False

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.ended = True
        return True  # stay open


async def detach(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter | asyncio.WriteTransport
) -> MovedStream:
    """Take a connection out of the event loop, to send it to another process, or to open it again here.

    What was written goes out first, so this waits for a peer that does not read; ``asyncio.timeout`` bounds that.  Cancelled, it
    has done nothing.  Afterwards ``reader`` and ``writer`` are spent; the peer notices nothing.

    Args:
        reader, writer: of one connection, as asyncio has made them.

    Raises:
        NotSendableError: TLS, or no socket; nothing was done.
        ClosedError: the connection is closed here.
        PeerClosedError: the peer has gone before it had read what was written.
        RuntimeError: another task is reading.
        OSError: what reading has met, or no descriptor left.
    """
    transport = writer.transport if isinstance(writer, asyncio.StreamWriter) else writer
    if getattr(reader, "_waiter", None) is not None:
        raise RuntimeError("another task is reading from this stream")
    await _flush(transport)
    error = reader.exception()
    if error is not None:
        raise error
    return _take_out(transport, reader)


async def detach_transport(transport: asyncio.Transport) -> MovedStream:
    """Take a connection with a protocol of your own out of the event loop; as :func:`detach` otherwise.

    What its protocol has received and not used must be given along: ``MovedStream(moved.to_socket(), unread)``.  It
    is told ``connection_lost(None)``.

    Raises:
        NotSendableError, ClosedError, PeerClosedError, OSError: as :func:`detach`.
    """
    await _flush(transport)
    return _take_out(transport, None)


async def _flush(transport: asyncio.WriteTransport) -> None:
    """Wait until everything written is with the kernel.

    Raises:
        NotSendableError, ClosedError, PeerClosedError
    """
    if transport.get_extra_info("sslcontext") is not None:
        raise _unsendable(
            transport, "its TLS state lives in this process: move it before the handshake, or proxy it"
        )
    if transport.is_closing():
        raise ClosedError("this connection is closed, or closing")
    if transport.get_extra_info("socket") is None:
        raise _unsendable(transport, "it has no socket: send the file or pipe that it was made of")
    pause = FIRST_PAUSE_SECONDS
    while transport.get_write_buffer_size():
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
        if transport.is_closing():
            raise PeerClosedError("the peer has gone before it had read everything")


def _take_out(transport: asyncio.WriteTransport, reader: asyncio.StreamReader | None) -> MovedStream:
    sock = to_socket(FdHandle.dup(transport.get_extra_info("socket").fileno()))
    transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport reads too
    unread = b"" if reader is None else _take_unread(reader)
    transport.abort()  # closes its own descriptor and says nothing to the peer
    return MovedStream(sock, unread)


def _take_unread(reader: asyncio.StreamReader) -> bytes:
    reader.feed_eof()  # so that reading everything needs no waiting
    try:
        reader.read().send(None)
    except StopIteration as stop:
        return bytes(stop.value)
    raise RuntimeError("another task is reading from this stream")


def _unsendable(obj: object, reason: str) -> NotSendableError:
    name = f"{type(obj).__module__}.{type(obj).__qualname__}"
    return NotSendableError(f"cannot move a {name}: {reason}", type_name=name, reason=reason)


def reduce_moved_stream(stream: MovedStream, context: reducers.Context) -> reducers.Reduced:
    if stream.closed:
        raise reducers.Refused(stream, "it was closed, sent or opened")
    context.consume(stream.close)
    return rebuild_moved_stream, (stream._sock, stream._unread)


def rebuild_moved_stream(sock: socket.socket, unread: bytes) -> MovedStream:
    return MovedStream(sock, unread)


reducers.known[MovedStream] = reduce_moved_stream
