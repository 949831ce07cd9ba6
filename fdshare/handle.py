"""``FdHandle``, the sole owner of one descriptor, and ``move``, which gives an owner away with a message.

Ownership, in three verbs used throughout fdshare:

=========== ============================================ =========================================
verb        calls                                        afterwards
=========== ============================================ =========================================
borrow      ``fileno()``                                 the handle still owns the descriptor
duplicate   ``FdHandle.dup(x)``, sending a handle        two owners, two descriptors, one description
consume     ``detach()``, ``to_file()``, ``to_socket()`` the caller owns it, the handle is spent
=========== ============================================ =========================================
"""

from __future__ import annotations

import _socket
import codecs
import errno
import io
import os
import stat
import warnings
from collections.abc import Callable
from itertools import starmap
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs

from fdshare.closing import Closing
from fdshare.errors import ClosedError, DecodeError, NotSendableError
from fdshare.native import Socket

if TYPE_CHECKING:
    import socket

__all__ = [
    "KIND_BY_FORMAT",
    "FdHandle",
    "Handles",
    "HasFileno",
    "Moved",
    "as_fd",
    "format_of",
    "hand_over",
    "kind_of",
    "kind_of_link",
    "move",
    "own",
    "socketpair_of",
    "to_socket",
]

T = TypeVar("T")


class HasFileno(Protocol):
    """Anything that lends its descriptor: a file, a socket, a Channel, an FdHandle."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


KIND_BY_FORMAT = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


_FORMAT_MASK = stat.S_IFMT(-1 & 0xFFFF)


def format_of(fd: int) -> int:
    """Return the file format bits (``S_IFMT``) that ``fstat`` tells of ``fd``; 0 for anonymous inodes."""
    return os.fstat(fd).st_mode & _FORMAT_MASK


def kind_of(fd: int) -> str:
    """Tell what ``fd`` is: "file", "directory", "socket", "pipe", "tty", "device", "memfd", "eventfd", "pidfd", "epoll",
    "timerfd", "signalfd", … or "unknown" where the system does not tell.

    Raises:
        OSError: ``fd`` is not open.
    """
    kind = KIND_BY_FORMAT.get(format_of(fd))
    if kind == "device" and os.isatty(fd):
        return "tty"
    if kind not in (None, "file"):
        return kind
    try:  # only Linux names anonymous inodes, and memory files among the regular ones
        link = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return kind or "unknown"
    return kind_of_link(link) or kind or "unknown"


def kind_of_link(link: str) -> str | None:
    """Tell the kind that a link of ``/proc/PID/fd`` names by itself: a memory file or an anonymous inode; None for others."""
    if link.startswith("/memfd:"):
        return "memfd"
    if link.startswith("pidfd:"):  # a file system of its own since Linux 6.9
        return "pidfd"
    if link.startswith("anon_inode:"):
        name = link.removeprefix("anon_inode:").strip("[]")
        return {"eventpoll": "epoll"}.get(name, name)
    return None


def as_fd(obj: HasFileno | int) -> int:
    """Borrow the descriptor of ``obj`` (an int, or anything with ``fileno()``).

    Raises:
        TypeError: ``obj`` has no descriptor.
        ValueError: the number is negative.
    """
    fd = obj if isinstance(obj, int) else getattr(obj, "fileno", _no_fileno)()
    if isinstance(fd, bool) or not isinstance(fd, int):
        raise TypeError(f"expected a descriptor or an object with fileno(), not {type(obj).__name__}")
    if fd < 0:
        raise ValueError(f"invalid descriptor {fd}")
    return fd


def unarmed() -> FdHandle:
    """Return a handle that owns nothing yet; for :func:`own` and its like."""
    handle = FdHandle.__new__(FdHandle)
    handle._fd, handle._kind, handle._format = -1, None, -1
    return handle


def own(function: Callable[..., int], *arguments: Any) -> FdHandle:
    """Call ``function``, which returns a new descriptor, and own the result.

    An interrupt (KeyboardInterrupt) strikes between bytecodes: here the number goes from one C function to the next, and
    so is never nobody's.

    Raises:
        OSError: as ``function``.
    """
    handle = unarmed()
    for _ in map(_arm, (handle,), starmap(function, (arguments,))):
        break
    return handle


def own_pipe() -> tuple[FdHandle, FdHandle]:
    """Make a pipe and own both ends of it, without a gap as in :func:`own`; return the one to read from first.

    Raises:
        OSError: as pipe(2).
    """
    reader, writer = unarmed(), unarmed()
    for reader._fd, writer._fd in starmap(os.pipe, ((),)):
        break
    return reader, writer


def hand_over(handle: FdHandle, function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function``, a C function whose result owns the handle's descriptor, and spend the handle with it.

    Between the call and the assignment that spends the handle there is no place for an interrupt.
    """
    for result in starmap(function, (arguments,)):
        handle._fd = -1
        return result
    raise AssertionError("one call gives one result")


def to_socket(handle: FdHandle, *arguments: int) -> socket.socket:
    """Spend ``handle`` into a socket; ``arguments`` are its family, type and protocol, if known.

    The socket says no more than the shared description does about blocking: timeout None or 0.0.

    Raises:
        OSError: not a socket; the handle stays usable.
    """
    family, type, proto = arguments or (-1, -1, -1)
    fd = handle.fileno()
    blocking = os.get_blocking(fd)
    if _socket.getdefaulttimeout() is not None:
        # A new socket would be given that timeout, and O_NONBLOCK written for it into what others share.
        type = (type if type >= 0 else _type_of_socket(fd)) | getattr(_socket, "SOCK_NONBLOCK", 0)
    sock = Socket.__new__(Socket)
    sock._io_refs, sock._closed = 0, False  # type: ignore[attr-defined]  # as its Python __init__ would
    hand_over(handle, _socket.socket.__init__, sock, family, type, proto, fd)
    timeout = None if blocking else 0.0
    if sock.gettimeout() != timeout:
        sock.settimeout(timeout)  # changes nothing in the description
    return sock


def socketpair_of(kind: int) -> tuple[socket.socket, socket.socket]:
    """Return a connected pair of AF_UNIX sockets of a type; no interrupt loses one.

    Raises:
        OSError: no descriptors left, or no sockets of that type.
    """
    # Sockets of C own themselves from the call on; socket.socketpair has Python in between.
    for first, second in starmap(_socket.socketpair, ((_socket.AF_UNIX, kind),)):  # noqa: B007
        break
    handles = [own(first.detach), own(second.detach)]
    one, two = [to_socket(handle, _socket.AF_UNIX, kind, 0) for handle in handles]
    return one, two


def _type_of_socket(fd: int) -> int:
    probe = _socket.socket(-1, _socket.SOCK_STREAM | getattr(_socket, "SOCK_NONBLOCK", 0), -1, fd)
    try:
        return probe.getsockopt(_socket.SOL_SOCKET, _socket.SO_TYPE)
    finally:
        probe.detach()


def _no_fileno() -> None:
    return None


def received(fd: int) -> FdHandle:
    """Own a number that the kernel has just given out, so that nothing about it needs a check.

    Nothing is called once the number is stored: an interrupt leaves it owned by the handle or by the caller, never by both.
    """
    handle = unarmed()
    handle._fd = fd
    return handle


def _checked(fd: int) -> int:
    if not isinstance(fd, int) or isinstance(fd, bool):
        raise TypeError(
            f"FdHandle takes a descriptor number, not {type(fd).__name__} (FdHandle.dup takes files too)"
        )
    if fd < 0:
        raise ValueError(f"invalid descriptor {fd}")
    os.get_inheritable(fd)  # EBADF now, and not when the handle closes what others have opened meanwhile
    return int(fd)


@attrs.define(eq=False, repr=False, slots=True, on_setattr=attrs.setters.NO_OP)
class FdHandle(Closing):
    """The sole owner of one descriptor.

    ``FdHandle(fd)`` takes the number over: from now on only the handle closes it.  Handles travel in messages (the
    descriptor is duplicated into the receiver) and close by ``close()`` or as a context manager; one that is dropped
    open closes too, with a ResourceWarning.  After a fork the child's copy owns the child's descriptor.

    Raises:
        TypeError: ``fd`` is not an int.
        ValueError: ``fd`` is negative.
        OSError: ``fd`` is not open (EBADF).
    """

    # Nothing is called between the converter and the end of __init__: an interrupt leaves the descriptor owned either
    # by the handle or by the caller, never by both.
    _fd: int = attrs.field(converter=_checked, alias="fd")
    _kind: str | None = attrs.field(default=None, init=False)
    _format: int = attrs.field(default=-1, init=False)

    @classmethod
    def dup(cls, file_or_fd: HasFileno | int) -> FdHandle:
        """Duplicate a descriptor: the new handle owns the copy (close-on-exec), ``file_or_fd`` keeps its own.

        When the copy is closed in this process, the kernel drops this process's record locks (``fcntl.lockf``) on the file, as
        at any close; sending the file itself does not.

        Raises:
            OSError: not open (EBADF), or the descriptor limit is reached (EMFILE).
            TypeError: ``file_or_fd`` has no descriptor.
        """
        handle = own(os.dup, as_fd(file_or_fd))
        return handle if cls is FdHandle else cls(handle.detach())

    def fileno(self) -> int:
        """Borrow the descriptor: its number, still owned by the handle.

        Raises:
            ClosedError: the handle was closed or consumed.
        """
        if self._fd < 0:
            raise ClosedError("this FdHandle was closed or consumed")
        return self._fd

    def detach(self) -> int:
        """Consume the handle: return the number, which the caller must close from now on.

        Raises:
            ClosedError: the handle was closed or consumed.
        """
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless.  Errors of close(2) are raised as OSError."""
        fd, self._fd = self._fd, -1  # forgotten first: the number may be reused as soon as it is closed
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether the handle owns nothing any more."""
        return self._fd < 0

    @property
    def kind(self) -> str:
        """What the descriptor is, see :func:`kind_of`; remembered, so it stays known after close.

        Raises:
            ClosedError: the handle was closed before its kind was ever asked for.
        """
        if self._kind is None:
            self._kind = kind_of(self.fileno())
        return self._kind

    @property
    def format(self) -> int:
        """The file format bits of the descriptor (``S_IFMT``), 0 for anonymous inodes; remembered.

        Raises:
            ClosedError: the handle was closed or consumed.
        """
        if self._format < 0:
            self._format = format_of(self.fileno())
        return self._format

    def verify(self, expected: int) -> None:
        """Check that the descriptor has the file format that its sender declared.

        Raises:
            DecodeError: it is something else: the sender is wrong or lies.
        """
        self._format = actual = format_of(self.fileno())
        if actual != expected:
            raise DecodeError(
                f"a descriptor was declared as {KIND_BY_FORMAT.get(expected, 'anonymous')!r} "
                f"and arrived as {KIND_BY_FORMAT.get(actual, 'anonymous')!r}"
            )

    def to_file(self, mode: str = "rb", **open_kwargs: Any) -> io.IOBase:
        """Consume the handle into a file object, as ``open(fd, mode, **open_kwargs)`` would make it.

        Raises:
            ClosedError: the handle was closed or consumed.
            ValueError, LookupError: bad mode, encoding or buffering; the handle stays usable where the descriptor does.
            OSError: the descriptor does not fit, such as a directory.
        """
        if not open_kwargs.get("closefd", True):
            raise ValueError("closefd=False would leave the descriptor to nobody")
        for option, lookup in (("encoding", codecs.lookup), ("errors", codecs.lookup_error)):
            if open_kwargs.get(option) not in (None, "locale"):
                lookup(open_kwargs[option])
        fd = self.fileno()
        try:
            file = open(fd, mode, **open_kwargs)  # noqa: SIM115 -- the caller owns it
        except BaseException:
            try:
                os.fstat(fd)
            except OSError:  # open() had made a file object, and closed the descriptor with it
                self._fd = -1
            raise
        self._fd = -1
        assert isinstance(file, io.IOBase)
        return file

    def to_socket(self) -> socket.socket:
        """Consume the handle into a socket; its timeout is None, or 0.0 where the description is non-blocking.

        Raises:
            ClosedError: the handle was closed or consumed.
            OSError: not a socket (ENOTSOCK); the handle stays usable.
        """
        return to_socket(self)

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<FdHandle closed>"
        try:
            kind = self.kind
        except OSError as error:
            kind = errno.errorcode.get(error.errno or 0, "?")
        return f"<FdHandle fd={self._fd} {kind}>"

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:  # unset where __init__ raised
            # The warning may be an error, and this object is beyond saving: close first.
            text = f"unclosed {self!r}"
            try:
                self.close()
            finally:
                warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


class HandleList(list[FdHandle]):
    """Descriptors that came together."""

    def close(self) -> None:
        """Close what is still in the list."""
        for handle in self:
            try:
                handle.close()
            except OSError:
                pass  # it is closed all the same, and nobody had used it; the others must be, too

    def release(self) -> None:
        """Let go of all of them: each has its own owner now."""
        self.clear()


class Handles(HandleList):
    """Descriptors on their way to an owner: they are closed when the list is dropped, until it is released."""

    def release(self) -> None:
        """Let go of all of them: each has its own owner now."""
        self.clear()
        # An interrupt inside a __del__ is lost, so this list will have none.
        self.__class__ = HandleList  # type: ignore[assignment]

    def __del__(self) -> None:
        self.close()


NO_HANDLES = HandleList()


_arm: Any = vars(FdHandle)["_fd"].__set__  # of the slot: a C function


class Outside:
    """How every pickler but a channel's takes a handle or a channel; the façade says it, since the way leads downward."""

    reduce: Callable[[object], tuple[Any, ...]]


class Moved:
    """What :func:`move` returns: an object whose descriptors change owner with the message."""

    __slots__ = ("obj",)

    def __init__(self, obj: object) -> None:
        self.obj = obj

    def __repr__(self) -> str:
        return f"move({self.obj!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotSendableError(
            "move() has a meaning only in a message sent over a fdshare.Channel", type_name="Moved"
        )


def move(obj: Any) -> Moved:
    """Mark ``obj`` to be given away: ``channel.send(move(f))``.

    The receiver gets what it would get without ``move``; the sender's own descriptors inside ``obj`` are closed as soon as the
    kernel has the message, and stay usable where the send raised.  Works at any depth of a message, and on containers
    and objects that hold files, sockets, handles or channels.

    Files that ``makefile()`` has made of a socket are flushed before it is sent, and closed with it when it has moved, so that
    the sender no longer holds the connection.  What one of them has read ahead is not in the socket any more: then the
    socket is refused with :class:`NotSendableError`, moved or not.
    """
    return Moved(obj)
