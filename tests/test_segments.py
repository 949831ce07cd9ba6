"""Segments that must not be trusted: whatever a wrong peer sends in their place is an error, never a signal or a stall."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

import pytest
from helpers import (
    LARGE,
    Piece,
    bare_pair,
    capture,
    close_pieces,
    inject,
)

import fdshare
from fdshare import (
    DecodeError,
    FdHandle,
    FdShareError,
    wire,
)
from fdshare.testing import checked_child, leak_check, pattern

MIB = 1 << 20


def a_large_message(transport: str) -> list[Piece]:
    """The pieces of a message with a segment of some 300 KB, as a channel sends them."""
    with bare_pair(transport) as (channel, bare):
        channel.send(bytearray(pattern(SIZE)))
        return capture(bare)


SIZE = LARGE + 12_345


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def temporary_file(size: int) -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


def silent_pipe(content: bytes = b"") -> int:
    """Both ends of a pipe in one descriptor: whoever waits for more waits for ever."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(f"{folder}/pipe")
        fd = os.open(f"{folder}/pipe", os.O_RDWR)
    if content:
        os.write(fd, content)
    return fd


FALSE_SEGMENTS: dict[str, Callable[[], int]] = {
    "unsealed": lambda: memfd(2 * MIB, 0),
    "only sealed against writing": lambda: memfd(2 * MIB, fcntl.F_SEAL_WRITE),
    "only sealed against shrinking": lambda: memfd(2 * MIB, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "short": lambda: memfd(SIZE // 2, ALL_SEALS),
    "empty": lambda: memfd(0, ALL_SEALS),
    "a file": lambda: temporary_file(2 * MIB),
    "a directory": lambda: os.open("/", os.O_RDONLY),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "a pipe at its end": lambda: one_of(os.pipe()),
    "a silent pipe": silent_pipe,
    "a pipe with too little": lambda: silent_pipe(b"x" * 1000),
    "a socket": lambda: one_of(tuple(s.detach() for s in socket.socketpair())),
    "write-only": lambda: os.open("/dev/null", os.O_WRONLY),
}


def one_of(fds: tuple[int, ...]) -> int:
    os.close(fds[1])
    return fds[0]


@pytest.mark.parametrize("what", FALSE_SEGMENTS)
def test_false_segment_is_refused(transport: str, segments: str, what: str) -> None:
    """It could be truncated under the receiver (SIGBUS), or is not what it is said to be, or never comes."""
    if segments in ("pipe", "file") and (what == "a file" or "sealed" in what):
        pytest.skip("a file needs no seals: it is copied, and nothing trusted")
    if segments == "lease" and what == "only sealed against shrinking":
        pytest.skip("that is what a lease is")
    pieces = a_large_message(transport)
    with leak_check(), bare_pair(transport) as (channel, bare):
        with FdHandle(FALSE_SEGMENTS[what]()) as false:
            inject(bare, [(data, [false.fileno()] if fds else []) for data, fds in pieces])
        with pytest.raises(DecodeError) as caught:
            channel.recv(timeout=5)
        del caught
        inject(bare, pieces)
        assert channel.recv(timeout=5) == pattern(SIZE)
    close_pieces(pieces)


@pytest.mark.parametrize("declared", ["memfd", "file"])
@pytest.mark.parametrize("size", [1 << 40, wire.MAX_SEGMENT])
def test_segment_too_large_for_this_process_is_an_error(transport: str, declared: str, size: int) -> None:
    """Sparse, so it costs its sender nothing; the receiver says so before it spends memory on it."""
    checked_child(_receive_sparse, transport, declared, size)


def _receive_sparse(transport: str, declared: str, size: int) -> None:
    try:
        if declared == "memfd":
            segment = memfd(size, ALL_SEALS)
        else:
            segment = temporary_file(size)
    except OSError as error:
        pytest.skip(f"no sparse file of {size} bytes here: {error}")
    # What the process may map is bounded, as in a container: reading it all would end in the out-of-memory killer.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    flags = wire.SEGMENT | wire.IN_SEGMENT | (wire.FILE if declared == "file" else 0)
    header = wire.pack(wire.MESSAGE, flags, payload_size=size, segment_size=size, nonce=1)
    with FdHandle(segment), bare_pair(transport) as (channel, bare):
        if transport == "seqpacket":
            inject(bare, [(wire.pack(wire.NOTICE, descriptors=1), []), (header, [segment])])
        else:
            inject(bare, [(header, []), (b"\x01", [segment])])
        with pytest.raises(FdShareError) as caught:
            channel.recv(timeout=20)
        del caught


@pytest.mark.usefixtures("only_files")
def test_truncated_file_segment_is_an_error_not_a_signal(transport: str) -> None:
    """A file's owner may shorten it after the receiver looked: it is read, never mapped."""
    pieces = a_large_message(transport)
    with bare_pair(transport) as (channel, bare):
        for _, fds in pieces:
            for fd in fds:
                os.ftruncate(fd, 1000)
        inject(bare, pieces)
        with pytest.raises(DecodeError):
            channel.recv(timeout=5)
    close_pieces(pieces)


def test_segment_that_is_missing_is_an_error(transport: str, segments: str) -> None:
    pieces = a_large_message(transport)
    close_pieces(pieces)
    with leak_check(), bare_pair(transport) as (channel, bare):
        inject(bare, [(data, []) for data, _ in pieces])
        with pytest.raises(FdShareError) as caught:
            channel.recv(timeout=5)
        del caught


def _under_a_limit_of_files(size: int) -> str:
    """Send ``size`` bytes twice, as in a flow, where files may have 1.5 MiB and the kernel kills who writes more."""
    sys.dont_write_bytecode = True  # what is imported under the limit may not be compiled yet
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, resource.RLIM_INFINITY))
    a, b = fdshare.Pipe()
    with a, b:
        try:
            for _ in range(2):
                a.send(bytes(size))
                assert len(b.recv()) == size
        except fdshare.NoSpaceError as error:
            return str(error)
        finally:
            a.send("next")
            assert b.recv() == "next"
    return ""


@pytest.mark.parametrize("size", [1 << 20, (5 << 18) + 5])
def test_messages_below_the_limit_of_files_arrive(size: int) -> None:
    """A recycled segment would be larger than the message, and over the limit."""
    assert checked_child(_under_a_limit_of_files, size) == ""


def test_a_message_over_the_limit_of_files_is_refused_by_its_name() -> None:
    assert "1572864 (RLIMIT_FSIZE" in checked_child(_under_a_limit_of_files, 2 << 20)


def _shared_things_under_a_limit_of_files() -> None:
    sys.dont_write_bytecode = True  # what is imported under the limit may not be compiled yet
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for make in (fdshare.Lock, lambda: fdshare.SharedMemory(2000)):
        with pytest.raises(OSError, match="RLIMIT_FSIZE"):
            make()


def test_shared_memory_and_locks_over_the_limit_of_files_are_refused_by_its_name() -> None:
    checked_child(_shared_things_under_a_limit_of_files)
