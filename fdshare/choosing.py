"""Which transport a socket has, and the pair of sockets for a transport."""

from __future__ import annotations

import _socket
import errno
import socket
from typing import Any

from fdshare import system
from fdshare.handle import socketpair_of
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.transport import Transport
from fdshare.transports import SeqpacketTransport, StreamTransport

__all__ = ["socketpair", "transport_of"]

# As plain ints: the socket class makes enums of them, which takes as long as a system call.
_family: Any = vars(_socket.socket)["family"].__get__
_kind: Any = vars(_socket.socket)["type"].__get__
_AF_UNIX, _SOCK_STREAM = int(socket.AF_UNIX), int(socket.SOCK_STREAM)
_SOCK_SEQPACKET = int(getattr(socket, "SOCK_SEQPACKET", -1))


def transport_of(sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> Transport:
    """Return the transport that fits a connected AF_UNIX socket.

    Raises:
        ValueError: it is of another family or type.
    """
    if _family(sock) == _AF_UNIX:
        kind = _kind(sock)
        if kind == _SOCK_SEQPACKET and system.HAVE_SEQPACKET:
            return SeqpacketTransport(sock, max_inflight)
        if kind == _SOCK_STREAM:
            return StreamTransport(sock, max_inflight)
    raise ValueError(f"a channel needs a SEQPACKET or STREAM socket of AF_UNIX, not {sock!r}")


def socketpair(transport: str | None) -> tuple[socket.socket, socket.socket]:
    """Return a connected pair for "seqpacket", "stream", or None for the best that the system has.

    Raises:
        ValueError: an unknown name.
        OSError: the system has no such sockets.
    """
    if transport not in (None, "seqpacket", "stream"):
        raise ValueError(f"transport is 'seqpacket', 'stream' or None, not {transport!r}")
    if transport != "stream" and system.HAVE_SEQPACKET:
        return socketpair_of(socket.SOCK_SEQPACKET)
    if transport == "seqpacket":
        raise OSError(errno.EPROTONOSUPPORT, "only Linux keeps packets whole (SEQPACKET): use stream")
    return socketpair_of(socket.SOCK_STREAM)
