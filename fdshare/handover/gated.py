"""``HandoverSocket``: a listening or datagram socket that accepts and receives only while its process serves.

The description is non-blocking for good: both generations use it, and a flag that one of them flipped would block the other.
Blocking, as Python tells it (``settimeout``), is this object's own business: it polls.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fdshare.errors import ClosedError
from fdshare.handle import FdHandle, hand_over
from fdshare.handover.errors import RetiredError
from fdshare.handover.gate import Gate
from fdshare.reducers import register

__all__ = ["HandoverSocket", "gated"]

T = TypeVar("T")

_INHERITS_FLAGS = not sys.platform.startswith("linux")
"""Whether an accepted socket is non-blocking because the listening one is, as on BSD."""


class HandoverSocket(socket.socket):
    """A socket of a :class:`Handover`; made by its ``listen``.

    ``accept`` and the receiving methods wait until this process serves, and raise RetiredError once a successor does
    (BlockingIOError where the socket is non-blocking: event loops take that for nothing to do).  Sent in a message, or
    duplicated by descriptor, it is an ordinary socket that knows nothing of this.
    """

    _gate: Gate
    _name: str
    _wait: float | None
    _address: Any
    """What the kernel does not tell; empty where it does."""

    def getsockname(self) -> Any:
        """Return the address: of an AF_UNIX socket the path where it is, for the kernel remembers where it was made.

        Raises:
            OSError: as getsockname(2).
        """
        return self._address or super().getsockname()

    @property
    def name(self) -> str:
        """What ``listen`` called it."""
        return self._name

    # --- blocking, without touching the description ---------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        """Set how many seconds calls of this object wait; None for ever, 0 not at all.

        Raises:
            ValueError: negative.
        """
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._wait = value

    def gettimeout(self) -> float | None:
        """Return how many seconds calls of this object wait; None for ever.

        Raises:
            nothing.
        """
        return self._wait

    def setblocking(self, flag: bool) -> None:
        """Let calls of this object wait for ever, or not at all.

        Raises:
            nothing.
        """
        self._wait = None if flag else 0.0

    def getblocking(self) -> bool:
        """Tell whether calls of this object wait.

        Raises:
            nothing.
        """
        return self._wait != 0.0

    # --- what the gate stands before --------------------------------------------------------------------------------------

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, as ``socket.accept``.

        Raises:
            RetiredError: a successor serves now; the socket is closed here.
            ClosedError: the handover was closed.
            BlockingIOError, TimeoutError: nothing to accept, or not yet this process's turn.
            OSError: as accept(2).
        """
        try:
            sock, address = self._through(super().accept)
        except RetiredError:
            self.retire()
            raise
        if _INHERITS_FLAGS and sock.gettimeout() is None:
            sock.setblocking(True)
        return sock, address

    def recv(self, *args: Any) -> bytes:
        """Receive from a datagram socket, as ``socket.recv``; raises as :meth:`accept`."""
        return self._through(super().recv, *args)

    def recvfrom(self, *args: Any) -> tuple[bytes, Any]:
        """Receive a datagram and its sender, as ``socket.recvfrom``; raises as :meth:`accept`."""
        return self._through(super().recvfrom, *args)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Receive into a buffer, as ``socket.recv_into``; raises as :meth:`accept`."""
        return self._through(super().recv_into, *args, **kwargs)

    def recvfrom_into(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        """Receive a datagram into a buffer, as ``socket.recvfrom_into``; raises as :meth:`accept`."""
        return self._through(super().recvfrom_into, *args, **kwargs)

    def retire(self) -> None:
        """Close it, and remember its address: should the successor die while this process finishes, others can listen there.

        Raises:
            nothing.
        """
        with contextlib.suppress(OSError):  # closed already
            self._address = self.getsockname()
            self.close()

    def _through(self, operate: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        gate, wait = self._gate, self._wait
        deadline = None if wait is None else time.monotonic() + wait
        while True:
            try:
                with gate.lock:
                    admitted = gate.admits(self._name)
                    if admitted:
                        try:
                            return operate(*args, **kwargs)
                        except BlockingIOError:
                            gate.note_empty(self._name)
            except ClosedError as error:  # RetiredError too
                if wait == 0.0:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
                raise
            if wait == 0.0:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            in_time = self._poll(deadline) if admitted else gate.wait_until_moved(deadline)
            if not in_time:
                raise TimeoutError("timed out")

    def _poll(self, deadline: float | None) -> bool:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        fd = self.fileno()
        if fd < 0:  # another thread has closed it
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        with self._gate.watching() as closing:
            if closing is not None:
                poll.register(closing, select.POLLIN)
            return bool(poll.poll(None if left is None else left * 1000))

    # --- copies -----------------------------------------------------------------------------------------------------------

    def dup(self) -> HandoverSocket:
        """Duplicate it: another socket behind the same gate.

        Raises:
            OSError: as dup(2).
        """
        copy = gated(FdHandle.dup(self), self._gate, self._name, self._address)
        copy._wait = self._wait
        return copy


def gated(handle: FdHandle, gate: Gate, name: str, path: str = "") -> HandoverSocket:
    """Spend ``handle``, a socket, into one behind ``gate`` under ``name``; it blocks, as Python's sockets do at first.

    Args:
        path: where an AF_UNIX socket is.

    Raises:
        OSError: not a socket; the handle stays usable.
    """
    sock = HandoverSocket.__new__(HandoverSocket)
    sock._io_refs, sock._closed = 0, False  # type: ignore[attr-defined]  # as its Python __init__ would
    sock._gate, sock._name, sock._wait, sock._address = gate, name, socket.getdefaulttimeout(), path
    hand_over(handle, _socket.socket.__init__, sock, -1, -1, -1, handle.fileno())
    try:
        _socket.socket.settimeout(sock, 0.0)
    except BaseException:
        sock.close()
        raise
    return sock


def rebuild_plain(handle: FdHandle) -> socket.socket:
    """Make of a sent HandoverSocket the ordinary socket that it is elsewhere."""
    return handle.to_socket()


register(HandoverSocket, reduce=lambda sock: (rebuild_plain, (FdHandle.dup(sock),)))
