"""``FdHandle``, the sole owner of one descriptor: borrow, duplicate, consume."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from travel import TIMEOUT, same_description, trip

from fdshare import ClosedError, FdHandle, Pipe, move
from fdshare.testing import checked_child, leak_check


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789\n")
    return path


def open_handle(path: Path, flags: int = os.O_RDWR) -> FdHandle:
    return FdHandle(os.open(path, flags))


# taking over and lending ---------------------------------------------------------------------------------------------


def test_handle_takes_the_number_over(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    with FdHandle(fd) as handle:
        assert handle.fileno() == handle.fileno() == fd
        assert not handle.closed
    assert handle.closed
    assert not is_open(fd)


@pytest.mark.parametrize("wrong", ["3", 3.0, None, True, b"3", object()])
def test_only_a_number_is_taken_over(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes a descriptor number"):
        FdHandle(wrong)


def test_files_are_duplicated_and_not_taken_over(path: Path) -> None:
    with path.open() as file, pytest.raises(TypeError, match=r"FdHandle\.dup takes files too"):
        FdHandle(file)  # type: ignore[arg-type]


def test_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid descriptor -1"):
        FdHandle(-1)


def test_a_number_that_is_not_open_is_refused() -> None:
    """A handle of it would one day close what somebody else has opened under that number."""
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        FdHandle(resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1)
    assert caught.value.errno == errno.EBADF


def test_a_subclass_duplicates_into_itself(path: Path) -> None:
    class Log(FdHandle):
        pass

    with path.open() as file, Log.dup(file) as log:
        assert type(log) is Log
        assert same_description(log, file)


def test_handle_has_no_other_attributes(path: Path) -> None:
    with open_handle(path) as handle:
        with pytest.raises(AttributeError):
            handle.name = "x"  # type: ignore[attr-defined]
        with pytest.raises(AttributeError):
            handle.closed = True  # type: ignore[misc]


def test_handles_are_told_apart_by_identity(path: Path) -> None:
    with open_handle(path) as handle, FdHandle.dup(handle) as other:
        assert handle != other
        assert len({handle, other, handle}) == 2


def test_lent_number_serves_the_system(path: Path) -> None:
    with open_handle(path) as handle:
        assert os.read(handle.fileno(), 3) == b"012"
        assert select.select([handle], [], [], 0)[0] == [handle]


# closing -------------------------------------------------------------------------------------------------------------------


def test_closing_twice_closes_nobody_elses(path: Path) -> None:
    """The number is used again at once; a second close must not hit its new owner."""
    handle = open_handle(path)
    number = handle.fileno()
    handle.close()
    with open_handle(path) as successor:
        assert successor.fileno() == number
        handle.close()
        del handle
        assert is_open(number)


def test_closed_handle_says_so(path: Path) -> None:
    handle = open_handle(path)
    handle.close()
    for use in (handle.fileno, handle.detach, handle.to_file, handle.to_socket, lambda: FdHandle.dup(handle)):
        with pytest.raises(ClosedError) as caught:
            use()
        assert caught.value.errno == errno.EBADF
        assert isinstance(caught.value, OSError)


def test_error_of_close_is_raised_and_the_number_forgotten(path: Path) -> None:
    handle = open_handle(path)
    os.close(handle.fileno())  # behind its back
    with pytest.raises(OSError, match="Bad file descriptor"):
        handle.close()
    assert handle.closed
    handle.close()


def test_context_manager_closes_after_an_exception(path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), open_handle(path) as handle:
        raise ZeroDivisionError
    assert handle.closed


def test_threads_that_close_at_the_same_time_close_once(path: Path) -> None:
    errors: list[BaseException] = []
    for _ in range(50):
        handle, start = open_handle(path), threading.Barrier(4)

        def close(handle: FdHandle = handle, start: threading.Barrier = start) -> None:
            start.wait(TIMEOUT)
            try:
                handle.close()
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    assert not errors


# dropped open ------------------------------------------------------------------------------------------------------------


def test_dropped_open_closes_with_a_warning(path: Path) -> None:
    handle = open_handle(path)
    number = handle.fileno()
    with pytest.warns(ResourceWarning, match=rf"unclosed <FdHandle fd={number} file>"):
        del handle
    assert not is_open(number)


def test_dropped_open_in_a_cycle_closes_with_a_warning(path: Path) -> None:
    cycle: list[Any] = [open_handle(path)]
    cycle.append(cycle)
    number = cycle[0].fileno()
    del cycle
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert not is_open(number)


def test_dropped_open_closes_where_the_warning_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        handle = open_handle(path)
        number = handle.fileno()
        del handle
    assert [type(error) for error in raised] == [ResourceWarning]
    assert not is_open(number)


@pytest.mark.parametrize(
    "spend",
    [
        FdHandle.close,
        lambda handle: os.close(handle.detach()),
        lambda handle: handle.to_file().close(),
        lambda handle: trip(move(handle)).close(),
    ],
    ids=["close", "detach", "to_file", "move"],
)
def test_spent_handle_is_dropped_in_silence(path: Path, spend: Callable[[FdHandle], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spend(open_handle(path))
        gc.collect()


def test_handle_that_was_never_made_is_dropped_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrong in (-1, "x", None):
            with contextlib.suppress(ValueError, TypeError):
                FdHandle(wrong)  # type: ignore[arg-type]
        FdHandle.__new__(FdHandle)
        gc.collect()


# duplicating -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["number", "file", "text", "handle"])
def test_duplicate_is_a_second_owner_of_one_description(path: Path, source: str) -> None:
    with open_handle(path) as handle, path.open("rb") as file, path.open() as text:
        original: Any = {"number": handle.fileno(), "file": file, "text": text, "handle": handle}[source]
        lender = handle if source == "number" else original
        with FdHandle.dup(original) as copy:
            assert copy.fileno() != lender.fileno()
            assert not os.get_inheritable(copy.fileno())
            assert same_description(copy, lender)
        assert is_open(lender.fileno())
        with FdHandle.dup(original) as copy:
            lender.close()
            assert os.pread(copy.fileno(), 3, 0) == b"012"


def test_duplicate_of_a_socket_and_a_channel() -> None:
    ours, theirs = socket.socketpair()
    here, there = Pipe()
    with ours, theirs, here, there:
        for thing in (ours, here):
            with FdHandle.dup(thing) as copy:
                assert copy.kind == "socket"
                assert os.path.sameopenfile(copy.fileno(), thing.fileno())


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (object(), TypeError),
        ("3", TypeError),
        (True, TypeError),
        (None, TypeError),
        (-1, ValueError),
        (10**6, OSError),
    ],
)
def test_what_cannot_be_duplicated(source: Any, error: type[Exception]) -> None:
    with leak_check(), pytest.raises(error):
        FdHandle.dup(source)


def test_closed_socket_cannot_be_duplicated() -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises(ValueError, match="invalid descriptor -1"):
        FdHandle.dup(closed)


def duplicate_at_the_limit() -> str:
    with open("/dev/null") as file:
        taken = [os.dup(file.fileno())]
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (taken[0] + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        try:
            FdHandle.dup(file)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            os.close(taken[0])
    return "no error"


def test_duplicate_at_the_descriptor_limit() -> None:
    assert checked_child(duplicate_at_the_limit) == "EMFILE"


# consuming -----------------------------------------------------------------------------------------------------------------


def test_detach_gives_the_number_away(path: Path) -> None:
    handle = open_handle(path)
    number = handle.detach()
    assert handle.closed
    handle.close()
    assert is_open(number)
    os.close(number)


@pytest.mark.parametrize(
    ("mode", "options", "kind"),
    [
        ("rb", {}, "BufferedReader"),
        ("wb", {}, "BufferedWriter"),
        ("ab", {}, "BufferedWriter"),
        ("r+b", {}, "BufferedRandom"),
        ("rb", {"buffering": 0}, "FileIO"),
        ("r", {}, "TextIOWrapper"),
        (
            "w",
            {"encoding": "utf-16", "errors": "replace", "newline": "\r\n", "buffering": 1},
            "TextIOWrapper",
        ),
        ("r", {"encoding": "locale"}, "TextIOWrapper"),
    ],
)
def test_to_file_as_open_would(path: Path, mode: str, options: dict[str, Any], kind: str) -> None:
    handle = open_handle(path)
    number = handle.fileno()
    with handle.to_file(mode, **options) as file:
        assert handle.closed
        assert type(file).__name__ == kind
        assert file.fileno() == number
        for name in ("encoding", "errors"):
            if options.get(name, "locale") != "locale":
                assert getattr(file, name) == options[name]
    assert not is_open(number)
    assert path.read_bytes() == b"0123456789\n"  # a descriptor is not truncated


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (["nonsense"], {}, ValueError),
        (["rw"], {}, ValueError),
        (["rb"], {"encoding": "utf-8"}, ValueError),
        (["r"], {"encoding": "no-such-encoding"}, LookupError),
        (["r"], {"errors": "no-such-handler"}, LookupError),
        (["r"], {"no_such_option": 1}, TypeError),
        ([5], {}, TypeError),
    ],
)
def test_to_file_that_fails_keeps_the_handle(
    path: Path, arguments: list[Any], options: dict[str, Any], error: type[Exception]
) -> None:
    with leak_check(closed=True), open_handle(path) as handle:
        with pytest.raises(error):
            handle.to_file(*arguments, **options)
        assert not handle.closed
        assert os.read(handle.fileno(), 3) == b"012"
        with handle.to_file() as file:
            assert file.read(3) == b"345"


def test_to_file_of_a_directory_keeps_the_handle(tmp_path: Path) -> None:
    (tmp_path / "inside").touch()
    with open_handle(tmp_path, os.O_RDONLY) as handle:
        with pytest.raises(IsADirectoryError):
            handle.to_file()
        assert os.listdir(handle.fileno()) == ["inside"]


@pytest.mark.parametrize(("mode", "options"), [("r+b", {}), ("r", {"buffering": 0})])
def test_to_file_that_closed_the_descriptor_spends_the_handle(mode: str, options: dict[str, Any]) -> None:
    """open() makes a file object first, and closes it where what comes above it does not fit."""
    reader, writer = os.pipe()
    os.close(writer)
    with leak_check():
        handle = FdHandle(reader)
        with pytest.raises((OSError, ValueError)):
            handle.to_file(mode, **options)
        assert handle.closed is not is_open(reader)
        handle.close()


def test_to_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        handle = FdHandle(theirs.detach())
        with handle.to_socket() as sock:
            assert handle.closed
            assert (sock.family, sock.type, sock.gettimeout()) == (ours.family, ours.type, None)
            sock.sendall(b"hello")
            assert ours.recv(10) == b"hello"
            with sock.makefile("rb"):  # counts its users, as one of socket's own making
                pass


def test_to_socket_of_a_nonblocking_one_says_so() -> None:
    """The description is what it is; a socket that said otherwise would raise BlockingIOError out of the blue."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.setblocking(False)
        with FdHandle(theirs.detach()).to_socket() as sock:
            assert sock.gettimeout() == 0.0
            assert not os.get_blocking(sock.fileno())
            with pytest.raises(BlockingIOError):
                sock.recv(1)


def test_to_socket_of_something_else_keeps_the_handle(path: Path) -> None:
    with leak_check(closed=True), open_handle(path) as handle:
        with pytest.raises(OSError, match=r"(?i)not a socket|non-socket") as caught:
            handle.to_socket()
        assert caught.value.errno == errno.ENOTSOCK
        assert os.read(handle.fileno(), 3) == b"012"


# kind, repr -------------------------------------------------------------------------------------------------------------


def make_epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def make_pty() -> int:
    master, slave = os.openpty()
    os.close(slave)
    return master


def make_fifo() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


KINDS: dict[str, Callable[[], int]] = {
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "socket": lambda: socket.socket().detach(),
    "pipe": make_fifo,
    "tty": make_pty,
    "device": lambda: os.open("/dev/null", os.O_RDWR),
    "memfd": lambda: os.memfd_create("x"),
    "eventfd": lambda: os.eventfd(0),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "epoll": make_epoll,
}
if hasattr(os, "timerfd_create"):  # Python 3.13
    KINDS["timerfd"] = lambda: os.timerfd_create(time.CLOCK_MONOTONIC)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_told_here_and_verified_there(kind: str) -> None:
    with FdHandle(KINDS[kind]()) as handle:
        assert handle.kind == kind
        assert repr(handle) == f"<FdHandle fd={handle.fileno()} {kind}>"
        with trip(handle) as received:
            assert type(received) is FdHandle
            assert received.kind == kind
            assert not os.get_inheritable(received.fileno())
        with trip([1, handle], "stream")[1] as received:
            assert received.kind == kind


def test_kind_is_remembered_after_close(path: Path) -> None:
    handle = open_handle(path)
    assert handle.kind == "file"
    handle.close()
    assert handle.kind == "file"
    assert repr(handle) == "<FdHandle closed>"


def test_kind_that_was_never_asked_for_is_gone_with_the_descriptor(path: Path) -> None:
    handle = open_handle(path)
    handle.close()
    with pytest.raises(ClosedError):
        _ = handle.kind


def test_repr_of_a_descriptor_closed_behind_its_back(path: Path) -> None:
    dangling = open_handle(path)
    number = dangling.fileno()
    os.close(number)
    assert repr(dangling) == f"<FdHandle fd={number} EBADF>"
    dangling.detach()


# fork --------------------------------------------------------------------------------------------------------------------


def test_after_a_fork_each_side_owns_its_own(path: Path) -> None:
    with open_handle(path) as handle:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                handle.close()
                status = 0 if handle.closed else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert os.read(handle.fileno(), 3) == b"012"


def test_before_a_fork_closed_is_closed_after_it(path: Path) -> None:
    handle = open_handle(path)
    handle.close()
    with open_handle(path) as successor:  # of the same number
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                handle.close()
                status = 0 if is_open(successor.fileno()) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
