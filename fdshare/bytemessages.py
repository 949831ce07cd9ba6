"""Messages that are bytes, as ``multiprocessing.connection.Connection`` has them: a part of ``Channel``."""

from __future__ import annotations

from typing import Any

from fdshare import preload, wire
from fdshare.codec import Outgoing
from fdshare.errors import MessageTooLargeError
from fdshare.transport import Transport

__all__ = ["ByteMessages"]


class ByteMessages:
    """What a channel sends and receives as bytes, with nothing encoded."""

    _transport: Transport
    _readable: bool
    _writable: bool

    def close(self) -> None:
        """Close this end."""
        raise NotImplementedError

    def _send_slowly(self, message: bytes | Outgoing, type: int, timeout: float | None) -> None:
        raise NotImplementedError

    def _recv_slowly(self, timeout: float | None, type: int) -> Any:
        raise NotImplementedError

    def send_bytes(
        self, buf: Any, offset: int = 0, size: int | None = None, *, timeout: float | None = None
    ) -> None:
        """Send bytes as one message, for ``recv_bytes``.

        Args:
            buf: a bytes-like object.
            offset, size: the part of it to send, in bytes; ``size`` None for the rest.
            timeout: seconds to wait for room; None waits for ever.

        Raises:
            ValueError: offset and size do not lie within the buffer.
            PeerClosedError, ClosedError, TimeoutError, NoSpaceError: as for :meth:`send`.
        """
        view = memoryview(buf)
        view = view.cast("B") if view.contiguous else memoryview(bytes(view))
        if offset < 0:
            raise ValueError("offset is negative")
        if offset > len(view):
            raise ValueError("buffer length < offset")
        size = len(view) - offset if size is None else size
        if size < 0:
            raise ValueError("size is negative")
        if offset + size > len(view):
            raise ValueError("buffer length < offset + size")
        self._send_slowly(Outgoing([view[offset : offset + size]]), wire.BYTES, timeout)

    def recv_bytes(self, maxlength: int | None = None, *, timeout: float | None = None) -> bytes:
        """Receive one message of ``send_bytes``.

        Args:
            maxlength: most bytes to accept; None for any size.
            timeout: seconds to wait; None waits for ever.

        Raises:
            ValueError: ``maxlength`` is negative.
            OSError: the message is longer than ``maxlength``; it is dropped, and nothing can be received any more.
            PeerClosedError, ClosedError, TimeoutError, ProtocolError: as for :meth:`recv`.
        """
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        data = self._recv_slowly(timeout, wire.BYTES)
        if maxlength is not None and len(data) > maxlength:
            if not self._writable:
                self.close()
            self._readable = self._transport.plain = False  # as a Connection: it can still send
            raise OSError(f"a message of {len(data)} bytes is longer than maxlength {maxlength}")
        return bytes(data)

    def recv_bytes_into(self, buf: Any, offset: int = 0, *, timeout: float | None = None) -> int:
        """Receive one message of ``send_bytes`` into a writable buffer.

        Args:
            buf: a writable bytes-like object.
            offset: where in it to begin, bytes.
            timeout: seconds to wait; None waits for ever.

        Returns:
            the size of the message, bytes.

        Raises:
            ValueError: the offset lies outside.
            TypeError: the buffer is read-only.
            multiprocessing.BufferTooShort: it does not fit; the exception's ``args[0]`` is the message.  A MessageTooLargeError
                where multiprocessing cannot be loaded.
            PeerClosedError, ClosedError, TimeoutError, ProtocolError: as for :meth:`recv`.
        """
        view = memoryview(buf).cast("B")
        if view.readonly:  # said before a message is taken, which would be lost
            raise TypeError("the buffer is read-only")
        if offset < 0:
            raise ValueError("negative offset")
        if offset > len(view):
            raise ValueError("offset too large")
        data = self._recv_slowly(timeout, wire.BYTES)
        if len(data) > len(view) - offset:
            raise _too_short(bytes(data))
        view[offset : offset + len(data)] = data
        return len(data)


def _too_short(data: bytes) -> Exception:
    multiprocessing = preload.load("multiprocessing")
    if multiprocessing is not None:
        return multiprocessing.BufferTooShort(data)  # type: ignore[no-any-return]
    return MessageTooLargeError(f"{len(data)} bytes do not fit into the buffer")
