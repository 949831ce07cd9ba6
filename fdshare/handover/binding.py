"""What a listener is asked to be (``Spec``), making such a socket, and telling whether one that is there already fits."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

import attrs

from fdshare import socketfile
from fdshare.errors import ProtocolError
from fdshare.handle import FdHandle, own, to_socket

__all__ = ["MAX_NAME", "Spec", "check_name", "identity_of", "is_control"]

BACKLOG = 1024
"""Connections that wait to be accepted: all that come while the one stops and the other begins, and the system's own bound
(net.core.somaxconn, 4096 on Linux) is not far above."""

MAX_NAME = 255
"""Characters of a listener's name: what systemd allows for a descriptor's (FDNAME_MAX)."""


def check_name(name: str) -> None:
    """Check a listener's name by systemd's rules, under which it may have to be kept.

    Raises:
        ValueError: not 1 to 255 printable ASCII characters, or a colon among them.
    """
    if not (0 < len(name) <= MAX_NAME and name.isascii() and name.isprintable() and ":" not in name):
        raise ValueError(
            f"a listener's name is 1 to {MAX_NAME} printable ASCII characters without a colon: {name!r}"
        )


@attrs.frozen
class Spec:
    """What ``listen`` was asked for: an address, and how to make a socket there.

    ``identity`` is the file of an AF_UNIX socket, once there is one.
    """

    family: int
    type: int
    host: str
    """Of AF_UNIX sockets the absolute path."""
    port: int = 0
    backlog: int = BACKLOG
    reuse_port: bool = False
    mode: int = 0o600
    given: bool = attrs.field(default=False, eq=False)
    """Whether a service manager gave the socket: its unit says the address, of whatever family, and this one nothing."""
    identity: socketfile.Identity | None = attrs.field(default=None, eq=False)

    @classmethod
    def inet(cls, host: str | None, port: int, type: int, backlog: int, reuse_port: bool) -> Spec:
        """Return what an address of the internet means; no host is every IPv4 address of this machine.

        Raises:
            ValueError: no such type or port.
        """
        _check(type)
        if not 0 <= port <= 65535:
            raise ValueError(f"a port is 0 to 65535, not {port}")
        host = host or "0.0.0.0"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return cls(int(family), int(type), host, port, backlog, reuse_port)

    @classmethod
    def unix(cls, path: str | bytes | os.PathLike[Any], type: int, backlog: int, mode: int) -> Spec:
        """Return what a path means.

        Raises:
            ValueError: no such type or mode, or an empty path or a zero byte in it.
        """
        if type != getattr(socket, "SOCK_SEQPACKET", None):
            _check(type)
        text = os.fsdecode(path)
        if not text or "\0" in text:
            raise ValueError(f"not the path of a socket: {text!r}")
        if not 0 <= mode <= 0o777:
            raise ValueError(f"mode is permission bits, not {mode:#o}")
        return cls(int(socket.AF_UNIX), int(type), os.path.abspath(text), backlog=backlog, mode=mode)

    @classmethod
    def of_wire(cls, values: object) -> Spec:
        """Rebuild what the other generation has told with :meth:`to_wire`, which may know more than this one.

        Raises:
            ProtocolError: it told nonsense.
        """
        known = {field.name for field in attrs.fields(cls)}
        try:
            spec = cls(**{name: value for name, value in dict(values).items() if name in known})  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"the predecessor describes a listener as {values!r}") from error
        if not (isinstance(spec.family, int) and isinstance(spec.type, int) and isinstance(spec.host, str)):
            raise ProtocolError(f"the predecessor describes a listener as {values!r}")
        return attrs.evolve(spec, identity=identity_of(spec.identity))

    def to_wire(self) -> dict[str, Any]:
        """Return plain values, which another version of this class can read."""
        return attrs.asdict(self)

    @property
    def is_unix(self) -> bool:
        """Whether the address is a path."""
        return self.family == socket.AF_UNIX

    def bind(self) -> tuple[FdHandle, Spec]:
        """Make the socket; return it, and the spec with the file it has.

        Raises:
            OSError: as bind(2), with the address.
        """
        sock = socket.socket(self.family, self.type)
        try:
            if self.is_unix:
                identity = socketfile.listen_at(sock, self.host, self.mode, self.backlog)
                return own(sock.detach), attrs.evolve(self, identity=identity)
            self._bind_inet(sock)
            return own(sock.detach), self
        except BaseException:
            sock.close()
            raise

    def _bind_inet(self, sock: socket.socket) -> None:
        stream = self.type == socket.SOCK_STREAM
        if (
            stream
        ):  # or the connections of a server that was killed would forbid the next one the port for a minute
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self.family == socket.AF_INET6 and hasattr(socket, "IPV6_V6ONLY"):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the same on every system
        try:
            sock.bind((self.host, self.port))
            if stream:
                sock.listen(self.backlog)
        except OSError as error:
            text = f"{error.strerror or error}: cannot listen at {self.host} port {self.port}"
            raise OSError(error.errno, text) from error

    @property
    def shown_path(self) -> str:
        """The path of an AF_UNIX socket that was made here, which the kernel does not tell; empty for others."""
        return self.host if self.is_unix and not self.given else ""

    # --- a socket that is there already -----------------------------------------------------------------------------------

    def misfit(self, handle: FdHandle) -> str | None:
        """Return why ``handle`` cannot serve for this spec at any address: it is of another type; None where it can."""
        if handle.format != stat.S_IFSOCK:
            return f"a {handle.kind}, and no socket"
        try:
            with _borrowed(handle) as sock:
                kind, listens = sock.type, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:  # O_PATH
            return f"a socket that cannot be used ({error.strerror})"
        if kind != self.type:
            return f"a socket of {_name_of(kind)}, and {_name_of(self.type)} was asked for"
        return None if bool(listens) == (self.type != socket.SOCK_DGRAM) else "a socket that does not listen"

    def fits(self, handle: FdHandle, theirs: Spec) -> bool:
        """Whether ``handle``, made for ``theirs``, may serve for this spec.

        The address must be the same, or one that it resolves to, unless it is a service manager's affair.
        """
        if self.misfit(handle):
            return False
        if theirs.given:
            return True
        same = (self.host, self.port) == (theirs.host, theirs.port)
        with _borrowed(handle) as sock:
            if sock.family != self.family:
                return False
            bound = sock.getsockname()
        if same and self.port:
            same = bound[1] == self.port
        return same or self._resolves_to(bound)

    def likeness(self, handle: FdHandle) -> int:
        """Return how much a socket that may serve is like what is asked for: 2 for the address, 1 for the family alone."""
        with _borrowed(handle) as sock:
            bound = sock.getsockname()
            if sock.family != self.family:
                return 0
        if self.is_unix:
            return 1 + (os.fsdecode(bound) == self.host)
        return 1 + (bound[:2] == (self.host, self.port) or self._resolves_to(bound))

    def _resolves_to(self, bound: Any) -> bool:
        if self.is_unix or self.port == 0:
            return False
        try:
            # As bytes: of text the codec "idna" would be imported, after a change of root or user perhaps.
            host = self.host.encode() if self.host.isascii() else self.host
            found = socket.getaddrinfo(host, self.port, self.family, self.type, 0, socket.AI_PASSIVE)
        except OSError:  # binding will tell
            return False
        return any(address[:2] == bound[:2] for *_, address in found)

    def remove_file(self) -> None:
        """Remove the file of an AF_UNIX socket, if it is still the same one.

        Raises:
            OSError: it may not be removed.
        """
        if self.is_unix and self.identity is not None:
            socketfile.remove(self.host, self.identity)


def is_control(handle: FdHandle) -> bool:
    """Whether a descriptor is a listening AF_UNIX socket."""
    try:
        with _borrowed(handle) as sock:
            return sock.family == socket.AF_UNIX and bool(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            )
    except OSError:  # no socket
        return False


def identity_of(value: object) -> socketfile.Identity | None:
    """Return which file a socket is, as the other generation has told it.

    Raises:
        ProtocolError: it told nonsense.
    """
    if value is None:
        return None
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(number, int) for number in value)
    ):
        return value[0], value[1]
    raise ProtocolError(f"the predecessor says that a socket is the file {value!r}")


def _name_of(type: int) -> str:
    try:
        return socket.SocketKind(type).name
    except ValueError:
        return f"type {type}"


def _check(type: int) -> None:
    if type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise ValueError(f"a listener is of SOCK_STREAM or SOCK_DGRAM, not {type!r}")


@contextlib.contextmanager
def _borrowed(handle: FdHandle) -> Iterator[socket.socket]:
    """Look at a descriptor as a socket, without touching its flags."""
    with FdHandle.dup(handle) as copy, to_socket(copy) as sock:
        yield sock
