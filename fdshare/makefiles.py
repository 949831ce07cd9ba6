"""Sockets of which ``makefile()`` has made files, as every handler of http.server does: what these hold is not in the kernel.

================== =========================================================================================
what the files hold when the socket is sent
================== =========================================================================================
written, unflushed is written first
read ahead         the send is refused: no socket could give it out again at the other side
nothing            the socket travels; where it is moved, the files are closed with it, and then raise
================== =========================================================================================

A socket counts its files and does not know them; the garbage collector does.
"""

from __future__ import annotations

import gc
import io
import socket
from functools import partial
from typing import Any

from fdshare import reducers
from fdshare.files import ReadAhead, give_back, read_ahead_of

__all__ = ["close", "settle"]

_LAYERS = (socket.SocketIO, io.BufferedReader, io.BufferedWriter, io.TextIOWrapper)


def settle(sock: Any) -> None:
    """Write what the files of ``sock`` have not written yet.

    Raises:
        Refused: one of them has read ahead, or cannot write, or cannot be found.
    """
    files = _files_of(sock)
    if len(files) < sock._io_refs:
        raise reducers.Refused(
            sock, f"{sock._io_refs - len(files)} files of its makefile() are out of reach: close them first"
        )
    ahead = 0
    for file in files:
        try:
            ahead += file.settle()
        except (OSError, ValueError) as error:
            reason = f"what was written to a file of its makefile() cannot be sent ahead of it: {error}"
            raise reducers.Refused(sock, reason) from error
    if ahead:
        raise reducers.Refused(
            sock,
            f"{ahead} bytes were read ahead by a file of its makefile(): read them and send them beside the socket, "
            "or read from the socket itself, or from makefile(..., buffering=0)",
        )


def close(sock: Any) -> None:
    """Close ``sock`` and its files, which would keep it open."""
    sock.close()
    for file in _files_of(sock):
        file.raw.close()  # and whatever reads or writes through it is closed thereby
    if sock.fileno() >= 0:
        sock._real_close()


class _File:
    """What one call of ``makefile()`` has made: a raw file, and the layers on it."""

    def __init__(self, raw: socket.SocketIO) -> None:
        self.raw = raw
        self.reader: io.BufferedReader | None = None
        self.writers: list[Any] = []  # text first
        self.texts: list[Any] = []

    def settle(self) -> int:
        """Flush it; return how many bytes it has read ahead."""
        if self.reader is not None:
            for text in self.texts:
                give_back(text, self.reader)
        for file in (*self.texts, *self.writers):
            if file.writable():
                file.flush()
        return 0 if self.reader is None else read_ahead_of(self.reader)

    def take(self, layer: Any) -> None:
        """Take a layer that may be of this file."""
        below = layer.buffer if isinstance(layer, io.TextIOWrapper) else layer
        if isinstance(below, io.BufferedRWPair):
            ours = self._is_below(below)
        else:
            raw = below.raw
            ours = (raw.raw if isinstance(raw, ReadAhead) else raw) is self.raw
        if ours and isinstance(layer, io.TextIOWrapper):
            self.texts.append(layer)
        elif ours and isinstance(layer, io.BufferedReader):
            self.reader = layer
        elif ours and isinstance(layer, io.BufferedWriter):
            self.writers.append(layer)

    def _is_below(self, pair: io.BufferedRWPair) -> bool:
        """Whether ``pair``, which shows nothing of what it holds, asks this file."""
        asked: list[bool] = []

        def writable() -> bool:
            asked.append(True)
            return True

        raw: Any = self.raw
        raw.writable = writable
        try:
            pair.writable()
        finally:
            del raw.writable
        return bool(asked)


def _files_of(sock: Any) -> list[_File]:
    """Return the files of ``sock`` that can be found."""
    files: list[_File] = []
    layers: list[Any] = []
    is_layer: dict[type, bool] = {}
    # The youngest first: a file that was made of late is found among a thousand objects instead of a million.
    # The layers on a file are younger than it is.
    for generation in range(3):
        for obj in gc.get_objects(generation=generation):
            cls = type(obj)
            known = is_layer.get(cls)
            if known is None:
                # Not by isinstance, which asks proxies; nor by issubclass, as abstract classes remember who was asked about.
                known = is_layer[cls] = any(layer in cls.__mro__ for layer in _LAYERS)
            if not known:
                continue
            if not isinstance(obj, socket.SocketIO):
                layers.append(obj)
            elif getattr(obj, "_sock", None) is sock:
                files.append(_File(obj))
        if len(files) >= sock._io_refs:
            break
    for layer in layers:
        for file in files:
            try:
                file.take(layer)
            except (ValueError, AttributeError):  # detached, or on something else
                pass
    return files


def ready(sock: socket.socket, context: reducers.Context) -> None:
    """Make a socket with files ready to be sent, and see to it that they are closed with it where it is moved.

    Raises:
        Refused: as :func:`settle`.
    """
    settle(sock)
    if context.moving:
        context.consume(partial(close, sock))


reducers.WithFiles.ready = ready
