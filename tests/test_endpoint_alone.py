"""Listener and connect in a program of one thread, which takes shorter ways: in children, as pytest has threads of its own."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SOCKET_TYPES, TRANSPORTS

from fdshare import (
    AccessDeniedError,
    BytesCodec,
    ClosedError,
    FdHandle,
    FdLimitError,
    Listener,
    PeerClosedError,
    Pipe,
    ProtocolError,
    aio,
    connect,
    move,
    users,
)
from fdshare.blocking import other_threads
from fdshare.greeting import PICKLE_ANSWER
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, numbered_handle, read_number


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


def alone(function: Callable[..., object], *args: object) -> None:
    checked_child(in_one_thread, function, *args, method="forkserver", timeout=50.0)


def in_one_thread(function: Callable[..., object], *args: object) -> None:
    assert not other_threads()
    function(*args)


def both_sides(path: str, transport: str) -> None:
    with Listener(path, transport=transport) as listener:
        for number in range(3):
            with connect(path, transport=transport) as client:
                client.send(move(numbered_handle(number)))
                with listener.accept() as server:
                    assert server._transport.greeting is None
                    assert read_number(server.recv()) == number
                    server.send("first answer")
                    assert client.recv() == "first answer"
                    server.send(move(numbered_handle(number)))
                    assert read_number(client.recv()) == number


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_both_sides(path: str, transport: str) -> None:
    alone(both_sides, path, transport)


def descriptors_first(path: str, transport: str) -> None:
    """The first thing a client receives is a notice, and then a packet, and no hello."""
    with (
        Listener(path, transport=transport) as listener,
        connect(path, transport=transport) as client,
        listener.accept() as server,
    ):
        for number in range(3):
            server.send([move(numbered_handle(number))])
            assert read_number(client.recv()[0]) == number
        server.send("and then")
        assert client.recv(timeout=20) == "and then"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_descriptors_first(path: str, transport: str) -> None:
    alone(descriptors_first, path, transport)


def silent_client(path: str, transport: str) -> None:
    with (
        Listener(path, transport=transport) as listener,
        socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport]) as silent,
    ):
        silent.connect(path)
        with listener.accept() as server:
            assert silent.recv(1000) == PICKLE_ANSWER.ours.data
            silent.sendall(PICKLE_ANSWER.ours.data)
            assert not server.poll()
            silent.close()
            with pytest.raises(PeerClosedError):
                server.recv()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_silent_client(path: str, transport: str) -> None:
    alone(silent_client, path, transport)


def codecs_differ(path: str, transport: str) -> None:
    with Listener(path, transport=transport, codec=BytesCodec()) as listener:
        for first in (0, 1):
            with connect(path, transport=transport) as client, listener.accept() as server:
                client.send("a pickle")
                for end in ((client, server), (server, client))[first]:
                    with pytest.raises(ProtocolError, match="same codec"):
                        end.recv()
                    with pytest.raises(ClosedError):
                        end.recv()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_codecs_differ(path: str, transport: str) -> None:
    alone(codecs_differ, path, transport)


def refused_then_served(path: str, transport: str) -> None:
    answers = [False, True]
    with (
        Listener(path, transport=transport, allow=lambda peer: answers.pop(0)) as listener,
        connect(path, transport=transport) as refused,
        connect(path, transport=transport, allow=users(os.geteuid())) as welcome,
        listener.accept() as server,
    ):
        with pytest.raises(AccessDeniedError):
            refused.recv()
        welcome.send(1)
        assert server.recv() == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_refused_then_served(path: str, transport: str) -> None:
    alone(refused_then_served, path, transport)


def no_descriptor_left(path: str) -> None:
    import resource

    with Listener(path) as listener, connect(path) as client:
        client.send("patient")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_numbers()), hard))
        fillers = []
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError:
            pass
        try:
            with pytest.raises(FdLimitError, match="stays queued"):
                listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        with listener.accept() as server:
            assert server.recv() == "patient"


def test_no_descriptor_left(path: str) -> None:
    alone(no_descriptor_left, path)


def signals(path: str) -> None:
    """One that returns, one that raises, one whose handler uses the listener, one that closes it."""
    with Listener(path) as listener:
        did: list[int] = []

        def visit() -> None:
            with connect(path) as client:
                client.send(len(did))

        def interrupt() -> None:
            raise KeyboardInterrupt

        def accept_inside() -> None:
            visit()
            with listener.accept() as server:
                did.append(server.recv())
            visit()

        for action in (visit, interrupt, accept_inside, listener.close):
            signal.signal(signal.SIGALRM, lambda *_, action=action: action())
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            if action is interrupt:
                with pytest.raises(KeyboardInterrupt):
                    listener.accept()
            elif action == listener.close:
                with pytest.raises(ClosedError):
                    listener.accept()
            else:
                with listener.accept() as server:
                    assert server.recv() == len(did)
        assert did == [0]


def test_signals_while_accepting(path: str) -> None:
    alone(signals, path)


def never_blocks(path: str) -> None:
    """No accept may block for what others took; the flag is there from the start, and nobody's holds changes."""
    with Listener(path) as listener:
        assert not os.get_blocking(listener.fileno())
        near, far = Pipe()
        with near, far:
            near.send(listener)
            with far.recv() as copy, connect(path):
                copy.accept().close()
                assert copy._accept_now() is listener._accept_now() is None
        for timeout in (None, 20.0):
            with connect(path), listener.accept(timeout):
                pass
        assert not os.get_blocking(listener.fileno())


def test_no_accept_waits_in_the_kernel(path: str) -> None:
    alone(never_blocks, path)


def inherited_stays_as_it_is(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen()
        with Listener(FdHandle.dup(sock)) as listener:
            with connect(path), listener.accept(20.0):
                pass
            with pytest.raises(TimeoutError):
                listener.accept(0.0)
            assert listener._accept_now() is None
        aio.Listener(FdHandle.dup(sock)).close()
        assert os.get_blocking(sock.fileno())


def test_no_flag_of_a_listening_socket_that_others_hold_is_written(path: str) -> None:
    alone(inherited_stays_as_it_is, path)
