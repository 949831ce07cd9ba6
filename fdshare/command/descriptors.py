"""What a process has open: each descriptor with its kind, access, flags, offset, size, socket, and who has its other end.

============ ===================================================== =====================================================
source       where                                                 what it cannot tell
============ ===================================================== =====================================================
``/proc``    Linux, any process that one may trace                 how much a pipe holds
``fstat``    any system, this process                              names where there is no F_GETPATH; other ends
``psutil``   any system it knows, any process of one's own         pipes and what else it has no name for; flags
============ ===================================================== =====================================================
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import attrs

from fdshare.command.sockets import Socket, read_sockets
from fdshare.credentials import peer_credentials
from fdshare.handle import KIND_BY_FORMAT, kind_of, kind_of_link, own
from fdshare.rights import open_numbers

__all__ = ["Descriptor", "Holder", "by_fstat", "by_proc", "by_psutil", "command_of", "read_descriptors"]


@attrs.frozen
class Holder:
    """A descriptor of some process; ``command`` is the process's short name."""

    pid: int
    fd: int
    command: str


@attrs.frozen(kw_only=True)
class Descriptor:
    """One descriptor of a process.

    ``kind`` is as of ``FdHandle.kind``; ``access`` is "r", "w", "rw", "path" (O_PATH), or "" where it is not known;
    ``offset`` and ``size`` are in bytes, None where they mean nothing; ``details`` has what only some kinds have, such as a
    memfd's ``seals`` or the ``pid`` behind a pidfd; ``peers`` are the descriptors at the other end of a pipe or socket, as far
    as they are in processes that we may see.
    """

    fd: int
    kind: str
    access: str = ""
    flags: tuple[str, ...] = ()
    offset: int | None = None
    size: int | None = None
    name: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)
    socket: Socket | None = None
    peers: tuple[Holder, ...] = ()


def read_descriptors(pid: int) -> list[Descriptor]:
    """Return what process ``pid`` has open, by number, from the best source there is.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: its descriptors are not ours to see.
        OSError: the system does not tell (ENOTSUP).
    """
    if os.path.isdir("/proc/self/fd"):
        return by_proc(pid)
    if pid == os.getpid():
        return by_fstat(open_numbers())
    return by_psutil(pid)


_FLAGS = {
    name.lower(): getattr(os, f"O_{name}", 0)
    for name in ("APPEND", "NONBLOCK", "DIRECT", "SYNC", "DSYNC", "ASYNC", "NOATIME", "TMPFILE", "CLOEXEC")
}
_MEANT_BY_ANOTHER = {"dsync": "sync"}  # O_SYNC has the bits of O_DSYNC in it
_PATH = getattr(os, "O_PATH", 0)


def _access_and_flags(bits: int) -> tuple[str, tuple[str, ...]]:
    if bits & _PATH:
        return "path", ("cloexec",) if bits & os.O_CLOEXEC else ()
    access = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}.get(bits & os.O_ACCMODE, "")
    found = {name for name, bit in _FLAGS.items() if bit and bits & bit == bit}
    found -= {name for name, other in _MEANT_BY_ANOTHER.items() if other in found}
    return access, tuple(sorted(found))


def _size_of(status: os.stat_result) -> int | None:
    return status.st_size if stat.S_ISREG(status.st_mode) else None


# --- /proc ------------------------------------------------------------------------------------------------------------


def by_proc(pid: int, fds: Iterable[int] | None = None) -> list[Descriptor]:
    """Return descriptors of process ``pid``, all or those in ``fds``; what closes meanwhile is left out.

    Raises:
        ProcessLookupError, PermissionError: as :func:`read_descriptors`.
    """
    try:
        numbers = sorted(_numbers(pid) if fds is None else fds)
        links = {fd: link for fd in numbers if (link := _link(pid, fd)) is not None}
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from None
    except PermissionError:  # the numbers may be told and yet not what they are
        raise PermissionError(
            errno.EACCES,
            f"process {pid} ({command_of(pid)}) is another user's or is protected: its descriptors are not ours to see",
        ) from None
    sockets = read_sockets(pid) if any(link.startswith("socket:") for link in links.values()) else {}
    found = [one for fd, link in links.items() if (one := _read(pid, fd, link, sockets)) is not None]
    found = _with_peers(found, links)
    if pid == os.getpid():
        for one in found:
            if one.socket is not None and one.socket.family == "unix" and not one.peers:
                one.details.update(_peer_of_own(one.fd))
    return found


def _peer_of_own(fd: int) -> dict[str, Any]:
    """Ask the kernel who made the connection, where the other end is in a process that we may not look into."""
    try:
        with own(os.dup, fd) as copy, copy.to_socket() as sock:
            peer = peer_credentials(sock)
    except OSError:  # not connected
        return {}
    return {"peer": {"pid": peer.pid, "uid": peer.uid}} if peer.pid > 0 else {}


def _numbers(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


def command_of(pid: int) -> str:
    """Return the short name of a process; "?" where the system does not tell."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


def _link(pid: int, fd: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except FileNotFoundError:  # closed meanwhile, as the one is by which the directory was read
        return None


def _read(pid: int, fd: int, link: str, sockets: dict[int, Socket]) -> Descriptor | None:
    path = f"/proc/{pid}/fd/{fd}"
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="surrogateescape") as file:
            info = [line.rstrip("\n").partition(":")[::2] for line in file]
        status = os.stat(path)
    except OSError:
        return None
    said = {key: value.strip() for key, value in info}
    kind = _kind(link, status)
    access, flags = _access_and_flags(int(said.get("flags", "0"), 8))
    details = dict(_details(kind, info, path))
    if status.st_nlink == 0 and link.endswith(_DELETED) and kind != "memfd":
        details["deleted"] = True
    return Descriptor(
        fd=fd,
        kind=kind,
        access=access,
        flags=flags,
        offset=int(said["pos"]) if kind in ("file", "memfd") and access != "path" and "pos" in said else None,
        size=_size_of(status),
        name=_name(link, deleted="deleted" in details),
        details=details,
        socket=_socket(path, status.st_ino, sockets)
        if kind == "socket" and link.startswith("socket:")
        else None,
    )


_DELETED = " (deleted)"
_TTY_MAJORS = {4, 5, *range(136, 144)}  # consoles, /dev/tty, and pseudoterminals: linux/major.h


def _kind(link: str, status: os.stat_result) -> str:
    kind = kind_of_link(link) or KIND_BY_FORMAT.get(stat.S_IFMT(status.st_mode), "unknown")
    if kind == "device" and stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in _TTY_MAJORS:
        return "tty"
    return kind


def _name(link: str, *, deleted: bool) -> str:
    if link.startswith("/memfd:"):
        return link.removeprefix("/memfd:").removesuffix(_DELETED)
    if deleted:
        return link.removesuffix(_DELETED)
    return link if link.startswith("/") else ""


def _details(kind: str, info: list[tuple[str, str]], path: str) -> Iterator[tuple[str, Any]]:
    """Yield what the kernel's ``fdinfo`` says beyond offset and flags (fs/*.c, each ``show_fdinfo``)."""
    said = {key: value.strip() for key, value in info}
    if "lock" in said:  # "1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF"
        yield "locked", "write" if " WRITE " in said["lock"] else "read"
    if said.get("scm_fds", "0") != "0":
        yield "descriptors_waiting", int(said["scm_fds"])
    if "tty-index" in said:  # the master end
        yield "master_of", f"/dev/pts/{said['tty-index']}"
    if "eventfd-count" in said:
        yield "count", int(said["eventfd-count"], 16)
    if "Pid" in said:
        yield "pid", int(said["Pid"])  # -1: it has ended
    if kind == "epoll":
        yield "watches", [int(value.split()[0]) for key, value in info if key == "tfd"]
    if kind == "inotify":
        yield "watches", sum(key.startswith("inotify wd") for key, _ in info)
    if kind == "timerfd" and "it_value" in said:
        yield "armed", said["it_value"] != "(0, 0)"
    if kind == "memfd":
        seals = _seals(path)
        if seals is not None:
            yield "seals", seals


def _seals(path: str) -> list[str] | None:
    """Ask a memory file of another process for its seals, by opening it once more, which changes nothing in it."""
    names = ("seal", "shrink", "grow", "write", "future_write")
    bits = [getattr(fcntl, f"F_SEAL_{name.upper()}", 1 << n) for n, name in enumerate(names)]
    try:
        with own(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) as memory:
            seals = fcntl.fcntl(memory.fileno(), _F_GET_SEALS)
    except OSError:
        return None
    return [name for name, bit in zip(names, bits, strict=True) if seals & bit]


_F_GET_SEALS = 1034  # linux/fcntl.h; the module has the name on Linux only


def _socket(path: str, inode: int, sockets: dict[int, Socket]) -> Socket:
    found = sockets.get(inode)
    if found is None:  # of a family that has no table here
        try:
            protocol = os.getxattr(path, "system.sockprotoname")  # type: ignore[attr-defined, unused-ignore]
        except (OSError, AttributeError):
            protocol = b"unknown"
        found = Socket(protocol.rstrip(b"\0").decode("ascii", "replace").lower(), "", "unconnected")
    return found


def _with_peers(found: list[Descriptor], links: dict[int, str]) -> list[Descriptor]:
    """Look through all processes that we may see for the other ends of sockets and pipes."""
    wanted: dict[int, str] = {}
    for one in found:
        if one.socket is not None and one.socket.peer:
            wanted[one.fd] = f"socket:[{one.socket.peer}]"
        elif links[one.fd].startswith("pipe:"):
            wanted[one.fd] = links[one.fd]
    if not wanted:
        return found
    seen = _search(set(wanted.values()))
    result = []
    for one in found:
        holders = seen.get(wanted.get(one.fd, ""), [])
        if one.kind == "pipe":  # both of its ends have one name
            holders = [(holder, access) for holder, access in holders if not set(access) <= set(one.access)]
        result.append(attrs.evolve(one, peers=tuple(holder for holder, _ in holders)))
    return result


def _search(wanted: set[str]) -> dict[str, list[tuple[Holder, str]]]:
    """Return who has a descriptor with one of these links, and for what access."""
    found: dict[str, list[tuple[Holder, str]]] = defaultdict(list)
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            for fd in sorted(_numbers(pid)):
                link = _link(pid, fd)
                if link in wanted:
                    mode = os.lstat(f"/proc/{pid}/fd/{fd}").st_mode  # the link's own mode tells the access
                    access = "r" * bool(mode & stat.S_IRUSR) + "w" * bool(mode & stat.S_IWUSR)
                    found[link].append((Holder(pid, fd, command_of(pid)), access))
        except OSError:  # ended meanwhile, or not ours to see
            continue
    return found


# --- this process, on any system ---------------------------------------------------------------------------------------


def by_fstat(fds: Iterable[int]) -> list[Descriptor]:
    """Return descriptors of this process, without ``/proc``; what is not open is left out."""
    found = []
    for fd in sorted(fds):
        with suppress(OSError):
            found.append(_read_own(fd))
    return found


def _read_own(fd: int) -> Descriptor:
    status = os.fstat(fd)
    kind = kind_of(fd)
    access, flags = _access_and_flags(fcntl.fcntl(fd, fcntl.F_GETFL))
    if not os.get_inheritable(fd):
        flags = tuple(sorted({*flags, "cloexec"}))
    return Descriptor(
        fd=fd,
        kind=kind,
        access="rw" if kind == "socket" else access,
        flags=flags,
        offset=os.lseek(fd, 0, os.SEEK_CUR) if kind in ("file", "memfd") and access != "path" else None,
        size=_size_of(status),
        name=_path_of(fd),
        socket=_own_socket(fd) if kind == "socket" else None,
    )


_F_GETPATH = 50  # sys/fcntl.h of macOS
_MAX_PATH = 1024  # bytes that it fills: MAXPATHLEN there


def _path_of(fd: int) -> str:
    if sys.platform != "darwin":
        return ""
    try:
        return os.fsdecode(fcntl.fcntl(fd, _F_GETPATH, bytes(_MAX_PATH)).rstrip(b"\0"))
    except OSError:  # it has no path
        return ""


def _own_socket(fd: int) -> Socket:
    with own(os.dup, fd) as copy, copy.to_socket() as sock:
        return Socket(
            family=_family(sock.family, sock.type),
            type=_type(sock.type),
            state="listening"
            if _option(sock, "SO_ACCEPTCONN")
            else "connected"
            if _has_peer(sock)
            else "unconnected",
            local=_address(sock.getsockname()),
            remote=_address(sock.getpeername()) if _has_peer(sock) else "",
        )


def _family(family: int, type_: int) -> str:
    if family in (socket.AF_INET, socket.AF_INET6):
        return {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}.get(socket.SocketKind(type_), "ip")
    try:
        return socket.AddressFamily(family).name.removeprefix("AF_").lower()
    except ValueError:
        return str(family)


def _type(type_: int) -> str:
    try:
        return socket.SocketKind(type_).name.removeprefix("SOCK_").lower()
    except ValueError:
        return str(type_)


def _option(sock: socket.socket, name: str) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, getattr(socket, name))
    except (OSError, AttributeError):
        return 0


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _address(address: Any) -> str:
    if isinstance(address, bytes):
        return "@" + os.fsdecode(address[1:]) if address.startswith(b"\0") else os.fsdecode(address)
    if isinstance(address, tuple) and len(address) >= 2:
        return f"[{address[0]}]:{address[1]}" if ":" in str(address[0]) else f"{address[0]}:{address[1]}"
    return str(address) if address else ""


# --- psutil -----------------------------------------------------------------------------------------------------------


def by_psutil(pid: int) -> list[Descriptor]:
    """Return what psutil tells of process ``pid``: its files and sockets.

    Raises:
        OSError: psutil is not installed (ENOTSUP).
        ProcessLookupError, PermissionError: as :func:`read_descriptors`.
    """
    try:
        import psutil
    except ImportError:
        raise OSError(
            errno.ENOTSUP,
            "this system has no /proc to tell what another process has open; psutil can: pip install psutil",
        ) from None
    try:
        process = psutil.Process(pid)
        files = process.open_files()
        connections = process.net_connections(kind="all")
    except psutil.NoSuchProcess:
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from None
    except psutil.AccessDenied:
        raise PermissionError(errno.EACCES, f"psutil may not see what process {pid} has open") from None
    found = [_file_of_psutil(file) for file in files if file.fd >= 0]
    found += [_socket_of_psutil(connection) for connection in connections if connection.fd >= 0]
    return sorted(found, key=lambda one: one.fd)


def _file_of_psutil(file: Any) -> Descriptor:
    try:
        size = _size_of(os.stat(file.path))
    except OSError:
        size = None
    mode = getattr(file, "mode", "")  # with position and flags on Linux only
    access = {"r": "r", "w": "w", "a": "w", "r+": "rw", "w+": "rw", "a+": "rw"}.get(mode, "")
    return Descriptor(
        fd=file.fd,
        kind="file",
        access=access,
        flags=_access_and_flags(getattr(file, "flags", 0))[1],
        offset=getattr(file, "position", None),
        size=size,
        name=file.path,
    )


def _socket_of_psutil(connection: Any) -> Descriptor:
    state = {"LISTEN": "listening", "ESTABLISHED": "connected"}.get(connection.status, "")
    return Descriptor(
        fd=connection.fd,
        kind="socket",
        access="rw",
        socket=Socket(
            family=_family(connection.family, connection.type),
            type=_type(connection.type),
            state=state or ("connected" if connection.raddr else "unconnected"),
            local=_address(connection.laddr),
            remote=_address(connection.raddr),
        ),
    )
