"""What the tests of stock pools send around: an object of each kind that holds a number, and how to read the number back."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import fdshare
from fdshare.rights import open_numbers
from fdshare.testing import numbered_handle, read_number


def _file(number: int, mode: str, **options: Any) -> Any:
    fd, path = tempfile.mkstemp()
    os.write(fd, f"{number}\n".encode())
    os.close(fd)
    try:
        return open(path, mode, **options)
    finally:
        os.unlink(path)


def _socket(number: int) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(str(number).encode())
    return ours


def _pipe(number: int) -> Any:
    reader, writer = os.pipe()
    os.write(writer, str(number).encode())
    os.close(writer)
    return open(reader, "rb", buffering=0)


def _connection(number: int) -> Any:
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        theirs.send(number)
    return ours


def _channel(number: int) -> fdshare.Channel:
    ours, theirs = fdshare.Pipe()
    with theirs:
        theirs.send(number)
    return ours


MAKERS: dict[str, Callable[[int], Any]] = {
    "text": functools.partial(_file, mode="r"),
    "binary": functools.partial(_file, mode="rb"),
    "random": functools.partial(_file, mode="r+b"),
    "socket": _socket,
    "pipe": _pipe,
    "connection": _connection,
    "channel": _channel,
    "handle": numbered_handle,
}
KINDS = tuple(MAKERS)


def make(kind: str, number: int) -> Any:
    """Make, in a worker or here, an object from which :func:`read` reads the number."""
    return MAKERS[kind](number)


def read(obj: Any) -> int:
    """Read the number of what :func:`make` made, and close it."""
    with obj:
        if isinstance(obj, fdshare.FdHandle):
            return read_number(obj)
        if isinstance(obj, socket.socket):
            return int(obj.recv(100))
        if hasattr(obj, "recv"):
            return int(obj.recv())
        assert obj.fileno() > 2  # and not a copy of the contents
        return int(obj.read())


def read_all(objects: list[Any]) -> list[int]:
    return [read(obj) for obj in objects]


def offset_of(file: Any) -> int:
    return os.lseek(file.fileno(), 0, os.SEEK_CUR)


def descriptors() -> tuple[int, int]:
    return os.getpid(), len(open_numbers())


def swap(obj: Any, kind: str) -> Any:
    """Read an object and return another one."""
    return make(kind, read(obj) + 1)
