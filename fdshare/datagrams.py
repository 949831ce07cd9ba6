"""Credentials with each message (SCM_CREDENTIALS), for sockets without connections, where there is no peer to ask about.

The kernel vouches for what arrives: a process can only name its own pid and one of its own users and groups, unless it is
privileged.  Linux only: elsewhere the calls raise OSError (ENOPROTOOPT).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable
from itertools import starmap
from typing import Any, NamedTuple

from fdshare import rights
from fdshare.credentials import PeerCredentials
from fdshare.errors import MessageTooLargeError
from fdshare.handle import FdHandle, HasFileno, as_fd
from fdshare.rights import Arrived
from fdshare.wire import MAX_FDS_PER_PACKET

__all__ = ["Signed", "ask_credentials", "recv_signed", "send_signed"]

_SO_PASSPIDFD = 76  # of asm-generic/socket.h, absent from the socket module
SCM_CREDENTIALS = int(getattr(socket, "SCM_CREDENTIALS", -1))
_UCRED = struct.Struct("=iII")
_LINUX = sys.platform == "linux"

_UNKNOWN_USER = 65534
"""What Linux says, with pid 0, of a message that was sent before its receiver asked (the default of fs.overflowuid)."""


class Signed(NamedTuple):
    """A message and who sent it."""

    data: bytes
    handles: list[FdHandle]
    """Its descriptors, close-on-exec, now the receiver's."""
    credentials: PeerCredentials | None
    """None where the kernel does not vouch for any."""
    pidfd: FdHandle | None
    """The sender as a pidfd, where it was asked for."""
    address: Any
    """The sender's own address as the socket module gives it, to answer to; None where it has none."""


def _check_system() -> None:
    if not _LINUX:
        raise OSError(errno.ENOPROTOOPT, "credentials with each message are Linux's (SCM_CREDENTIALS)")


def ask_credentials(sock: socket.socket, *, pidfd: bool = False) -> None:
    """Let the kernel add the sender's credentials to every message that ``sock`` receives from now on.

    Args:
        sock: an AF_UNIX socket of any type.
        pidfd: whether to add a pidfd of the sender too (Linux 6.5 and later).

    Raises:
        OSError: ENOPROTOOPT where the system has no such thing.
    """
    _check_system()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if pidfd:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)


def credentials_in(ancillary: Iterable[tuple[int, int, bytes]]) -> PeerCredentials | None:
    """Return who has sent what ``recvmsg`` gave; None where the kernel does not vouch for anybody."""
    for level, type, data in ancillary:
        if (level, type) == (socket.SOL_SOCKET, SCM_CREDENTIALS) and len(data) == _UCRED.size:
            pid, uid, gid = _UCRED.unpack(data)
            if (pid, uid) != (0, _UNKNOWN_USER):
                return PeerCredentials(pid, uid, gid)
    return None


def signature(who: PeerCredentials) -> tuple[int, int, bytes]:
    """Return the ancillary data that names ``who`` as the sender."""
    return (socket.SOL_SOCKET, SCM_CREDENTIALS, _UCRED.pack(who.pid, who.uid, who.gid))


def send_signed(
    sock: socket.socket,
    buffers: Iterable[Any],
    fds: Iterable[HasFileno | int] = (),
    *,
    address: Any = None,
    credentials: PeerCredentials | None = None,
) -> int:
    """Send bytes with descriptors and credentials.

    Args:
        sock: an AF_UNIX socket.
        buffers: bytes-like pieces; at least one byte together.
        fds: numbers, or objects with ``fileno()``; they stay the caller's.
        address: where to, for a socket that is not connected.
        credentials: None for this process and its effective user and group; others need privileges (CAP_SYS_ADMIN, CAP_SETUID …).

    Returns:
        how many bytes were sent.

    Raises:
        ValueError: no data.
        MessageTooLargeError: more than 253 descriptors (SCM_MAX_FD of Linux).
        OSError: as sendmsg(2): EPERM for credentials that are not this process's, ENOPROTOOPT where the system has none.
    """
    _check_system()
    pieces = [memoryview(piece).cast("B") for piece in buffers]
    if not any(map(len, pieces)):
        raise ValueError("credentials need at least one byte of data: a stream loses them otherwise")
    owners = list(fds)  # alive until they are sent, also those that a generator made
    numbers = [as_fd(owner) for owner in owners]
    if len(numbers) > MAX_FDS_PER_PACKET:
        raise MessageTooLargeError(
            f"{len(numbers)} descriptors; one sendmsg takes at most {MAX_FDS_PER_PACKET}"
        )
    who = credentials or PeerCredentials(os.getpid(), os.geteuid(), os.getegid())
    return sock.sendmsg(pieces, [signature(who), *rights.rights(numbers)], rights.SEND, address)


def recv_signed(sock: socket.socket, bufsize: int, maxfds: int = 0) -> Signed:
    """Receive one message with who sent it; first call :func:`ask_credentials`.

    Args:
        sock: an AF_UNIX socket.
        bufsize: most bytes to receive.
        maxfds: most descriptors to accept.

    Raises:
        DescriptorsLostError: the kernel dropped some; those that came were closed.
        ProtocolError: more than ``maxfds`` came; all of them were closed.
        MessageTooLargeError: a packet or datagram is longer than ``bufsize``; its descriptors were closed.
        OSError: as recvmsg(2).
    """
    for arrived in map(Arrived, starmap(sock.recvmsg, ((bufsize, rights.CONTROL_SIZE, rights.CLOEXEC),))):  # noqa: B007 -- see rights.py
        break
    credentials, pidfd = credentials_in(arrived[1]), None
    for level, type, data in arrived[1]:
        if (level, type) == (socket.SOL_SOCKET, rights.SCM_PIDFD):
            number = int.from_bytes(data, sys.byteorder, signed=True)
            if number >= 0:
                pidfd = FdHandle.dup(number)  # the original is closed with what is left over
    try:
        handles = rights.take_checked(arrived, bufsize, maxfds)
    except BaseException:
        if pidfd is not None:
            pidfd.close()
        raise
    return Signed(arrived[0], handles, credentials, pidfd, arrived[3] or None)
