"""``AsyncChannel``: a channel for tasks of an event loop; codec, wire and transports are a ``Channel``'s, only waiting is new.

Each step is tried at once and waited for only where the kernel says EAGAIN, always with MSG_DONTWAIT: O_NONBLOCK belongs to all
who share the socket.  Taking a message is one step without an ``await`` in it, and so is sending a packet:

============== ================================================================================================
cancelled in   what becomes of the message
============== ================================================================================================
``recv``       it stays queued, in the kernel or in the transport, for the next ``recv``
``send``       a packet (SEQPACKET) was not sent; a frame that was begun (STREAM) is given up: whoever sends next, or
               ``close``, completes it, and the receiver drops it with its descriptors
============== ================================================================================================

Tasks that have to wait do so in turn, first come first served, each direction by itself.
"""

from __future__ import annotations

import errno
import pickle
import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

from fdshare import inflight, packets, rights, wire
from fdshare.aio.end import BURST, AsyncEnd
from fdshare.aio.passing import Blocked
from fdshare.aio.waiting import Waits
from fdshare.blocking import python_threads
from fdshare.channel import Channel
from fdshare.channel import Pipe as SyncPipe
from fdshare.codec import Codec, Incoming, Outgoing, raise_undecodable
from fdshare.errors import PeerClosedError, ProtocolError
from fdshare.handle import FdHandle
from fdshare.handlers import is_from_handler
from fdshare.inflight import DEFAULT_MAX_INFLIGHT, DRAIN_SECONDS
from fdshare.transports import StreamTransport

__all__ = ["AsyncChannel", "Pipe"]

THREAD_SIZE = 4 * 2**20
"""Segments from this size on, bytes, are written by a thread.  Measured: one of this size takes 0.6 ms, for which the loop would
stand still (0.2 in a steady flow); a hop to a thread and back takes 0.03 ms, and makes others wait for the interpreter's lock."""

T = TypeVar("T")

_PICKLE_MARK = wire.PICKLE_MARK
_NOTICE_MARK = bytes([wire.NOTICE])
_SEND_NOW = rights.SEND_NOW
_loads = pickle.loads
_NOTHING: Any = object()


class AsyncChannel(AsyncEnd):
    """One end of a connection for objects, for the tasks of an event loop.

    Made by ``Pipe``, ``connect`` and ``Listener`` of this module, or from a Channel, which is spent: the connection goes
    on here with whatever had arrived.  Several tasks may send and receive at once; one end may be shared by several
    processes where the transport is "seqpacket".  Not for several threads: it belongs to the event loop that waits for it.
    AsyncChannels travel in messages and as arguments of processes, and arrive as such.

    Args:
        channel: an open Channel or AsyncChannel; it is closed to its user.

    Raises:
        ClosedError: it is closed.
        RuntimeError: the event loop of another thread still runs with it.
    """

    def __init__(self, channel: Channel | AsyncChannel) -> None:
        super().__init__(channel)
        inner = self._inner
        self._encode, self._send_bare, self._few = inner._encode, inner._send_bare, inner._few
        self._quiet = (
            False  # whether the last recv found nothing at first; then asking costs less than trying
        )

    async def send(self, obj: Any) -> None:
        """Send one object, with every descriptor in it.

        A send that is cancelled has sent nothing.  What ``obj`` holds must not be changed or closed before it returns.

        Args:
            obj: as for ``Channel.send``.

        Raises:
            NotSendableError: something in it cannot travel.
            PeerClosedError: nobody can receive it any more.
            ClosedError: this side is closed, also while it waited.
            FdLimitError, NoSpaceError, MessageTooLargeError, AccessDeniedError: nothing was sent.
        """
        message = self._encode(obj)
        if self._credit and not self._waits.sending.taken:
            self._credit -= 1
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
        await self._send_slowly(message, wire.MESSAGE)

    async def recv(self) -> Any:
        """Receive the next object.

        A recv that is cancelled has taken nothing.

        Raises:
            PeerClosedError: the other side is closed and everything was received.
            ClosedError: this side is closed, also while it waited.
            DecodeError, FdLimitError, DescriptorsLostError, ProtocolError: as for ``Channel.recv``.
        """
        if self._credit and not self._waits.receiving.taken:
            self._credit -= 1
            transport = self._transport
            if (
                not self._quiet
                or transport.arrived is not None
                or transport.greeting is not None
                or transport.closed
                or self._input.poll(0)
            ):
                obj = self._receive_now(wire.MESSAGE)
                if obj is not _NOTHING:
                    self._quiet = False
                    return obj
                self._quiet = True
            return await self._receive_slowly(wire.MESSAGE, True)
        return await self._receive_slowly(wire.MESSAGE, False)

    def __aiter__(self) -> Self:
        """Return itself: iterating yields messages until the peer closes."""
        return self

    async def __anext__(self) -> Any:
        """Receive the next object, until the peer closes."""
        try:
            return await self.recv()
        except PeerClosedError:
            raise StopAsyncIteration from None

    async def send_bytes(self, buf: Any) -> None:
        """Send bytes as one message, for ``recv_bytes``.

        Args:
            buf: a bytes-like object; a slice of a memoryview for a part of one.

        Raises:
            PeerClosedError, ClosedError, NoSpaceError: as for :meth:`send`.
        """
        view = memoryview(buf)
        view = view.cast("B") if view.contiguous else memoryview(bytes(view))
        await self._send_slowly(Outgoing([view]), wire.BYTES)

    async def recv_bytes(self) -> bytes:
        """Receive one message of ``send_bytes``.

        Raises:
            PeerClosedError, ClosedError, ProtocolError: as for :meth:`recv`.
        """
        return bytes(await self._receive_slowly(wire.BYTES, False))

    # --- receiving --------------------------------------------------------------------------------------------------------

    def _receive_now(self, type: int) -> Any:
        """Take the next message, or return _NOTHING."""
        transport = self._transport
        if transport.plain and type == wire.MESSAGE:
            if transport.arrived is None:
                try:
                    for transport.arrived in transport.arrivals_now:  # noqa: B020 -- an attribute as target, see transport.py
                        break
                except BlockingIOError:
                    return _NOTHING
                except OSError:
                    pass  # closed, gone: the slow path tells
            if transport.arrived is not None:
                data, ancillary, _, _ = transport.arrived
                if data and not ancillary and data[0] == _PICKLE_MARK:
                    transport.arrived = None
                    try:
                        return _loads(data)
                    except Exception as error:  # noqa: BLE001 -- raised again
                        raise_undecodable(error)
                if not ancillary and data[:1] == _NOTICE_MARK and not python_threads():
                    few = transport.receive_few()
                    if few is not None:
                        return self._inner._codec.decode(Incoming(*few))
        inner = self._inner
        inner._check(inner._readable, "write-only")
        try:
            packet = transport._receive_now()
            if packet is None:
                return _NOTHING
            message = inner._open(packet)
        except ProtocolError:
            self.close()
            raise
        return inner._decode(message, type)

    async def _receive_slowly(self, type: int, tried: bool) -> Any:
        waits = self._enter()
        turn = waits.receiving
        if turn.taken:
            await turn.wait()
        else:
            turn.taken = True
        try:
            if not tried:
                if not self._credit:
                    await self._pause(waits)
                message = self._receive_now(type)
                if message is not _NOTHING:
                    return message
            while True:
                await waits.readable()
                self._credit = BURST
                message = self._receive_now(type)
                if message is not _NOTHING:
                    return message
        finally:
            turn.leave()

    async def _hello(self) -> None:
        """Wait for the peer's hello, before anybody receives.

        Raises:
            OSError: as the first recv would.
        """
        waits, transport = self._enter(), self._transport
        while transport.greeting is not None and not transport.greeting.take(transport):
            await waits.readable()
            transport.check_open()

    def _end_input(self) -> None:
        """Let ``recv`` tell the end of the connection, after what has arrived already."""
        if not self.closed:
            try:
                self._transport.sock.shutdown(socket.SHUT_RD)
            except OSError:
                pass  # it has ended

    def _end_output(self) -> None:
        """Let the peer find the end of the connection after what was sent."""
        self._inner._check(self.writable, "read-only")
        self._inner._writable = False
        self._send_bare = self._few = None
        try:
            self._transport.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has ended

    # --- sending ----------------------------------------------------------------------------------------------------------

    async def _send_slowly(self, message: bytes | Outgoing, type: int) -> None:
        out = message if isinstance(message, Outgoing) else Outgoing([message])
        try:
            self._inner._check(self.writable, "read-only")
            waits = self._enter()
            turn = waits.sending
            if turn.taken:
                await turn.wait()
            else:
                turn.taken = True
            try:
                if not self._credit:
                    await self._pause(waits)
                await self._send_outgoing(waits, out, type, wire.MAX_INLINE)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                # A small send buffer: all of it into a segment.
                await self._send_outgoing(waits, out, type, 0)
            finally:
                turn.leave()
        except BaseException:
            out.failed()
            raise
        out.sent()

    async def _send_outgoing(self, waits: Waits, out: Outgoing, type: int, max_inline: int) -> None:
        transport, fds = self._transport, out.fds
        inline = min(max_inline, wire.ALWAYS_INLINE)
        if not out.buffers:
            size = sum(map(len, out.payload))
            # More than a little goes inline only where it cannot block: the queue is empty.
            if inline < size <= max_inline and not transport.in_flight.unread():
                inline = max_inline
            if size <= inline and transport.bare and not fds and type == wire.MESSAGE:
                await self._send_packet(waits, b"", out.payload, ())
                return
        header, payload, parts = plan = packets.plan(out, type, inline, wire.nonce())
        if fds or parts is not None:
            await self._patiently(waits, partial(transport.untaken.make_room, len(fds) + (parts is not None)))
        if parts is None:
            if out.announced:
                await self._send_step(waits, [wire.pack(*header), *payload], fds)
                transport.untaken.note(len(fds))
            else:
                await self._with_bundle(waits, header, payload, fds)
            return
        reservation = await self._reserve(waits, header.segment_size)
        write = partial(self._inner._write_segment, plan)
        header, segment = (
            write() if header.segment_size < THREAD_SIZE else await waits.run(write, _close_segment)
        )
        with segment:
            await self._with_bundle(waits, header, payload, [*fds, segment.fileno()])
            transport.in_flight.note(reservation)

    async def _reserve(self, waits: Waits, size: int) -> inflight.Reservation:
        """Wait until ``size`` more bytes may be in flight."""
        in_flight = self._transport.in_flight
        warn_at = time.monotonic() + inflight.WARN_SECONDS
        while True:
            self._transport.check_open()
            try:
                return in_flight.reserve(size, None)
            except Blocked:
                pass
            await waits.sleep(inflight.TICK_SECONDS)
            if time.monotonic() > warn_at and self.readable and not self.closed and self.poll():
                warn_at = float("inf")
                inflight._warn_of_deadlock(in_flight.limit)

    async def _with_bundle(
        self, waits: Waits, header: wire.Header, payload: list[Any], fds: list[int]
    ) -> None:
        if len(fds) <= wire.MAX_FDS_PER_PACKET:
            await self._send_packet(waits, wire.pack(*header), payload, fds)
        else:
            header = header._replace(flags=header.flags | wire.BUNDLE)
            with await self._patiently(waits, partial(self._transport.bundle, fds)) as bundle:
                await self._send_packet(waits, wire.pack(*header), payload, [bundle.fileno()])
        if fds:
            self._transport.untaken.note(len(fds))

    async def _send_packet(self, waits: Waits, header: bytes, payload: list[Any], fds: Sequence[int]) -> None:
        transport = self._transport
        if transport.takes is not None:
            transport.takes.check(header, sum(map(len, payload)))
        if isinstance(transport, StreamTransport):
            await self._send_frame(waits, transport, wire.frame(header, payload), fds)
            return
        if fds:
            await self._send_step(waits, [wire.notice_of(header)], ())
        await self._send_step(waits, [header, *payload], fds)

    async def _send_frame(
        self, waits: Waits, transport: StreamTransport, frame: bytearray, fds: Sequence[int]
    ) -> None:
        await self._send_until(waits, transport, len(transport._frame), ())  # one that was given up
        transport._frame, transport._sent = frame, 0
        try:
            if fds:  # with the first byte behind the header, which tells of them
                await self._send_until(waits, transport, wire.HEADER_SIZE, ())
                await self._send_until(waits, transport, wire.HEADER_SIZE + 1, fds)
            await self._send_until(waits, transport, len(frame), ())
        except BaseException:
            if transport._sent == 0:
                transport._frame = bytearray()
            elif transport._sent < len(frame):
                frame[-1] = 0
            raise

    async def _send_until(
        self, waits: Waits, transport: StreamTransport, end: int, fds: Sequence[int]
    ) -> None:
        while transport._sent < end:
            await self._send_step(waits, [memoryview(transport._frame)[transport._sent : end]], fds)

    async def _send_step(self, waits: Waits, buffers: Sequence[Any], fds: Sequence[int]) -> None:
        await self._patiently(waits, partial(self._transport._send_step, buffers, fds))

    async def _patiently(self, waits: Waits, function: Callable[[float | None], T]) -> T:
        """Call a function of the transport, which takes a deadline, until it need not wait any more."""
        deadline: float | None = None
        while True:
            try:
                return function(deadline)
            except Blocked as blocked:
                events = blocked.events
            if events != select.POLLHUP:
                await waits.writable()
                self._credit = BURST
            else:  # descriptors in flight have to drain
                deadline = deadline or time.monotonic() + DRAIN_SECONDS
                await waits.sleep(inflight.TICK_SECONDS)


def _close_segment(written: tuple[wire.Header, FdHandle]) -> None:
    written[1].close()


def Pipe(  # noqa: N802 -- the name of multiprocessing's
    duplex: bool = True,
    *,
    transport: str | None = None,
    codec: Codec | None = None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
) -> tuple[AsyncChannel, AsyncChannel]:
    """Return the two ends of a new connection; arguments are those of ``fdshare.Pipe``.

    Raises:
        ValueError: unknown transport.
        OSError: no descriptors left, or the system lacks the transport.
    """
    first, second = SyncPipe(
        duplex, transport=transport, codec=codec, max_inflight=max_inflight, max_untaken=max_untaken
    )
    return AsyncChannel(first), AsyncChannel(second)
