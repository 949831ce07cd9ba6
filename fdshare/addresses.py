"""Sockets by address: a listening one, a connected one, and those that were inherited from who started this process.

Nothing here speaks the protocol: what comes out are plain sockets.  An abstract name begins with a zero byte, as in the
kernel's interface, since every other first character is one of a path.
"""

from __future__ import annotations

import _socket
import errno
import functools
import operator
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from itertools import repeat, starmap

from fdshare import socketfile, system
from fdshare.handle import FdHandle, as_fd, to_socket
from fdshare.native import Socket
from fdshare.rights import refuse_all

__all__ = [
    "Address",
    "accepted_sockets",
    "connected_socket",
    "inherited_socket",
    "listen_fds",
    "listening_socket",
]

Address = str | bytes | os.PathLike[str] | os.PathLike[bytes]

DEFAULT_BACKLOG = 128
"""Connections that the kernel keeps until they are accepted; the system may allow fewer (net.core.somaxconn of Linux)."""

MAX_ABSTRACT = 107
"""Bytes of an abstract name on Linux, without the zero byte in front of it."""

FIRST_LISTEN_FD = 3
"""SD_LISTEN_FDS_START: the first descriptor that a service manager hands over."""

MAX_LISTEN_FDS = 65536
"""Most descriptors that LISTEN_FDS may speak of: more than any service has, fewer than would keep us busy."""

# Plain ints: the socket module's enums take longer than a system call.
_AF_UNIX = int(socket.AF_UNIX)
_SEQPACKET, _STREAM = int(getattr(socket, "SOCK_SEQPACKET", -1)), int(socket.SOCK_STREAM)
_TYPES = {
    "seqpacket": _SEQPACKET if system.HAVE_SEQPACKET else -1,
    "stream": _STREAM,
    None: _SEQPACKET if system.HAVE_SEQPACKET else _STREAM,
}
_NONBLOCK = int(getattr(socket, "SOCK_NONBLOCK", 0))


class _Made(Socket):
    """A socket made in C alone: no interrupt finds a descriptor without an owner, and it takes half the time."""

    _io_refs = 0
    _closed = False

    __init__ = _socket.socket.__init__


def _text(address: Address) -> str:
    """Return an address as text, checked.

    Raises:
        ValueError: empty, a zero byte inside, an abstract name that is too long or has no place on this system.
    """
    text = address if type(address) is str else os.fsdecode(address)
    if text and "\0" not in text:
        return text
    if text[:1] == "\0":
        if sys.platform != "linux":
            raise ValueError("abstract names exist on Linux only: use a path")
        if not 0 < len(os.fsencode(text)) - 1 <= MAX_ABSTRACT:
            raise ValueError(f"an abstract name has 1 to {MAX_ABSTRACT} bytes")
        return text
    raise ValueError(
        "an address is the path of a socket: not empty, and no zero byte inside (abstract names begin with one)"
    )


def _new_socket(transport: str | None) -> socket.socket:
    """Return a new socket that does not block.

    Raises:
        ValueError: an unknown name.
        OSError: the system has no such sockets, or no descriptor is left.
    """
    try:
        kind = _TYPES[transport]
    except KeyError:
        raise ValueError(f"transport is 'seqpacket', 'stream' or None, not {transport!r}") from None
    if kind < 0:
        raise OSError(errno.EPROTONOSUPPORT, "only Linux keeps packets whole (SEQPACKET): use stream")
    sock: socket.socket = _Made(_AF_UNIX, kind | _NONBLOCK)
    if not _NONBLOCK:
        sock.setblocking(False)
    return sock


def accepted_sockets(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the next connection, again and again, or raise what accept(2) says; nothing that is raised ends it."""
    accept = listener._accept  # type: ignore[attr-defined]  # of C, below the method
    make = functools.partial(_Made, _AF_UNIX, int(listener.type), 0)
    return map(make, map(operator.itemgetter(0), starmap(accept, repeat(()))))


def listening_socket(
    address: Address,
    *,
    backlog: int = DEFAULT_BACKLOG,
    mode: int = 0o600,
    transport: str | None = None,
    descriptors: bool = True,
) -> tuple[socket.socket, socketfile.Identity | None]:
    """Return a listening socket that does not block, and which file it is (None for an abstract name).

    Args:
        address: a path, or an abstract name: one that begins with a zero byte.
        backlog: as for listen(2).
        mode: permission bits of the socket's file.
        transport: "seqpacket", "stream", or None for the best that the system has.
        descriptors: whether any may come, from the first moment on.

    Raises:
        ValueError: a bad address, mode or transport.
        OSError: EADDRINUSE where somebody listens there; what the directory says.
    """
    text = _text(address)
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode is permission bits, not {mode:#o}")
    sock = _new_socket(transport)
    try:
        if not descriptors:
            refuse_all(sock)  # what is accepted inherits it
        if text[0] == "\0":
            try:
                sock.bind(os.fsencode(text))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise OSError(error.errno, "somebody has this abstract name already", text) from error
                raise
            sock.listen(backlog)
            return sock, None
        return sock, socketfile.listen_at(sock, os.path.abspath(text), mode, backlog)
    except BaseException:
        sock.close()
        raise


def connected_socket(
    address: Address,
    *,
    timeout: float | None = None,
    transport: str | None = None,
    descriptors: bool = True,
) -> socket.socket:
    """Return a blocking socket that is connected to a listener; nothing was said or checked yet.

    Args:
        timeout: seconds to wait while the listener's backlog is full; None waits for ever.
        descriptors: whether any may come, from the first moment on.

    Raises:
        FileNotFoundError, ConnectionRefusedError, PermissionError, TimeoutError, OSError: says what to do.
    """
    text = _text(address)
    sock = _new_socket(transport)
    try:
        if not descriptors:
            refuse_all(sock)
        try:
            sock.connect(text)
        except OSError as error:
            _connect_slowly(sock, text, error, timeout)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(True)
    return sock


def _connect_slowly(sock: socket.socket, text: str, error: OSError, timeout: float | None) -> None:
    """Go on where a simple connect has failed with ``error``: wait for room in the backlog, or take a way to a long path.

    Raises:
        OSError: says what to do.
    """
    try:
        if isinstance(error, BlockingIOError):
            _connect_later(sock, text, timeout)
        elif error.errno is None and not socketfile.fits(text):
            with socketfile.short_for_connect(text) as short:
                try:
                    sock.connect(short)
                except BlockingIOError:
                    _connect_later(sock, short, timeout)
        else:
            raise error
    except OSError as final:
        raise _explained(final, text, sock) from final


def _connect_later(sock: socket.socket, address: str, timeout: float | None) -> None:
    """Connect once the backlog has room: there is nothing to poll for, so the kernel must wait.

    Raises:
        TimeoutError: it had none in time.
    """
    if timeout is not None and timeout <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the listener's backlog is full")
    deadline = None if timeout is None else time.monotonic() + timeout
    # A socket that Python believes not to block: where it waits itself, it takes EINTR for a success.
    os.set_blocking(sock.fileno(), True)
    while True:
        left = 0.0 if deadline is None else max(deadline - time.monotonic(), 1e-6)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, system.timeval(left))
        try:
            sock.connect(address)
        except InterruptedError:
            continue
        except BlockingIOError as error:
            raise TimeoutError(
                errno.ETIMEDOUT, f"the listener's backlog is full, for {timeout:g} s now: it does not accept"
            ) from error
        break
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, system.timeval(0))


def _explained(error: OSError, address: str, sock: socket.socket) -> OSError:
    """Return the error with what to do about it."""
    number, text = error.errno, error.strerror
    if number == errno.ENOENT:
        text = "nobody listens here, there is no such file: start the listener first, or correct the path"
    elif number == errno.ECONNREFUSED:
        if address[0] == "\0":
            text = "nobody listens at this abstract name: start the listener first"
        elif sys.platform != "linux" and _is_listening(address):
            text = (
                "the listener's backlog is full, which this system refuses at once: connect again in a while"
            )
        elif _is_socket(address):
            text = (
                "nobody listens here any more: the listener has ended; start it again, it replaces the file"
            )
        else:
            text = "this file is no socket"
    elif number == errno.ENOTSOCK:  # what BSD says where Linux refuses
        number, text = errno.ECONNREFUSED, "this file is no socket"
    elif number == errno.EPROTOTYPE:
        other = "stream" if sock.type == socket.SOCK_SEQPACKET else "seqpacket"
        text = f"the listener uses another type of socket: give connect transport={other!r}, or the listener another one"
    elif number in (errno.EACCES, errno.EPERM):
        text = "this user may not connect: the mode of the socket's file, or of a directory on the way, forbids it"
    elif number is None:
        return error
    return OSError(number, text, address.replace("\0", "@"))  # of the subclass that fits the number


def _is_listening(path: str) -> bool:
    try:
        return socketfile.is_alive(path)
    except OSError:
        return False


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # cannot be told


def inherited_socket(
    given: FdHandle | socket.socket | int, backlog: int = DEFAULT_BACKLOG, *, descriptors: bool = True
) -> socket.socket:
    """Take over a listening socket that somebody else has made; where it does not fit it stays as it was.

    It listens anew, so that clients see this process's credentials, and no longer those of the service manager.

    Args:
        given: an FdHandle or socket, which are spent, or a descriptor's number, which belongs to the result.
        descriptors: whether any may come, from now on.

    Raises:
        ValueError: not a listening AF_UNIX socket, SEQPACKET or STREAM.
        OSError: not open, or not a socket.
    """
    number = as_fd(given)
    with to_socket(FdHandle.dup(number)) as probe:
        fits = (
            probe.family == socket.AF_UNIX
            and probe.type in _TYPES.values()
            and probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
        if not fits:
            raise ValueError(
                f"descriptor {number} is no listening AF_UNIX socket (systemd: ListenSequentialPacket= or ListenStream= "
                "with a path)"
            )
        kind = probe.type
    handle = FdHandle(number if isinstance(given, int) else given.detach())
    sock = to_socket(handle, socket.AF_UNIX, kind, 0)
    try:
        sock.set_inheritable(False)
        if not descriptors:
            refuse_all(sock)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_fds() -> list[tuple[str, FdHandle]]:
    """Take over the descriptors that a service manager hands to this process (sd_listen_fds(3): socket activation).

    Reads ``LISTEN_PID``, ``LISTEN_FDS`` and ``LISTEN_FDNAMES``, and removes them from the environment, so that a second call, and
    child processes, find nothing.

    Returns:
        name and handle of each, in their order, for ``Listener(handle)``; the name is "unknown" where none was given.  An empty
        list where nothing was handed over, or to another process.

    Raises:
        ValueError: the variables are not numbers, or out of bounds.
        OSError: one of the descriptors is not open.
    """
    pid, count, names, _ = (
        os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES", "PIDFDID")
    )
    if not (pid and count) or int(pid) != os.getpid():
        return []
    if not 0 <= int(count) <= MAX_LISTEN_FDS:
        raise ValueError(f"LISTEN_FDS is {count}; MAX_LISTEN_FDS is {MAX_LISTEN_FDS}")
    numbers = range(FIRST_LISTEN_FD, FIRST_LISTEN_FD + int(count))
    labels = names.split(":") if names else []
    if len(labels) != len(numbers):
        labels = ["unknown"] * len(numbers)
    for number in numbers:
        os.fstat(number)  # before any of them is touched
    for number in numbers:
        os.set_inheritable(number, False)
    return [(label, FdHandle(number)) for label, number in zip(labels, numbers, strict=True)]
