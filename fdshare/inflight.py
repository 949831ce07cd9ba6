"""What was sent and not yet taken: the bound on memory that messages with segments hold between two processes.

The kernel tells how much of what a socket sent is unread (SIOCOUTQ), in bytes of its own accounting and for all
messages together.  Each message with a segment, or another descriptor, adds a known least amount, so the figure bounds how many
of them can still be there.  macOS and FreeBSD do not tell: there only the buffer of the socket bounds what is in flight.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import functools
import math
import resource
import select
import socket
import sys
import termios
import time
import weakref
from collections import deque
from itertools import starmap
from typing import Protocol

from fdshare import locks, preload
from fdshare.errors import ClosedError, FdLimitError

__all__ = ["DEFAULT_MAX_INFLIGHT", "InFlight", "Reservation", "Untaken", "unread_bytes"]

DEFAULT_MAX_INFLIGHT = 256 * 2**20
"""Bytes of segments that may be sent and not yet taken, from one Channel object."""

UNTAKEN_SHARE = 8
"""The part of the descriptor limit that one channel may have in flight, unless told otherwise.  The kernel counts those of all
processes of a user against it, so that a peer that takes nothing would leave none to the others."""

FEW_UNTAKEN = 16
"""Descriptors in flight that are below every bound, so that few sends have to ask the kernel."""

WARN_SECONDS = 5.0
"""After this time a sender that waits for ``max_inflight`` and has unread messages itself says so in the log."""

DRAIN_SECONDS = 1.0
"""How long a sender waits, without a timeout of its own, for descriptors in flight to be taken."""

TICK_SECONDS = 0.001
"""How often a sender looks whether in-flight data was taken: nothing can wake it for that."""

_MANY_FLYING = 32
"""Records of sent segments beyond which those that were taken are dropped at once."""


class Waits(Protocol):
    """What the accounts need of a transport."""

    sock: socket.socket

    def wait(self, events: int, deadline: float | None) -> int:
        """Wait for ``events`` or the end of the connection until ``deadline`` of time.monotonic()."""


class Reservation:
    """Room under ``max_inflight`` for a segment that is being sent."""

    __slots__ = ("__weakref__", "size")

    def __init__(self, size: int) -> None:
        self.size = size


def unread_bytes(sock: _socket.socket) -> int:
    """Return how much of what ``sock`` has sent is unread, in the kernel's own measure (SIOCOUTQ); 0 where it does not tell."""
    buffer = bytearray(4)
    try:
        fcntl.ioctl(sock, termios.TIOCOUTQ, buffer)
    except OSError:
        return 0
    return int.from_bytes(buffer, sys.byteorder)


@functools.cache
def _packet_cost() -> int:
    """Measure what a message with a segment adds to :func:`unread_bytes` at least: two of the smallest packets."""
    # Of C alone, so that no interrupt can lose one.
    for sender, receiver in starmap(_socket.socketpair, ((socket.AF_UNIX, socket.SOCK_STREAM),)):  # noqa: B007
        break
    try:
        sender.send(b"x")
        return 2 * max(1, unread_bytes(sender))
    finally:
        sender.close()
        receiver.close()


class InFlight:
    """The accounts of one sender; usable by several threads."""

    def __init__(self, transport: Waits, limit: int) -> None:
        self.limit = limit
        self._transport = transport
        self._flying: deque[int] = deque()  # sizes of segments, oldest first
        self._flying_bytes = 0
        self._reserved: weakref.WeakSet[Reservation] = weakref.WeakSet()
        self._lock = locks.make_lock()

    def unread(self) -> int:
        """Return how much sent data the receivers have not taken, as the kernel accounts for it.

        Raises:
            ClosedError: closed by another thread.
        """
        try:
            return unread_bytes(self._transport.sock)
        except ValueError as error:  # closed meanwhile: the number is -1
            raise ClosedError("this channel was closed") from error

    def reserve(self, size: int, deadline: float | None) -> Reservation:
        """Wait until ``size`` more bytes of segments fit under ``max_inflight``; into an empty queue any size does.

        Returns:
            the reservation, which holds as long as it is referenced, or until :meth:`note`.

        Raises:
            TimeoutError: the deadline has passed.
        """
        mine = Reservation(size)
        warn_at = time.monotonic() + WARN_SECONDS
        while True:
            with self._lock:
                if len(self._flying) >= _MANY_FLYING or not self._fits(size):
                    self._forget_delivered()
                if self._fits(size):
                    self._reserved.add(mine)
                    return mine
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"{self.limit} bytes (max_inflight) are undelivered; nothing was sent")
            found = self._transport.wait(
                select.POLLIN if now > warn_at else select.POLLHUP, now + TICK_SECONDS
            )
            if found & (select.POLLERR | select.POLLHUP):
                return mine  # the send will say so
            if found & select.POLLIN:
                warn_at = math.inf
                _warn_of_deadlock(self.limit)

    def _fits(self, size: int) -> bool:
        taken = self._flying_bytes + sum(reservation.size for reservation in self._reserved)
        return not taken or taken + size <= self.limit

    def note(self, reservation: Reservation) -> None:
        """Record that the reserved segment was sent."""
        with self._lock:
            self._flying.append(reservation.size)
            self._flying_bytes += reservation.size
            self._reserved.discard(reservation)

    def _forget_delivered(self) -> None:
        """Drop the record of segments whose packets were taken: the queue is first in, first out.

        What is unread may be other messages too, so this errs on the side of waiting.
        """
        most_unread = -(-self.unread() // _packet_cost())
        while len(self._flying) > most_unread:
            self._flying_bytes -= self._flying.popleft()


class Untaken:
    """Descriptors that one channel has sent and the other side has not taken; usable by several threads.

    What is unread may be other messages too, so this errs on the side of waiting.
    """

    __slots__ = ("_flying", "_transport", "limit")

    def __init__(self, transport: Waits, limit: float | None) -> None:
        self.limit = limit
        self._transport = transport
        self._flying: deque[int] = deque()  # how many each message has brought, oldest first

    def __len__(self) -> int:
        return sum(tuple(self._flying))

    @property
    def bound(self) -> float:
        """Most of them: what was asked for, or a part of the descriptor limit of now."""
        if self.limit is not None:
            return self.limit
        return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // UNTAKEN_SHARE, FEW_UNTAKEN)

    def fits(self, count: int) -> bool:
        """Whether ``count`` more fit under the bound; into an empty queue any number does."""
        if not self._flying or (self.limit is None and len(self) + count <= FEW_UNTAKEN):
            return True
        self._forget_taken()
        return not self._flying or len(self) + count <= self.bound

    def make_room(self, count: int, deadline: float | None) -> None:
        """Wait until ``count`` more fit.

        Raises:
            FdLimitError: the deadline has passed; without one, the receiver has taken none for a while.
        """
        before, until = -1, 0.0
        while not self.fits(count):
            now, unread = time.monotonic(), unread_bytes(self._transport.sock)
            if unread != before:
                before, until = unread, now + DRAIN_SECONDS
            if now >= (until if deadline is None else deadline):
                raise self._refusal(count)
            if self._transport.wait(select.POLLHUP, now + TICK_SECONDS):
                return  # the send will say so

    def note(self, count: int) -> None:
        """Record that a message with so many was sent."""
        if self.limit != math.inf:
            self._flying.append(count)

    def _forget_taken(self) -> None:
        try:
            most_unread = -(-unread_bytes(self._transport.sock) // _packet_cost())
            while len(self._flying) > most_unread:
                self._flying.popleft()
        except (ValueError, IndexError):  # closed meanwhile; another thread has done the same
            pass

    def _refusal(self, count: int) -> FdLimitError:
        """Return the error for a message that did not get room."""
        return FdLimitError(
            errno.ETOOMANYREFS,
            f"the other side has not taken {len(self)} descriptors that were sent before (max_untaken is {self.bound}): "
            f"{count} more were not sent",
            needed=count,
            limit=int(self.bound),
        )


def _warn_of_deadlock(bound: int) -> None:
    preload.warn(
        "a send has waited %.0f s for the receiver to take %d bytes (max_inflight), with unread messages on this side: "
        "if the receiver is sending too, one of the two must receive first",
        WARN_SECONDS,
        bound,
    )
