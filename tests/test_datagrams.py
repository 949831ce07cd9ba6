"""Credentials with each message, for sockets without connections."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest
from helpers import SOCKET_TYPES

import fdshare
from fdshare import PeerCredentials, ProtocolError, ask_credentials, recv_signed, send_signed
from fdshare.testing import Child, numbered_handle, read_number

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")
NOBODY = 65534


@pytest.fixture
def public() -> Iterator[str]:
    """The path of a socket that every user can reach."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="fdshare-test-") as name:
        os.chmod(name, 0o777)
        yield name + "/sock"


def become_nobody(*extra_groups: int) -> None:
    os.setgroups(extra_groups)
    os.setregid(NOBODY, NOBODY)
    os.setreuid(NOBODY, NOBODY)


@pytest.fixture(params=["dgram", "stream", "seqpacket"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    kind = {"dgram": socket.SOCK_DGRAM, **SOCKET_TYPES}[request.param]
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.settimeout(20)
    with ours, theirs:
        yield ours, theirs


@needs_linux
def test_signed_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ask_credentials(ours)
    with numbered_handle(5) as handle:
        assert send_signed(theirs, [b"da", b"ta"], [handle]) == 4
        assert send_signed(theirs, [b"bare"]) == 4
    data, handles, credentials, pidfd, address = recv_signed(ours, 4, 1)
    assert (data, pidfd, address) == (b"data", None, None)
    assert credentials == PeerCredentials(os.getpid(), os.geteuid(), os.getegid())
    assert read_number(handles[0]) == 5
    assert recv_signed(ours, 4)[:2] == (b"bare", [])


@needs_linux
def test_kernel_signs_what_its_sender_did_not(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(b"1")
    assert recv_signed(ours, 10).credentials is None  # nobody had asked
    ask_credentials(ours)
    theirs.send(b"2")
    found = recv_signed(ours, 10)
    assert found.credentials is not None
    assert (found.data, found.credentials.pid) == (b"2", os.getpid())


@needs_linux
def test_message_sent_before_anybody_asked() -> None:
    """The kernel makes it look as if nobody had sent it, which must not pass for the user nobody."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.send(b"early")
        ask_credentials(ours)
        assert recv_signed(ours, 10).credentials is None


@needs_linux
def test_datagrams_between_strangers(public: str) -> None:
    """Without a connection: each message says who sent it, from where, and with a pidfd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.settimeout(20)
        server.bind(public)
        os.chmod(public, 0o666)
        try:
            ask_credentials(server, pidfd=True)
        except OSError:
            pytest.skip("no SO_PASSPIDFD here")
        with Child(send_datagram, public, method="fork", unwanted=(server,)) as child:
            data, handles, credentials, pidfd, address = recv_signed(server, 100, 1)
            assert credentials is not None
            assert pidfd is not None
            with pidfd:
                assert pidfd.kind == "pidfd"
                assert not os.get_inheritable(pidfd.fileno())
            assert read_number(handles[0]) == 9
            assert (data, credentials.pid, address) == (b"who am I?", child.pid, public + ".client")
            assert credentials.uid == (NOBODY if os.geteuid() == 0 else os.geteuid())
            send_signed(server, [str(credentials.uid).encode()], address=address)
            assert child.result() == str(credentials.uid)


def send_datagram(path: str) -> str:
    if os.geteuid() == 0:
        become_nobody()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client, numbered_handle(9) as handle:
        client.settimeout(20)
        client.bind(path + ".client")
        if os.geteuid() == NOBODY:
            with pytest.raises(PermissionError):  # it cannot be somebody else
                send_signed(client, [b"x"], address=path, credentials=PeerCredentials(os.getpid(), 0, 0))
        send_signed(client, [b"who am I?"], [handle], address=path)
        return client.recv(100).decode()


@needs_linux
def test_signed_messages_that_are_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match="one byte"):
        send_signed(theirs, [b""])
    with numbered_handle(1) as handle:
        with pytest.raises(fdshare.MessageTooLargeError):
            send_signed(theirs, [b"x"], [handle] * 254)
        try:
            ask_credentials(ours, pidfd=True)
        except OSError:
            ask_credentials(ours)
        send_signed(theirs, [b"x"], [handle])
    with pytest.raises(ProtocolError, match="at most 0"):
        recv_signed(ours, 10)
    if ours.type != socket.SOCK_STREAM:
        send_signed(theirs, [b"xxx"])
        with pytest.raises(fdshare.MessageTooLargeError):
            recv_signed(ours, 2)


def test_no_credentials_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdshare import datagrams

    monkeypatch.setattr(datagrams, "_LINUX", False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for call in (lambda: ask_credentials(ours), lambda: send_signed(theirs, [b"x"])):
            with pytest.raises(OSError, match="Linux") as caught:
                call()
            assert caught.value.errno == errno.ENOPROTOOPT
