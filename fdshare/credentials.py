"""Who is at the other end of a socket, as the kernel says."""

from __future__ import annotations

import socket
import struct
import sys

import attrs

__all__ = ["PeerCredentials", "peer_credentials"]


@attrs.frozen
class PeerCredentials:
    """Who is at the other end, as the kernel noted when the connection was made.

    ``pid`` is 0 where the system does not tell it.
    """

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Ask the kernel who is at the other end of a connected AF_UNIX socket.

    Raises:
        OSError: not connected, or the system does not tell.
    """
    if hasattr(socket, "SO_PEERCRED"):
        layout = struct.Struct("3i")
        return PeerCredentials(
            *layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
        )
    # LOCAL_PEERCRED of FreeBSD and macOS: struct xucred {u_int version; uid_t uid; short ngroups; gid_t groups[16]; ...}
    data = sock.getsockopt(0, 1, 4 + 4 + 4 + 16 * 4 + 8)
    _, uid, groups, gid = struct.unpack_from("IIhxxI", data)
    pid = struct.unpack("i", sock.getsockopt(0, 2, 4))[0] if sys.platform == "darwin" else 0  # LOCAL_PEERPID
    return PeerCredentials(pid, uid, gid if groups else -1)
