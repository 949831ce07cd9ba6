"""``Channel``: one end of a connection that carries objects, whatever descriptors they hold.

    send: object -> codec.encode -> Outgoing -> wire.pack -> transport.send -> kernel
    recv: kernel -> transport.receive -> wire.unpack -> Incoming -> codec.decode -> object

Each direction has a fast path for small messages without descriptors, which are bare pickles on a SEQPACKET socket: one
system call, no header.  Everything else takes the slow path below it.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import select
import selectors
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from itertools import starmap
from typing import TYPE_CHECKING, Any

from fdshare import memory, reducers, wire
from fdshare import transport as transports
from fdshare.codec import Codec, Incoming, Outgoing, PickleCodec, undecodable
from fdshare.errors import ClosedError, DecodeError, PeerClosedError, ProtocolError
from fdshare.handle import FdHandle, HasFileno, as_fd, inheritable
from fdshare.transport import PeerCredentials

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Channel", "ChannelSet", "Pipe", "wait"]

_PICKLE = PickleCodec()
_PICKLE_MARK = wire.PICKLE_MARK
_RECEIVE = transports.RECEIVE
_SEND_NOW = transports.SEND_NOW
_other_threads = transports.other_threads
_nonces = itertools.count(1)


def _nonce() -> int:
    return (os.getpid() << 40 | next(_nonces)) & 0xFFFF_FFFF_FFFF_FFFF


class Channel:
    """One end of a connection for objects; a drop-in for ``multiprocessing.connection.Connection``.

    Made by :func:`Pipe`, or around a connected AF_UNIX socket, which it takes over.  Usable by several threads at once; one end may be
    shared by several processes where the transport is "seqpacket".  Channels travel in messages and as arguments
    of ``multiprocessing.Process``.

    Args:
        sock: a connected AF_UNIX socket, SOCK_SEQPACKET or SOCK_STREAM; it belongs to the channel now.
        readable, writable: what this end may do.
        codec: how objects become bytes; None for pickle.
        max_inflight: most bytes of large messages sent here and not yet taken there; a send waits beyond it.

    Raises:
        ValueError: not such a socket, or neither readable nor writable.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        readable: bool = True,
        writable: bool = True,
        codec: Codec | None = None,
        max_inflight: int = transports.DEFAULT_MAX_INFLIGHT,
    ) -> None:
        if not (readable or writable):
            raise ValueError("a channel is readable, writable or both")
        if sock.gettimeout() is not None:
            sock.settimeout(None)
        self._transport = transport = transports.transport_of(sock, max_inflight)
        self._readable = readable
        self._writable = writable
        self._codec: Codec = codec or _PICKLE
        self._encode = self._codec.encode
        self._pending = transport.pending
        # Bare pickles only, and only where the kernel keeps packets apart.
        self._fast = codec is None and transport.name == "seqpacket"
        self._send_bytes_now = sock.send
        self._recvmsg = sock.recvmsg

    # --- messages -------------------------------------------------------------------------------------------------------

    def send(self, obj: Any, *, timeout: float | None = None) -> None:
        """Send one object, with every descriptor in it.

        Descriptors are duplicated to the receiver; inside ``fdshare.move`` they are given away.

        Args:
            obj: what pickle or cloudpickle takes, files, sockets, FdHandles, channels, registered types, at any depth.
            timeout: seconds to wait for room; None waits for ever.

        Raises:
            NotSendableError: something in it cannot travel.
            PeerClosedError: nobody can receive it any more.
            ClosedError: this side is closed, also by another thread while it waited.
            TimeoutError: nothing was sent.
            FdLimitError, NoSpaceError, MessageTooLargeError, AccessDeniedError: nothing was sent.
        """
        message = self._encode(obj)
        if type(message) is bytes and self._fast and self._writable:
            try:
                self._send_bytes_now(message, _SEND_NOW)
                return
            except OSError:
                pass  # full, closed, gone: the slow path tells
        self._send_slowly(message, wire.MESSAGE, timeout)

    def recv(self, *, timeout: float | None = None) -> Any:
        """Receive the next object.

        Args:
            timeout: seconds to wait for one; None waits for ever.

        Raises:
            PeerClosedError: the other side is closed and everything was received.
            ClosedError: this side is closed, also by another thread while it waited.
            TimeoutError: none came.
            DecodeError: the message cannot be rebuilt; its descriptors are closed, the next one can be received.
            FdLimitError: no room for its descriptors; it stays queued.
            DescriptorsLostError: some of its descriptors were dropped on the way.
            ProtocolError: the peer does not speak the protocol; the channel is closed now.
        """
        if timeout is None and self._fast and self._readable and not _other_threads():
            pending = self._pending
            if not pending:
                try:
                    pending.extend(starmap(self._recvmsg, _RECEIVE))
                except OSError:
                    return self._recv_slowly(None, wire.MESSAGE)
            data, ancillary, _, _ = pending[0]
            if data and not ancillary and data[0] == _PICKLE_MARK:
                try:
                    obj = pickle.loads(data)
                except Exception as error:
                    del pending[0]
                    raise undecodable(error) from error
                del pending[0]  # no interrupt can come between this and the caller
                return obj
        return self._recv_slowly(timeout, wire.MESSAGE)

    def __iter__(self) -> Iterator[Any]:
        """Yield messages until the peer closes."""
        while True:
            try:
                obj = self.recv()
            except PeerClosedError:
                return
            yield obj

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None, *, timeout: float | None = None) -> None:
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
        if size is None:
            size = len(view) - offset
        elif size < 0:
            raise ValueError("size is negative")
        elif offset + size > len(view):
            raise ValueError("buffer length < offset + size")
        self._send_slowly(Outgoing([view[offset : offset + size]]), wire.BYTES, timeout)

    def recv_bytes(self, maxlength: int | None = None, *, timeout: float | None = None) -> bytes:
        """Receive one message of ``send_bytes``.

        Args:
            maxlength: most bytes to accept; None for any size.
            timeout: seconds to wait; None waits for ever.

        Raises:
            ValueError: ``maxlength`` is negative.
            OSError: the message is longer than ``maxlength``; it is dropped, and the channel is closed as a Connection would be.
            PeerClosedError, ClosedError, TimeoutError, ProtocolError: as for :meth:`recv`.
        """
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        data = self._recv_slowly(timeout, wire.BYTES)
        if maxlength is not None and len(data) > maxlength:
            self.close()
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
            multiprocessing.BufferTooShort: it does not fit; the exception's ``args[0]`` is the message.
            PeerClosedError, ClosedError, TimeoutError, ProtocolError: as for :meth:`recv`.
        """
        view = memoryview(buf).cast("B")
        if offset < 0:
            raise ValueError("negative offset")
        if offset > len(view):
            raise ValueError("offset too large")
        data = self._recv_slowly(timeout, wire.BYTES)
        if len(data) > len(view) - offset:
            from multiprocessing import BufferTooShort

            raise BufferTooShort(bytes(data))
        view[offset : offset + len(data)] = data
        return len(data)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether something can be received: a message, or the end of the connection.

        Args:
            timeout: seconds to wait for it; None waits for ever.

        Raises:
            ClosedError: this side is closed.
            OSError: this end is write-only.
        """
        self._check(self._readable, "write-only")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._transport.pending:
            if not self._transport.wait(select.POLLIN, deadline):
                return False
            if self._transport.has_message():
                break
        return True

    # --- the slow path -----------------------------------------------------------------------------------------------------

    def _check(self, allowed: bool, what: str) -> None:
        self._transport.check_open()
        if not allowed:
            raise OSError(f"this end of the channel is {what}")

    def _send_slowly(self, message: bytes | Outgoing, type: int, timeout: float | None) -> None:
        outgoing = message if isinstance(message, Outgoing) else Outgoing([message])
        try:
            self._check(self._writable, "read-only")
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                self._send_outgoing(outgoing, type, deadline, wire.MAX_INLINE)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                self._send_outgoing(outgoing, type, deadline, 0)  # a small send buffer: all of it into a segment
        except BaseException:
            outgoing.failed()
            raise
        outgoing.sent()

    def _send_outgoing(self, out: Outgoing, type: int, deadline: float | None, max_inline: int) -> None:
        payload, fds, flags = out.payload, out.fds, 0
        if out.buffers:
            payload = [wire.pack_table(out.buffers), *payload]
        size = sum(map(len, payload))
        if size <= max_inline and not out.buffers:
            if self._fast and not fds and type == wire.MESSAGE:
                self._transport.send(b"", payload, (), deadline)
            else:
                header = wire.pack(type, flags, len(fds), 0, size, 0, _nonce() if fds else 0)
                self._with_bundle(header, payload, fds, deadline)
            return
        if size > max_inline:
            flags, parts, payload = wire.IN_SEGMENT, payload, []
        else:
            parts = []
        parts, segment_size = _lay_out(parts, size if flags else 0, out.buffers)
        self._transport.reserve(segment_size, deadline)
        segment, sealed = memory.write_segment(parts)
        with segment:
            flags |= wire.SEGMENT if sealed else wire.SEGMENT | wire.FILE
            if len(fds) + 1 > wire.MAX_FDS_PER_PACKET:
                flags |= wire.BUNDLE
            header = wire.pack(type, flags, len(fds), len(out.buffers), size, segment_size, _nonce())
            unread = self._transport.unread()
            self._with_bundle(header, payload, [*fds, segment.fileno()], deadline)
            self._transport.note_in_flight(segment_size, unread)

    def _with_bundle(self, header: bytes, payload: list[Any], fds: list[int], deadline: float | None) -> None:
        if len(fds) <= wire.MAX_FDS_PER_PACKET:
            self._transport.send(header, payload, fds, deadline)
            return
        with transports.make_bundle(fds) as bundle:
            self._transport.send(wire.with_flag(header, wire.BUNDLE), payload, [bundle.fileno()], deadline)

    def _recv_slowly(self, timeout: float | None, type: int) -> Any:
        self._check(self._readable, "write-only")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            header, payload, handles = self._transport.receive(deadline)
            if header is None:
                message, arrived_type = Incoming(payload), wire.MESSAGE
            else:
                message, arrived_type = self._open_packet(header, payload, handles), header.type
        except ProtocolError:
            self.close()
            raise
        if type == wire.BYTES:
            message.close()
            return message.payload
        if arrived_type == wire.BYTES:
            # As a Connection does: whatever bytes come are a pickle.
            pass
        return self._codec.decode(message)

    def _open_packet(self, header: wire.Header, payload: Any, handles: list[FdHandle]) -> Incoming:
        """Put a packet and its segment together; close its descriptors where that fails."""
        try:
            if not header.flags & wire.SEGMENT:
                return Incoming(payload, handles)
            segment = handles.pop()
            memory_view = memory.map_segment(segment, header.segment_size, sealed=not header.flags & wire.FILE)
            if header.flags & wire.IN_SEGMENT:
                payload = memory_view[: header.payload_size]
            buffers = [
                memory_view[offset : offset + size].toreadonly() if readonly else memory_view[offset : offset + size]
                for offset, size, readonly in wire.unpack_table(header, payload)
            ]
            return Incoming(payload[8 * header.buffers :], handles, buffers)
        except BaseException:
            for handle in handles:
                handle.close()
            raise

    # --- the descriptor ---------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Borrow the descriptor's number, for selectors and the like; reading from it breaks the channel.

        Raises:
            ClosedError: this side is closed.
        """
        self._transport.check_open()
        return self._transport.sock.fileno()

    def close(self) -> None:
        """Close this end; whoever is blocked in it gets ClosedError, the peer PeerClosedError.  Twice is harmless."""
        self._transport.close()

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return self._transport.closed

    @property
    def readable(self) -> bool:
        """Whether this end can receive."""
        return self._readable

    @property
    def writable(self) -> bool:
        """Whether this end can send."""
        return self._writable

    @property
    def transport(self) -> str:
        """How packets are kept apart: "seqpacket" by the kernel, "stream" by length-prefixed frames."""
        return self._transport.name

    @property
    def max_inflight(self) -> int:
        """Most bytes of large messages sent here and not yet taken; may be set."""
        return self._transport.max_inflight

    @max_inflight.setter
    def max_inflight(self, value: int) -> None:
        self._transport.max_inflight = value

    @property
    def peer(self) -> PeerCredentials:
        """Who is at the other end: pid, uid and gid as the kernel noted them when the connection was made.

        Raises:
            ClosedError: this side is closed.
            OSError: the system does not tell.
        """
        self._transport.check_open()
        return transports.peer_credentials(self._transport.sock)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._transport.sock.fileno()}"
        return f"<Channel {state} {self.transport}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process."""
        return _adopt_inherited, (inheritable(self, "Channel"), *_options(self))


def _options(channel: Channel) -> tuple[bool, bool, Codec | None, int]:
    codec = None if channel._codec is _PICKLE else channel._codec
    return channel._readable, channel._writable, codec, channel.max_inflight


def reduce_channel(channel: Channel, context: reducers.Context) -> reducers.Reduced:
    if channel.closed:
        raise reducers.Refused(channel, "it is closed")
    if context.moving:
        context.consume(channel.close)
    return rebuild_channel, (context.lend(channel.fileno(), channel), *_options(channel))


def rebuild_channel(index: int, readable: bool, writable: bool, codec: Codec | None, max_inflight: int) -> Channel:
    return reducers.built(_channel_of(reducers.take(index, stat.S_IFSOCK), readable, writable, codec, max_inflight))


def _adopt_inherited(token: Any, readable: bool, writable: bool, codec: Codec | None, max_inflight: int) -> Channel:
    handle = FdHandle(token.detach())
    os.set_inheritable(handle.fileno(), False)
    return _channel_of(handle, readable, writable, codec, max_inflight)


def _channel_of(
    handle: FdHandle, readable: bool, writable: bool, codec: Codec | None, max_inflight: int
) -> Channel:
    with handle, handle.to_socket() as sock:
        transports.transport_of(sock)
        owned = socket.socket(fileno=sock.detach())
    return Channel(owned, readable=readable, writable=writable, codec=codec, max_inflight=max_inflight)


reducers.known[Channel] = reduce_channel


def _lay_out(parts: list[Any], size: int, buffers: list[memoryview]) -> tuple[list[Any], int]:
    """Return the pieces of a segment with the gaps that alignment leaves, and its size in bytes."""
    parts, offset = list(parts), size
    for buffer in buffers:
        begin = wire.align(offset, buffer.nbytes)
        if begin > offset:
            parts.append(_ZEROS[: begin - offset])
        parts.append(buffer)
        offset = begin + buffer.nbytes
    return parts, offset


_ZEROS = memoryview(bytes(wire.PAGE))


def Pipe(  # noqa: N802 -- the name of multiprocessing's
    duplex: bool = True,
    *,
    transport: str | None = None,
    codec: Codec | None = None,
    max_inflight: int = transports.DEFAULT_MAX_INFLIGHT,
) -> tuple[Channel, Channel]:
    """Return the two ends of a new connection.

    Args:
        duplex: False makes the first end read-only and the second write-only.
        transport: "seqpacket", "stream", or None for the best that the system has.
        codec: how objects become bytes, at both ends; None for pickle.
        max_inflight: most bytes of large messages sent and not yet taken, each way; a send waits beyond it.

    Raises:
        ValueError: unknown transport.
        OSError: no descriptors left, or the system lacks the transport.
    """
    first, second = transports.socketpair(transport)
    return (
        Channel(first, writable=duplex, codec=codec, max_inflight=max_inflight),
        Channel(second, readable=duplex, codec=codec, max_inflight=max_inflight),
    )


def _is_ready(obj: Any) -> bool:
    return not isinstance(obj, Channel) or obj.closed or obj._transport.has_message()


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
    poll = select.poll()
    numbers = [as_fd(obj) for obj in objects]
    for number in numbers:
        poll.register(number, select.POLLIN)
    while True:
        ready = [obj for obj in objects if isinstance(obj, Channel) and obj._pending]
        if ready:
            return ready
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        found = {number for number, _ in poll.poll(None if left is None else left * 1000)}
        ready = [obj for obj, number in zip(objects, numbers, strict=True) if number in found and _is_ready(obj)]
        if ready or left == 0:
            return ready


class ChannelSet:
    """Many channels, one persistent epoll (kqueue or poll elsewhere): waiting costs what is ready, not what is registered.

    Args:
        channels: the first members.

    Raises:
        OSError: no descriptor left for the epoll.
    """

    def __init__(self, channels: Iterable[HasFileno] = ()) -> None:
        self._selector = selectors.DefaultSelector()
        self._numbers: dict[HasFileno, int] = {}
        for channel in channels:
            self.add(channel)

    def add(self, channel: HasFileno) -> None:
        """Watch ``channel`` (or anything with ``fileno()``); twice is harmless.

        Raises:
            ClosedError: it is closed.
            OSError: it cannot be watched, or the set is closed.
        """
        number = as_fd(channel)
        known = self._selector.get_map().get(number)
        if known is not None:
            if known.data is channel:
                return
            self.discard(known.data)  # closed since, and its number used again
        self._selector.register(number, selectors.EVENT_READ, channel)
        self._numbers[channel] = number

    def discard(self, channel: HasFileno) -> None:
        """Stop watching ``channel``; harmless where it is not watched, or was closed meanwhile."""
        number = self._numbers.pop(channel, None)
        if number is not None:
            self._selector.unregister(number)

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait until channels can be received from; return those, at least one unless the time was up.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = [key.data for key, _ in self._selector.select(left)]
            ready = [channel for channel in ready if _is_ready(channel)]
            if ready or left == 0:
                return ready

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, channel: object) -> bool:
        return channel in self._numbers

    def close(self) -> None:
        """Close the set; its channels stay open."""
        self._numbers.clear()
        self._selector.close()

    def __enter__(self) -> ChannelSet:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
