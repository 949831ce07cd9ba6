"""``Listener`` and ``connect``: two programs find each other by a path, and know who the other is.

    connect                                    Listener
    kernel: connected, perhaps not accepted
    is the listener's user admitted? --no--> REFUSED, AccessDeniedError
    hello -->
    (connect returns)                          accept: is the peer's user admitted? --no--> REFUSED, next one
                                               <-- hello, unless it has seen the other's, and its own is the same
                                               (accept returns)
    before the first message it takes, each side checks the other's hello

Nobody waits for a hello, so a program may do both in one thread, and a silent client delays no other one: what its
handler waits for is its first message, with a timeout of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from typing import Any

import attrs

from fdshare import native, reducers, rights, socketfile
from fdshare.addresses import (
    DEFAULT_BACKLOG,
    Address,
    accepted_sockets,
    connected_socket,
    inherited_socket,
    listening_socket,
)
from fdshare.blocking import TICK_MILLISECONDS, python_threads
from fdshare.channel import Channel
from fdshare.closing import Closing
from fdshare.codec import Codec
from fdshare.credentials import Policy, objection, same_user
from fdshare.disposal import dispose_listener, forks
from fdshare.errors import AccessDeniedError, ClosedError, FdLimitError
from fdshare.greeting import (
    PICKLE_ANSWER,
    Answer,
    Bounds,
    expect_hello,
    hello_of,
    refuse,
    say_hello,
    takes_descriptors,
)
from fdshare.handle import FdHandle, Outside, to_socket
from fdshare.handlers import is_from_handler
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.transport import Transport

__all__ = ["Listener", "connect"]

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.01, 1.0
"""How long the first pause in accepting takes when no descriptor or memory is left, and the longest."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""What passes by itself once others have closed something."""

LATE_SECONDS = 0.02
"""How long after its time is up ``accept`` still looks at who is queued, where those before were refused: a refusal takes
0.1 ms, and milliseconds where hundreds of descriptors have come with it."""


class _Door(Transport):
    """A listening socket: waiting on it, and closing it under who waits."""

    def _close(self) -> None:
        dispose_listener(self.sock, alone=self.forks_when_alone == forks())


class Listener(Closing):
    """Listens at an address, and gives a :class:`Channel` for each peer that is admitted.

    The socket's file appears listening and with its mode, takes the place of a dead listener's, and is removed by ``close``,
    in the process that made it, unless something else is there by then.  Usable by several threads at once, and by
    several processes: it travels in messages.  ``fileno()`` is readable when ``accept`` has something to do.

    Args:
        address: the path of the socket, of any length; an abstract name (Linux), which begins with a zero byte; or a listening
            socket that is there already (see :func:`listen_fds`): an FdHandle, a socket or a descriptor, now the listener's.
            Others may hold it too, so O_NONBLOCK stays as it is: without it, an ``accept`` that another process forestalls in the
            very moment waits for the next connection, whatever its timeout.
        backlog: connections that wait to be accepted; the system may allow fewer.
        allow: who is admitted: a callable that takes PeerCredentials.  Those who are not are told, and accept goes on.
        codec: how objects become bytes; None for pickle, which is for users who trust each other.
        mode: permission bits of the socket's file; connecting takes the permission to write.
        transport: "seqpacket", "stream", or None for the best that the system has.
        max_inflight, max_untaken: bounds of each of its channels, as for :class:`Channel`; the second is an eighth of the soft
            limit of descriptors unless told otherwise.

    Raises:
        OSError: EADDRINUSE where somebody listens there; what the directory says.
        ValueError: a bad address, mode or transport, or not a listening AF_UNIX socket.
    """

    def __init__(
        self,
        address: Address | FdHandle | socket.socket | int,
        *,
        backlog: int = DEFAULT_BACKLOG,
        allow: Policy = same_user,
        codec: Codec | None = None,
        mode: int = 0o600,
        transport: str | None = None,
        max_inflight: int = DEFAULT_MAX_INFLIGHT,
        max_untaken: int | None = None,
    ) -> None:
        bounds = Bounds(max_inflight, max_untaken)
        if isinstance(address, FdHandle | socket.socket | int):
            sock, identity = inherited_socket(address, backlog, descriptors=takes_descriptors(codec)), None
            name = os.fsdecode(sock.getsockname())
        else:
            sock, identity = listening_socket(
                address,
                backlog=backlog,
                mode=mode,
                transport=transport,
                descriptors=takes_descriptors(codec),
            )
            name = os.fsdecode(address)
        try:
            self._start(sock, name, identity, allow, codec, bounds)
            if not isinstance(address, FdHandle | socket.socket | int):
                self._door.forks_when_alone = forks()
        except BaseException:
            sock.close()
            raise

    def _start(
        self,
        sock: socket.socket,
        address: str,
        identity: socketfile.Identity | None,
        allow: Policy,
        codec: Codec | None,
        bounds: Bounds,
    ) -> None:
        self._address = address
        self._path = os.path.abspath(address) if identity else ""
        self._identity = identity  # of the file, while it is for us to remove
        self._owner = os.getpid()
        self._allow = allow
        self._codec = codec
        self._bounds = bounds
        self._hello = hello_of(codec)
        self._stream = sock.type == socket.SOCK_STREAM
        self._connections = accepted_sockets(sock)
        self._door = _Door(sock)  # for its way of waiting, and of closing under who waits

    # --- accepting ---------------------------------------------------------------------------------------------------------

    def accept(self, timeout: float | None = None) -> Channel:
        """Wait for the next peer that is admitted.

        The peer need not have said anything: what is wrong with its hello is an error of the channel's first ``recv``.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: nobody came who is admitted.
            ClosedError: the listener is closed, also by another thread while this one waited.
            FdLimitError: no descriptor left; who has connected stays queued.
        """
        if timeout is None and not python_threads():
            channel = self._accept_alone()
            if channel is not None:
                return channel
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._wait(deadline)
            sock = self._accept_now()
            channel = None if sock is None else self._admit(sock)
            if channel is not None:
                return channel
            if deadline is not None and time.monotonic() >= deadline + LATE_SECONDS:
                raise TimeoutError("nobody connected who is admitted")

    def __iter__(self) -> Iterator[Channel]:
        """Yield a channel for each peer, until the listener is closed.

        Where no descriptor or memory is left, it pauses, says so in the log, and goes on with who has stayed queued.

        Raises:
            OSError: accepting has failed for good.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                channel = self.accept()
            except ClosedError:
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                if pause == FIRST_PAUSE_SECONDS:
                    _log.warning("accepting at %r pauses: %s", self._address, error)
                if not self._pause(pause):
                    return
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            yield channel
            del channel  # it is the caller's alone

    def _pause(self, seconds: float) -> bool:
        """Let some time pass; False where it was closed meanwhile."""
        try:
            self._door.wait(0, time.monotonic() + seconds)
        except ClosedError:
            return False
        return True

    def _accept_alone(self) -> Channel | None:
        """Accept in few steps; None where nobody comes within a tick, or it takes more."""
        if self._door.closed:
            return None
        try:
            if not self._door.input.poll(TICK_MILLISECONDS):
                return None
            for sock in self._connections:  # noqa: B007 -- one of them, stored without a gap
                break
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: in a signal handler, inside of another accept
            if is_from_handler(error):
                raise
            return None
        return self._admit(sock)

    def _accept_now(self) -> socket.socket | None:
        """Take the next connection; None where another thread or process has taken it, or it is gone."""
        try:
            with self._door._reading:  # close() waits for it, so that the number stays ours
                if not self._has_one():
                    return None
                for sock in self._connections:  # noqa: B007 -- one of them, stored without a gap
                    break
            return sock
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                limit = rights.descriptor_limit()
                raise FdLimitError(
                    error.errno,
                    f"no descriptor left for a connection (limit {limit}): it stays queued; close some",
                    needed=1,
                    limit=limit,
                ) from error
            self._check_open()
            raise

    def _has_one(self) -> bool:
        """Whether accept(2) returns at once.

        A listening socket that somebody else has made may block, and stays as it is, since others hold it: then one looks first.
        """
        fd = self._door.sock.fileno()
        if fd < 0 or not os.get_blocking(fd):
            return True
        poll = native.poll()
        poll.register(fd, native.IN)
        return bool(poll.poll(0))

    def _admit(self, sock: socket.socket) -> Channel | None:
        """Return a channel for a new connection; None where its peer was refused, or has gone."""
        try:
            why = objection(sock, self._allow)
            if why is None:
                return expect_hello(sock, self._codec, self._hello, self._stream, self._bounds)
            _log.info("a connection to %r was refused: %s", self._address, why)
            refuse(sock)
            return None
        except BaseException:
            sock.close()
            raise

    def _wait(self, deadline: float | None) -> None:
        try:
            found = self._door.wait(select.POLLIN, deadline)
        except ClosedError:
            raise _closed() from None
        if not found:
            raise TimeoutError("nobody connected who is admitted")

    def _check_open(self) -> None:
        if self._door.closed:
            raise _closed()
        self._door.check_open()

    # --- the address, the descriptor, the end ------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where it listens, as it was given; an abstract name begins with a zero byte.

        The kernel remembers how a socket was made: getsockname(2), getpeername(2) and ss(8) show the way to a private directory
        beside the file, by its descriptor of then, where it began to listen before it appeared.
        """
        return self._address

    @property
    def closed(self) -> bool:
        """Whether it was closed in this process."""
        return self._door.closed

    @property
    def transport(self) -> str:
        """What its channels use: "seqpacket" or "stream"."""
        return "stream" if self._stream else "seqpacket"

    def fileno(self) -> int:
        """Borrow the descriptor's number, for selectors and :func:`fdshare.wait`.

        Raises:
            ClosedError: the listener is closed.
        """
        self._check_open()
        self._door.forks_when_alone = -1  # it may be duplicated, or inherited
        return self._door.sock.fileno()

    def close(self) -> None:
        """Stop listening: who waits in ``accept`` gets ClosedError, who is queued is disconnected.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        if self._door.closed:
            return
        # While the file is there, somebody listens: otherwise another one could replace it just before it is removed.
        self._remove_file()
        self._door.close()

    def _remove_file(self) -> None:
        identity, self._identity = self._identity, None
        if identity is not None and self._owner == os.getpid():
            try:
                socketfile.remove(self._path, identity)
            except OSError as error:  # as after a change of user; the next listener replaces it
                _log.warning("the socket %r stays behind: %s", self._path, error)

    def _give_away(self) -> None:
        """Close, and leave the file to who has the listener now."""
        self._identity = None
        self._door.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd={self._door.sock.fileno()}"
        return f"<Listener {state} {self.transport} {self._address!r}>"

    def __del__(self) -> None:
        door = getattr(self, "_door", None)  # unset where __init__ raised
        if door is not None and not door.closed:
            text = f"unclosed {self!r}"
            try:
                self.close()
            finally:
                warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


_log = logging.getLogger("fdshare")


def _closed() -> ClosedError:
    return ClosedError("this listener was closed")


def connect(
    address: Address,
    *,
    timeout: float | None = None,
    allow: Policy = same_user,
    codec: Codec | None = None,
    transport: str | None = None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
) -> Channel:
    """Connect to a :class:`Listener`; return as soon as the kernel has the connection, also before it is accepted.

    Args:
        address: as for the listener: a path, or an abstract name.
        timeout: seconds to wait while the listener's backlog is full; None waits for ever.
        allow: which user may be listening there: a callable that takes PeerCredentials, those of whom called listen(2).
        codec: how objects become bytes, the same as the listener's; None for pickle.
        transport: "seqpacket", "stream", or None for the best that the system has, as the listener.
        max_inflight, max_untaken: bounds of the channel, as for :class:`Listener`.

    Raises:
        FileNotFoundError, ConnectionRefusedError: nobody listens there.
        AccessDeniedError: another user listens there.
        PermissionError: this user may not connect.
        TimeoutError: the backlog stayed full.
        OSError: EPROTOTYPE: the listener has another transport.
        ValueError: a bad address or transport.
    """
    answer = PICKLE_ANSWER if codec is None else Answer(hello_of(codec))
    sock = connected_socket(
        address, timeout=timeout, transport=transport, descriptors=takes_descriptors(codec)
    )
    try:
        why = objection(sock, allow)
        if why is not None:
            refuse(sock)
            raise AccessDeniedError(f"the listener at {os.fsdecode(address)!r} is not trusted here: {why}")
        say_hello(sock, answer.ours)
        channel = Channel(sock, codec=codec, max_inflight=max_inflight, max_untaken=max_untaken)
        channel._transport.greeting = answer
        Bounds(max_inflight, max_untaken).meet(channel)
        return channel
    except BaseException:
        sock.close()
        raise


# --- how a listener travels --------------------------------------------------------------------------------------------------


def reduce_listener(listener: Listener, context: reducers.Context) -> reducers.Reduced:
    if listener.closed:
        raise reducers.Refused(listener, "it is closed")
    path, identity = "", None
    if context.moving:
        context.consume(listener._give_away)
        if listener._owner == os.getpid():
            path, identity = listener._path, listener._identity
    index = context.lend(listener.fileno(), listener)
    bounds = attrs.astuple(listener._bounds)
    return rebuild_listener, (
        index,
        listener._address,
        path,
        identity,
        listener._allow,
        listener._codec,
        *bounds,
    )


def rebuild_listener(
    index: int,
    address: str,
    path: str,
    identity: socketfile.Identity | None,
    allow: Policy,
    codec: Codec | None,
    max_inflight: int = DEFAULT_MAX_INFLIGHT,
    max_untaken: int | None = None,
) -> Listener:
    sock = to_socket(reducers.take(index, stat.S_IFSOCK))
    listener = Listener.__new__(Listener)
    try:
        listener._start(sock, address, identity, allow, codec, Bounds(max_inflight, max_untaken))
    except BaseException:
        sock.close()
        raise
    listener._path = path
    return reducers.built(listener)


reducers.known[Listener] = reduce_listener
