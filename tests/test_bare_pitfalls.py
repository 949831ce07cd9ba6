"""Bare SCM_RIGHTS where it bites: each known trap of descriptor passing as a test of ``send_fds`` and ``recv_fds``."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers import requires_seqpacket
from unix_sockets import Pair, connected_pair, socket_kind, type_of

from fdshare import ClosedError, DescriptorsLostError, FdHandle, ProtocolError, recv_fds, send_fds
from fdshare.testing import checked_child, numbered_handle, read_number

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["connected_pair", "socket_kind"]  # fixtures are found by their names in the module

MOST = 253
"""SCM_MAX_FD of Linux."""

SO_PASSPIDFD = 76
"""Missing from the socket module; Linux 6.5 and newer."""


@contextlib.contextmanager
def numbered(*numbers: int) -> Iterator[list[FdHandle]]:
    """Handles from which their numbers can be read back at the other side, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(numbered_handle(number)) for number in numbers]


def send_numbered(sock: socket.socket, data: bytes, *numbers: int) -> int:
    """Send fresh numbered descriptors; the sender's copies are closed."""
    with numbered(*numbers) as handles:
        return send_fds(sock, [data], handles)


def nothing_waits(sock: socket.socket) -> bool:
    """Whether the socket has neither data nor the end of the connection to read."""
    return not select.select([sock], [], [], 0)[0]


# 1: bytes and descriptors coalesce on a stream --------------------------------------------------------------


def test_messages_that_coalesce_keep_their_descriptors_in_order(pair: Pair) -> None:
    ours, theirs = pair
    for data, numbers in ((b"11", ()), (b"22", (2,)), (b"33", ()), (b"44", (4,)), (b"55", ())):
        assert send_numbered(theirs, data, *numbers) == 2
    theirs.close()
    received: list[tuple[bytes, list[int]]] = []
    while True:
        data, handles = recv_fds(ours, 100, 10)
        if not data:
            break
        received.append((data, [read_number(handle) for handle in handles]))
    if ours.type == socket.SOCK_SEQPACKET:
        assert received == [(b"11", []), (b"22", [2]), (b"33", []), (b"44", [4]), (b"55", [])]
    else:
        assert b"".join(data for data, _ in received) == b"1122334455"
        assert [number for _, numbers in received for number in numbers] == [2, 4]
        # Where the reads are cut is the kernel's choice; each descriptor comes no later than with its own bytes.
        assert [numbers for data, numbers in received if b"22" in data] == [[2]]
        assert [numbers for data, numbers in received if b"44" in data] == [[4]]


def test_a_stream_read_in_small_pieces_gives_descriptors_with_their_first_byte() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        send_numbered(theirs, b"abc", 7)
        data, (handle,) = recv_fds(ours, 1, 1)
        assert (data, read_number(handle)) == (b"a", 7)
        assert recv_fds(ours, 10, 1) == (b"bc", [])


# 2 and 7: every read takes descriptors, with a control buffer of full size ------------------------------------


@pytest.mark.parametrize(("sent", "wanted"), [(1, 0), (2, 1), (MOST, 1), (MOST, MOST - 1)])
def test_surplus_descriptors_are_closed_and_said(pair: Pair, sent: int, wanted: int) -> None:
    """All of them arrive (the control buffer is large enough), so all of them can be closed: the leak check looks."""
    ours, theirs = pair
    send_numbered(theirs, b"x", *range(sent))
    with pytest.raises(ProtocolError, match=f"{sent} descriptors arrived; at most {wanted}"):
        recv_fds(ours, 1, wanted)
    send_numbered(theirs, b"y", 1)  # the socket is as usable as before
    data, (handle,) = recv_fds(ours, 1, 1)
    assert (data, read_number(handle)) == (b"y", 1)


def test_nothing_to_receive_is_an_empty_result_only_at_the_end(pair: Pair) -> None:
    ours, theirs = pair
    ours.settimeout(0.01)
    with pytest.raises(TimeoutError):
        recv_fds(ours, 1, 1)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        recv_fds(ours, 1, 1)
    theirs.close()
    assert recv_fds(ours, 1, 1) == (b"", [])


# 3: descriptors without data are lost -------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [[], [b""], [b"", bytearray()]])
def test_descriptors_without_a_byte_are_refused(pair: Pair, buffers: list[Any]) -> None:
    ours, theirs = pair
    with numbered(1) as handles, pytest.raises(ValueError, match="at least one byte"):
        send_fds(theirs, buffers, handles)
    assert nothing_waits(ours)


def test_an_empty_piece_beside_a_byte_is_fine(pair: Pair) -> None:
    ours, theirs = pair
    with numbered(1) as handles:
        assert send_fds(theirs, [b"", b"x", b""], handles) == 1
    data, (handle,) = recv_fds(ours, 10, 1)
    assert (data, read_number(handle)) == (b"x", 1)


# 4: short writes ----------------------------------------------------------------------------------------------


def test_a_short_write_sends_the_descriptors_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        theirs.setblocking(False)
        message = os.urandom(4 << 20)
        rest = memoryview(message)
        rest = rest[send_numbered(theirs, message, 1, 2) :]
        assert rest  # more than any default buffer takes
        received = bytearray()
        handles: list[FdHandle] = []
        while len(received) < len(message):
            data, new = recv_fds(ours, 1 << 20, MOST)
            received += data
            handles += new
            if rest:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[send_fds(theirs, [rest], []) :]
        assert received == message
        assert [read_number(handle) for handle in handles] == [1, 2]


@requires_seqpacket
def test_a_packet_that_is_too_large_is_refused_whole() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with numbered(1) as handles, pytest.raises(OSError, match="too long") as caught:
            send_fds(theirs, [bytes(64 << 20)], handles)
        assert caught.value.errno == errno.EMSGSIZE
        assert nothing_waits(ours)


# 5 and 6: how many at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 252, MOST])
def test_so_many_descriptors_in_one_message(pair: Pair, count: int) -> None:
    ours, theirs = pair
    assert send_numbered(theirs, b"x", *range(count)) == 1
    data, handles = recv_fds(ours, 10, count)
    assert data == b"x"
    assert [read_number(handle) for handle in handles] == list(range(count))


@pytest.mark.parametrize("count", [MOST + 1, 1000])
def test_too_many_descriptors_in_one_message(pair: Pair, count: int) -> None:
    ours, theirs = pair
    with numbered(0) as (handle,), pytest.raises(ValueError, match=f"{count} descriptors.* at most {MOST}"):
        send_fds(theirs, [b"x"], [handle] * count)
    assert nothing_waits(ours)


def test_all_descriptors_come_in_one_control_message(pair: Pair) -> None:
    """Seen by the standard library: some systems deliver only one of several."""
    ours, theirs = pair
    send_numbered(theirs, b"x", *range(MOST))
    _, control, flags, _ = ours.recvmsg(10, socket.CMSG_SPACE(4 * MOST))
    received = array.array("i")
    for _, _, data in control:
        received.frombytes(data)
    assert [read_number(FdHandle(fd)) for fd in received] == list(range(MOST))
    assert [(level, type_) for level, type_, _ in control] == [(socket.SOL_SOCKET, socket.SCM_RIGHTS)]
    assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)


# 8: close-on-exec ---------------------------------------------------------------------------------------------


def test_received_descriptors_are_not_inherited(pair: Pair) -> None:
    ours, theirs = pair
    with numbered(1, 2) as handles:
        for handle in handles:
            os.set_inheritable(handle.fileno(), True)  # the sender's flag does not travel
        send_fds(theirs, [b"x"], handles)
    _, received = recv_fds(ours, 1, 2)
    look = "import os, sys; print(*[os.path.exists(f'/dev/fd/{fd}') for fd in sys.argv[1:]])"
    numbers = [str(handle.fileno()) for handle in received]
    with received[0], received[1]:
        assert [os.get_inheritable(handle.fileno()) for handle in received] == [False, False]
        command = [sys.executable, "-c", look, *numbers]
        assert subprocess.check_output(command, close_fds=False, text=True).split() == ["False", "False"]


# 9 and 11: what the kernel drops is said, what came with it is closed --------------------------------------------


@contextlib.contextmanager
def room_for_only(count: int) -> Iterator[None]:
    """Lower the descriptor limit so that ``count`` more can be opened, by this process, in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        free = [os.dup(0) for _ in range(count)]  # the lowest free numbers: the limit goes right behind them
        limit = max(free, default=-1) + 1
        if not free:
            limit = os.dup(0)
            os.close(limit)
        for fd in free:
            os.close(fd)
        for fd in range(limit):  # fill gaps that a lower number may have
            if fd not in free and not is_open(fd):
                stack.callback(os.close, os.dup2(0, fd))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def receive_without_room(kind: str, sent: int, room: int) -> tuple[str, int, int, int]:
    """Receive ``sent`` descriptors where only ``room`` fit; return what was raised, and that the next message comes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, type_of(kind))
    with ours, theirs:
        send_numbered(theirs, b"x", *range(sent))
        send_numbered(theirs, b"y", 42)
        with room_for_only(room):
            with pytest.raises(DescriptorsLostError) as caught:
                recv_fds(ours, 1, MOST)
            # What did come was closed again: there is as much room as before.
            for fd in [os.dup(0) for _ in range(room)]:
                os.close(fd)
        data, (handle,) = recv_fds(ours, 1, 1)
        assert data == b"y"
        lost = caught.value
        return str(lost), lost.expected, lost.received, read_number(handle)


@pytest.mark.parametrize(("sent", "room"), [(1, 0), (5, 0), (5, 2), (253, 252)])
def test_descriptors_without_room_are_an_error_and_no_leak(kind: str, sent: int, room: int) -> None:
    text, expected, received, after = checked_child(receive_without_room, kind, sent, room)
    assert "descriptors" in text
    assert received == room
    assert expected == 0 or expected > received  # the kernel tells that some are missing, not how many
    assert after == 42


def test_the_last_descriptor_that_fits_arrives(kind: str) -> None:
    assert checked_child(receive_with_just_enough_room, kind) == [0, 1, 2]


def receive_with_just_enough_room(kind: str) -> list[int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, type_of(kind))
    with ours, theirs:
        send_numbered(theirs, b"x", 0, 1, 2)
        with room_for_only(3):
            _, handles = recv_fds(ours, 1, 3)
        return [read_number(handle) for handle in handles]


# other control messages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, MOST])
def test_a_pidfd_of_the_kernel_is_not_leaked(pair: Pair, count: int) -> None:
    """SO_PASSPIDFD adds a descriptor in a control message of another type (SCM_PIDFD), also to plain data."""
    ours, theirs = pair
    try:
        ours.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    except OSError as error:
        pytest.skip(f"no SO_PASSPIDFD: {error}")
    send_numbered(theirs, b"x", *range(count))
    data, handles = recv_fds(ours, 1, MOST)
    assert data == b"x"
    assert [read_number(handle) for handle in handles] == list(range(count))


@pytest.mark.skipif(not hasattr(socket, "SO_PASSCRED"), reason="no SO_PASSCRED on this system")
def test_credentials_leave_room_for_all_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    send_numbered(theirs, b"x", *range(MOST))
    _, handles = recv_fds(ours, 1, MOST)
    assert [read_number(handle) for handle in handles] == list(range(MOST))


# what is given to send_fds ----------------------------------------------------------------------------------------


def test_sending_leaves_every_owner_its_own(pair: Pair) -> None:
    ours, theirs = pair
    with numbered(5) as (handle,), open(os.devnull) as file, socket.socket() as sock:
        send_fds(theirs, [b"x"], [handle, file, sock, file.fileno()])
        assert (handle.closed, file.closed, sock.fileno() < 0) == (False, False, False)
        _, received = recv_fds(ours, 1, 4)
        assert [one.kind for one in received[1:]] == ["device", "socket", "device"]
        assert read_number(received[0]) == 5
        for one in received[1:]:
            one.close()


def test_owners_that_a_generator_makes_live_until_they_are_sent(pair: Pair, tmp_path: Any) -> None:
    """A file that nobody but the generator holds must not close before the message is with the kernel."""
    ours, theirs = pair
    for name in "ab":
        (tmp_path / name).write_text(name)
    opened: list[Any] = []

    class Holder:
        """Closes in silence when it is dropped, as files did once."""

        def __init__(self, name: str) -> None:
            self.fd = os.open(tmp_path / name, os.O_RDONLY)
            opened.append(self.fd)

        def fileno(self) -> int:
            return self.fd

        def __del__(self) -> None:
            os.close(self.fd)

    send_fds(theirs, [b"x"], (Holder(name) for name in "ab"))
    _, handles = recv_fds(ours, 1, 2)
    texts = []
    for handle in handles:
        with handle.to_file("r") as file:
            texts.append(file.read())
    assert texts == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-1, ValueError),
        (True, TypeError),
        ("3", TypeError),
        (None, TypeError),
        (2.5, TypeError),
        (1 << 30, OSError),
    ],
)
def test_what_is_no_descriptor_is_refused_and_nothing_sent(
    pair: Pair, bad: Any, error: type[Exception]
) -> None:
    ours, theirs = pair
    with numbered(1) as (good,), pytest.raises(error):
        send_fds(theirs, [b"x"], [good, bad])
    assert nothing_waits(ours)


def test_a_closed_handle_is_refused(pair: Pair) -> None:
    ours, theirs = pair
    with numbered(1) as (handle,):
        pass
    with pytest.raises(ClosedError):
        send_fds(theirs, [b"x"], [handle])
    assert nothing_waits(ours)


def test_sending_to_a_peer_that_is_gone_is_an_error_and_no_signal(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    with numbered(1) as handles, pytest.raises(BrokenPipeError):
        send_fds(theirs, [b"x"], handles)


def test_descriptors_outlive_their_sender(pair: Pair) -> None:
    """What is in flight belongs to the message: its sender may close everything, and so may end."""
    ours, theirs = pair
    send_numbered(theirs, b"x", 3)
    theirs.close()
    _, (handle,) = recv_fds(ours, 1, 1)
    assert read_number(handle) == 3


def test_descriptors_that_nobody_receives_close_with_the_socket(pair: Pair) -> None:
    ours, theirs = pair
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe:
        with FdHandle(writer) as handle:
            send_fds(theirs, [b"x"], [handle])
        ours.close()
        assert pipe.read() == b""  # the last write end went with the message
