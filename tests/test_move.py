"""``move``: what is sent changes its owner with the message, and stays where the send failed."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from travel import pipe_files, refusal, trip

from fdshare import ClosedError, FdHandle, FdShareError, NotSendableError, PeerClosedError, Pipe, move
from fdshare.testing import leak_check, numbered_handle, read_number


@attrs.define
class Job:
    name: str
    files: list[Any]


def test_moved_handle_changes_owner() -> None:
    handle = numbered_handle(5)
    number = handle.fileno()
    with leak_check(closed=False):
        received = trip(move(handle))
        assert handle.closed
        assert read_number(received) == 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
@pytest.mark.parametrize(
    "build", [list, tuple, lambda h: {"k": h}, lambda h: Job("j", h)], ids=["list", "tuple", "dict", "attrs"]
)
def test_everything_inside_is_moved(build: Callable[[Any], Any], transport: str) -> None:
    handles = [numbered_handle(n) for n in range(10)]
    received = trip({"moved": move(build(handles)), "kept": 1}, transport)
    assert all(handle.closed for handle in handles)
    inside = received["moved"]
    inside = inside["k"] if isinstance(inside, dict) else inside.files if isinstance(inside, Job) else inside
    assert [read_number(handle) for handle in inside] == list(range(10))


def test_only_what_is_inside_is_moved() -> None:
    with numbered_handle(1) as before, numbered_handle(2) as inside, numbered_handle(3) as after:
        received = trip([before, move(inside), after])
        assert (before.closed, inside.closed, after.closed) == (False, True, False)
        assert [read_number(handle) for handle in received] == [1, 2, 3]


def test_moved_and_named_elsewhere_is_one_object() -> None:
    for order in (1, -1):
        handle = numbered_handle(4)
        first, second = trip([handle, move(handle)][::order])
        assert first is second
        assert read_number(first) == 4
        assert handle.closed == (order == -1)  # moved where it was met first: afterwards it is a reference
        handle.close()


def test_move_of_what_has_no_descriptor_is_harmless() -> None:
    assert trip(move({"a": [1, 2]})) == {"a": [1, 2]}
    assert trip([move(None), move(move(3))]) == [None, 3]
    assert repr(move([1])) == "move([1])"


def test_move_means_nothing_elsewhere() -> None:
    with numbered_handle(1) as handle:
        with pytest.raises(NotSendableError, match="only in a message"):
            pickle.dumps(move(handle))
        assert not handle.closed


@pytest.mark.parametrize("close", [FdHandle.close, FdHandle.detach])
def test_closed_handle_cannot_be_sent_or_moved(close: Callable[[FdHandle], Any]) -> None:
    handle = numbered_handle(1)
    kept = FdHandle.dup(handle)
    fd = close(handle)
    for message in (handle, move(handle)):
        assert "closed or was consumed" in str(refusal(message))
    kept.close()
    if fd is not None:
        os.close(fd)


@contextlib.contextmanager
def failing_channel(how: str) -> Iterator[tuple[Any, type[FdShareError] | type[TimeoutError]]]:
    here, there = Pipe()
    with here, there:
        if how == "peer closed":
            there.close()
        elif how == "closed":
            here.close()
        else:
            with contextlib.suppress(TimeoutError):
                while True:
                    here.send(bytes(10_000), timeout=0)
        yield here, {"peer closed": PeerClosedError, "closed": ClosedError, "full": TimeoutError}[how]


@pytest.mark.parametrize("how", ["peer closed", "closed", "full"])
def test_moved_stays_where_the_send_failed(how: str) -> None:
    handle, (reader, writer) = numbered_handle(3), pipe_files("r")
    writer.write(b"one\ntwo\n")
    with failing_channel(how) as (channel, error), reader, writer:
        assert reader.readline() == "one\n"
        with pytest.raises(error):
            channel.send({"a": move([handle, reader])}, timeout=0)
        assert reader.readline() == "two\n"
    assert read_number(handle) == 3


def test_moved_stays_where_the_message_cannot_be_encoded() -> None:
    with numbered_handle(3) as handle:
        assert refusal([move(handle), threading.Lock()]).path == "message[1]"
        assert not handle.closed


def test_moved_socket_file_and_channel_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("0123456789\n")
    ours, theirs = socket.socketpair()
    here, there = Pipe()
    file = path.open()
    with ours, here:
        received = trip(move([theirs, there, file]))
        assert theirs.fileno() == -1
        assert there.closed
        assert file.closed
        with received[0] as sock, received[1] as channel, received[2] as text:
            sock.send(b"x")
            assert ours.recv(1) == b"x"
            channel.send("y")
            assert here.recv() == "y"
            assert text.read() == "0123456789\n"
