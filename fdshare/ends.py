"""The two ends of a queue's pair of sockets: what a packet weighs, and what a packet is.

A large item's packet is padded, so that it weighs in the socket what its segment does in memory, to scale.  The kernel then
bounds the items of all producers together, with no accounts that could get out of step when somebody dies.
"""

from __future__ import annotations

import errno
import fcntl
import math
import select
import socket
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any

from fdshare import packets, recycle, rights, system, wire
from fdshare.blocking import other_threads
from fdshare.choosing import socketpair
from fdshare.codec import Incoming
from fdshare.errors import DescriptorsLostError, ProtocolError, QueueClosedError
from fdshare.handle import HandleList, socketpair_of
from fdshare.handlers import is_from_handler
from fdshare.inflight import DRAIN_SECONDS, TICK_SECONDS
from fdshare.rights import Arrived
from fdshare.sync import Event
from fdshare.transport import Transport

__all__ = ["Inlet", "Outlet", "make_pair", "time_limit"]

HAVE_SEQPACKET = system.HAVE_SEQPACKET
"""Whether SEQPACKET is used; read at each use, so that tests can switch it off."""

DGRAM_BUFFER = 128 * 1024
"""Bytes of socket buffer for datagrams: the default of macOS takes 2 KiB."""

CLOSED_TICK_SECONDS = 0.02
"""How often a put that waits for room for its datagram looks whether the queue was closed meanwhile."""

_PASSING = (errno.ETOOMANYREFS, errno.ENOBUFS)
"""What a writer waits for until it has passed, beside room."""

_SO_PEEK_OFF = 42
"""At which byte of all that is unread a peek begins; Python has no name for it."""

_LOOK = rights.NOW | rights.PEEK | socket.MSG_TRUNC
"""Leaves the packet where it is, and tells all its length."""

_RESERVE = 64
"""Bytes below the send buffer that no padded packet exceeds: the kernel refuses what leaves it less than 32."""


class Inlet(Transport):
    """The end that is written to."""

    name = "queue"

    def __init__(self, sock: socket.socket, maxbytes: int, over: Event | None) -> None:
        super().__init__(sock)
        self.capacity = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._maxbytes = maxbytes
        self._over = over

    def padding(self, header: wire.Header) -> memoryview:
        """Return what makes a packet weigh in the socket what its segment does in memory, to scale."""
        size = min(header.segment_size, self._maxbytes) * self.capacity // self._maxbytes
        size = min(size, self.capacity - _RESERVE) - wire.HEADER_SIZE - header.inline_size
        return memoryview(_zeros(self.capacity))[: max(0, size)]

    def put_packet(self, pieces: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        """Send one packet, waiting for room.

        Raises:
            TimeoutError, PeerClosedError, ClosedError, FdLimitError, AccessDeniedError, NotSendableError
            OSError: EMSGSIZE.
        """
        # The kernel wakes a writer when three quarters are free again, which is long where few items fill it; and it wakes
        # none for the end of datagrams, nor, on macOS, for room.
        tick = None if sum(map(len, pieces)) <= self.capacity // 8 else TICK_SECONDS
        if self._over is not None:
            tick = CLOSED_TICK_SECONDS
        if tick is None and deadline is None and not fds and not (other_threads() or recycle.kept):
            # Nobody can close it under us, so the kernel waits, in the one call.
            try:
                self.sock.send(b"".join(pieces), rights.SEND)
                return
            except OSError:
                pass  # the next step tells
        drained = None
        while self._over is None or not self._over.is_set():
            try:
                until = None if tick is None else time.monotonic() + tick
                self._send_step(pieces, fds, _earlier(until, deadline))
                return
            except OSError as error:
                if tick is None or not (isinstance(error, TimeoutError) or error.errno in _PASSING):
                    raise
                now = time.monotonic()
                if error.errno == errno.ETOOMANYREFS and deadline is None:
                    drained = drained or now + DRAIN_SECONDS
                if now >= (drained or deadline or math.inf):
                    if error.errno == errno.ENOBUFS:  # of BSD, for datagrams that find no room
                        raise TimeoutError("the time is up; the queue is full") from error
                    raise
        raise QueueClosedError

    def wait_for_room(self, deadline: float | None) -> None:
        """Wait until the next item may be put, before memory is spent on it.

        Raises:
            TimeoutError, ClosedError
        """
        while self.in_flight.unread() >= self.capacity:
            if self._over is not None and self._over.is_set():
                raise QueueClosedError
            tick = time.monotonic() + TICK_SECONDS
            found = self.wait(select.POLLOUT, _earlier(tick, deadline))
            if found & (select.POLLERR | select.POLLHUP):
                return  # the send will say so
            if not found and deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the queue has {self._maxbytes} bytes; nothing was put")

    def is_full(self) -> bool:
        """Whether the next put would wait; raises ClosedError."""
        unread = self.in_flight.unread()
        # Of no use where the kernel does not tell; POLLOUT, on Linux, means that three quarters are free.
        return unread >= self.capacity if unread else not self.wait(select.POLLOUT, time.monotonic())


def _earlier(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)


_zero_bytes = b""


def _zeros(size: int) -> bytes:
    global _zero_bytes
    if len(_zero_bytes) < size:
        _zero_bytes = bytes(size)
    return _zero_bytes


class Outlet(Transport):
    """The end that is read from."""

    name = "queue"

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.arrivals = self._arrivals(0)
        """What comes, each waited for in the read itself."""

    def is_empty(self) -> bool:
        """Whether no item lies in the socket, or it is closed."""
        # No peek, which would begin where another process's count() has set it.
        buffer = bytearray(4)
        try:
            fcntl.ioctl(self.sock, termios.FIONREAD, buffer)
        except (OSError, ValueError) as error:
            if is_from_handler(error):
                raise
        return not any(buffer)

    def count(self) -> int:
        """Return how many items lie in the socket, by a look at each; others may take and put meanwhile.

        Raises:
            NotImplementedError: the system cannot look beyond the first.
        """
        if sys.platform != "linux":
            raise NotImplementedError("only Linux looks at more than the first item of a queue: ask empty()")
        if self.is_empty():
            return 0
        sock, items, place, byte = self.sock, 0, 0, bytearray(1)
        try:
            while True:
                # At each step, as the place belongs to all who share the socket.
                sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, place)
                size = sock.recv_into(byte, 1, _LOOK)
                if not size:  # the queue was closed
                    return items
                place += size
                items += 1
        except OSError as error:  # no more, or closed by another thread
            if is_from_handler(error):
                raise
            return items
        finally:
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)

    def open_item(self, arrived: Any) -> Incoming:
        """Return the parts of an item that is more than a bare pickle; what came is used up.

        Raises:
            DescriptorsLostError, ProtocolError, DecodeError: it is gone.
        """
        owner = arrived if isinstance(arrived, Arrived) else Arrived(arrived)
        data, _, flags, _ = owner
        try:
            header = wire.unpack(data)
            end = wire.HEADER_SIZE + header.inline_size
            if header.type != wire.MESSAGE or len(data) < end:
                raise ProtocolError(f"an item of {len(data)} bytes says {end}")
        except ProtocolError:
            owner.close()
            raise
        try:
            handles: HandleList = self._complete(owner, header, None)
        except DescriptorsLostError as error:
            raise _lost(error, flags) from error
        return packets.open_packet(header, memoryview(data)[wire.HEADER_SIZE : end], handles)


def _lost(error: DescriptorsLostError, flags: int) -> DescriptorsLostError:
    limit = rights.descriptor_limit()
    cause = (
        f"there was no room for them (limit {limit}): close some or raise RLIMIT_NOFILE"
        if flags & rights.CONTROL_TRUNCATED or not rights.has_room_for(error.expected)
        else "the kernel or a security module dropped the others"
    )
    return DescriptorsLostError(
        f"an item with {error.expected} descriptors is gone, of which {error.received} arrived and were closed: {cause}; "
        "a queue that others read too cannot hold an item back, and goes on with the next",
        expected=error.expected,
        received=error.received,
    )


_SNDBUF_FACTOR = 2 if sys.platform == "linux" else 1
"""Linux doubles what one asks for, to pay for its own accounts."""


def make_pair(maxbytes: int) -> tuple[socket.socket, socket.socket, Event | None]:
    """Return the end to read from, the one to write to, and what says that it is over where the sockets cannot.

    Raises:
        OSError: no descriptors left.
    """
    over = None
    if HAVE_SEQPACKET:
        outlet, inlet = socketpair("seqpacket")
    else:
        outlet, inlet = socketpair_of(socket.SOCK_DGRAM)
        inlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DGRAM_BUFFER)
        outlet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DGRAM_BUFFER)
        over = Event()
    if inlet.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > maxbytes:
        inlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, maxbytes // _SNDBUF_FACTOR)
    for sock in (outlet, inlet):
        if sock.gettimeout() is not None:  # by socket.setdefaulttimeout
            sock.settimeout(None)
    return outlet, inlet, over


def time_limit(block: bool | float | None, timeout: float | None) -> float | None:
    """Return the time limit of a call that may be written as that of queue.Queue, or with a timeout alone."""
    if timeout is None and not isinstance(block, bool):
        return block
    return timeout if block else 0.0
