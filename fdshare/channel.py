"""``Channel``: one end of a connection that carries objects, whatever descriptors they hold.

    send: object -> codec.encode -> Outgoing -> wire.pack -> transport.send -> kernel
    recv: kernel -> transport.receive -> wire.unpack -> Incoming -> codec.decode -> object

Each direction has a fast path for small messages without descriptors, which are bare pickles on a SEQPACKET socket: one
system call, no header.  Everything else takes the slow path below it.
"""

from __future__ import annotations

import errno
import math
import pickle
import select
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from fdshare import packets, reducers, rights, wire
from fdshare.blocking import TICK_MILLISECONDS, python_threads
from fdshare.bytemessages import ByteMessages
from fdshare.choosing import socketpair, transport_of
from fdshare.closing import Closing
from fdshare.codec import Codec, Incoming, Outgoing, PickleCodec, decode_bare, raise_undecodable
from fdshare.credentials import PeerCredentials, peer_credentials
from fdshare.errors import PeerClosedError, ProtocolError
from fdshare.handle import FdHandle, Outside, to_socket
from fdshare.handlers import is_from_handler
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.transport import Packet
from fdshare.transports import SeqpacketTransport, has_read_ahead

__all__ = ["Channel", "Pipe"]

_PICKLE = PickleCodec()
_PICKLE_MARK = wire.PICKLE_MARK
_NOTICE_MARK = bytes([wire.NOTICE])
_loads = pickle.loads
_SEND_NOW = rights.SEND_NOW


class Channel(ByteMessages, Closing):
    """One end of a connection for objects; a drop-in for ``multiprocessing.connection.Connection``.

    Made by :func:`Pipe`, or around a connected AF_UNIX socket, which it takes over.  Usable by several threads at once; one end
    may be shared by several processes where the transport is "seqpacket".  Travels in messages and as an argument of processes.

    Args:
        sock: a connected AF_UNIX socket, SOCK_SEQPACKET or SOCK_STREAM; it belongs to the channel now.
        readable, writable: what this end may do.
        codec: how objects become bytes; None for pickle.
        max_inflight: most bytes of large messages sent here and not yet taken there; a send waits beyond it.
        max_untaken: most descriptors sent here and not yet taken there, as the system has a limit for all channels of a user
            together.  Beyond it a send waits, until its timeout or for a second in which none is taken, and raises FdLimitError.
            None for no bound but the system's; with a codec without pickle, for an eighth of the soft limit of descriptors.

    Raises:
        ValueError: not such a socket, neither readable nor writable, or a bound below one.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        readable: bool = True,
        writable: bool = True,
        codec: Codec | None = None,
        max_inflight: int = DEFAULT_MAX_INFLIGHT,
        max_untaken: int | None = None,
    ) -> None:
        if not (readable or writable):
            raise ValueError("a channel is readable, writable or both")
        if max_untaken is not None and max_untaken < 1:
            raise ValueError(f"max_untaken is {max_untaken}: 1 or more, or None")
        if sock.gettimeout():
            sock.settimeout(0.0)  # waiting is our own; O_NONBLOCK, which others share, stays as it is
        self._transport = transport = transport_of(sock, max_inflight)
        self._readable = readable
        self._writable = writable
        self._codec: Codec = codec or _PICKLE
        self._encode = self._codec.encode
        # The fast paths: bare pickles, where the kernel keeps packets apart.
        transport.bare = codec is None and transport.name == "seqpacket"
        limits = getattr(codec, "limits", None)
        if limits is not None:
            transport.restrict(limits)
        if max_untaken is not None or limits is not None:
            transport.max_untaken = max_untaken
        transport.plain = transport.bare and readable
        self._send_bare = sock.send if transport.bare and writable else None
        seqpacket = transport if isinstance(transport, SeqpacketTransport) else None
        self._few = seqpacket if writable else None
        self._framed = seqpacket if limits is not None else None

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
        if type(message) is bytes and self._send_bare is not None:
            try:
                self._send_bare(message, _SEND_NOW)
                return
            except OSError as error:  # full, closed, gone: the slow path tells
                if is_from_handler(error):  # the message may be out
                    raise
        elif self._few is not None:
            if isinstance(message, bytes):
                if self._few.send_framed(message):
                    return
            elif self._few.send_few(message):
                message.sent()
                return
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

        What a signal handler raises comes out as it is.  A message that was being rebuilt is lost with it, unless it is a small
        one and that was a KeyboardInterrupt.
        """
        transport = self._transport
        if timeout is None and transport.plain and transport.arrived is None and not python_threads():
            # What came is this call's alone until it says otherwise: threads that C has made may be here too.
            arrived: Any = None
            try:
                transport.looks = looks = transport.looks - 1
                if looks < 0 or transport.input.poll(TICK_MILLISECONDS):
                    for arrived in transport.arrivals_now:  # noqa: B007 -- stored without a gap, see transport.py
                        break
                    data, ancillary, _, _ = arrived
                    if data and not ancillary and data[0] == _PICKLE_MARK:
                        return _loads(data)
                    transport.arrived = arrived
            except KeyboardInterrupt:
                if arrived is not None:
                    transport.arrived = arrived  # the message stays for the next call
                raise
            except Exception as error:
                if arrived is not None:
                    raise_undecodable(error)
                if is_from_handler(error):
                    raise
                transport.found_nothing()
                # nothing there yet, closed, or a signal handler receives in the middle of this: the slow path tells
            if transport.arrived is not None and not ancillary and data[:1] == _NOTICE_MARK:
                few = transport.receive_few()
                if few is not None:
                    return self._codec.decode(Incoming(*few))
        return self._recv_slowly(timeout, wire.MESSAGE)

    def __iter__(self) -> Iterator[Any]:
        """Yield messages until the peer closes."""
        while True:
            try:
                obj = self.recv()
            except PeerClosedError:
                return
            yield obj

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether something can be received: a message, or the end of the connection.

        On "stream" also the beginning of a message whose rest has not come yet, as with a Connection.

        Args:
            timeout: seconds to wait for it; None waits for ever.

        Raises:
            ClosedError: this side is closed.
            OSError: this end is write-only.
        """
        self._check(self._readable, "write-only")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not has_read_ahead(self._transport):
            if not self._transport.wait(select.POLLIN, deadline):
                return False
            if self._transport.has_message():
                break
            if deadline is not None and time.monotonic() >= deadline:
                return False  # a peer that sends nothing but notices does not keep us
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
                # A small send buffer: all of it into a segment.
                self._send_outgoing(outgoing, type, deadline, 0)
        except BaseException:
            outgoing.failed()
            raise
        outgoing.sent()

    def _send_outgoing(self, out: Outgoing, type: int, deadline: float | None, max_inline: int) -> None:
        transport, fds = self._transport, out.fds
        inline = min(max_inline, wire.ALWAYS_INLINE)
        if not out.buffers:
            size = sum(map(len, out.payload))
            # More than a little goes inline only where it cannot block: the queue is empty.
            if inline < size <= max_inline and not transport.in_flight.unread():
                inline = max_inline
            if size <= inline and transport.bare and not fds and type == wire.MESSAGE:
                transport.send(b"", out.payload, (), deadline)
                return
        header, payload, parts = plan = packets.plan(out, type, inline, wire.nonce())
        if fds or parts is not None:
            transport.untaken.make_room(len(fds) + (parts is not None), deadline)
        if parts is None and out.announced:
            transport._send_step([wire.pack(*header), *payload], fds, deadline)
            transport.untaken.note(len(fds))
            return
        if parts is None:
            self._with_bundle(header, payload, fds, deadline)
            return
        reservation = transport.in_flight.reserve(header.segment_size, deadline)
        header, segment = self._write_segment(plan)
        try:  # and not "with", whose __enter__ is one more place for an interrupt
            self._with_bundle(header, payload, [*fds, segment.fileno()], deadline)
            transport.in_flight.note(reservation)
        finally:
            segment.close()

    def _write_segment(self, plan: packets.Plan) -> tuple[wire.Header, FdHandle]:
        trusted = self._codec is _PICKLE
        return plan.write_segment(self._transport if trusted else None, piped=trusted)

    def _with_bundle(
        self, header: wire.Header, payload: list[Any], fds: list[int], deadline: float | None
    ) -> None:
        transport = self._transport
        if len(fds) <= wire.MAX_FDS_PER_PACKET:
            transport.send(wire.pack(*header), payload, fds, deadline)
        else:
            header = header._replace(flags=header.flags | wire.BUNDLE)
            with transport.bundle(fds, deadline) as bundle:
                transport.send(wire.pack(*header), payload, [bundle.fileno()], deadline)
        if fds:
            transport.untaken.note(len(fds))

    def _recv_slowly(self, timeout: float | None, type: int) -> Any:
        self._check(self._readable, "write-only")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            few = None if self._framed is None or timeout is not None else self._framed.receive_framed()
            message: bytes | Incoming
            if few is not None:
                message = Incoming(*few)
            else:
                packet = self._transport.receive(deadline)
                bare = packet.header is None and type == wire.MESSAGE
                message = packet.payload if bare else self._open(packet)
        except ProtocolError:
            self.close()
            raise
        return decode_bare(message) if isinstance(message, bytes) else self._decode(message, type)

    def _open(self, packet: Packet) -> Incoming:
        return packets.open_packet(*packet, trusted=self._codec is _PICKLE)

    def _decode(self, message: Incoming, type: int) -> Any:
        if type == wire.BYTES:
            message.close()
            return message.payload
        return self._codec.decode(message)

    # --- the descriptor ---------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Borrow the descriptor's number, for selectors and the like; reading from it breaks the channel.

        Raises:
            ClosedError: this side is closed.
        """
        self._transport.check_open()
        self._transport.forks_when_alone = -1  # it may be duplicated, or inherited
        return self._transport.sock.fileno()

    def close(self) -> None:
        """Close this end; whoever is blocked in it gets ClosedError, the peer PeerClosedError.  Twice is harmless.

        A thread that began to wait less than 0.05 s ago may go on waiting for so long.

        Raises:
            OSError: as close(2).
        """
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
        return self._transport.in_flight.limit

    @max_inflight.setter
    def max_inflight(self, value: int) -> None:
        self._transport.in_flight.limit = value

    @property
    def max_untaken(self) -> float:
        """Most descriptors sent here and not yet taken; infinite where only the system bounds them.  May be set."""
        return self._transport.untaken.bound

    @max_untaken.setter
    def max_untaken(self, value: float) -> None:
        self._transport.untaken.limit = value

    @property
    def peer(self) -> PeerCredentials:
        """Who is at the other end: pid, uid and gid as the kernel noted them at connect(2), or its listener's listen(2).

        Raises:
            ClosedError: this side is closed.
            OSError: the system does not tell.
        """
        self._transport.check_open()
        return peer_credentials(self._transport.sock)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._transport.sock.fileno()}"
        return f"<Channel {state} {self.transport}>"

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:
        transport = getattr(self, "_transport", None)  # unset where __init__ raised
        if transport is not None and not transport.closed and not finalizing():  # closing needs modules
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:
                transport.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


def reduce_channel(channel: Channel, context: reducers.Context) -> reducers.Reduced:
    if channel.closed:
        raise reducers.Refused(channel, "it is closed")
    if context.moving:
        context.consume(channel.close)
    codec = None if channel._codec is _PICKLE else channel._codec
    limit = channel._transport.untaken.limit
    options = channel._readable, channel._writable, codec, channel.max_inflight, limit
    return rebuild_channel, (context.lend(channel.fileno(), channel), *options)


def rebuild_channel(
    index: int,
    readable: bool,
    writable: bool,
    codec: Codec | None,
    max_inflight: int,
    max_untaken: float | None = math.inf,
) -> Channel:
    channel = _channel_of(reducers.take(index, stat.S_IFSOCK), readable, writable, codec, max_inflight)
    channel._transport.max_untaken = max_untaken
    return reducers.built(channel)


def _channel_of(
    handle: FdHandle, readable: bool, writable: bool, codec: Codec | None, max_inflight: int
) -> Channel:
    sock = to_socket(handle)
    try:
        return Channel(sock, readable=readable, writable=writable, codec=codec, max_inflight=max_inflight)
    except BaseException:
        sock.close()
        raise


reducers.known[Channel] = reduce_channel


def Pipe(  # noqa: N802 -- the name of multiprocessing's
    duplex: bool = True,
    *,
    transport: str | None = None,
    codec: Codec | None = None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
) -> tuple[Channel, Channel]:
    """Return the two ends of a new connection.

    Args:
        duplex: False makes the first end read-only and the second write-only.
        transport: "seqpacket", "stream", or None for the best that the system has.
        codec: how objects become bytes, at both ends; None for pickle.
        max_inflight: most bytes of large messages sent and not yet taken, each way; a send waits beyond it.
        max_untaken: most descriptors sent and not yet taken, each way; as for :class:`Channel`.

    Raises:
        ValueError: unknown transport.
        OSError: no descriptors left, or the system lacks the transport.
    """
    first, second = socketpair(transport)
    return (
        Channel(first, writable=duplex, codec=codec, max_inflight=max_inflight, max_untaken=max_untaken),
        Channel(second, readable=duplex, codec=codec, max_inflight=max_inflight, max_untaken=max_untaken),
    )
