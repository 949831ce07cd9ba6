"""Descriptors as fields of typed messages: what each annotation takes, what it checks on arrival, what it gives.

================================================ ============================ ==================================
annotation                                       kinds unless declared        access unless declared
================================================ ============================ ==================================
``FdHandle``                                     any but a directory          any
``BinaryIO``, ``IO[bytes]``, ``io.FileIO``       a regular file               any; the file object follows it
``io.BufferedReader``                            a regular file               "r"
``io.BufferedWriter``                            a regular file               "w"
``io.BufferedRandom``                            a regular file               "rw"
``TextIO``, ``IO[str]``, ``io.TextIOWrapper``    a regular file               any; the file object follows it
``socket.socket``                                a socket
``Channel``                                      a socket of AF_UNIX          "rw": what it may do
================================================ ============================ ==================================

Both ends check with the same function: the sender, so that a mistake is its own error, and the receiver, since the
sender may lie.  A descriptor in the message is a number, its place among those that came with it.
"""

from __future__ import annotations

import _socket
import codecs
import fcntl
import io
import os
import socket
import stat
import sys
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import attrs

from fdshare import files, makefiles
from fdshare.channel import Channel
from fdshare.codec import Codec, Outgoing
from fdshare.errors import DecodeError
from fdshare.handle import FdHandle, HandleList, format_of, hand_over, kind_of, to_socket
from fdshare.reducers import Refused, Unpacking
from fdshare.typed.costs import Cost

__all__ = ["Descriptor", "Field", "Receiving", "Sending", "field_of"]

Access = Literal["r", "w", "rw", "path"]

_O_PATH = getattr(os, "O_PATH", 0)  # Linux only

_ACCESS = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}

_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "pipe",
}
"""What fstat tells for certain; the rest needs another look."""


def _is_made_up(fd: int) -> bool:
    """Whether the kernel makes a regular file up as it is read: of procfs, sysfs and the like.

    Its reader may wait, as for the memory of another process, and writing it may be an order.  Such a file has no blocks, and
    its file system none either, as one of memory without a limit, which alone has seals.
    """
    if sys.platform != "linux" or os.fstat(fd).st_blocks or os.fstatvfs(fd).f_blocks:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return True
    return False


def _frozen(names: Iterable[Any] | str) -> frozenset[Any]:
    return frozenset((names,)) if isinstance(names, str) else frozenset(names)


@attrs.frozen(kw_only=True)
class Descriptor:
    """What a descriptor in a typed message must be: ``Annotated[FdHandle, Descriptor(kinds={"file"}, access="r")]``.

    Args:
        kinds: as :attr:`FdHandle.kind` names them; "file" holds for memory files too, and not for "pseudo" ones, which the kernel
            makes up as they are read (``/proc/1/mem``).  Empty for what the type says.
        access: "r", "w" or "rw": exactly what the descriptor was opened for; "path" for one of O_PATH; None for
            any but that.  For a Channel: what it may do.
        directories: whether a directory may come.  With one, a confined process opens what lies below and beside it.
        families, types: of sockets, such as ``{socket.AF_INET}`` and ``{socket.SOCK_STREAM}``; empty for any.
        encoding, errors, newline: of text files, as for ``open``; they are the receiver's, not the sender's.
        codec: of a Channel; None for the codec of the channel that the message comes by.

    Raises:
        ValueError: an unknown access.
    """

    kinds: frozenset[str] = attrs.field(default=frozenset(), converter=_frozen)
    access: Access | None = attrs.field(
        default=None, validator=attrs.validators.in_((None, "r", "w", "rw", "path"))
    )
    directories: bool = False
    families: frozenset[int] = attrs.field(default=frozenset(), converter=_frozen)
    types: frozenset[int] = attrs.field(default=frozenset(), converter=_frozen)
    encoding: str = "utf-8"
    errors: str = "strict"
    newline: str | None = None
    codec: Codec | None = None

    def objection(self, fd: int) -> str | None:
        """Return why ``fd`` is not what was declared, None where it is.

        Raises:
            OSError: it is not open.
        """
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if bool(flags & _O_PATH) != (self.access == "path"):
            return "it is " + ("" if flags & _O_PATH else "not ") + 'of O_PATH (access="path")'
        kind = self._kind(fd)
        if kind not in self.kinds and (self.kinds or kind == "directory"):
            if kind != "directory":
                return f"it is a {kind}, not {' or '.join(sorted(self.kinds))}"
            if not self.directories:
                return "it is a directory, which must be declared: Descriptor(directories=True)"
        if self.access not in (None, "path") and kind != "socket":
            access = _ACCESS.get(flags & os.O_ACCMODE)
            if access != self.access:
                return f"it is open for {access!r}, and declared for {self.access!r}"
        if kind == "socket" and (self.families or self.types):
            return self._socket_objection(fd)
        return None

    def _kind(self, fd: int) -> str:
        format = format_of(fd)
        if format == stat.S_IFREG and self.kinds and _is_made_up(fd):
            return "pseudo"
        if format == stat.S_IFREG and ("file" in self.kinds or not self.kinds):
            return "file"
        return _KINDS.get(format) or kind_of(fd)

    def _socket_objection(self, fd: int) -> str | None:
        # Any type but -1, and not blocking: so nothing is written into what the sender shares, whatever the default timeout.
        probe = _socket.socket(-1, socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0), -1, fd)
        try:
            family, type = int(probe.family), probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        finally:
            probe.detach()
        if self.families and family not in self.families:
            return f"it is a socket of family {family}, not {sorted(map(int, self.families))}"
        if self.types and type not in self.types:
            return f"it is a socket of type {type}, not {sorted(map(int, self.types))}"
        return None


class Sending:
    """The descriptors of a message that is being encoded, and what it costs."""

    __slots__ = ("_places", "codec", "cost", "moving", "out")

    _places: dict[tuple[int, str], int]

    def __init__(self, codec: Codec, cost: Cost) -> None:
        self.codec = codec
        self.cost = cost
        self.out: Outgoing | None = None
        self.moving = 0

    def lend(self, obj: Any, field: Field, owner: Any) -> int:
        """Put the descriptor of ``obj`` into the message, once for each way to stand there; return its place.

        Args:
            owner: what is closed once it has moved: the object itself, or what it is part of.

        Raises:
            Refused: it is not what the field declares.
        """
        key = id(obj), field.declaration
        if self.out is None:
            self.out, self._places = Outgoing(), {}
        elif key in self._places:
            return self._places[key]
        fd = field.ready(obj, field.options, self)
        objection = field.options.objection(fd)
        if objection is not None:
            raise Refused(obj, objection)
        self.out._owners.append(obj)
        if self.moving:
            with_files = isinstance(owner, socket.socket) and owner._io_refs  # type: ignore[attr-defined]
            self.out._consumed.append(partial(makefiles.close, owner) if with_files else owner.close)
        place = self._places[key] = len(self.out.fds)
        self.out.fds.append(fd)
        return place


class Receiving(Unpacking):
    """The descriptors of a message that is being decoded, and what it costs."""

    __slots__ = ("_taken", "codec", "cost")

    cost: Cost
    """Of messages with something in them that is counted."""

    def __init__(self, handles: HandleList, codec: Codec) -> None:
        super().__init__(handles)
        self.codec = codec
        self._taken: dict[int, tuple[Field, Any]] = {}

    def take(self, place: int, field: Field) -> Any:
        """Return the object of the descriptor at ``place``, always the same one.

        Raises:
            DecodeError: there is none, it is not what the field declares, or it stands elsewhere as something else.
        """
        if place in self._taken:
            other, obj = self._taken[place]
            if other.declaration != field.declaration:
                raise DecodeError(
                    f"descriptor {place} stands for both {other.declaration} and {field.declaration}"
                )
            return obj
        if not 0 <= place < len(self.handles):
            raise DecodeError(f"descriptor {place} of a message that has {len(self.handles)}")
        handle = self.handles[place]
        objection = field.options.objection(handle.fileno())
        if objection is not None:
            raise DecodeError(f"descriptor {place} is refused: {objection}")
        self.given[place] = True
        obj = field.build(handle, field.options, self)
        self._taken[place] = field, obj
        return obj

    def check_all_taken(self) -> None:
        """Refuse descriptors that no field spoke of.

        Raises:
            DecodeError: there are some.
        """
        if not all(self.given):
            raise DecodeError(f"{self.given.count(False)} descriptors that no field of the message holds")

    def built_one(self, obj: Any) -> Any:
        """Note an object that took a descriptor over, so that it is closed where the rest fails."""
        self.built.append(obj)
        return obj


@attrs.frozen(eq=False)
class Field:
    """One way in which a descriptor stands in a message."""

    text: str
    """What both ends must agree on."""
    declaration: str
    """That, and what is each end's own: one object cannot be of two declarations."""
    accepts: frozenset[type]
    ready: Callable[[Any, Descriptor, Sending], int]
    """Makes an object ready to be sent and returns its descriptor; raises Refused."""
    build: Callable[[FdHandle, Descriptor, Receiving], Any]
    """Makes the object of a descriptor that was checked; on failure the handle still owns it, or ``built`` does."""
    options: Descriptor


# --- FdHandle ---------------------------------------------------------------------------------------------------------


def _ready_handle(handle: FdHandle, options: Descriptor, sending: Sending) -> int:
    if handle.closed:
        raise Refused(handle, "it is closed or was consumed")
    return handle.fileno()


def _build_handle(handle: FdHandle, options: Descriptor, receiving: Receiving) -> FdHandle:
    return handle


# --- sockets and channels ---------------------------------------------------------------------------------------------


def _ready_socket(sock: socket.socket, options: Descriptor, sending: Sending) -> int:
    if sock.fileno() < 0:
        raise Refused(sock, "it is closed")
    if sock._io_refs:  # type: ignore[attr-defined]
        makefiles.settle(sock)
    return sock.fileno()


def _build_socket(handle: FdHandle, options: Descriptor, receiving: Receiving) -> Any:
    return receiving.built_one(to_socket(handle))


def _ready_channel(channel: Channel, options: Descriptor, sending: Sending) -> int:
    if channel.closed:
        raise Refused(channel, "it is closed")
    codec, wanted = channel._codec, options.codec or sending.codec
    if codec.name != wanted.name:
        raise Refused(channel, f"it speaks {codec.name!r}, and the field says {wanted.name!r}")
    access = "r" * channel.readable + "w" * channel.writable
    if access != (options.access or "rw"):
        raise Refused(channel, f"it is open for {access!r}, and declared for {options.access or 'rw'!r}")
    return channel.fileno()


def _build_channel(handle: FdHandle, options: Descriptor, receiving: Receiving) -> Any:
    access = options.access or "rw"
    sock = receiving.built_one(to_socket(handle))
    channel = Channel(
        sock, readable="r" in access, writable="w" in access, codec=options.codec or receiving.codec
    )
    return receiving.built_one(channel)


# --- files ------------------------------------------------------------------------------------------------------------

_READ_AHEAD = (
    "bytes were read ahead and the stream cannot seek back: open it with buffering=0, or send it unread"
)


def _ready_binary(file: Any, options: Descriptor, sending: Sending) -> int:
    fd = files._open(file)
    if type(file) is io.FileIO:
        return fd
    if type(file.raw) is not io.FileIO:
        raise Refused(file, f"below it is a {type(file.raw).__name__}, not a plain file")
    if file.seekable():
        if file.writable():
            file.flush()
        if file.readable():
            files._align(file)
    elif not file.readable():
        file.flush()
    elif files._readahead(file):
        raise Refused(file, _READ_AHEAD)
    return fd


def _build_raw(handle: FdHandle, options: Descriptor, receiving: Receiving) -> Any:
    fd = handle.fileno()
    access = _ACCESS.get(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
    if access is None:
        raise DecodeError("a descriptor that can neither be read nor written stands for a file")
    mode = {"r": "rb", "w": "wb", "rw": "r+b"}[access]
    return receiving.built_one(hand_over(handle, io.FileIO, fd, mode))


def _build_binary(handle: FdHandle, options: Descriptor, receiving: Receiving) -> Any:
    raw = _build_raw(handle, options, receiving)
    if not (raw.readable() and raw.writable()):
        return receiving.built_one((io.BufferedReader if raw.readable() else io.BufferedWriter)(raw))
    return receiving.built_one(io.BufferedRandom(raw)) if raw.seekable() else raw


_PLAIN_POSITION = 1 << 64
"""Positions of text from here on say more than an offset: of half a character, or half a newline."""


def _ready_text(text: io.TextIOWrapper, options: Descriptor, sending: Sending) -> int:
    fd = files._open(text)
    if type(getattr(text.buffer, "raw", None)) is not io.FileIO:
        raise Refused(text, "below it is no plain file")
    if codecs.lookup(text.encoding) != codecs.lookup(options.encoding):
        raise Refused(text, f"it is in {text.encoding}, and the field says {options.encoding}")
    if not text.readable():
        text.flush()
    elif text.seekable():
        if files._settle(text) >= _PLAIN_POSITION:
            raise Refused(text, "it stands in the middle of a newline or a character")
    elif files._was_read(text) or files._readahead(text.buffer):
        raise Refused(text, _READ_AHEAD)
    return fd


def _build_text(handle: FdHandle, options: Descriptor, receiving: Receiving) -> Any:
    file = _build_binary(handle, options, receiving)
    if type(file) is io.FileIO:
        raise DecodeError("text for reading and writing needs a file that can seek")
    return receiving.built_one(io.TextIOWrapper(file, options.encoding, options.errors, options.newline))


# --- from an annotation ------------------------------------------------------------------------------------------------

_BINARY = frozenset({io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom})
_FILE = frozenset({"file"})
_SOCKET = frozenset({"socket"})

# name, what the sender may put there, ready, build, kinds, access
_Kind = tuple[str, frozenset[type], Any, Any, frozenset[str], Access | None]
_FIELDS: dict[Any, _Kind] = {
    FdHandle: ("handle", frozenset({FdHandle}), _ready_handle, _build_handle, frozenset(), None),
    socket.socket: ("socket", frozenset({socket.socket}), _ready_socket, _build_socket, _SOCKET, None),
    Channel: ("channel", frozenset({Channel}), _ready_channel, _build_channel, _SOCKET, None),
    io.FileIO: ("raw", frozenset({io.FileIO}), _ready_binary, _build_raw, _FILE, None),
}
_BY_ACCESS: dict[Any, Access] = {
    io.BufferedReader: "r",
    io.BufferedWriter: "w",
    io.BufferedRandom: "rw",
}
for _type, _access in _BY_ACCESS.items():
    _FIELDS[_type] = ("binary", frozenset({_type}), _ready_binary, _build_binary, _FILE, _access)
for _type in (typing.BinaryIO, typing.IO[bytes]):
    _FIELDS[_type] = ("binary", _BINARY, _ready_binary, _build_binary, _FILE, None)
for _type in (typing.TextIO, typing.IO[str], io.TextIOWrapper):
    _FIELDS[_type] = ("text", frozenset({io.TextIOWrapper}), _ready_text, _build_text, _FILE, None)


def field_of(annotation: Any, options: Descriptor | None) -> Field | None:
    """Return the field of an annotation, None where that is of another sort.

    Raises:
        TypeError: ``options`` do not go with it.
    """
    try:
        name, accepts, ready, build, kinds, access = _FIELDS[annotation]
    except (KeyError, TypeError):
        return None
    options = options or Descriptor()
    if options.access == "path" and name != "handle":
        raise TypeError(f"only an FdHandle can be a descriptor of O_PATH, not {annotation!r}")
    if annotation in _BY_ACCESS and options.access not in (None, access):
        raise TypeError(f"{annotation.__name__} is open for {access!r}, not {options.access!r}")
    if name in ("socket", "channel") and not options.kinds <= kinds:
        raise TypeError(f"a {name} is a socket, not {' or '.join(sorted(options.kinds))}")
    if name not in ("socket", "handle") and (options.directories or options.families or options.types):
        raise TypeError(f"directories, families and types say nothing of {annotation!r}")
    allowed = options.kinds or kinds
    if options.directories and allowed:
        allowed |= {"directory"}
    families = frozenset({int(socket.AF_UNIX)}) if name == "channel" else options.families
    options = attrs.evolve(
        options,
        kinds=allowed,
        directories=options.directories or "directory" in allowed,
        access=options.access or access,
        families=families,
    )
    text = _describe(name, options)
    return Field(text, text + _own(name, options), accepts, ready, build, options)


def _describe(name: str, options: Descriptor) -> str:
    parts: list[Any] = [sorted(options.kinds), options.access, options.directories]
    parts += [sorted(map(int, options.families)), sorted(map(int, options.types))]
    if name == "text":
        parts.append(codecs.lookup(options.encoding).name)
    if name == "channel":
        parts.append(options.codec.name if options.codec is not None else "same")
    return f"{name}{parts}"


def _own(name: str, options: Descriptor) -> str:
    """Describe what the other end need not know: how text is read, and which codec it is of those with one name."""
    if name == "text":
        return f" with errors={options.errors!r}, newline={options.newline!r}"
    if name == "channel" and options.codec is not None:
        return f" with codec {id(options.codec):#x}"
    return ""
