"""A connection each of whose packets tells who has sent it, at that moment: for ends whose user may change while it lasts.

SO_PEERCRED tells who called connect(2) or listen(2), also long after that process has given up its privileges, or has passed the
socket on.  The kernel vouches for each packet too (SCM_CREDENTIALS), and there it tells the sender of now.  So::

    packet --> is there a hello in it?  --yes--> taken: it says what is spoken, and gives nobody any right
                 | no
                 v
               does its sender pass the policy?  --no--> closed with its descriptors, AccessDeniedError, and so from then on
                 | yes
                 v
               taken, ``sender`` is who it was

Linux only: elsewhere the policy has been asked when the connection was made, and that is all.
"""

from __future__ import annotations

import _socket
import os
import socket
import sys
from collections.abc import Iterable
from itertools import starmap
from typing import Any

import attrs

from fdshare import hello, rights
from fdshare.credentials import PeerCredentials, Policy, objection_to, peer_credentials
from fdshare.datagrams import ask_credentials, credentials_in, signature
from fdshare.errors import AccessDeniedError
from fdshare.handle import FdHandle, HasFileno, hand_over, own, to_socket
from fdshare.rights import Adopted, Arrived

__all__ = ["VouchedSocket", "prepare", "vouched"]

_LINUX = sys.platform == "linux"


class VouchedSocket(socket.socket):
    """Made by :func:`vouched`; a channel's transport takes it for any other socket."""

    sender: PeerCredentials | None
    """Who has sent the last packet that was taken; None before it, and where the system does not tell."""
    _allow: Policy
    _connection: PeerCredentials
    _refused: str

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        """Receive a packet, without its credentials, as ``socket.recvmsg``.

        Raises:
            AccessDeniedError: its sender does not pass the policy, or that of an earlier one did not.
            OSError: as recvmsg(2).
        """
        if self._refused:
            raise AccessDeniedError(self._refused)
        for arrived in map(Arrived, starmap(super().recvmsg, ((bufsize, ancbufsize, flags),))):  # noqa: B007 -- see rights.py
            break
        data, ancillary, _, _ = arrived
        if data or ancillary:  # else it is the end
            self._check(data, ancillary)
        if self._refused:
            rights.drop(arrived)
            raise AccessDeniedError(self._refused)
        ancillary[:] = [part for part in ancillary if part[:2] != _CREDENTIALS]
        message = tuple(arrived)
        arrived.__class__ = Adopted  # type: ignore[assignment]  # it owns nothing any more: the caller does
        return message

    def _check(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        sender = credentials_in(ancillary)
        if sender is None:
            if not hello.is_hello(data) or any(part[:2] == rights.RIGHTS for part in ancillary):
                self._refused = "a message of which the kernel does not say who has sent it"
            return
        if (sender.uid, sender.gid) == (self._connection.uid, self._connection.gid):
            # Supplementary groups are told of the connection alone.
            sender = attrs.evolve(sender, groups=self._connection.groups)
        why = objection_to(sender, self._allow)
        if why is None:
            self.sender = sender
        else:
            self._refused = f"who sends at the other end is not trusted here, whoever connected: {why}"

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send bytes as this process's effective user; as ``socket.send``.

        Raises:
            OSError: as send(2).
        """
        return self.sendmsg((data,), (), flags) if _acts_as_another() else super().send(data, flags)

    def sendmsg(
        self, buffers: Iterable[Any], ancdata: Iterable[Any] = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """Send bytes and descriptors as this process's effective user; as ``socket.sendmsg``.

        Raises:
            OSError: as sendmsg(2).
        """
        if _acts_as_another():
            ancdata = [signature(PeerCredentials(os.getpid(), os.geteuid(), os.getegid())), *ancdata]
        return super().sendmsg(buffers, ancdata, flags, address)


_CREDENTIALS = (int(socket.SOL_SOCKET), int(getattr(socket, "SCM_CREDENTIALS", -1)))


def _acts_as_another() -> bool:
    """Whether what the kernel tells on its own, the real user and group, is not what policies ask for, the effective ones."""
    return _LINUX and (os.getuid(), os.getgid()) != (os.geteuid(), os.getegid())


def prepare(listening: HasFileno) -> None:
    """Let the kernel vouch for each packet of the connections to a listening AF_UNIX socket, from the first one on.

    Raises:
        OSError: as setsockopt(2), and where it is no socket.
    """
    if _LINUX:
        with FdHandle.dup(listening) as copy, to_socket(copy) as sock:
            ask_credentials(sock)  # accepted ones inherit it


def vouched(sock: socket.socket, allow: Policy) -> socket.socket:
    """Spend a connected AF_UNIX socket of SEQPACKET into one that holds the sender of each packet against ``allow``.

    Where there are no such credentials, it is returned as it is.

    Raises:
        OSError: as setsockopt(2) and getsockopt(2); the socket stays usable.
    """
    if not _LINUX:
        return sock
    ask_credentials(sock)
    timeout = sock.gettimeout()
    signed = VouchedSocket.__new__(VouchedSocket)
    signed._io_refs, signed._closed = 0, False  # type: ignore[attr-defined]  # as its Python __init__ would
    signed.sender, signed._allow, signed._refused = None, allow, ""
    signed._connection = peer_credentials(sock)
    family, kind = int(sock.family), int(sock.type) | _NONBLOCK * (timeout is not None)
    with own(sock.detach) as handle:
        hand_over(handle, _socket.socket.__init__, signed, family, kind, 0, handle.fileno())
    if signed.gettimeout() != timeout:
        signed.settimeout(timeout)
    return signed


_NONBLOCK = int(getattr(socket, "SOCK_NONBLOCK", 0))
