"""The only caller of ``sendmsg`` and ``recvmsg``: SEQPACKET and STREAM sockets, and bare SCM_RIGHTS.

A transport moves packets: a header, a payload, descriptors.  It is used by several threads at once and closed under any of them.  No call
blocks in the kernel with a lock held, and waiting happens in one place, :meth:`Transport.wait`.

Signals: a handler that raises (KeyboardInterrupt) may strike between any two bytecodes.  So what a system call returned is
put where it is remembered by C code alone, ``pending.extend(starmap(recvmsg, ...))``, and each step from there to the caller is one
assignment.  An interrupted ``recv`` either left its message for the next one or dropped it whole; an interrupted ``send`` sent all or
nothing.

Receiving descriptors::

    NOTICE header read --> noticed --> peek the packet: all descriptors there? --no--> FdLimitError, still queued
                                          | yes
                                          v
                               take the packet --> Arrived (owns the numbers) --> FdHandles
"""

from __future__ import annotations

import _thread
import array
import errno
import fcntl
import math
import os
import resource
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import starmap
from typing import Any

import attrs

from fdshare import wire
from fdshare.errors import (
    AccessDeniedError,
    ClosedError,
    DescriptorsLostError,
    FdLimitError,
    NotSendableError,
    PeerClosedError,
    ProtocolError,
)
from fdshare.handle import FdHandle, HasFileno, as_fd

__all__ = ["PeerCredentials", "SeqpacketTransport", "StreamTransport", "Transport", "recv_fds", "send_fds"]

CONTROL_SIZE = socket.CMSG_SPACE(4 * wire.MAX_FDS_PER_PACKET) + 64
"""Bytes of control buffer for every read: the most descriptors of one packet, and credentials, should somebody ask for them.
A smaller one would lose descriptors, and leak them on macOS."""

DRAIN_SECONDS = 1.0
"""How long a sender waits, without a timeout of its own, for descriptors in flight to drain (ETOOMANYREFS)."""

WARN_SECONDS = 5.0
"""After this time a sender that waits for ``max_inflight`` and has unread messages itself says so in the log."""

TICK_SECONDS = 0.001
"""How often a sender looks whether in-flight data was taken: nothing can wake it for that."""

DEFAULT_MAX_INFLIGHT = 256 * 2**20
"""Bytes of segments that may be sent and not yet taken, from one Channel object."""

_CLOEXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # absent on macOS
_NOW = socket.MSG_DONTWAIT
SEND_NOW = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
_PEEK = socket.MSG_PEEK

RECEIVE = ((wire.PACKET_SIZE, CONTROL_SIZE, _CLOEXEC),)
RECEIVE_NOW = ((wire.PACKET_SIZE, CONTROL_SIZE, _CLOEXEC | _NOW),)
_PEEK_NOW = ((wire.PACKET_SIZE, CONTROL_SIZE, _CLOEXEC | _NOW | _PEEK),)

other_threads = _thread._count
"""How many Python threads there are beside the main one, in 30 ns."""

_fork_count = 0


def _count_fork() -> None:
    global _fork_count
    _fork_count += 1


os.register_at_fork(after_in_child=_count_fork)


def descriptor_limit() -> int:
    """Return the soft limit of descriptors of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")) - 1


def _limit_error(needed: int) -> FdLimitError:
    limit = descriptor_limit()
    return FdLimitError(
        errno.EMFILE,
        f"a message brings {needed} descriptors and there is no room for them (limit {limit}): it stays queued; "
        "close some or raise RLIMIT_NOFILE, and receive again",
        needed=needed,
        limit=limit,
    )


class Arrived(tuple[Any, ...]):
    """The result of ``recvmsg`` as the owner of the descriptors in it, from the C call on.

    Ownership goes to :attr:`handles` in one step of C code; whatever nobody adopted is closed with the object.
    """

    handles: list[FdHandle]

    def adopt(self) -> list[FdHandle]:
        """Return the descriptors as handles, the same ones at each call."""
        if "handles" not in self.__dict__:
            self.handles = []
            # An interrupt inside leaves the list shorter: __del__ closes what lies behind.
            self.handles.extend(map(FdHandle, _numbers(self[1])))
        return self.handles

    def close(self) -> None:
        """Close all of its descriptors, adopted or not."""
        for handle in self.adopt():
            handle.close()

    def __del__(self) -> None:
        numbers = _numbers(self[1]) if self[1] else ()
        for fd in numbers[len(self.__dict__.get("handles", ())) :]:
            os.close(fd)


def _numbers(ancillary: Iterable[tuple[int, int, bytes]]) -> Sequence[int]:
    numbers = array.array("i")
    for level, type, data in ancillary:
        if level == socket.SOL_SOCKET and type == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if not _CLOEXEC:
        for fd in numbers:
            os.set_inheritable(fd, False)
    return numbers


def _rights(fds: Sequence[int]) -> list[tuple[int, int, Any]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


class _Waker:
    """Ends the poll of a blocked thread from another one."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.reader = self.writer = FdHandle(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        else:
            reader, writer = os.pipe()
            self.reader, self.writer = FdHandle(reader), FdHandle(writer)

    def wake(self) -> None:
        os.write(self.writer.fileno(), (1).to_bytes(8, sys.byteorder))

    def __enter__(self) -> _Waker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()
        self.writer.close()


def _poll(poll: select.poll, deadline: float | None) -> int:
    milliseconds = None if deadline is None else max(0, min(math.ceil((deadline - time.monotonic()) * 1000), 2**31 - 1))
    ready = poll.poll(milliseconds)
    return ready[0][1] if ready else 0


class Transport:
    """One end of a connection that moves packets; SEQPACKET or STREAM in the subclasses."""

    name: str

    def __init__(self, sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> None:
        self.sock = sock
        self.closed = False
        self.max_inflight = max_inflight
        self.pending: deque[Any] = deque()  # results of recvmsg that nobody has taken yet
        self._flying: deque[tuple[int, int]] = deque()  # segment bytes, and what their packet added to the queue
        self._fork_count = _fork_count
        self._reading = threading.RLock()
        self._writing = threading.RLock()
        self._wakers: set[_Waker] = set()

    # --- waiting and closing ---------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise ClosedError after close; and after a fork forget the locks of threads that are not here."""
        if self.closed:
            raise ClosedError("this channel was closed")
        if self._fork_count != _fork_count:
            self._reading, self._writing = threading.RLock(), threading.RLock()
            self._wakers = set()
            self._fork_count = _fork_count

    def wait(self, events: int, deadline: float | None) -> int:
        """Wait until the socket is ready for ``events``, broken, or the time is up.

        Args:
            events: of select.POLL*; 0 waits for the end of the connection alone.
            deadline: of time.monotonic(), in seconds; None waits for ever.

        Returns:
            the events found, 0 when the time is up.

        Raises:
            ClosedError: closed by another thread meanwhile.
        """
        poll = select.poll()
        poll.register(self.sock, events)
        if not other_threads():  # nobody could close it under us
            return _poll(poll, deadline)
        with _Waker() as waker:
            poll.register(waker.reader.fileno(), select.POLLIN)
            self._wakers.add(waker)
            try:
                self.check_open()
                found = _poll(poll, deadline)
            finally:
                self._wakers.discard(waker)
        self.check_open()
        return found

    def wait_or_raise(self, events: int, deadline: float | None) -> None:
        """Wait as :meth:`wait` does.

        Raises:
            TimeoutError: the time is up.
        """
        if not self.wait(events, deadline):
            raise TimeoutError("the time is up; nothing was lost")

    def close(self) -> None:
        """Close the socket, after waking whoever waits on it."""
        if self.closed:
            return
        self.check_open()
        self.closed = True
        for waker in tuple(self._wakers):
            waker.wake()
        with self._reading, self._writing:
            self._close()

    def _close(self) -> None:
        self.sock.close()
        while self.pending:
            Arrived(self.pending.popleft()).close()

    # --- what is in flight -----------------------------------------------------------------------------------------------

    def unread(self) -> int:
        """Return how much sent data the receivers have not taken (kernel's accounting); 0 where it is unknown."""
        buffer = bytearray(4)
        try:
            fcntl.ioctl(self.sock, termios.TIOCOUTQ, buffer)
        except OSError:
            return 0
        return int.from_bytes(buffer, sys.byteorder)

    def reserve(self, size: int, deadline: float | None) -> None:
        """Wait until ``size`` more bytes of segments fit under ``max_inflight``; into an empty queue any size does.

        Raises:
            TimeoutError: the deadline has passed.
        """
        warn_at = time.monotonic() + WARN_SECONDS
        while self._flying and sum(flying[0] for flying in self._flying) + size > self.max_inflight:
            self._forget_delivered()
            if not self._flying:
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"{self.max_inflight} bytes (max_inflight) are undelivered; nothing was sent")
            found = self.wait(select.POLLIN if now > warn_at else 0, now + TICK_SECONDS)
            if found & (select.POLLERR | select.POLLHUP):
                return  # the send will say so
            if found & select.POLLIN:
                warn_at = math.inf
                _warn_of_deadlock(self.max_inflight)

    def note_in_flight(self, size: int, unread_before: int) -> None:
        """Record a sent segment of ``size`` bytes."""
        self._flying.append((size, max(0, self.unread() - unread_before)))

    def _forget_delivered(self) -> None:
        """Drop the record of segments whose packets were taken: the queue is first in, first out."""
        unread, behind = self.unread(), 0
        for index in range(len(self._flying) - 1, -1, -1):
            if unread <= behind:
                for _ in range(index + 1):
                    self._flying.popleft()
                return
            behind += self._flying[index][1]
        if unread <= 0:
            self._flying.clear()

    # --- sending --------------------------------------------------------------------------------------------------------

    def _send_step(self, buffers: Sequence[Any], fds: Sequence[int], results: Any, deadline: float | None) -> None:
        """Send once, waiting for room; append the byte count to ``results``.

        Raises:
            PeerClosedError, FdLimitError, AccessDeniedError, NotSendableError, TimeoutError, ClosedError
            OSError: EMSGSIZE, for the caller to find another way.
        """
        arguments = ((buffers, _rights(fds), SEND_NOW),)
        drained = None
        while True:
            self.check_open()
            try:
                results.extend(starmap(self.sock.sendmsg, arguments))
                return
            except BlockingIOError:
                self.wait_or_raise(select.POLLOUT, deadline)
            except OSError as error:
                if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):
                    now = time.monotonic()
                    drained = drained or (now + DRAIN_SECONDS if deadline is None else deadline)
                    if now < drained and not self.wait(0, now + TICK_SECONDS):
                        continue
                raise self._send_error(error, fds) from error

    def _send_error(self, error: OSError, fds: Sequence[int]) -> Exception:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED):
            return PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
        if self.closed:
            return ClosedError("this channel was closed")
        if error.errno == errno.ETOOMANYREFS:
            limit = descriptor_limit()
            return FdLimitError(
                error.errno,
                f"this user has too many descriptors in flight (limit {limit}): {len(fds)} more did not fit; "
                "let the receivers take theirs, or raise RLIMIT_NOFILE",
                needed=len(fds),
                limit=limit,
            )
        if error.errno in (errno.EPERM, errno.EACCES) and fds:
            return AccessDeniedError(error.errno, "the receiver or a security module does not let descriptors pass")
        if error.errno == errno.EBADF and fds:
            return NotSendableError("a descriptor of the message was closed before it was sent")
        return error

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        """Send one packet with its descriptors, all or nothing.

        Args:
            header: as :func:`fdshare.wire.pack` made it.
            payload: bytes-like pieces, at most ``wire.MAX_INLINE`` bytes together.
            fds: borrowed descriptors; more than ``wire.MAX_FDS_PER_PACKET`` come as the one end of a bundle.
            deadline: of time.monotonic(), in seconds; None waits for ever.

        Raises:
            PeerClosedError, ClosedError, TimeoutError: and nothing was sent.
            FdLimitError: too many descriptors in flight for this user.
            OSError: EMSGSIZE: larger than the socket's send buffer.
        """
        raise NotImplementedError

    def receive(self, deadline: float | None) -> tuple[wire.Header | None, Any, list[FdHandle]]:
        """Take the next packet.

        Returns:
            its header (None for a bare pickle), its inline payload, and its descriptors, now the caller's.

        Raises:
            PeerClosedError, ClosedError, TimeoutError, FdLimitError (the packet stays queued), DescriptorsLostError
            ProtocolError: the caller must close the channel.
        """
        while True:
            with self._reading:
                self.check_open()
                packet = self._receive_now()
            if packet is not None:
                return packet
            self.wait_or_raise(select.POLLIN, deadline)

    def _receive_now(self) -> tuple[wire.Header | None, Any, list[FdHandle]] | None:
        raise NotImplementedError

    def has_message(self) -> bool:
        """Whether a readable socket has something to receive, or the end; a notice alone is nothing."""
        return True

    def _fetch(self, arguments: Any) -> Arrived | None:
        """Take one result of recvmsg into ``pending``, unless one is there; None where nothing has arrived."""
        if not self.pending:
            try:
                self.pending.extend(map(Arrived, starmap(self.sock.recvmsg, arguments)))
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._receive_error(error) from error
        arrived = self.pending[0]
        if type(arrived) is not Arrived:  # left by an interrupted fast path, without descriptors
            arrived = self.pending[0] = Arrived(arrived)
        return arrived

    def _receive_error(self, error: OSError) -> OSError:
        if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
            return PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
        return ClosedError("this channel was closed") if self.closed else error

    def _peek(self, size: int) -> Arrived | None:
        """Look at the next packet with its descriptors (the kernel installs them already), leaving it queued."""
        peeked: list[Arrived] = []
        try:
            peeked.extend(map(Arrived, starmap(self.sock.recvmsg, ((size, CONTROL_SIZE, _CLOEXEC | _NOW | _PEEK),))))
        except OSError:
            return None  # the read itself will say so
        return peeked[0]

    def _check_room(self, peeked: Arrived, carried: int, bundled: int) -> None:
        """Raise FdLimitError where the descriptors of a peeked packet do not fit into this process."""
        found = len(peeked.adopt())
        if peeked[2] & socket.MSG_CTRUNC and found < carried and not _has_room():
            peeked.close()
            raise _limit_error(max(carried, bundled))
        if bundled and open_descriptors() + bundled > descriptor_limit():
            peeked.close()
            raise _limit_error(bundled)

    def _complete(
        self, arrived: Arrived, header: wire.Header, peeked: Arrived | None
    ) -> list[FdHandle]:
        """Return all descriptors of a packet that was taken.

        Raises:
            DescriptorsLostError: some are missing.
            ProtocolError: there are more than it says.
        """
        handles = arrived.adopt()
        if len(handles) < header.carried and peeked is not None and len(peeked.adopt()) == header.carried:
            arrived.close()  # lost between peek and read, to another thread: those of the peek are the same
            handles = peeked.adopt()
        elif peeked is not None:
            peeked.close()
        if len(handles) > header.carried:
            _close_all(handles)
            raise ProtocolError(f"{len(handles)} descriptors in a packet that declares {header.carried}")
        if len(handles) < header.carried:
            _close_all(handles)
            raise _lost(header.carried, len(handles))
        return self._unbundle(header, handles[0]) if header.flags & wire.BUNDLE else handles

    def _unbundle(self, header: wire.Header, bundle: FdHandle) -> list[FdHandle]:
        """Take the batches out of a bundle, a byte each."""
        total = header.descriptors + (header.flags & wire.SEGMENT)
        handles: list[FdHandle] = []
        try:
            with bundle.to_socket() as sock:
                while len(handles) < total:
                    batch: list[Arrived] = []
                    batch.extend(map(Arrived, starmap(sock.recvmsg, ((1, CONTROL_SIZE, _CLOEXEC | _NOW),))))
                    handles.extend(batch[0].adopt())
                    if not batch[0][0] or batch[0][2] & socket.MSG_CTRUNC:
                        break
            if len(handles) != total:
                raise _lost(total, len(handles))
        except BaseException as error:
            _close_all(handles)
            if isinstance(error, OSError) and not isinstance(error, DescriptorsLostError):
                raise ProtocolError(f"a bundle of descriptors cannot be read: {error}") from error
            raise
        return handles


def _has_room() -> bool:
    """Whether one more descriptor can be opened; if so, missing ones were not dropped for want of room."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _close_all(handles: Iterable[FdHandle]) -> None:
    for handle in handles:
        handle.close()


def _lost(expected: int, received: int) -> DescriptorsLostError:
    return DescriptorsLostError(
        f"{received} of {expected} descriptors arrived: the kernel or a security module dropped the others, "
        "for want of room or of permission; those that came were closed",
        expected=expected,
        received=received,
    )


def make_bundle(fds: Sequence[int]) -> FdHandle:
    """Return a socket that holds ``fds`` in batches, to travel in a packet in their place.

    Raises:
        OSError: EMFILE, ETOOMANYREFS, EBADF.
    """
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with writer:
        bundle = FdHandle(reader.detach())
        try:
            for first in range(0, len(fds), wire.MAX_FDS_PER_PACKET):
                writer.sendmsg([b"\0"], _rights(fds[first : first + wire.MAX_FDS_PER_PACKET]), SEND_NOW)
        except BaseException:
            bundle.close()
            raise
    return bundle


def _warn_of_deadlock(bound: int) -> None:
    import logging

    logging.getLogger("fdshare").warning(
        "a send has waited %.0f s for the receiver to take %d bytes (max_inflight), with unread messages on this side: "
        "if the receiver is sending too, one of the two must receive first",
        WARN_SECONDS,
        bound,
    )


class SeqpacketTransport(Transport):
    """One packet a message; several processes may share one end."""

    name = "seqpacket"
    _noticed = False

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        results: list[int] = []
        if fds:
            self._send_step([wire.pack(wire.NOTICE, descriptors=len(fds))], (), results, deadline)
        self._send_step([header, *payload], fds, results, deadline)

    def _receive_now(self) -> tuple[wire.Header | None, Any, list[FdHandle]] | None:
        peeked = header = None
        while True:
            if self._noticed and not self.pending:
                peeked = self._peek(wire.PACKET_SIZE)
                if peeked is None:
                    return None
                header = _header_or_none(peeked[0])
                if header is not None and header.type != wire.NOTICE:
                    self._check_room(peeked, header.carried, header.descriptors if header.flags & wire.BUNDLE else 0)
            arrived = self._fetch(RECEIVE_NOW)
            if arrived is None:
                return None
            data, ancillary, flags, _ = arrived
            self._noticed = False
            del self.pending[0]
            if peeked is not None and (peeked[0] != data or len(data) < wire.HEADER_SIZE):
                peeked.close()  # another reader took that one
                peeked = None
            if data[:1] == _PICKLE_MARK and not ancillary:
                return None, data, []
            header = self._unpack(arrived)
            if header is None:
                self._noticed = True
                continue
            return header, memoryview(data)[wire.HEADER_SIZE :], self._complete(arrived, header, peeked)

    def _unpack(self, arrived: Arrived) -> wire.Header | None:
        """Return the checked header of a packet, None for a notice."""
        data, ancillary, flags, _ = arrived
        try:
            if not data:
                raise PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
            header = wire.unpack(data)
            if flags & socket.MSG_TRUNC or len(data) != wire.HEADER_SIZE + header.inline_size:
                raise ProtocolError(f"a packet of {len(data)} bytes says {wire.HEADER_SIZE + header.inline_size}")
            if header.type == wire.NOTICE and ancillary:
                raise ProtocolError("a notice with descriptors")
        except BaseException:
            arrived.close()
            raise
        return None if header.type == wire.NOTICE else header

    def has_message(self) -> bool:
        with self._reading:
            self.check_open()
            while not self.pending:
                try:
                    first = self.sock.recv(1, _NOW | _PEEK)
                except BlockingIOError:
                    return False
                except OSError:
                    return True
                if first != _NOTICE_MARK:
                    return True
                arrived = self._fetch(RECEIVE_NOW)
                if arrived is not None and self._noticed_by(arrived):
                    self._noticed = True
                    del self.pending[0]
            return True

    def _noticed_by(self, arrived: Arrived) -> bool:
        return arrived[0][:1] == _NOTICE_MARK and not arrived[1] and len(arrived[0]) == wire.HEADER_SIZE


_PICKLE_MARK = bytes([wire.PICKLE_MARK])
_NOTICE_MARK = bytes([wire.NOTICE])


def _header_or_none(data: bytes) -> wire.Header | None:
    try:
        return wire.unpack(data)
    except ProtocolError:
        return None


class StreamTransport(Transport):
    """Length-prefixed frames; one process at a time reads, and one writes, each end."""

    name = "stream"

    def __init__(self, sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> None:
        super().__init__(sock, max_inflight)
        self._parser = wire.StreamParser()
        self._arrived: tuple[Arrived, ...] = ()  # what brought the descriptors of the present frame
        self._frame = bytearray()  # a frame begun by an earlier call
        self._counts: list[int] = []  # how much of it was sent, piece by piece

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        with self._writing:
            self._flush(deadline)
            self._counts.clear()
            self._frame = frame = wire.frame(header, payload)
            try:
                # The header alone, then the descriptors with the first byte behind it.
                if fds:
                    self._send_piece(wire.HEADER_SIZE, (), deadline)
                    self._send_piece(wire.HEADER_SIZE + 1, fds, deadline)
                self._flush(deadline)
            except BaseException:
                if sum(self._counts) == 0:
                    frame.clear()
                elif sum(self._counts) < len(frame):
                    frame[-1] = 0  # given up: the receiver drops it when the rest has come
                raise

    def _send_piece(self, end: int, fds: Sequence[int], deadline: float | None) -> None:
        while (start := sum(self._counts)) < end:
            self._send_step([bytes(self._frame[start:end])], fds, self._counts, deadline)

    def _flush(self, deadline: float | None) -> None:
        while (start := sum(self._counts)) < len(self._frame):
            self._send_step([bytes(self._frame[start:])], (), self._counts, deadline)

    def _receive_now(self) -> tuple[wire.Header | None, Any, list[FdHandle]] | None:
        while True:
            parser = self._parser
            header, size, peeked = parser.header, parser.wanted, None
            carried = 0 if header is None or self._arrived else header.carried
            if header is not None and carried and not self.pending:
                peeked = self._peek(1)
                if peeked is None:
                    return None
                self._check_room(peeked, carried, header.descriptors if header.flags & wire.BUNDLE else 0)
            arrived = self._fetch(((size, CONTROL_SIZE, _CLOEXEC | _NOW),))
            if arrived is None:
                return None
            if not arrived[0]:
                del self.pending[0]
                arrived.close()
                raise PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
            if arrived[1] and not carried:
                arrived.close()
                raise ProtocolError("descriptors in the middle of a frame")
            after, frame = parser.fed(arrived[0])
            keep = (*self._arrived, arrived) if carried else self._arrived
            if carried and peeked is not None and len(arrived.adopt()) < carried == len(peeked.adopt()):
                arrived.close()
                keep = (peeked,)
            elif peeked is not None:
                peeked.close()
            self._parser, self._arrived = after, keep
            del self.pending[0]
            if frame is not None:
                header, payload = frame
                self._arrived = ()
                if payload is None:
                    for part in keep:
                        part.close()
                    continue
                return header, payload, self._complete(keep[0] if keep else _NOTHING, header, None)

    def _close(self) -> None:
        if self._frame and sum(self._counts) < len(self._frame):
            try:  # let the peer's parser reach the end of a frame that was given up
                self.sock.send(bytes(self._frame[sum(self._counts) :]), SEND_NOW)
            except OSError:
                pass
        super()._close()
        for part in self._arrived:
            part.close()


_NOTHING = Arrived((b"", [], 0, None))

Transport_by_type = {socket.SOCK_SEQPACKET: SeqpacketTransport, socket.SOCK_STREAM: StreamTransport}


def transport_of(sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> Transport:
    """Return the transport that fits a connected AF_UNIX socket.

    Raises:
        ValueError: it is of another family or type.
    """
    kind = Transport_by_type.get(sock.type)
    if sock.family != socket.AF_UNIX or kind is None:
        raise ValueError(f"a channel needs a SEQPACKET or STREAM socket of AF_UNIX, not {sock!r}")
    return kind(sock, max_inflight)


def socketpair(transport: str | None) -> tuple[socket.socket, socket.socket]:
    """Return a connected pair for "seqpacket", "stream", or None for the best that the system has.

    Raises:
        ValueError: an unknown name.
        OSError: the system has no such sockets.
    """
    if transport not in (None, "seqpacket", "stream"):
        raise ValueError(f"transport is 'seqpacket', 'stream' or None, not {transport!r}")
    if transport != "stream":
        try:
            return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            if transport or sys.platform == "linux":
                raise
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


@attrs.frozen
class PeerCredentials:
    """Who is at the other end, as the kernel noted when the connection was made.

    ``pid`` is 0 where the system does not tell it.
    """

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Ask the kernel who is at the other end of a connected AF_UNIX socket.

    Raises:
        OSError: not connected, or the system does not tell.
    """
    if hasattr(socket, "SO_PEERCRED"):
        layout = struct.Struct("3i")
        return PeerCredentials(*layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)))
    # LOCAL_PEERCRED of FreeBSD and macOS: struct xucred {u_int version; uid_t uid; short ngroups; gid_t groups[16]; ...}
    data = sock.getsockopt(0, 1, 4 + 4 + 4 + 16 * 4 + 8)
    _, uid, groups, gid = struct.unpack_from("IIhxxI", data)
    pid = struct.unpack("i", sock.getsockopt(0, 2, 4))[0] if sys.platform == "darwin" else 0  # LOCAL_PEERPID
    return PeerCredentials(pid, uid, gid if groups else -1)


# --- bare SCM_RIGHTS -------------------------------------------------------------------------------------------------


def send_fds(sock: socket.socket, buffers: Iterable[Any], fds: Iterable[HasFileno | int]) -> int:
    """Send bytes with descriptors to a peer that need not be fdshare.

    Args:
        sock: a connected AF_UNIX socket.
        buffers: bytes-like pieces; at least one byte together, since descriptors without data are lost on a stream.
        fds: numbers, or objects with ``fileno()``; they stay the caller's.

    Returns:
        how many bytes were sent; on a stream that may be fewer than given, and the descriptors have gone with the first.

    Raises:
        ValueError: no data, or more than 253 descriptors (SCM_MAX_FD of Linux).
        OSError: as sendmsg(2): EBADF, EPIPE, ETOOMANYREFS, EAGAIN, …
    """
    pieces = [memoryview(piece).cast("B") for piece in buffers]
    numbers = [as_fd(fd) for fd in fds]
    if numbers and not any(map(len, pieces)):
        raise ValueError("descriptors need at least one byte of data: a stream loses them otherwise")
    if len(numbers) > wire.MAX_FDS_PER_PACKET:
        raise ValueError(f"{len(numbers)} descriptors; one sendmsg takes at most {wire.MAX_FDS_PER_PACKET}")
    return sock.sendmsg(pieces, _rights(numbers), getattr(socket, "MSG_NOSIGNAL", 0))


def recv_fds(sock: socket.socket, bufsize: int, maxfds: int) -> tuple[bytes, list[FdHandle]]:
    """Receive bytes with descriptors from a peer that need not be fdshare.

    Args:
        sock: a connected AF_UNIX socket.
        bufsize: most bytes to receive.
        maxfds: most descriptors to accept.

    Returns:
        the data (empty at the end of the connection), and the descriptors, close-on-exec, now the caller's.

    Raises:
        DescriptorsLostError: the kernel dropped some (no room, a security module); those that came were closed.
        ProtocolError: more than ``maxfds`` came; all of them were closed.
        OSError: as recvmsg(2).
    """
    result: list[Arrived] = []
    result.extend(map(Arrived, starmap(sock.recvmsg, ((bufsize, CONTROL_SIZE, _CLOEXEC),))))
    arrived = result.pop()
    handles = arrived.adopt()
    if arrived[2] & socket.MSG_CTRUNC:
        arrived.close()
        raise _lost(len(handles) + 1, len(handles)) if not _has_room() else _lost(0, len(handles))
    if len(handles) > maxfds:
        arrived.close()
        raise ProtocolError(f"{len(handles)} descriptors arrived; at most {maxfds} were asked for")
    return arrived[0], handles
