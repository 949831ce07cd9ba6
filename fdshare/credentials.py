"""Who is at the other end of a socket, as the kernel says, and who may be: policies.

A policy is any callable that takes the peer's :class:`PeerCredentials` and tells whether it is admitted.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import struct
import sys
from collections.abc import Callable

import attrs

from fdshare.handle import FdHandle, HasFileno, own, to_socket

__all__ = [
    "PeerCredentials",
    "Policy",
    "any_user",
    "groups",
    "name_of",
    "objection",
    "objection_to",
    "peer_credentials",
    "peer_pidfd",
    "same_user",
    "users",
]

# The numbers of asm-generic/socket.h, which older socket modules lack; sparc and parisc have others.
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77

_MAX_OPTION = 1024
"""Bytes of a socket option that the socket module hands through: 256 groups."""


@attrs.frozen
class PeerCredentials:
    """Who is at the other end, as the kernel noted when the connection was made (or its listener began to listen).

    ``pid`` is 0 where the system does not tell it; uid and gid are the effective ones.  ``groups`` are the supplementary groups
    (None where the system does not tell them); they play no part in comparisons.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] | None = attrs.field(default=None, eq=False, repr=False)


Policy = Callable[[PeerCredentials], bool]

_HAVE_PEERCRED = hasattr(socket, "SO_PEERCRED")
_SOL_SOCKET, _SO_PEERCRED = int(socket.SOL_SOCKET), int(getattr(socket, "SO_PEERCRED", 0))
_unpack = struct.Struct("iII").unpack  # struct ucred {pid_t pid; uid_t uid; gid_t gid;}

# struct xucred {u_int version; uid_t uid; short ngroups; gid_t groups[16];} of macOS and FreeBSD (sys/ucred.h), where the first
# group is the process's own.  FreeBSD's has union {void *unused; pid_t pid;} behind it, filled in since FreeBSD 13.
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 1, 2
_XUCRED = struct.Struct("IIh16I")
_XUCRED_PID_AT = struct.calcsize("IIh16I0P")


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Ask the kernel who is at the other end of a connected AF_UNIX socket.

    Raises:
        OSError: not connected, or the system does not tell.
    """
    if _HAVE_PEERCRED:
        pid, uid, gid = _unpack(sock.getsockopt(_SOL_SOCKET, _SO_PEERCRED, 12))
        return PeerCredentials(pid, uid, gid, _peer_groups(sock))
    data = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_PID_AT + 8)
    _, uid, count, *gids = _XUCRED.unpack_from(data)
    del gids[max(count, 0) :]
    return PeerCredentials(_bsd_pid(sock, data), uid, gids[0] if gids else -1, tuple(gids[1:]))


def _bsd_pid(sock: socket.socket, xucred: bytes) -> int:
    if sys.platform != "darwin":
        end = _XUCRED_PID_AT + 4
        return int.from_bytes(xucred[_XUCRED_PID_AT:end], sys.byteorder) if len(xucred) >= end else 0
    try:
        return int.from_bytes(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4), sys.byteorder)
    except OSError:  # ENOTCONN: it has closed its end, or passed it on and ended
        return 0


def _peer_groups(sock: socket.socket) -> tuple[int, ...] | None:
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION)
    except OSError:  # Linux before 4.13, or more than 256 groups
        return None
    return struct.unpack(f"{len(data) // 4}I", data)


def peer_pidfd(channel: HasFileno) -> FdHandle | None:
    """Return a pidfd of the process at the other end, by which its pid cannot be mistaken for a later process's.

    It is the process that made the connection, or the one that let the listener listen.  It polls as readable once that
    process has ended; ``signal.pidfd_send_signal`` takes it.

    Args:
        channel: a Channel, or a connected AF_UNIX socket.

    Returns:
        the pidfd, now the caller's; None where the system has none for sockets (Linux has since 6.5).

    Raises:
        ProcessLookupError: that process has ended and was waited for (before Linux 6.16).
        OSError: not connected.
    """
    with to_socket(FdHandle.dup(channel)) as sock:
        try:
            return own(sock.getsockopt, socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            if error.errno in (errno.ENOPROTOOPT, errno.EINVAL, errno.EOPNOTSUPP):
                return None
            raise


_OVERFLOW_UID = 65534
"""What Linux shows of every user who has no number in this process's user namespace (fs.overflowuid); else it is "nobody"."""


def is_own_user(uid: int) -> bool:
    """Whether a uid that the kernel has told is this process's own (effective) user for certain."""
    return uid == os.geteuid() and (uid != _OVERFLOW_UID or _every_user_has_a_number())


def _every_user_has_a_number() -> bool:
    if sys.platform != "linux":
        return True
    try:
        # Not as text, whose codec may be out of reach for a process that was confined.
        with open("/proc/self/uid_map", "rb") as lines:
            return sum(int(line.split()[2]) for line in lines) >= 2**32 - 1
    except OSError:  # no /proc here
        return False


# --- policies -------------------------------------------------------------------------------------------------------------


def same_user(peer: PeerCredentials) -> bool:
    """Admit the processes of this process's own (effective) user; the default of both sides.

    In a user namespace that has no number for some users, the number 65534 stands for all of them, and is admitted from none;
    ``users(65534)`` does.

    Raises:
        nothing.
    """
    return is_own_user(peer.uid)


def any_user(peer: PeerCredentials) -> bool:
    """Admit everybody whom the file's mode lets through: only for codecs without pickle.

    Raises:
        nothing.
    """
    return True


@attrs.frozen
class _Users:
    uids: frozenset[int]

    def __call__(self, peer: PeerCredentials) -> bool:
        return peer.uid in self.uids

    def __str__(self) -> str:
        return f"users({', '.join(map(str, sorted(self.uids)))})"


@attrs.frozen
class _Groups:
    gids: frozenset[int]

    def __call__(self, peer: PeerCredentials) -> bool:
        return peer.gid in self.gids or not self.gids.isdisjoint(
            _groups_by_name(peer.uid, peer.gid) if peer.groups is None else peer.groups
        )

    def __str__(self) -> str:
        return f"groups({', '.join(map(str, sorted(self.gids)))})"


def _groups_by_name(uid: int, gid: int) -> list[int]:
    """Return the groups that the system's database gives to a user; none for an unknown one."""
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except (KeyError, OSError):
        return []


def users(*names_or_uids: str | int) -> Policy:
    """Return a policy that admits these users; the own one only if named.

    Args:
        names_or_uids: user names, or numbers.

    Raises:
        LookupError: no such user.
        TypeError: neither a name nor a number.
    """
    return _Users(frozenset(_number(one, lambda name: pwd.getpwnam(name).pw_uid) for one in names_or_uids))


def groups(*names_or_gids: str | int) -> Policy:
    """Return a policy that admits processes in one of these groups, by their own group or a supplementary one.

    Args:
        names_or_gids: group names, or numbers.

    Raises:
        LookupError: no such group.
        TypeError: neither a name nor a number.
    """
    return _Groups(frozenset(_number(one, lambda name: grp.getgrnam(name).gr_gid) for one in names_or_gids))


def _number(one: str | int, look_up: Callable[[str], int]) -> int:
    if isinstance(one, str):
        return look_up(one)
    if isinstance(one, bool) or not isinstance(one, int):
        raise TypeError(f"a name or a number is needed, not {type(one).__name__}")
    return one


def name_of(policy: Policy) -> str:
    """Return what messages call a policy."""
    return (
        str(policy)
        if isinstance(policy, _Users | _Groups)
        else getattr(policy, "__name__", type(policy).__name__)
    )


def objection(sock: socket.socket, allow: Policy) -> str | None:
    """Hold the peer of a connected socket against a policy.

    Returns:
        why it is not admitted; None where it is.  A policy that fails admits nobody.

    Raises:
        OSError: the system does not tell who it is.
    """
    if allow is same_user and _HAVE_PEERCRED:  # the usual case, in a quarter of the time
        uid = _unpack(sock.getsockopt(_SOL_SOCKET, _SO_PEERCRED, 12))[1]
        if uid == os.geteuid() and (uid != _OVERFLOW_UID or _every_user_has_a_number()):
            return None
    return objection_to(peer_credentials(sock), allow)


def objection_to(peer: PeerCredentials, allow: Policy) -> str | None:
    """Hold credentials against a policy, as :func:`objection`.

    Raises:
        nothing.
    """
    try:
        if allow(peer):
            return None
        why = "does not admit it"
    except Exception as error:  # noqa: BLE001 -- a policy may raise anything, and must not end who calls accept
        why = f"failed with {type(error).__name__}: {error}"
    return f"uid {peer.uid} (pid {peer.pid}): the policy {name_of(allow)} {why}"
