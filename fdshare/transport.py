"""What both transports share: waiting, closing under a blocked call, bounds on what is in flight, complete descriptors.

A transport moves packets: a header, a payload, descriptors.  Several threads may use it at once and close it under each other.
No call blocks in the kernel with a lock held, and waiting happens in one place, :meth:`Transport.wait`.

Signals: a handler that raises may strike after any call (see rights.py).  ``for transport.arrived in ...recvmsg...: break``
stores what came without a gap, and from there to the caller each step is an assignment.  So an interrupted
``recv`` left its message for the next one or dropped it whole, and an interrupted ``send`` sent all or nothing.

Receiving descriptors::

    header seen --> peek the packet: all descriptors there? --no--> FdLimitError, still queued
                       | yes
                       v
            take the packet --> Arrived (owns the numbers) --> Handles --> the decoded object
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import repeat, starmap
from typing import Any, NamedTuple, Protocol

from fdshare import locks, memory, preload, recycle, rights, wire
from fdshare.blocking import TICK_MILLISECONDS, Waker, wait_beside, wake
from fdshare.disposal import dispose, forks
from fdshare.errors import (
    AccessDeniedError,
    ClosedError,
    DecodeError,
    FdLimitError,
    NotSendableError,
    PeerClosedError,
    ProtocolError,
)
from fdshare.firstuse import OnFirstUse
from fdshare.handle import NO_HANDLES, FdHandle, HandleList
from fdshare.hello import Greeting, Takes
from fdshare.inflight import DEFAULT_MAX_INFLIGHT, DRAIN_SECONDS, TICK_SECONDS, InFlight, Untaken
from fdshare.native import IN, Poll, make_poll
from fdshare.rights import Arrived

__all__ = ["FEWEST_LOOKS", "MANY_UNSEEN", "Packet", "Transport"]

FEWEST_LOOKS, MOST_LOOKS = 8, 512
"""How many reads begin with a look after one that did not and found nothing, which costs ten times what a look does.  Twice as
many each time, unless it was worth that."""

MANY_UNSEEN = 64
"""After so many reads without a look, one that finds nothing was worth its cost."""

_fork_count = 0


def _count_fork() -> None:
    global _fork_count
    _fork_count += 1


os.register_at_fork(after_in_child=_count_fork)


class Limits(Protocol):
    """Bounds on what a peer that is not trusted may send."""

    @property
    def max_bytes(self) -> int:
        """Most bytes of one message."""

    @property
    def carried(self) -> int:
        """Most descriptors with one packet."""

    def check(self, header: wire.Header) -> None:
        """Raise DecodeError for a message that must be dropped, ProtocolError where the channel must be closed."""


class Packet(NamedTuple):
    """What :meth:`Transport.receive` returns."""

    header: wire.Header | None
    """None for a bare pickle."""
    payload: Any
    """Bytes-like: what came in the packet itself."""
    handles: HandleList
    """Its descriptors, all of them, the segment's last."""


def _input_of(sock: socket.socket) -> Poll:
    """Return what waits for something to read; for one thread at a time."""
    poll = make_poll()
    poll.register(sock.fileno(), IN)
    return poll


class Transport:
    """One end of a connection that moves packets; SEQPACKET or STREAM in the subclasses."""

    name: str
    greeting: Greeting | None = None
    takes: Takes | None = None
    limits: Limits | None = None
    closed = False
    arrived: Any = None  # a result of recvmsg that nobody has taken yet
    keeps_bundles = False  # whether what is read here is only to be sent on
    forks_when_alone = -1  # forks before it was made here; -1 where others may have it, too
    max_untaken: float | None = math.inf  # descriptors; None for a part of the system's limit
    bare = False  # whether packets without a header are spoken here
    plain = False  # whether the next packet may be taken without looking for room first
    looks = FEWEST_LOOKS  # how many reads to come begin with one; below zero, how many did not
    _next_looks = FEWEST_LOOKS
    _control = rights.CONTROL_SIZE
    _sent = 0  # bytes of the present frame that the kernel has; for streams

    # A connection of a few messages needs none of these, which take longer to make than all the rest.
    in_flight = OnFirstUse(lambda transport: InFlight(transport, transport._max_inflight))
    untaken = OnFirstUse(lambda transport: Untaken(transport, transport.max_untaken))
    arrivals_now = OnFirstUse(lambda transport: transport._arrivals(rights.NOW))
    input = OnFirstUse(lambda transport: _input_of(transport.sock))
    _reading = OnFirstUse(lambda transport: locks.make_rlock())
    _writing = OnFirstUse(lambda transport: locks.make_rlock())

    def __init__(self, sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> None:
        preload.prepare()  # for listeners and queues, too, which are transports underneath
        self.sock = sock
        self._max_inflight = max_inflight
        self._fork_count = _fork_count
        self._wakers: set[Waker] = set()

    def _read_with(self, control: int) -> None:
        self._control = control
        self.__dict__.pop("arrivals_now", None)

    def _arrivals(self, flags: int) -> Iterator[Any]:
        """Yield what ``recvmsg`` returns, again and again, all in C."""
        return starmap(self.sock.recvmsg, repeat((wire.PACKET_SIZE, self._control, rights.CLOEXEC | flags)))

    def restrict(self, limits: Limits) -> None:
        """Hold what arrives to ``limits`` from now on.

        On Linux the kernel closes at once what does not fit into the control buffer, and where no descriptor may come at all
        it refuses them at the sender, if it is new enough.
        """
        self.limits = limits
        if sys.platform == "linux":
            self._read_with(rights.control_size(limits.carried))
            if not limits.carried:
                rights.refuse_all(self.sock)

    def _passes(self, header: wire.Header) -> bool:
        """Whether what this header announces may be taken.

        Raises:
            ProtocolError: the channel must be closed.
        """
        try:
            if self.limits is not None:
                self.limits.check(header)
        except DecodeError:
            return False
        return True

    # --- waiting and closing ---------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise ClosedError after close; and after a fork forget the locks of threads that are not here."""
        if self.closed:
            raise ClosedError("this channel was closed")
        if self._fork_count != _fork_count:
            for name in ("_reading", "_writing"):
                self.__dict__.pop(name, None)
            self.__dict__["in_flight"] = InFlight(self, self.in_flight.limit)
            self._wakers = set()
            self._fork_count = _fork_count
            self._after_fork()

    def _after_fork(self) -> None:
        """Forget what only the parent may go on with."""

    def wait(self, events: int, deadline: float | None) -> int:
        """Wait until the socket is ready for ``events``, broken, or the time is up.

        Args:
            events: of select.POLL*; POLLHUP for the end of the connection alone, of which macOS tells only who asks.
            deadline: of time.monotonic(), in seconds; None waits for ever.

        Returns:
            the events found, 0 when the time is up.

        Raises:
            ClosedError: closed by another thread meanwhile.
        """
        fd = self.sock.fileno()
        if fd < 0:
            raise ClosedError("this channel was closed")
        poll = make_poll()
        poll.register(fd, events)
        return wait_beside(poll, deadline, self._wakers, self.check_open)

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
        wake(self._wakers)
        with self._reading, self._writing:
            self._close()

    def _close(self) -> None:
        if self.greeting is not None:
            self.greeting.leave(self)
        recycle.leave(self)
        if self.limits is None:
            self.sock.close()
        else:
            dispose(self.sock, alone=self.forks_when_alone == forks())
        if type(self.arrived) is Arrived:
            self.arrived.close()
        self.arrived = None

    # --- sending --------------------------------------------------------------------------------------------------------

    def _send_step(self, buffers: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        """Send once, waiting for room; add the byte count to ``_sent``.

        Raises:
            PeerClosedError, FdLimitError, AccessDeniedError, NotSendableError, TimeoutError, ClosedError
            OSError: EMSGSIZE, for the caller to find another way.
        """
        arguments = ((buffers, rights.rights(fds), rights.SEND_NOW),)
        drained: float | None = None
        while True:
            self.check_open()
            try:
                for count in starmap(self.sock.sendmsg, arguments):
                    self._sent += count
                    return
            except BlockingIOError:
                self.wait_or_raise(select.POLLOUT, deadline)
            except OSError as error:
                drained = self._wait_for_drain(error, fds, drained, deadline)

    def bundle(self, fds: Sequence[int], deadline: float | None) -> FdHandle:
        """Return a bundle of ``fds``, waiting for descriptors in flight to drain where the system wants that.

        Raises:
            FdLimitError, NotSendableError, ClosedError
        """
        drained: float | None = None
        while True:
            self.check_open()
            try:
                return rights.make_bundle(fds)
            except OSError as error:
                drained = self._wait_for_drain(error, fds, drained, deadline)

    def _wait_for_drain(
        self, error: OSError, fds: Sequence[int], drained: float | None, deadline: float | None
    ) -> float:
        """Pass time after ETOOMANYREFS or ENOBUFS; raise the typed error for any other, or when it has lasted.

        ``drained`` is until when to try, None at first; returned for the next call.
        """
        if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):
            now = time.monotonic()
            drained = drained or (now + DRAIN_SECONDS if deadline is None else deadline)
            if now < drained and not self.wait(select.POLLHUP, now + TICK_SECONDS):
                return drained
        raise self._send_error(error, fds) from error

    def _send_error(self, error: OSError, fds: Sequence[int]) -> Exception:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED):
            why = None if self.greeting is None else self.greeting.farewell(self)
            return why or PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
        if self.closed:
            return ClosedError("this channel was closed")
        limit = rights.descriptor_limit()
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return FdLimitError(
                error.errno,
                f"no descriptor left for a bundle (limit {limit}): close some",
                needed=2,
                limit=limit,
            )
        if error.errno == errno.ETOOMANYREFS:
            return FdLimitError(
                error.errno,
                f"this user has too many descriptors in flight (limit {limit}): {len(fds)} more did not fit; "
                "let the receivers take theirs, or raise RLIMIT_NOFILE",
                needed=len(fds),
                limit=limit,
            )
        if error.errno in (errno.EPERM, errno.EACCES) and fds:
            return AccessDeniedError(
                error.errno, "the receiver or a security module does not let descriptors pass"
            )
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

    def receive(self, deadline: float | None) -> Packet:
        """Take the next packet; its handles are the caller's.

        Raises:
            PeerClosedError, ClosedError, TimeoutError, FdLimitError (the packet stays queued), DescriptorsLostError
            DecodeError: the packet was over a limit, and is gone.
            ProtocolError: the caller must close the channel.
        """
        while True:
            late = deadline is not None and time.monotonic() >= deadline
            with self._reading:
                self.check_open()
                if deadline is None:
                    self._await_for_a_tick()
                packet = self._receive_now()
            if packet is not None:
                return packet
            if late:  # whatever still comes: a peer that sends nothing but notices does not keep us
                raise TimeoutError("the time is up; nothing was lost")
            self.wait_or_raise(select.POLLIN, deadline)

    def _await_for_a_tick(self) -> None:
        """Wait for the next packet a short time, without the machinery of :meth:`wait`."""
        if self.arrived is None:
            try:
                self.input.poll(TICK_MILLISECONDS)
            except RuntimeError:
                pass  # a signal handler receives in the middle of this

    def found_nothing(self) -> None:
        """Look before the next reads again: messages do not come faster than they are taken."""
        many = self.looks < -MANY_UNSEEN
        self.looks = self._next_looks = FEWEST_LOOKS if many else min(2 * self._next_looks, MOST_LOOKS)

    def _receive_now(self) -> Packet | None:
        raise NotImplementedError

    def receive_few(self) -> tuple[memoryview, HandleList] | None:
        """Receive a small message with some descriptors the short way; None where there is none."""
        return None

    def has_message(self) -> bool:
        """Whether a readable socket has something to receive, or the end; a notice alone is nothing."""
        raise NotImplementedError

    def _fetch(self, size: int, reset: bool = False) -> Arrived | None:
        """Take up to ``size`` bytes into ``arrived``, unless something is there; None where nothing has come."""
        if self.arrived is None:
            arguments = ((size, self._control, rights.CLOEXEC | rights.NOW),)
            try:
                for self.arrived in map(Arrived, starmap(self.sock.recvmsg, arguments)):  # noqa: B020 -- likewise
                    break
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in (errno.ECONNRESET, errno.EMSGSIZE) and not reset:
                    # SEQPACKET tells of a reset once, before it gives what the peer had sent and closed behind.  BSD says
                    # EMSGSIZE where descriptors do not fit, drops them (unp_externalize), and keeps the bytes for the next read.
                    return self._fetch(size, True)
                raise self._receive_error(error) from error
        elif type(self.arrived) is tuple:  # left by an interrupted fast path
            self.arrived = Arrived(self.arrived)
        return self.arrived

    def _receive_error(self, error: OSError) -> OSError:
        if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
            return PeerClosedError(errno.EPIPE, "the other side of this channel was closed")
        return ClosedError("this channel was closed") if self.closed else error

    def _peek(self, size: int) -> Arrived | None:
        """Look at the next bytes with their descriptors (the kernel installs them already), leaving all queued."""
        arguments = ((size, self._control, rights.CLOEXEC | rights.NOW | rights.PEEK),)
        try:
            for peeked in map(Arrived, starmap(self.sock.recvmsg, arguments)):
                return peeked
        except OSError:
            pass  # the read itself will say so
        return None

    def _prepare(self, header: wire.Header) -> None:
        """Load what the segment of a message to come will need, while it is still queued."""
        if header.flags & wire.SEGMENT and not header.flags & wire.FILE:
            try:
                memory.prepare_to_map()
            except (OSError, ImportError) as error:
                if not rights.has_room_for_one():
                    raise rights.limit_error(header.total) from error

    def _check_room(self, peeked: Arrived, header: wire.Header) -> None:
        """Raise FdLimitError where the descriptors of a peeked packet do not fit into this process."""
        handles = peeked.adopt()
        if (
            len(handles) < header.carried
            and peeked[2] & rights.CONTROL_TRUNCATED
            and not rights.has_room_for_one()
        ):
            handles.close()
            raise rights.limit_error(header.total)
        if header.flags & wire.BUNDLE and not self.keeps_bundles and not rights.has_room_for(header.total):
            handles.close()
            raise rights.limit_error(header.total)

    def _complete(self, arrived: Arrived | None, header: wire.Header, peeked: Arrived | None) -> HandleList:
        """Return all descriptors of a packet that was taken.

        Raises:
            DescriptorsLostError: some are missing.
            ProtocolError: there are more than it says.
        """
        handles = arrived.adopt() if arrived is not None else NO_HANDLES
        if peeked is not None:
            if len(handles) < header.carried == len(peeked.adopt()):
                # Another thread took the room between peek and read: those of the peek are the same.
                handles.close()
                handles = peeked.adopt()
            else:
                peeked.close()
        if len(handles) > header.carried:
            handles.close()
            raise ProtocolError(f"{len(handles)} descriptors in a packet that declares {header.carried}")
        if len(handles) < header.carried:
            handles.close()
            raise rights.lost(header.total, len(handles))
        bundled = header.flags & wire.BUNDLE and not self.keeps_bundles
        return rights.unbundle(handles[0], header.total) if bundled else handles
