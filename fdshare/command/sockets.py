"""The system's table of sockets: by inode, what a socket is, its addresses, and which other socket it is connected to.

On Linux alone.  AF_UNIX sockets come from the kernel's socket diagnostics (netlink, as ``ss`` asks it), which tell the
peer; TCP and UDP from ``/proc/PID/net``, where the peer of a connection inside this machine is the line with the
addresses swapped.  Where diagnostics are not to be had, ``/proc/PID/net/unix`` gives the names without the peers.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing

import attrs

__all__ = ["Socket", "read_sockets"]


@attrs.frozen
class Socket:
    """A socket as the system lists it.

    ``local`` and ``remote`` are paths, ``@name`` for abstract ones, or ``address:port``; "" where there is none.  ``peer`` is the
    inode of the other end, 0 where it is not known.  ``unread`` is the number of bytes that wait to be read, or, of a
    listening socket, that of connections that wait to be accepted; None where the system does not tell.
    """

    family: str
    type: str
    state: str
    local: str = ""
    remote: str = ""
    peer: int = 0
    unread: int | None = None


def read_sockets(pid: int) -> dict[int, Socket]:
    """Return the sockets of the network namespace of process ``pid``, by inode.

    Those of another namespace than ours come without AF_UNIX peers.  Empty where the system has no such table.
    """
    table = dict(_inet(pid))
    table.update(_unix_names(pid))
    try:
        if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            table.update(_unix_diagnostics())
    except OSError:  # diagnostics are a module that need not be there, or a sandbox forbids them
        pass
    return table


# --- AF_UNIX, by netlink ---------------------------------------------------------------------------------------------

# linux/sock_diag.h, linux/unix_diag.h, linux/netlink.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct(
    "=BBHIIIII"
)  # struct unix_diag_req: family, protocol, -, states, inode, show, cookie
_MESSAGE = struct.Struct("=BBBBIII")  # struct unix_diag_msg: family, type, state, -, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_UINT32 = struct.Struct("=I")
_NAME, _PEER, _QUEUE = 0, 2, 4  # UNIX_DIAG_NAME, UNIX_DIAG_PEER, UNIX_DIAG_RQLEN
_SHOW = 1 << _NAME | 1 << _PEER | 1 << _QUEUE
_ALL_STATES = 0xFFFFFFFF

_BUFFER = 1 << 16
"""Bytes of one read: the kernel fills at most 32 KiB at a time in a dump."""

_PATIENCE = 5.0
"""Seconds to wait for the kernel's next answer; it needs microseconds."""

_TYPES = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}
_ESTABLISHED, _CLOSE, _LISTEN = 1, 7, 10  # the kernel's TCP_*, which it uses for every family


def _unix_diagnostics() -> Iterator[tuple[int, Socket]]:
    """Yield inode and socket of all AF_UNIX sockets of our network namespace.

    Raises:
        OSError: no such diagnostics.
    """
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _SHOW, 0, 0)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    with closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)) as netlink:
        netlink.settimeout(_PATIENCE)
        netlink.sendto(header + request, (0, 0))
        while True:
            data = netlink.recv(_BUFFER)
            if not data:
                return
            while len(data) >= _HEADER.size:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_DONE or length < _HEADER.size:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    raise OSError(code, os.strerror(code))
                yield _unix_socket(data[_HEADER.size : length])
                data = data[length + 3 & ~3 :]


def _unix_socket(message: bytes) -> tuple[int, Socket]:
    _, type_, state, _, inode, _, _ = _MESSAGE.unpack_from(message)
    attributes = dict(_attributes(message[_MESSAGE.size :]))
    peer = _number(attributes.get(_PEER))
    sock = Socket(
        family="unix",
        type=_TYPES.get(type_, str(type_)),
        state="listening" if state == _LISTEN else "connected" if peer else "unconnected",
        local=_unix_name(attributes.get(_NAME, b"")),
        peer=peer,
        unread=_number(attributes[_QUEUE]) if _QUEUE in attributes else None,
    )
    return inode, sock


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]


def _number(data: bytes | None) -> int:
    return int(_UINT32.unpack_from(data)[0]) if data and len(data) >= _UINT32.size else 0


def _unix_name(name: bytes) -> str:
    if name.startswith(b"\0"):
        return "@" + os.fsdecode(name[1:])
    return os.fsdecode(name.rstrip(b"\0"))


# --- /proc/PID/net ----------------------------------------------------------------------------------------------------

_UNIX_LISTENING = 1 << 16  # __SO_ACCEPTCON, in the column of flags
_UNIX_STATES = {3: "connected"}  # SS_CONNECTED


def _lines(pid: int, name: str) -> Iterable[list[str]]:
    try:
        with open(f"/proc/{pid}/net/{name}", encoding="utf-8", errors="surrogateescape") as table:
            return [line.split() for line in table][1:]
    except OSError:  # that family is not there, or nothing of it is shown to us
        return []


def _unix_names(pid: int) -> Iterator[tuple[int, Socket]]:
    for line in _lines(pid, "unix"):  # Num RefCount Protocol Flags Type St Inode Path
        try:
            flags, type_, state, inode = (
                int(line[n], base) for n, base in ((3, 16), (4, 16), (5, 16), (6, 10))
            )
        except (ValueError, IndexError):  # whoever binds a socket may have put a line's end into its name
            continue
        told = "listening" if flags & _UNIX_LISTENING else _UNIX_STATES.get(state, "unconnected")
        yield inode, Socket("unix", _TYPES.get(type_, str(type_)), told, local=" ".join(line[7:]))


_STATES = {_ESTABLISHED: "connected", _CLOSE: "unconnected", _LISTEN: "listening"}
_OTHER_STATES = {
    2: "connecting",
    3: "connecting",
    4: "closing",
    5: "closing",
    6: "closed",
    8: "half closed",
    9: "closing",
    11: "closing",
}


def _inet(pid: int) -> Iterator[tuple[int, Socket]]:
    for protocol, type_ in (("tcp", "stream"), ("udp", "dgram")):
        rows = [
            (int(line[9]), _endpoint(line[1]), _endpoint(line[2]), int(line[3], 16), line[4])
            for name in (protocol, f"{protocol}6")
            for line in _lines(pid, name)  # sl local remote state tx:rx timer retransmits uid timeout inode
            if len(line) > 9
        ]
        inodes = {(local, remote): inode for inode, local, remote, _, _ in rows if inode}
        for inode, local, remote, state, queues in rows:
            if inode:  # 0: the connection has outlived its socket
                yield (
                    inode,
                    Socket(
                        family=protocol,
                        type=type_,
                        state=_STATES.get(state) or _OTHER_STATES.get(state, str(state)),
                        local=local,
                        remote="" if state in (_LISTEN, _CLOSE) else remote,
                        peer=inodes.get((remote, local), 0) if state == _ESTABLISHED else 0,
                        unread=int(queues.partition(":")[2], 16),
                    ),
                )


def _endpoint(text: str) -> str:
    """Turn ``0100007F:0050``, words of the machine's own byte order, into ``127.0.0.1:80``."""
    digits, _, port = text.partition(":")
    words = bytes.fromhex(digits)
    if sys.byteorder == "little":
        words = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    if len(words) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, words)}:{int(port, 16)}"
    address = socket.inet_ntop(socket.AF_INET6, words)
    if address.startswith("::ffff:") and "." in address:  # an IPv4 peer of a socket for both
        return f"{address.removeprefix('::ffff:')}:{int(port, 16)}"
    return f"[{address}]:{int(port, 16)}"
