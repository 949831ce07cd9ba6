"""``fdshare send`` and ``fdshare recv``: two terminals, one socket, and what passes between them.

=========== ======================= ========================================================================
form        between                 on the socket
=========== ======================= ========================================================================
a channel   fdshare and fdshare     one message, a dict from the names as given to things with a descriptor
``--raw``   fdshare and any program bare SCM_RIGHTS: a little data with up to 253 descriptors, as often as needed
=========== ======================= ========================================================================

By default ``recv`` listens and ``send`` connects; each may do the other.  Who connects waits until somebody listens, so the
order of their start does not matter.  ``send`` ends well when the other side has taken everything.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import attrs

import fdshare
from fdshare import wire
from fdshare.addresses import connected_socket, inherited_socket, listening_socket
from fdshare.command.arrivals import (
    NOT_EXECUTABLE,
    NOT_FOUND,
    Arrival,
    Item,
    copy_all,
    find_items,
    hand_over_to,
    is_plain,
    shortened,
    tell,
)
from fdshare.command.ls import counted
from fdshare.credentials import peer_credentials, same_user
from fdshare.disposal import dispose
from fdshare.errors import AccessDeniedError, PeerClosedError
from fdshare.handle import FdHandle, own, to_socket
from fdshare.inflight import unread_bytes
from fdshare.socketfile import remove

T = TypeVar("T")

__all__ = ["Meeting", "Taking", "receive", "send"]

RETRY_SECONDS = 0.02
"""How often to look whether somebody listens by now: soon enough for people and scripts, and no load."""

FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.001, 0.05
"""How often to look whether the other side has taken what was sent, as nothing wakes a sender for that: less and less often."""

RAW_BUFFER = 1 << 20
"""Bytes of data taken at once from a peer that is not fdshare: more than a packet has without a raised wmem_max."""


STDIN = "stdin"
"""The name in a message of what came in by ``-``."""


@attrs.frozen(kw_only=True)
class Meeting:
    """How to find the other side.

    ``address`` is a path, ``@name`` for an abstract name, or ``fd:N`` for a listening socket that was inherited; ``timeout`` is
    in seconds, for each time that the other side is waited for.  ``any_user`` is about raw messages at an abstract name.
    """

    address: str
    listens: bool
    raw: bool
    any_user: bool
    transport: str | None
    timeout: float | None

    @property
    def inherited(self) -> int | None:
        """The number of the inherited socket that the address names, if it does."""
        return numbered(self.address)

    def admits(self, sock: socket.socket, name: Any) -> bool:
        """Whether the other end of a bare socket may take part: where a file's mode does not say so, the same user.

        Args:
            name: of the listening socket, as the kernel gives it; an abstract one is bytes.
        """
        return self.any_user or bool(name and isinstance(name, str)) or same_user(peer_credentials(sock))

    @property
    def place(self) -> str:
        """The address in the kernel's notation."""
        return "\0" + self.address[1:] if self.address.startswith("@") else self.address


def numbered(text: str) -> int | None:
    """Return N of ``fd:N``; None for every other text, which is a path."""
    scheme, _, number = text.partition(":")
    return int(number) if scheme == "fd" and number.isdecimal() else None


# --- meeting ---------------------------------------------------------------------------------------------------------------


def _note(text: str) -> None:
    """Tell a person, and no log, why nothing happens."""
    if sys.stderr.isatty():
        print(f"fdshare: {text}", file=sys.stderr, flush=True)


@contextmanager
def _channel(meeting: Meeting) -> Iterator[fdshare.Channel]:
    """Give a channel to the other side."""
    if meeting.listens:
        given: Any = meeting.place if meeting.inherited is None else _inherited(meeting.inherited)
        with fdshare.Listener(given, transport=meeting.transport) as listener:
            _note(f"listening at {meeting.address}")
            try:
                channel = listener.accept(meeting.timeout)
            except TimeoutError:
                raise _nobody_came(meeting) from None
    else:
        channel = _connect(
            meeting,
            lambda left: fdshare.connect(meeting.place, timeout=left, transport=meeting.transport),
        )
    with channel:
        yield channel


@contextmanager
def _socket(meeting: Meeting) -> Iterator[socket.socket]:
    """Give a bare socket to the other side."""
    transport = meeting.transport or "stream"
    if meeting.listens:
        sock = _accept_raw(meeting, transport)
    else:
        sock = _connect(
            meeting, lambda left: connected_socket(meeting.place, timeout=left, transport=transport)
        )
    try:
        if not meeting.listens and not meeting.admits(sock, sock.getpeername()):
            raise AccessDeniedError(
                errno.EACCES, f"another user listens at {meeting.address}: --any-user talks to that one, too"
            )
        sock.settimeout(meeting.timeout)
        yield sock
    finally:
        dispose(sock, alone=False)


def _accept_raw(meeting: Meeting, transport: str) -> socket.socket:
    identity = None
    if meeting.inherited is not None:
        listener = inherited_socket(_inherited(meeting.inherited))
    else:
        listener, identity = listening_socket(meeting.place, transport=transport)
    deadline = _deadline(meeting.timeout)
    try:
        with listener:
            _note(f"listening at {meeting.address}")
            while fdshare.wait([listener], _left(deadline)):
                try:
                    sock, _ = listener.accept()
                except (
                    BlockingIOError,
                    ConnectionAbortedError,
                ):  # another process was faster, or it has gone again
                    continue
                if meeting.admits(sock, listener.getsockname()):
                    return sock
                _note(f"another user has come to {meeting.address}, and was refused")
                dispose(sock, alone=True)
                if _left(deadline) == 0:  # whoever still comes: strangers without end would keep us
                    break
    finally:
        if identity is not None:
            remove(os.path.abspath(meeting.place), identity)
    raise _nobody_came(meeting)


def _inherited(number: int) -> FdHandle:
    code = errno.EBADF
    try:
        if number not in _closed_streams():
            return own(os.dup, number)
    except OverflowError:
        pass
    except OSError as error:
        code = error.errno or code
    raise OSError(code, f"descriptor {number}: {os.strerror(code)}")


def _closed_streams() -> list[int]:
    """Return which of the descriptors 0 to 2 were closed when this program began; something else stands there now."""
    streams = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
    return [number for number, stream in enumerate(streams) if stream is None]


def _connect(meeting: Meeting, attempt: Callable[[float | None], T]) -> T:
    """Try until somebody listens."""
    deadline = _deadline(meeting.timeout)
    for tries in count():
        left = _left(deadline)
        try:
            return attempt(left)
        except (FileNotFoundError, ConnectionRefusedError):
            if left == 0:
                raise
        if not tries:
            _note(f"waiting for somebody to listen at {meeting.address}")
        time.sleep(RETRY_SECONDS)
    raise AssertionError("count() does not end")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _nobody_came(meeting: Meeting) -> TimeoutError:
    return TimeoutError(
        errno.ETIMEDOUT, f"nobody connected to {meeting.address} within {meeting.timeout:g} s"
    )


@contextmanager
def _all_descriptors_allowed() -> Iterator[tuple[int, int]]:
    """Raise the soft limit of descriptors to the hard one in the block; give the limits as they were.

    The soft limit is low for programs that use select(2); this one passes as many descriptors on as it is given.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS allows less than its hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- sending -------------------------------------------------------------------------------------------------------------


def send(meeting: Meeting, files: Sequence[str], *, mode: str, data: bytes) -> int:
    """Open files and send them; return when the other side has taken them.

    Args:
        files: paths; ``-`` is the standard input, ``fd:N`` a descriptor that was inherited.
        mode: as of open(), without b and t.
        data: what goes with the descriptors of a raw message; one byte at least.

    Raises:
        OSError: a file cannot be opened; nobody came; the other side closed before it had taken them.
    """
    with _all_descriptors_allowed(), ExitStack() as stack:
        things: dict[str, Any] = {}
        for path in files:
            things[STDIN if path == "-" else path] = stack.enter_context(_open(path, mode))
        if meeting.raw:
            with _socket(meeting) as sock:
                _send_raw(sock, list(things.values()), data)
                _wait_until_taken(sock, meeting.timeout)
        else:
            with _channel(meeting) as channel:
                try:
                    channel.send(things, timeout=meeting.timeout)
                except PeerClosedError:
                    raise _not_taken() from None
                except TimeoutError:
                    raise _too_late(meeting.timeout) from None
                with to_socket(FdHandle.dup(channel)) as sock:
                    _wait_until_taken(sock, meeting.timeout, channel)
    return 0


def _open(path: str, mode: str) -> io.FileIO | FdHandle:
    """Open a file without a buffer; a directory becomes a handle, as does what is open already."""
    if path == "-" and sys.stdin is None:
        raise OSError(errno.EBADF, "the standard input is closed")
    given = 0 if path == "-" else numbered(path)
    if given is not None:
        return _inherited(given)
    try:
        return io.FileIO(path, mode)
    except IsADirectoryError:
        if mode != "r":
            raise
        return own(os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _send_raw(sock: socket.socket, things: list[Any], data: bytes) -> None:
    try:
        for first in range(0, len(things), wire.MAX_FDS_PER_PACKET):
            sent = fdshare.send_fds(sock, [data], things[first : first + wire.MAX_FDS_PER_PACKET])
            while sent < len(data):  # of a stream; the descriptors have gone with the first of it
                sent += sock.send(data[sent:])
    except (BrokenPipeError, ConnectionResetError):
        raise _not_taken() from None
    except TimeoutError:
        raise _too_late(sock.gettimeout()) from None


def _wait_until_taken(sock: socket.socket, timeout: float | None, channel: Any = None) -> None:
    """Wait until nothing of what was sent is unread; raise where the other side has closed over it.

    The kernel resets a connection (ECONNRESET) whose other side closes with something unread, or is closed before it
    was accepted.
    """
    deadline = _deadline(timeout)
    pause = FIRST_LOOK_SECONDS
    while True:
        unread = unread_bytes(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            if channel is not None:
                _say_why(channel)
            raise _not_taken()
        if not unread:
            return
        if _left(deadline) == 0:
            raise _too_late(timeout)
        time.sleep(pause)
        pause = min(1.5 * pause, LAST_LOOK_SECONDS)


def _say_why(channel: fdshare.Channel) -> None:
    """Raise what the other side has said before it closed, if that is why: a refusal, another version or codec."""
    try:
        channel.recv(timeout=0)
    except (PeerClosedError, TimeoutError):
        pass


def _too_late(timeout: float | None) -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"the other side did not take it within {timeout:g} s")


def _not_taken() -> PeerClosedError:
    return PeerClosedError(errno.EPIPE, "the other side closed before it had taken everything")


# --- receiving -----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Taking:
    """What to do with what arrives.

    ``count`` is the number of messages to take, None for all until the other side closes; ``how`` is "table", "json" or "cat";
    ``command`` is started with the descriptors of all messages, at the end.
    """

    count: int | None
    how: str
    command: Sequence[str] | None


def receive(meeting: Meeting, taking: Taking) -> int:
    """Receive messages, and do with them as told; return the exit code.

    Raises:
        OSError: nobody came; the other side sent nothing; a message cannot be received or copied.
    """
    if taking.command is not None and shutil.which(taking.command[0]) is None:  # before anything is taken
        code = errno.EACCES if os.path.exists(taking.command[0]) else errno.ENOENT
        return _cannot_start(taking.command, OSError(code, os.strerror(code)))
    kept: list[Item] = []
    with _all_descriptors_allowed() as limits, ExitStack() as stack:
        if meeting.raw:
            arrivals = _raw_arrivals(stack.enter_context(_socket(meeting)))
        else:
            arrivals = _arrivals(stack.enter_context(_channel(meeting)), meeting.timeout)
        number = 0
        while number != taking.count and (arrival := _next(arrivals, meeting.timeout)):
            number = arrival.number
            with ExitStack() as closing:
                for item in arrival.items:
                    closing.callback(getattr(item.thing, "close", _nothing))
                if taking.command is not None:
                    kept += arrival.items
                    stack.push(closing.pop_all())
                elif taking.how == "cat":
                    copy_all(arrival)
                else:
                    tell(arrival, as_json_text=taking.how == "json")
        if not number:
            raise PeerClosedError(errno.EPIPE, "the other side closed without sending anything")
        if taking.command is not None:
            sys.stdout.flush()
            try:
                hand_over_to(taking.command, kept, limits)
            except (FileNotFoundError, PermissionError) as error:
                return _cannot_start(taking.command, error)
    return 0


def _nothing() -> None:
    """Close what has a descriptor and cannot be closed."""


def _next(arrivals: Iterator[Arrival], timeout: float | None) -> Arrival | None:
    try:
        return next(arrivals, None)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"the other side sent nothing within {timeout:g} s") from None


def _cannot_start(command: Sequence[str], error: OSError) -> int:
    print(f"fdshare recv: {command[0]}: {error.strerror}", file=sys.stderr)
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def _arrivals(channel: fdshare.Channel, timeout: float | None) -> Iterator[Arrival]:
    for number in count(1):
        try:
            message = channel.recv(timeout=timeout)
        except PeerClosedError:
            return
        text = "" if is_plain(message) else shortened(message)
        yield Arrival(number, channel.peer, find_items(message), text)


def _raw_arrivals(sock: socket.socket) -> Iterator[Arrival]:
    for number in count(1):
        try:
            data, handles = fdshare.recv_fds(sock, RAW_BUFFER, wire.MAX_FDS_PER_PACKET)
        except ConnectionResetError:
            return
        if not data and not handles:
            return
        items = [Item(str(n), handle) for n, handle in enumerate(handles)]
        yield Arrival(
            number, peer_credentials(sock), items, f"{counted(len(data), 'byte')}: {shortened(data)}"
        )
