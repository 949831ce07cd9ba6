"""Channels over channels at any depth, epoll, and descriptors that only a handle can hold."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from pathlib import Path

import pytest
from helpers import requires_epoll, requires_eventfd, requires_memfd, requires_pidfd
from hypothesis import given
from hypothesis import strategies as st
from travel import TIMEOUT, refusal, trip

from fdshare import Channel, FdHandle, PeerClosedError, Pipe, move
from fdshare.testing import checked_child

# channels over channels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["seqpacket", "stream"])
@pytest.mark.parametrize("inner", ["seqpacket", "stream"])
def test_channel_keeps_what_it_is(outer: str, inner: str) -> None:
    reader, writer = Pipe(duplex=False, transport=inner, max_inflight=4321)
    with writer, trip(move(reader), outer) as received:
        assert reader.closed
        assert type(received) is Channel
        assert (received.transport, received.max_inflight) == (inner, 4321)
        assert (received.readable, received.writable) == (True, False)
        writer.send([1])
        assert received.recv() == [1]


def test_channel_through_a_channel_through_a_channel() -> None:
    """Depth 3, and each channel carries the next while messages wait in it."""
    with contextlib.ExitStack() as stack:
        ends = [[stack.enter_context(end) for end in Pipe()] for _ in range(4)]
        ends[3][0].send("innermost")
        for depth in (2, 1, 0):
            ends[depth][0].send({"next": move(ends[depth + 1][1])})
        channel = ends[0][1]
        for _ in range(3):
            channel = stack.enter_context(channel.recv()["next"])
        assert channel.recv() == "innermost"
        channel.send("back")
        assert ends[3][0].recv() == "back"


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.binary(max_size=100))
def test_channel_at_any_depth(moves: list[bool], content: bytes) -> None:
    with contextlib.ExitStack() as stack:
        far, near = Pipe()
        stack.enter_context(far)
        for moved in moves:
            stack.enter_context(near)
            near = trip(move(near) if moved else near)
        stack.enter_context(near)
        near.send(content)
        assert far.recv() == content


def test_channel_through_itself() -> None:
    """Its own end in a message to the other: a cycle in the kernel, gone when it is received."""
    here, there = Pipe()
    with here, there:
        here.send(here)
        with there.recv() as also_here:
            also_here.send("by the copy")
            assert there.recv() == "by the copy"
            there.send("to either")
            assert here.recv() == "to either"


def test_closed_channel_is_refused() -> None:
    here, there = Pipe()
    here.close()
    there.close()
    assert refusal([1, here]).path == "message[1]"


def relay(channel: Channel, depth: int) -> None:
    """Receive a channel; hand it to a child of our own, or answer on it."""
    with channel, channel.recv() as carried:
        if depth == 0:
            carried.send(("answered by", os.getpid()))
            return
        ours, theirs = Pipe()
        with ours, theirs:
            ours.send(move(carried))
            checked_child(relay, theirs, depth - 1, method="fork")


def test_channel_handed_down_three_processes() -> None:
    far, near = Pipe()
    ours, theirs = Pipe()
    with far, ours, theirs:
        ours.send(move(near))
        checked_child(relay, theirs, 2, method="fork")
        text, pid = far.recv()
        assert text == "answered by"
        assert pid != os.getpid()
        with pytest.raises(PeerClosedError):
            far.recv()


# what only a handle can hold -------------------------------------------------------------------------------------------


@requires_epoll
def test_epoll_watches_there_what_it_watched_here() -> None:
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        epoll = stack.enter_context(select.epoll())
        epoll.register(reader, select.EPOLLIN)
        with trip(epoll) as received:
            assert type(received) is select.epoll
            assert not os.get_inheritable(received.fileno())
            assert received.poll(0) == []
            os.write(writer, b"x")
            assert received.poll(TIMEOUT) == [(reader, select.EPOLLIN)]
        moved = trip([move(epoll)])[0]
        assert epoll.closed
        moved.close()
        assert refusal([moved]).reason == "it is closed"


def test_directory_is_a_place_to_open_from(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("found")
    with (
        FdHandle(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)) as handle,
        trip({"root": handle})["root"] as received,
    ):
        assert received.kind == "directory"
        assert os.listdir(received.fileno()) == ["inside"]
        with open(os.open("inside", os.O_RDONLY, dir_fd=received.fileno())) as file:
            assert file.read() == "found"


@requires_eventfd
def test_eventfd_counts_for_both() -> None:
    with FdHandle(os.eventfd(0, os.EFD_NONBLOCK)) as handle, trip(handle) as received:
        os.eventfd_write(received.fileno(), 3)
        os.eventfd_write(handle.fileno(), 4)
        assert os.eventfd_read(received.fileno()) == 7


@requires_pidfd
def test_pidfd_signals_and_waits_there() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    with FdHandle(os.pidfd_open(pid)) as handle, trip(handle) as received:
        signal.pidfd_send_signal(received.fileno(), signal.SIGKILL)
        assert select.select([received], [], [], TIMEOUT)[0] == [received]
        result = os.waitid(os.P_PIDFD, received.fileno(), os.WEXITED)
        assert result is not None
        assert result.si_status == signal.SIGKILL


@requires_memfd
def test_memfd_is_one_memory() -> None:
    with FdHandle(os.memfd_create("shared", os.MFD_CLOEXEC)) as handle:
        os.write(handle.fileno(), b"hello")
        with trip(handle) as received:
            assert received.kind == "memfd"
            with received.to_file("r+b") as file:
                file.seek(0)
                file.write(b"HE")
        assert os.pread(handle.fileno(), 10, 0) == b"HEllo"


if hasattr(os, "timerfd_create"):  # Python 3.13

    def test_timerfd_expires_there() -> None:
        with FdHandle(os.timerfd_create(time.CLOCK_MONOTONIC)) as handle, trip(handle) as received:
            os.timerfd_settime(handle.fileno(), initial=0.001)
            assert select.select([received], [], [], TIMEOUT)[0] == [received]


def test_lock_of_the_description_travels(tmp_path: Path) -> None:
    """flock() belongs to the description: both hold it, and it is free when both are closed."""
    path = tmp_path / "lock"
    path.touch()
    with open(path) as file, open(path) as other:
        fcntl.flock(file, fcntl.LOCK_EX)
        received = trip(move(file))
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        received.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
