"""Sockets of every family at every stage, with their timeouts, and the Connections of multiprocessing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK_METHODS
from travel import TIMEOUT, refusal, trip

from fdshare import Channel, Pipe, move
from fdshare.testing import checked_child

FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6, "unix": socket.AF_UNIX}
TYPES = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
KINDS = [(f, t) for f in FAMILIES for t in TYPES if t != "seqpacket" or f == "unix"]
CONNECTING = [(f, t) for f, t in KINDS if t != "dgram"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


if not has_ipv6():
    KINDS = [kind for kind in KINDS if kind[0] != "inet6"]
    CONNECTING = [kind for kind in CONNECTING if kind[0] != "inet6"]


@pytest.fixture
def address(tmp_path: Path) -> Callable[[str], Any]:
    """An address to bind to, by family."""
    count = iter(range(100))

    def make(family: str) -> Any:
        # AF_UNIX paths are short, pytest's folders are not: relative to the working directory.
        return {"inet": ("127.0.0.1", 0), "inet6": ("::1", 0)}.get(
            family, os.path.relpath(tmp_path / f"s{next(count)}")
        )

    return make


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(family: str, kind: str) -> socket.socket:
    sock = socket.socket(FAMILIES[family], TYPES[kind])
    sock.settimeout(TIMEOUT)
    return sock


def described(sock: socket.socket) -> tuple[Any, ...]:
    return type(sock), sock.family, sock.type, sock.proto, sock.gettimeout()


def assert_alike(received: socket.socket, original: socket.socket) -> None:
    assert described(received) == described(original)
    assert received.fileno() != original.fileno()
    assert os.path.sameopenfile(received.fileno(), original.fileno())
    assert not received.get_inheritable()


# every family, every stage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_unbound_socket_is_bound_there(family: str, kind: str, transport: str, address: Any) -> None:
    with new(family, kind) as sock, trip(sock, transport) as received:
        assert_alike(received, sock)
        received.bind(address(family))
        assert sock.getsockname() == received.getsockname()  # one description


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_bound_socket_has_its_address(family: str, kind: str, address: Any) -> None:
    with new(family, kind) as sock:
        sock.bind(address(family))
        with trip(sock) as received:
            assert_alike(received, sock)
            assert received.getsockname() == sock.getsockname()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("family", "kind"), CONNECTING)
def test_listening_socket_accepts_there(family: str, kind: str, moved: bool, address: Any) -> None:
    with new(family, kind) as sock, new(family, kind) as client:
        sock.bind(address(family))
        sock.listen()
        name = sock.getsockname()
        client.connect(name)  # before it travels: the queue of connections is the description's
        with trip(move(sock) if moved else sock) as received:
            assert (sock.fileno() == -1) == moved
            server, _ = received.accept()
            with server:
                client.sendall(b"hello")
                assert server.recv(10) == b"hello"


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize(("family", "kind"), CONNECTING)
def test_connected_socket_goes_on(family: str, kind: str, end: str, address: Any) -> None:
    with new(family, kind) as listener, new(family, kind) as client:
        listener.bind(address(family))
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        server.settimeout(TIMEOUT)
        mine, other = (client, server) if end == "client" else (server, client)
        with server:
            other.sendall(b"sent before")  # what the kernel holds travels with it
            with trip(mine) as received:
                assert_alike(received, mine)
                assert received.getpeername() == mine.getpeername()
                assert received.recv(100) == b"sent before"
                received.sendall(b"answer")
                assert other.recv(100) == b"answer"
            other.sendall(b"still open")
            assert mine.recv(100) == b"still open"


@pytest.mark.parametrize("family", [family for family, kind in KINDS if kind == "dgram"])
def test_datagrams_wait_in_the_description(family: str, address: Any) -> None:
    with new(family, "dgram") as sock, new(family, "dgram") as sender:
        sock.bind(address(family))
        sender.sendto(b"one", sock.getsockname())
        sender.sendto(b"", sock.getsockname())
        with trip(sock) as received:
            assert received.recv(10) == b"one"
            assert received.recv(10) == b""


@pytest.mark.parametrize("kind", TYPES)
def test_socketpair(kind: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, TYPES[kind])
    with ours, trip(move(theirs)) as received:
        received.send(b"hello")
        assert ours.recv(10) == b"hello"


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR])
def test_half_closed_socket(how: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.shutdown(how)
        with trip(theirs) as received:
            if how == socket.SHUT_WR:
                with pytest.raises(BrokenPipeError):
                    received.send(b"x")
            else:
                assert received.recv(1) == b""


def test_socket_options_are_the_descriptions() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with trip(sock) as received:
            assert received.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0


def test_same_socket_twice_is_one_object() -> None:
    with socket.socket() as sock:
        first, deep = trip([sock, {"a": (sock,)}])
        assert first is deep["a"][0]
        first.close()


def test_closed_and_detached_sockets_are_refused() -> None:
    closed = socket.socket()
    closed.close()
    detached = socket.socket()
    fd = detached.detach()
    for sock in (closed, detached):
        error = refusal({"server": {"sock": sock}})
        assert error.path == "message['server']['sock']"
        assert error.type_name == "socket.socket"
        assert error.reason == "it is closed"
    os.close(fd)


def test_received_socket_can_make_files() -> None:
    ours, theirs = socket.socketpair()
    with ours, trip(move(theirs)) as received:
        with received.makefile("rw") as file:
            ours.sendall(b"line\n")
            assert file.readline() == "line\n"
        ours.sendall(b"x")
        assert received.recv(1) == b"x"
        file = received.makefile("rb")
        received.close()
        ours.sendall(b"y")
        assert file.read(1) == b"y"  # open as long as one of them is
        file.close()


# timeouts, O_NONBLOCK --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 0.0, 0.5, 30.0])
@pytest.mark.parametrize("stage", ["fresh", "listening", "connected"])
def test_timeout_is_kept_and_the_senders_flag_untouched(timeout: float | None, stage: str) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        sock = theirs if stage == "connected" else stack.enter_context(socket.socket())
        if stage == "listening":
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        sock.settimeout(timeout)
        before = os.get_blocking(sock.fileno())
        with trip(sock) as received:
            assert received.gettimeout() == sock.gettimeout() == timeout
            assert os.get_blocking(sock.fileno()) == before == (timeout is None)
        assert os.get_blocking(sock.fileno()) == before


def test_timeout_that_the_description_contradicts() -> None:
    """Somebody set O_NONBLOCK behind the socket: the flag is the truth, and receiving must not write it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.set_blocking(theirs.fileno(), False)
        assert theirs.gettimeout() is None
        with trip(theirs) as received:
            assert received.gettimeout() == 0.0
            assert not os.get_blocking(theirs.fileno())
        theirs.settimeout(5)
        os.set_blocking(theirs.fileno(), True)
        with trip(theirs) as received:
            assert received.gettimeout() is None
            assert os.get_blocking(theirs.fileno())


@pytest.mark.parametrize("timeout", [None, 0.0, 5.0])
def test_default_timeout_of_the_receiver_is_not_imposed(timeout: float | None) -> None:
    """Every new socket gets the default, and O_NONBLOCK with it: not so one that is only a copy."""
    ours, theirs = socket.socketpair()
    here, there = Pipe()
    with ours, theirs, here, there:
        theirs.settimeout(timeout)
        blocking = os.get_blocking(theirs.fileno())
        here.send(theirs)
        socket.setdefaulttimeout(7)
        try:
            received = there.recv()
        finally:
            socket.setdefaulttimeout(None)
        with received:
            assert received.gettimeout() == timeout
            assert received.type == socket.SOCK_STREAM
            assert os.get_blocking(theirs.fileno()) == blocking


def test_timeout_works_there() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0.01)
        with trip(theirs) as received, pytest.raises(TimeoutError):
            received.recv(1)


def answer(channel: Channel) -> None:
    with channel, channel.recv() as sock:
        sock.sendall(repr((sock.gettimeout(), sock.getsockname() == sock.getpeername())).encode())


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_socket_in_another_process(method: str) -> None:
    ours, theirs = socket.socketpair()
    here, there = Pipe()
    with ours, here, there:
        theirs.settimeout(3.5)
        here.send(move(theirs))
        checked_child(answer, there, method=method)
        ours.settimeout(TIMEOUT)
        assert ours.recv(100).startswith(b"(3.5, ")


# what belongs to sockets, and does not travel ---------------------------------------------------------------------------


def test_makefile_is_refused_with_the_way_out() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for mode, buffering in (("rb", 0), ("rb", -1), ("wb", -1), ("r", -1), ("w", -1)):
            with theirs.makefile(mode, buffering) as file:  # type: ignore[call-overload]
                error = refusal([file])
                assert "send the socket, and call makefile() there" in str(error)
                assert error.path is not None
                assert error.path.startswith("message[0]")
        with theirs.makefile("r") as text:
            ours.sendall(b"one\ntwo\n")
            assert text.readline() == "one\n"
            refusal(move(text))
            assert text.readline() == "two\n"


def test_tls_socket_is_refused_with_the_way_out() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        wrapped = ssl.create_default_context().wrap_socket(
            theirs, server_hostname="x", do_handshake_on_connect=False
        )
        with wrapped:
            error = refusal({"connections": [wrapped]})
            assert error.path == "message['connections'][0]"
            assert error.type_name == "ssl.SSLSocket"
            assert "before it is wrapped" in str(error)


class MySocket(socket.socket):
    """Something that a plain socket is not."""


def test_subclass_of_a_socket_never_becomes_a_plain_one() -> None:
    with MySocket() as sock:
        error = refusal(sock)
        assert error.path == "message"
        assert "subclass of socket" in str(error)
        assert "fdshare.register(MySocket" in str(error)


# connections of multiprocessing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplex", [True, False])
@pytest.mark.parametrize("moved", [False, True])
def test_connection(duplex: bool, moved: bool) -> None:
    reader, writer = multiprocessing.Pipe(duplex)
    with reader, writer:
        received_reader, received_writer = trip(move([reader, writer]) if moved else [reader, writer])
        with received_reader, received_writer:
            for received, original in ((received_reader, reader), (received_writer, writer)):
                assert type(received) is type(original)
                assert (received.readable, received.writable) == (original.readable, original.writable)
                assert original.closed == moved
            received_writer.send({"a": 1})
            assert received_reader.recv() == {"a": 1}


def test_closed_connection_is_refused() -> None:
    reader, writer = multiprocessing.Pipe()
    reader.close()
    writer.close()
    assert refusal([reader]).reason == "it is closed"
