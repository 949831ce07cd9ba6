"""What several test modules share: pairs of channels, one end of them bare, and functions beside the test."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fdshare import Channel, FdHandle, system, wire
from fdshare.rights import open_numbers
from fdshare.testing import numbered_handle, pattern, read_number

TRANSPORTS = ("seqpacket", "stream") if system.HAVE_SEQPACKET else ("stream",)
METHODS = ("fork", "forkserver", "spawn")
QUICK_METHODS = ("fork", "forkserver")
"""One that inherits everything and one that inherits nothing, for what depends on no more: spawn imports pytest each time."""
SOCKET_TYPES = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}


requires_seqpacket = pytest.mark.skipif(
    not system.HAVE_SEQPACKET, reason="needs sockets that keep packets whole"
)
requires_memfd = pytest.mark.skipif(not system.HAVE_MEMFD, reason="needs memory files")
requires_eventfd = pytest.mark.skipif(not system.HAVE_EVENTFD, reason="needs eventfds")
requires_pidfd = pytest.mark.skipif(not system.HAVE_PIDFD, reason="needs process descriptors")
requires_epoll = pytest.mark.skipif(not system.HAVE_EPOLL, reason="needs epoll")
requires_unread_count = pytest.mark.skipif(
    sys.platform != "linux", reason="needs a kernel that tells what lies unread in a socket"
)
requires_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
requires_waiting_connect = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a full backlog refuses"
)


@contextlib.contextmanager
def running(*targets: Callable[[], object], closing: tuple[Channel, ...] = ()) -> Iterator[None]:
    """Run functions in threads beside the block, and raise what failed first, in the block or in a thread.

    Then the channels in ``closing`` are closed at once, so that nobody waits for one that has failed.
    """
    errors: list[BaseException] = []

    def note(error: BaseException) -> None:
        errors.append(error)
        for channel in closing:
            channel.close()

    def guarded(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 -- raised below
            note(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException as error:  # noqa: BLE001 -- raised below
        note(error)
    for thread in threads:
        thread.join(40)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


@contextlib.contextmanager
def bare_pair(transport: str) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket at the other end of it."""
    ours, bare = socket.socketpair(socket.AF_UNIX, SOCKET_TYPES[transport])
    bare.settimeout(20)
    with bare, Channel(ours) as channel:
        yield channel, bare


LARGE = 2 * wire.MAX_INLINE
"""Bytes that need a segment."""

Piece = tuple[bytes, list[int]]
"""Bytes and the descriptors that came, or go, with them."""


def capture(bare: socket.socket) -> list[Piece]:
    """Take everything off a bare socket that is in it now, in the pieces in which a channel had sent it.

    A packet is a piece.  A frame is three: the header, the byte after it, which brings the descriptors, and the rest;
    read at once they would coalesce, and nobody could tell which byte the descriptors came with.
    """
    pieces: list[Piece] = []
    stream = bare.type == socket.SOCK_STREAM
    bare.setblocking(False)
    try:
        while True:
            pieces.append(_read(bare, wire.HEADER_SIZE if stream else 1 << 20))
            size = wire.unpack(pieces[-1][0]).inline_size if stream else 0
            for part in (1, size) if stream and size else (1,) if stream else ():
                pieces.append(_read(bare, part))
    except (BlockingIOError, EOFError):
        return pieces
    finally:
        bare.settimeout(20)


def _read(bare: socket.socket, size: int) -> Piece:
    # Not socket.recv_fds: in Python 3.11 it ignores its flags.
    data, ancillary, _, _ = bare.recvmsg(size, 4096, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    if not data:
        raise EOFError
    numbers = array.array("i")
    for _, _, rights in ancillary:
        numbers.frombytes(rights)
    return data, list(numbers)


def inject(bare: socket.socket, pieces: list[Piece]) -> None:
    """Put pieces into a bare socket."""
    for data, fds in pieces:
        socket.send_fds(bare, [data], fds)


def close_pieces(pieces: list[Piece]) -> None:
    """Close the descriptors of captured pieces."""
    for _, fds in pieces:
        for fd in fds:
            os.close(fd)


def limit_for(free: int) -> int:
    """Return the RLIMIT_NOFILE that leaves room for ``free`` more descriptors, whatever numbers are taken."""
    taken = set(open_numbers())
    limit = 0
    while free:
        free -= limit not in taken
        limit += 1
    return limit


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Look at a condition again and again until it holds; fail after ``seconds``."""
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


# every kind of message, each of which says which one it is

KINDS = ("small", "empty", "inline", "large", "one_fd", "many_fds", "bundle", "large_and_fds")


def compose(number: int, kind: str) -> tuple[Any, list[FdHandle]]:
    """Return message ``number`` of a kind, and the handles in it, which stay the caller's."""
    count = {"one_fd": 1, "many_fds": 20, "bundle": 300, "large_and_fds": 3}.get(kind, 0)
    size = {"small": 10, "inline": 50_000, "large": LARGE, "large_and_fds": LARGE}.get(kind, 0)
    handles = [numbered_handle(number + i) for i in range(count)]
    return (number, kind, pattern(size, number % 251), handles), handles


def verify(message: Any) -> int:
    """Check a message of :func:`compose`, close its handles, return its number."""
    number, kind, content, handles = message
    assert len(content) == {"small": 10, "inline": 50_000, "large": LARGE, "large_and_fds": LARGE}.get(
        kind, 0
    )
    assert content == pattern(len(content), number % 251)
    assert len(handles) == {"one_fd": 1, "many_fds": 20, "bundle": 300, "large_and_fds": 3}.get(kind, 0)
    assert [read_number(handle) for handle in handles] == list(range(number, number + len(handles)))
    return int(number)


def send_all(channel: Channel, numbers: range, kinds: tuple[str, ...] = KINDS) -> None:
    """Send one message for each number, of each kind in turn."""
    for number in numbers:
        message, handles = compose(number, kinds[number % len(kinds)])
        try:
            channel.send(message, timeout=30)
        finally:
            for handle in handles:
                handle.close()


def receive_all(channel: Channel, numbers: range) -> None:
    """Receive exactly these messages, in this order."""
    assert [verify(channel.recv(timeout=30)) for _ in numbers] == list(numbers)
