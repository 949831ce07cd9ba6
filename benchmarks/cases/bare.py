"""The least that Python can do: pickle over a SOCK_SEQPACKET socket, with none of fdshare's guarantees.

No limits, no checks, no partial failure, sockets only alone or as a flat list: it shows what the interpreter and the kernel take.
"""

from __future__ import annotations

import array
import pickle
import socket
from typing import Any

from benchmarks.model import Skipped

__all__ = ["BareEnd", "bare_pipe"]

MAX_PACKET = 65536


class BareEnd:
    """One end of a socket pair; a socket, and a list whose first item is one, is sent as descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, obj: Any) -> None:
        """Pickle and send; sockets are described and their descriptors attached."""
        if type(obj) is list and obj and type(obj[0]) is socket.socket:
            facts: Any = [(int(s.family), int(s.type), s.proto) for s in obj]
            fds = array.array("i", [s.fileno() for s in obj])
            self._sock.sendmsg([pickle.dumps(facts, 5)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        elif type(obj) is socket.socket:
            facts = (int(obj.family), int(obj.type), obj.proto)
            fds = array.array("i", [obj.fileno()])
            self._sock.sendmsg([pickle.dumps(facts, 5)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        else:
            self._sock.send(pickle.dumps(obj, 5))

    def recv(self) -> Any:
        """Receive and unpickle.

        Raises:
            EOFError: the other end was closed.
        """
        data, ancillary, _flags, _address = self._sock.recvmsg(
            MAX_PACKET, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            raise EOFError
        obj = pickle.loads(data)
        if not ancillary:
            return obj
        fds = array.array("i", ancillary[0][2])
        if type(obj) is tuple:
            return socket.socket(*obj, fds[0])
        return [
            socket.socket(family, kind, proto, fd) for (family, kind, proto), fd in zip(obj, fds, strict=True)
        ]

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def fileno(self) -> int:
        """Borrow the descriptor."""
        return self._sock.fileno()


def bare_pipe() -> tuple[BareEnd, BareEnd]:
    """Return two connected ends.

    Raises:
        Skipped: this system has no SOCK_SEQPACKET for AF_UNIX.
    """
    try:
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise Skipped(f"no SOCK_SEQPACKET here: {error}") from error
    return BareEnd(one), BareEnd(two)
