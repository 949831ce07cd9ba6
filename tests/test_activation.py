"""Listening sockets that somebody else has made: given as they are, and handed over by a service manager."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SOCKET_TYPES, TRANSPORTS, requires_seqpacket

from fdshare import FdHandle, Listener, connect, listen_fds
from fdshare.rights import open_numbers


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@contextlib.contextmanager
def listening(path: str, kind: int = socket.SOCK_SEQPACKET) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(path)
        sock.listen(1)
        yield sock
        os.unlink(path)  # it was not removed by who has inherited it


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("form", ["socket", "handle", "number"])
def test_listening_socket_that_is_there_already(path: str, transport: str, form: str) -> None:
    with listening(path, SOCKET_TYPES[transport]) as made:
        given: Any = made.dup() if form == "socket" else FdHandle.dup(made)
        if form == "number":
            given = given.detach()
        with Listener(given) as listener, connect(path, transport=transport) as client:
            assert (listener.address, listener.transport) == (path, transport)
            client.send(1)
            with listener.accept() as server:
                assert server.recv() == 1


def test_what_is_no_listening_socket_stays(path: str) -> None:
    left, right = socket.socketpair()
    with left, right, socket.socket(socket.AF_INET) as inet, socket.socket(socket.AF_UNIX) as fresh:
        inet.listen()
        fresh.bind(path)
        for given in (left, inet, fresh):
            for form in (given, given.fileno()):
                with pytest.raises(ValueError, match="no listening AF_UNIX socket"):
                    Listener(form)
            assert given.fileno() >= 0
    with pytest.raises(OSError, match="Bad file"):
        Listener(left.dup().detach() + 500)


MANAGER = """
import fcntl, os, sys
first, second, program = sys.argv[1:]
copies = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in (first, second)]
for number, copy in zip((3, 4), copies):
    os.dup2(copy, number)
    os.close(copy)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", program])
"""

ACTIVATED = """
import os, sys, fdshare
handles = fdshare.listen_fds()
assert not [name for name in os.environ if name.startswith("LISTEN_")]
assert fdshare.listen_fds() == []
for name, handle in handles:
    assert not os.get_inheritable(handle.fileno())
(first, handle), *others = handles
for name, other in others:
    other.close()
print([name for name, _ in handles], flush=True)
with fdshare.Listener(handle) as listener, listener.accept(20) as channel:
    channel.send((listener.address, os.getpid()))
    channel.recv()
"""


@requires_seqpacket
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("main:spare", "['main', 'spare']"),
        ("one", "['unknown', 'unknown']"),
        (None, "['unknown', 'unknown']"),
    ],
)
def test_socket_activation(path: str, names: str | None, expected: str) -> None:
    """As systemd does it: the descriptors from 3 on, and the pid of who they are for."""
    environment = {**os.environ, "LISTEN_FDS": "2"}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    with listening(path) as made, socket.socket() as spare, connect(path) as client:
        assert client.peer.pid == os.getpid()
        numbers = [made.fileno(), spare.fileno()]
        command = [sys.executable, "-c", MANAGER, *map(str, numbers), ACTIVATED]
        with subprocess.Popen(command, env=environment, pass_fds=numbers, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline().decode().strip() == expected
            address, pid = client.recv(timeout=20)
            assert (address, pid) == (path, process.pid)
            # It listens in its own name now; who connected before saw the one before it.
            with connect(path) as late:
                assert late.peer.pid == process.pid
            client.send("done")
        assert process.returncode == 0


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "self", "LISTEN_FDS": "0"},
    ],
    ids=str,
)
def test_nothing_was_handed_over(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(os.getpid()) if value == "self" else value)
    assert listen_fds() == []
    assert "LISTEN_PID" not in os.environ


@pytest.mark.parametrize(
    ("count", "error"), [("-1", ValueError), ("x", ValueError), ("65537", ValueError), ("60000", OSError)]
)
def test_bad_activation(count: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    before = {fd: os.get_inheritable(fd) for fd in open_numbers() if _is_open(fd)}
    with pytest.raises(error):
        listen_fds()
    assert {fd: os.get_inheritable(fd) for fd in before} == before


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
