"""Messages that are one handle or one socket and nothing else: their pickles, known by heart.

Handing a single connection to another process is what descriptors are sent for most, and its pickle is always the same few
bytes.  So both ends remember these pickles, instead of running the machinery each time: a third of the time of
the whole message.  The bytes are those that pickle writes; the other end need not know of this.
"""

from __future__ import annotations

import io
import pickle
import socket
from collections.abc import Callable
from typing import Any

from fdshare import reducers
from fdshare.errors import DecodeError
from fdshare.handle import FdHandle, HandleList, format_of, to_socket
from fdshare.native import Socket

__all__ = ["keys", "pickle_of", "rebuilder", "remember"]

_MAX_SIZE = 128
"""Bytes; these pickles have 49 for a handle and 62 to 75 for a socket."""

_MAX_KNOWN = 256
"""Most pickles remembered; there are few kinds of socket, but a timeout may be any number."""

_GLOBAL = b"\x8c\x10fdshare.reducers"
"""What comes after the eleven bytes of protocol and frame, where the whole message was made by a function of that module."""

Key = tuple[Any, ...]  # the arguments of the function that rebuilds, without the index of the descriptor

_pickles: dict[Key, bytes] = {}
_rebuilders: dict[bytes, Callable[[HandleList], Any] | None] = {}


def _handle_key(handle: FdHandle) -> Key | None:
    fd, format = handle._fd, handle._format
    return None if fd < 0 else (format if format >= 0 else handle.format,)


def _socket_key(sock: socket.socket) -> Key | None:
    if sock.fileno() < 0 or sock._io_refs:  # type: ignore[attr-defined]
        return None
    return reducers._family(sock), reducers._type_of(sock), sock.proto, sock.gettimeout()


keys: dict[type, Callable[[Any], Key | None]] = {FdHandle: _handle_key, Socket: _socket_key}
"""What distinguishes the pickles of a type; a type that the user registers is taken out."""


def pickle_of(obj: Any, key: Callable[[Any], Key | None]) -> bytes | None:
    """Return the pickle of ``obj``, an open handle or socket; None where it is not known."""
    if reducers.known.get(type(obj)) is not _REDUCERS[type(obj)]:  # the user has registered a way of his own
        del keys[type(obj)]
        return None
    found = key(obj)
    return None if found is None else _pickles.get(found)


_REDUCERS = {FdHandle: reducers.reduce_handle, Socket: reducers.reduce_socket}


def remember(obj: Any, payload: bytes) -> None:
    """Learn the pickle of ``obj``, a handle or socket, as the encoder wrote it."""
    found = keys[type(obj)](obj)
    if found is not None and rebuilder(payload) is not None:
        _pickles[found] = payload


def rebuilder(payload: Any) -> Callable[[HandleList], Any] | None:
    """Return what rebuilds the object of a message that is one handle or socket; None for any other message.

    It raises DecodeError where the descriptor is not what the sender declared, and takes it out of the list otherwise.
    """
    if len(payload) > _MAX_SIZE:
        return None
    data = bytes(payload)
    try:
        return _rebuilders[data]
    except KeyError:
        if data[11:29] != _GLOBAL or len(_rebuilders) >= _MAX_KNOWN:
            return None
    found = _rebuilders[data] = _read(data)
    return found


class _Call:
    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments: Key = ()

    def __call__(self, *arguments: Any) -> _Call:
        self.arguments = arguments
        return self


class _Reader(pickle.Unpickler):
    """Reads which function is called with what, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module != reducers.__name__ or name not in ("take", "rebuild_socket"):
            raise pickle.UnpicklingError(name)
        return _Call(name)


def _read(data: bytes) -> Callable[[HandleList], Any] | None:
    try:
        call = _Reader(io.BytesIO(data)).load()
    except Exception:  # noqa: BLE001 -- not one of these; whatever is wrong with it, unpickling it will tell
        return None
    if type(call) is not _Call or call.arguments[:1] != (0,):
        return None
    try:
        return (_take if call.name == "take" else _rebuild_socket)(*call.arguments[1:])
    except TypeError:
        return None


def _take(format: int) -> Callable[[HandleList], FdHandle]:
    def take(handles: HandleList) -> FdHandle:
        handle = handles[0]
        if format_of(handle._fd) != format:
            handle.verify(format)
        handle._format = format
        handles.release()
        return handle

    return take


def _rebuild_socket(
    family: int, type: int, proto: int, timeout: float | None
) -> Callable[[HandleList], socket.socket]:
    def rebuild_socket(handles: HandleList) -> socket.socket:
        # As reducers.rebuild_socket; the socket's own type is asked for, in a third of the time of fstat.
        sock = to_socket(handles[0], family, type, proto)
        try:
            actual = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        except OSError as error:
            sock.close()
            raise DecodeError("a descriptor was declared as 'socket' and is none") from error
        if actual != type:
            sock.close()
            raise DecodeError(f"a socket was declared as of type {type} and is of type {actual}")
        if timeout is not None and sock.gettimeout() is not None:
            sock.settimeout(timeout)
        handles.release()
        return sock

    return rebuild_socket
