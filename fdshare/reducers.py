"""Which types travel and how: a registry of reduce/rebuild pairs, side by side.

A reducer is called as ``reduce(obj, context)`` and returns what ``__reduce__`` would: a module-level function and its
arguments, which may hold further objects that travel.  ``context.lend(fd, owner)`` puts a descriptor into the message and
returns its index; the rebuild function calls :func:`take` with that index.  A reducer may run several times for one
object, and must leave it as it was: flushing a writer and aligning a reader's offset are the only things done to it.

The names of the rebuild functions are the wire format.
"""

from __future__ import annotations

import _socket
import copyreg
import select
import socket
import stat
import sys
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fdshare.errors import DecodeError
from fdshare.handle import FdHandle, HandleList, Moved, format_of, hand_over, to_socket
from fdshare.mains import Importable, importable
from fdshare.native import Socket

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")

__all__ = ["Context", "decoding", "find_reducer", "register", "take"]


class Context(Protocol):
    """What an encoder offers to reducers."""

    by_value: bool
    """Whether cloudpickle may take over what cannot be found by name."""

    moving: int
    """Above zero inside ``move(...)``: the object changes owner with the message."""

    memo: Any
    """Pickle's: what is in the message already, by id, once copied."""

    def lend(self, fd: int, owner: object) -> int:
        """Put ``fd`` into the message, keeping ``owner`` alive until it is sent; return its index there."""

    def consume(self, close: Callable[[], object]) -> None:
        """Call ``close`` once the kernel has the message."""

    def borrow_temporary(self, handle: FdHandle) -> None:
        """Close ``handle`` when the message was sent, or failed."""


Reduced = Any  # the tuple of object.__reduce__, or NotImplemented
Reducer = Callable[[Any, Context], Reduced]


# --- the descriptors of the message being decoded, by thread ------------------------------------------------


class Unpacking:
    """The descriptors of a message that is being unpickled, and who took them."""

    __slots__ = ("built", "given", "handles", "numbers")

    def __init__(self, handles: HandleList) -> None:
        self.handles = handles
        self.numbers = [handle._fd for handle in handles]
        self.given = [False] * len(handles)
        self.built: list[Any] = []

    def close(self, failed: bool) -> None:
        """Close every descriptor that nobody took, and after a failure those that somebody took too."""
        if failed:
            for obj in reversed(self.built):
                try:
                    obj.close()
                except Exception:  # noqa: BLE001 -- of any type, and the others must be closed
                    pass
            self.handles.close()
            return
        if not all(self.given):
            for handle, given in zip(self.handles, self.given, strict=True):
                if not given:
                    handle.close()
        self.handles.release()


class _Decoding(threading.local):
    message: Unpacking | None = None


decoding = _Decoding()


def take(index: int, expected_format: int) -> FdHandle:
    """Return the message's descriptor number ``index``: itself the first time, a duplicate afterwards.

    Raises:
        DecodeError: outside of decoding, no such descriptor, or not what the sender declared.
    """
    message = decoding.message
    if message is None:
        raise DecodeError("a message with descriptors was unpickled outside its channel")
    if not 0 <= index < len(message.numbers):
        raise DecodeError(f"descriptor {index} of a message that has {len(message.numbers)}")
    number = message.numbers[index]
    if message.given[index]:
        handle = FdHandle.dup(number)
        message.built.append(handle)
    else:
        message.given[index] = True
        handle = message.handles[index]
    if format_of(number) == expected_format:
        handle._format = expected_format
    else:
        handle.verify(expected_format)
    return handle


def peek(index: int) -> int:
    """Borrow the number of the message's descriptor ``index``, which is left to whoever takes it.

    Raises:
        DecodeError: outside of decoding, or no such descriptor.
    """
    message = decoding.message
    if message is None or not 0 <= index < len(message.numbers):
        raise DecodeError(f"no descriptor {index} in this message")
    return message.numbers[index]


def built(obj: T) -> T:
    """Note an object that took a descriptor over, so that it is closed where the rest of the message fails."""
    if decoding.message is not None:
        decoding.message.built.append(obj)
    return obj


# --- the registry ---------------------------------------------------------------------------------------------

known: dict[type, Reducer] = {}
known_by_name: dict[str, Reducer] = {}  # types of modules that are not imported for their sake
_refusals: set[Reducer] = set()  # what holds for subclasses too
resolved: dict[type, Reducer | None] = {}

beside_pickle: set[Reducer] = set()
"""Reducers that take some objects of their type, in messages; the others, subclasses and other picklers go pickle's own way."""

find_window: Callable[[memoryview], Any] | None = None
"""Returns what stands for a buffer that lies in shared memory, or None; unset as long as this process has no such memory."""


def register(type: type, *, reduce: Callable[[Any], tuple[Any, ...]]) -> None:
    """Teach fdshare how objects of exactly ``type`` travel.

    Args:
        type: a class; a subclass needs a registration of its own.
        reduce: called with the object at the sender, returns ``(function, args)`` as ``__reduce__`` would; ``args`` may
            hold files, sockets, FdHandles.  An ``FdHandle.dup(fd)`` made there and referenced from nowhere else is
            closed after the send, and with it go this process's record locks on that file: name the open file itself where
            there may be some.  It may be called several times for one object.

    Raises:
        TypeError: ``type`` is not a class or ``reduce`` is not callable.
    """
    if not isinstance(type, _type) or not callable(reduce):
        raise TypeError("register(type, reduce=function): a class and a function")

    def reduce_registered(obj: Any, context: Context) -> Reduced:
        reduced = reduce(obj)
        arguments = reduced[1] if isinstance(reduced, tuple) and len(reduced) > 1 else ()
        for position in range(len(arguments)):
            # Referenced by the tuple and getrefcount's argument only: made for this message.
            if _type(arguments[position]) is FdHandle and sys.getrefcount(arguments[position]) <= 2:
                context.borrow_temporary(arguments[position])
        return reduced

    known[type] = reduce_registered
    resolved.clear()


_type = type


def find_reducer(cls: type) -> Reducer | None:
    """Return how ``cls`` travels, or None where pickle's own way is right; remembered in ``resolved``.

    A subclass of a known type that says nothing about its own pickling is refused: rebuilt as its base it would
    silently become something else.
    """
    reducer = resolved[cls] = _resolve(cls)
    return reducer


def _resolve(cls: type) -> Reducer | None:
    if issubclass(cls, type):
        return reduce_by_name
    for base in cls.__mro__[:-1]:
        reducer = known.get(base) or known_by_name.get(f"{base.__module__}.{base.__qualname__}")
        if reducer is not None:
            if base is cls or reducer in _refusals:
                return reducer
            return None if reducer in beside_pickle else _refuse_subclass(cls, base)
        if cls in copyreg.dispatch_table or "__reduce__" in vars(base) or "__reduce_ex__" in vars(base):
            return None  # it knows by itself
    return None


def _refuse_subclass(cls: type, base: type) -> Reducer:
    return _refusal(
        f"it is a subclass of {base.__name__} with a behaviour of its own; "
        f"fdshare.register({cls.__name__}, reduce=...) says how it travels"
    )


def _refusal(reason: str) -> Reducer:
    def refuse(obj: Any, context: Context) -> Reduced:
        raise Refused(obj, reason)

    return refuse


def refuse_early(obj: object, context: Context) -> None:
    """Raise :class:`Refused` where ``obj`` is of a type that never travels, before anything around it is touched."""
    reducer = find_reducer(type(obj))
    if reducer in _refusals:
        reducer(obj, context)


class Refused(Exception):
    """Inside the encoder: ``obj`` cannot travel, because of ``reason``."""

    def __init__(self, obj: object, reason: str) -> None:
        super().__init__(reason)
        self.obj = obj
        self.reason = reason


def lend(obj: Any, context: Context, fd: int) -> tuple[int, int]:
    return context.lend(fd, obj), format_of(fd)


# --- FdHandle and move -------------------------------------------------------------------------------------------


def reduce_handle(handle: FdHandle, context: Context) -> Reduced:
    fd, format = handle._fd, handle._format  # not by their properties: a message may have thousands
    if fd < 0:
        raise Refused(handle, "it is closed or was consumed")
    if context.moving:
        context.consume(handle.close)
    return take, (context.lend(fd, handle), format if format >= 0 else handle.format)


class Mark:
    """Stands around what is moved, so that the encoder knows where it begins and ends."""

    def __init__(self, step: int) -> None:
        self.step = step


def reduce_move(moved: Moved, context: Context) -> Reduced:
    return rebuild_moved, (Mark(1), moved.obj, Mark(-1))


def reduce_mark(mark: Mark, context: Context) -> Reduced:
    context.moving += mark.step
    return int, ()


def rebuild_moved(_begin: object, obj: Any, _end: object) -> Any:
    return obj


# --- sockets, connections, epoll --------------------------------------------------------------------------------


def reduce_socket(sock: socket.socket, context: Context) -> Reduced:
    fd = sock.fileno()
    if fd < 0:
        raise Refused(sock, "it is closed")
    if sock._io_refs:  # type: ignore[attr-defined]
        WithFiles.ready(sock, context)
    elif context.moving:
        context.consume(sock.close)
    return rebuild_socket, (
        context.lend(fd, sock),
        _family(sock),
        _type_of(sock),
        sock.proto,
        sock.gettimeout(),
    )


class WithFiles:
    """How a socket is made ready that has files of ``makefile()``; makefiles.py says it, since it knows what files hold."""

    ready: Callable[[socket.socket, Context], None]


# As plain ints: the properties of socket.socket make enum members of them, which takes longer than all the rest.
_family = vars(_socket.socket)["family"].__get__
_type_of = vars(_socket.socket)["type"].__get__


def rebuild_socket(index: int, family: int, type: int, proto: int, timeout: float | None) -> socket.socket:
    # O_NONBLOCK belongs to the description that the sender shares, and settimeout writes it.  So the timeout is set
    # only where that changes nothing; where the flag says otherwise meanwhile, the flag is the truth.
    sock = built(to_socket(take(index, stat.S_IFSOCK), family, type, proto))
    if timeout is not None and sock.gettimeout() is not None:
        sock.settimeout(timeout)
    return sock


def reduce_transport_socket(sock: Any, context: Context) -> Reduced:
    """What asyncio shows of a socket that belongs to its event loop: of a server's a duplicate can be sent."""
    if context.moving:
        raise Refused(sock, "it belongs to its event loop: send it without move(), then close the server")
    if sock.type != socket.SOCK_DGRAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise Refused(sock, _IN_A_LOOP)
    index = context.lend(sock.fileno(), sock)
    return rebuild_socket, (index, int(sock.family), int(sock.type), sock.proto, 0.0)


_IN_A_LOOP = (
    "it belongs to its event loop: send await fdshare.aio.detach(reader, writer), or detach_transport(transport), "
    "and open that there"
)


def reduce_connection(connection: Connection, context: Context) -> Reduced:
    if connection.closed:
        raise Refused(connection, "it is closed")
    if context.moving:
        context.consume(connection.close)
    arguments = lend(connection, context, connection.fileno())
    return rebuild_connection, (*arguments, connection.readable, connection.writable)


def rebuild_connection(index: int, format: int, readable: bool, writable: bool) -> Connection:
    from multiprocessing.connection import Connection

    return built(Connection(take(index, format).detach(), readable, writable))


def reduce_epoll(epoll: Any, context: Context) -> Reduced:
    if epoll.closed:
        raise Refused(epoll, "it is closed")
    if context.moving:
        context.consume(epoll.close)
    return rebuild_epoll, lend(epoll, context, epoll.fileno())


def rebuild_epoll(index: int, format: int) -> Any:
    handle = take(index, format)
    return built(hand_over(handle, select.epoll.fromfd, handle.fileno()))


# --- functions and classes -----------------------------------------------------------------------------------------


def reduce_by_name(obj: Any, context: Context) -> Reduced:
    """Functions and classes travel by name, except those of a main module that not every other process can import."""
    if (
        not context.by_value
        and getattr(obj, "__module__", None) == "__main__"
        and importable() is not Importable.BY_ALL
    ):
        raise Refused(obj, "it lives in a __main__ that other processes cannot import")
    return NotImplemented


known.update(
    {
        FdHandle: reduce_handle,
        Moved: reduce_move,
        Mark: reduce_mark,
        Socket: reduce_socket,
        types.FunctionType: reduce_by_name,
    }
)
if hasattr(select, "epoll"):
    known[select.epoll] = reduce_epoll
known_by_name.update(
    {
        "multiprocessing.connection.Connection": reduce_connection,
        "asyncio.trsock.TransportSocket": reduce_transport_socket,
        "uvloop.loop.PseudoSocket": reduce_transport_socket,
    }
)
beside_pickle.add(reduce_transport_socket)
_OF_A_LOOP = (
    "it is of an event loop of this process, whose numbers mean other files elsewhere: make one there"
)
OF_THIS_PROCESS = {
    "selectors.BaseSelector": "its keys are numbers of this process: send the files that it watches, and register them there",
    "selectors.SelectorKey": "its fd is a number of this process: send its fileobj, and register that there",
    "select.poll": "what it watches are numbers of this process: send the files, and register them there",
    "select.devpoll": "what it watches are numbers of this process: send the files, and register them there",
    "select.kqueue": "a kqueue is of this process: send the files that it watches, and register them there",
    "select.kevent": "its ident is a number of this process: send the file itself",
    "fdshare.waiting.ChannelSet": "its numbers are of this process: send list(set), and make a ChannelSet of that there",
    "posix.DirEntry": "it refers to a directory that this process has open: send entry.path",
    "posix.ScandirIterator": "it is a directory open in this process: send the path, or os.open() of it",
    "asyncio.events.AbstractEventLoop": _OF_A_LOOP,
    "uvloop.loop.Loop": _OF_A_LOOP,
    "asyncio.events.Handle": _OF_A_LOOP,
    "asyncio.futures.Future": _OF_A_LOOP,
    "_asyncio.Future": _OF_A_LOOP,
}
"""What is in it are numbers of this process, or of its event loop: by name, and why it does not travel."""

for _name, _reason in {
    **OF_THIS_PROCESS,
    "ssl.SSLSocket": "its TLS state lives in this process: send the plain socket before it is wrapped, or proxy it",
    "gzip.GzipFile": "a compressed stream has state in mid-file: send the file below it, before it is wrapped",
    "bz2.BZ2File": "a compressed stream has state in mid-file: send the file below it, before it is wrapped",
    "lzma.LZMAFile": "a compressed stream has state in mid-file: send the file below it, before it is wrapped",
    "zipfile.ZipExtFile": "a compressed member has state in mid-file: send the archive's own file, or read() of it",
    "_io.BufferedRWPair": "it joins two streams: send the two",
    "builtins.memoryview": "a view borrows its memory: send bytes(view), or the object it looks into",
    "socket.SocketIO": "it belongs to its socket: send the socket, and call makefile() there",
    "codecs.StreamReaderWriter": "it reads ahead out of reach: use open(..., encoding=...), not codecs.open",
    "mmap.mmap": "a mapping is of this process: send the file and map it there",
    "subprocess.Popen": "a process belongs to its parent: send its pipes (stdin, stdout, stderr)",
    **dict.fromkeys(
        (
            "asyncio.streams.StreamReader",
            "asyncio.streams.StreamWriter",
            "asyncio.transports.BaseTransport",
            "uvloop.loop.TCPTransport",
            "uvloop.loop.UnixTransport",
            "uvloop.loop.UDPTransport",
            "uvloop.loop._SSLProtocolTransport",
        ),
        _IN_A_LOOP,
    ),
    **dict.fromkeys(
        ("asyncio.events.AbstractServer", "uvloop.loop.Server"),
        "it belongs to its event loop: send its sockets, and start a server with them there",
    ),
}.items():
    known_by_name[_name] = _refusal(_reason)
    _refusals.add(known_by_name[_name])
