"""Bare SCM_RIGHTS: ``send_fds`` and ``recv_fds`` against C programs, in both directions and over both socket types."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from c_programs import TIMEOUT, CPrograms, compiled_programs
from unix_sockets import Pair, connected_pair, socket_kind, type_of

from fdshare import FdHandle, recv_fds, send_fds

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "compiled_programs",
    "connected_pair",
    "socket_kind",
]  # fixtures are found by their names in the module

TEXT = "one\ntwo\nthree\n"
CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(TEXT)
    return path


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A socket path that fits into the 108 (or 104) bytes of an AF_UNIX address."""
    with tempfile.TemporaryDirectory(prefix="fds") as directory:
        yield Path(directory) / "s"


def content(handle: FdHandle) -> str:
    with handle.to_file("r") as file:
        return str(file.read())


# one descriptor --------------------------------------------------------------------------------------------


def test_one_file_from_c(c_programs: CPrograms, pair: Pair, text_file: Path) -> None:
    ours, theirs = pair
    with c_programs.start("send_one", theirs, text_file) as peer:
        data, handles = recv_fds(ours, 16, 1)
        assert data == b"F"
        assert [handle.kind for handle in handles] == ["file"]
        assert content(handles[0]) == TEXT
        assert recv_fds(ours, 16, 1) == (b"", [])  # the program has ended
        peer.finish()


def test_one_file_to_c(c_programs: CPrograms, pair: Pair, text_file: Path) -> None:
    ours, theirs = pair
    with c_programs.start("recv_one", theirs) as peer, text_file.open() as file:
        assert send_fds(ours, [b"F"], [file]) == 1
        assert peer.finish() == (TEXT, "F")


def test_one_file_from_c_over_a_path(
    c_programs: CPrograms, kind: str, text_file: Path, short_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, type_of(kind)) as listener:
        listener.settimeout(TIMEOUT)
        listener.bind(str(short_path))
        listener.listen(1)
        with c_programs.start("send_one", f"connect:{kind}:{short_path}", text_file) as peer:
            accepted, _ = listener.accept()
            with accepted:
                data, (handle,) = recv_fds(accepted, 16, 1)
            assert (data, content(handle)) == (b"F", TEXT)
            peer.finish()


def test_one_file_to_c_over_a_path(
    c_programs: CPrograms, kind: str, text_file: Path, short_path: Path
) -> None:
    with c_programs.start("recv_one", f"listen:{kind}:{short_path}") as peer:
        peer.wait_for_line("listening")
        with socket.socket(socket.AF_UNIX, type_of(kind)) as sock, text_file.open() as file:
            sock.connect(str(short_path))
            assert send_fds(sock, [b"F"], [file]) == 1
        assert peer.finish() == (TEXT, "F")


def test_between_two_c_programs_and_back(c_programs: CPrograms, pair: Pair, text_file: Path) -> None:
    """A descriptor that came from one program goes on to another."""
    ours, theirs = pair
    with c_programs.start("send_one", theirs, text_file) as peer:
        data, (handle,) = recv_fds(ours, 16, 1)
        peer.finish()
    ours, theirs = socket.socketpair(socket.AF_UNIX, ours.type)
    with ours, handle, c_programs.start("recv_one", theirs) as peer:
        send_fds(ours, [data], [handle])
        assert not handle.closed  # sending duplicates
        assert peer.finish() == (TEXT, "F")


# many descriptors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "times"), [(1, 5), (3, 2), (100, 50), (253, 127)])
def test_many_files_from_c(
    c_programs: CPrograms, pair: Pair, tmp_path: Path, kind: str, batch: int, times: int
) -> None:
    ours, theirs = pair
    names = [tmp_path / name for name in ("a", "b")]
    for path in names:
        path.write_text(path.name)
    received: list[str] = []
    sizes: list[int] = []
    with c_programs.start("send_many", theirs, batch, times, *names) as peer:
        while True:
            data, handles = recv_fds(ours, 1, 253)
            if not data:
                break
            sizes.append(len(handles))
            assert data == bytes([len(handles)])  # the program's own count
            received += [content(handle) for handle in handles]
        peer.finish()
    assert received == ["a", "b"] * times
    full, rest = divmod(2 * times, batch)
    assert sizes == [batch] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("batches", [[1], [3], [253], [1, 0, 2], [253, 253, 1]])
def test_many_files_to_c(c_programs: CPrograms, pair: Pair, tmp_path: Path, batches: list[int]) -> None:
    ours, theirs = pair
    expected = ""
    with c_programs.start("recv_many", theirs) as peer:
        for number, count in enumerate(batches):
            handles = [handle_to(tmp_path, f"{number}.{i}\n") for i in range(count)]
            # The program takes a message at a time: on a stream each one ends where descriptors begin anew.
            assert send_fds(ours, [b"x" * (number + 1)], handles) == number + 1
            for handle in handles:
                handle.close()
            expected += "".join(f"{number}.{i}\n" for i in range(count))
        ours.close()
        out, _ = peer.finish()
    lines = out.splitlines(keepends=True)
    assert "".join(line for line in lines if "." in line) == expected
    counts = [tuple(map(int, line.split())) for line in lines if "." not in line]
    if ours.type == socket.SOCK_SEQPACKET:
        assert counts == [(number + 1, count) for number, count in enumerate(batches)]
    else:  # bytes without descriptors may be read together with their neighbours
        assert [count for _, count in counts if count] == [count for count in batches if count]
        assert sum(size for size, _ in counts) == sum(range(len(batches) + 1))


def handle_to(directory: Path, text: str) -> FdHandle:
    """Return a handle to a new file that holds ``text`` and has no name any more."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(text.encode())
        file.seek(0)
        return FdHandle.dup(file)


def test_every_kind_of_descriptor_to_c(c_programs: CPrograms, pair: Pair, text_file: Path) -> None:
    """Numbers, handles, files and sockets, in the order they were given."""
    ours, theirs = pair
    reader, writer = os.pipe()
    here, there = socket.socketpair()
    with (
        FdHandle(reader) as handle,
        open(writer, "wb") as pipe,
        here,
        there,
        text_file.open() as file,
        c_programs.start("recv_many", theirs) as peer,
    ):
        pipe.write(b"pipe\n")
        pipe.close()
        here.sendall(b"socket\n")
        here.close()
        assert send_fds(ours, [b"abc", bytearray(b"de"), memoryview(b"f")], [handle, there, file]) == 6
        assert send_fds(ours, [b"g"], [file.fileno()]) == 1
        ours.close()
        # The file is one description: what the first descriptor had read, the second does not read again.
        assert peer.finish()[0] == f"6 3\npipe\nsocket\n{TEXT}1 1\n"


# what is shared --------------------------------------------------------------------------------------------


def test_offset_shared_with_c_which_gives(c_programs: CPrograms, pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    path = tmp_path / "letters"
    path.write_bytes(b"abcdefghijklmnop")
    with c_programs.start("shared_offset", theirs, "give", path) as peer:
        _, (handle,) = recv_fds(ours, 1, 1)
        with handle:
            assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == 4
            assert os.read(handle.fileno(), 4) == b"efgh"
            ours.sendall(b"R")
            assert peer.finish()[0] == "give at 0: abcd\ngive at 8: ijkl\n"
            assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == 12  # the program moved our offset


def test_offset_shared_with_c_which_takes(c_programs: CPrograms, pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    path = tmp_path / "letters"
    path.write_bytes(b"abcdefghijklmnop")
    with c_programs.start("shared_offset", theirs, "take") as peer, path.open("rb", buffering=0) as file:
        assert file.read(4) == b"abcd"
        send_fds(ours, [b"F"], [file])
        assert recv_fds(ours, 1, 0) == (b"R", [])
        assert file.tell() == 8
        assert file.read(4) == b"ijkl"
        assert peer.finish()[0] == "take at 4: efgh\n"


# credentials -----------------------------------------------------------------------------------------------

needs_credentials = pytest.mark.skipif(
    not hasattr(socket, "SO_PASSCRED"), reason="no SO_PASSCRED on this system"
)


@needs_credentials
def test_credentials_from_c_by_the_standard_library(c_programs: CPrograms, pair: Pair) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with c_programs.start("credentials", theirs, "send") as peer:
        data, control, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(CREDENTIALS.size))
        out, _ = peer.finish()
    assert data == b"C"
    ((level, type_, value),) = control
    assert (level, type_) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    assert CREDENTIALS.unpack(value) == (peer.pid, os.getuid(), os.getgid())
    # A socketpair's peer is who made it: this process, for both ends.
    assert out == f"SO_PEERCRED {os.getpid()} {os.getuid()} {os.getgid()}\n"


@needs_credentials
@pytest.mark.parametrize("maxfds", [1, 2, 253])
def test_credentials_beside_a_descriptor_from_c(
    c_programs: CPrograms, pair: Pair, text_file: Path, maxfds: int
) -> None:
    """Credentials come first in the control buffer: they must not push the descriptor out of it."""
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with c_programs.start("credentials", theirs, "send", text_file) as peer:
        data, (handle,) = recv_fds(ours, 16, maxfds)
        assert (data, content(handle)) == (b"C", TEXT)
        peer.finish()


@needs_credentials
def test_credentials_without_a_descriptor_from_c(c_programs: CPrograms, pair: Pair) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with c_programs.start("credentials", theirs, "send") as peer:
        assert recv_fds(ours, 16, 4) == (b"C", [])
        peer.finish()


@needs_credentials
def test_credentials_beside_a_descriptor_to_c(c_programs: CPrograms, pair: Pair, text_file: Path) -> None:
    """Where the receiver asks for credentials the kernel adds them to what send_fds sends."""
    ours, theirs = pair
    with c_programs.start("credentials", theirs, "recv") as peer, text_file.open() as file:
        assert recv_fds(ours, 1, 0) == (b"R", [])  # it has asked for credentials
        send_fds(ours, [b"C"], [file])
        out, _ = peer.finish()
    me = f"{os.getpid()} {os.getuid()} {os.getgid()}"
    assert out == f"SO_PEERCRED {me}\nSCM_CREDENTIALS {me}\nSCM_RIGHTS 1\n{TEXT}"


@needs_credentials
def test_peer_credentials_over_a_path(c_programs: CPrograms, kind: str, short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, type_of(kind)) as listener:
        listener.settimeout(TIMEOUT)
        listener.bind(str(short_path))
        listener.listen(1)
        with c_programs.start("credentials", f"connect:{kind}:{short_path}", "send") as peer:
            accepted, _ = listener.accept()
            with accepted:
                value = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
                assert CREDENTIALS.unpack(value) == (peer.pid, os.getuid(), os.getgid())
                out, _ = peer.finish()
    assert out == f"SO_PEERCRED {os.getpid()} {os.getuid()} {os.getgid()}\n"
