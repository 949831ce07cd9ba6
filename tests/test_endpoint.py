"""Listener and connect: who meets whom, how long anybody waits, and what becomes of a listener that is closed, forked or sent."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import resource
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    METHODS,
    QUICK_METHODS,
    SOCKET_TYPES,
    TRANSPORTS,
    compose,
    requires_seqpacket,
    requires_waiting_connect,
    running,
    verify,
    wait_until,
)

from fdshare import (
    Channel,
    ChannelSet,
    ClosedError,
    FdHandle,
    FdLimitError,
    Listener,
    PeerClosedError,
    Pipe,
    connect,
    move,
    wait,
)
from fdshare.greeting import PICKLE_ANSWER, say_hello
from fdshare.rights import open_numbers
from fdshare.testing import Child, checked_child, numbered_handle, read_number, room_for


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@contextlib.contextmanager
def connected(path: str, **options: Any) -> Iterator[tuple[Channel, Channel]]:
    """A client and its server side, made in one thread."""
    with Listener(path, **options) as listener:
        options.pop("allow", None)
        with connect(path, **options) as client, listener.accept() as server:
            yield client, server


# meeting


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_thread_does_both(path: str, transport: str) -> None:
    """connect returns before accept was called, and messages can be sent at once."""
    with Listener(path, transport=transport) as listener:
        assert (listener.address, listener.transport, listener.closed) == (path, transport, False)
        with connect(path, transport=transport) as client:
            with numbered_handle(7) as handle:
                client.send({"n": handle})
            with listener.accept() as server:
                assert read_number(server.recv()["n"]) == 7
                server.send("seen")
                assert client.recv() == "seen"
                assert client.transport == server.transport == transport
                assert client.peer == server.peer
                assert (server.peer.pid, server.peer.uid) == (os.getpid(), os.geteuid())
    assert listener.closed
    assert not os.path.exists(path)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("kind", ["small", "inline", "large", "one_fd", "many_fds", "bundle"])
def test_first_message_of_every_kind(path: str, transport: str, timeout: float | None, kind: str) -> None:
    with room_for(2000), connected(path, transport=transport) as ends:
        for near, far in (ends, ends[::-1]):
            message, handles = compose(5, kind)
            with running(functools.partial(near.send, message, timeout=20)):
                assert verify(far.recv(timeout=timeout)) == 5
            for handle in handles:
                handle.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("threaded", [False, True])
def test_first_message_is_bytes(path: str, transport: str, threaded: bool) -> None:
    with connected(path, transport=transport) as (client, server):
        stop = threading.Event()
        with running(*[lambda: stop.wait(20)] if threaded else []):
            client.send_bytes(b"one")
            assert server.recv_bytes() == b"one"
            server.send_bytes(b"two")
            assert client.recv_bytes() == b"two"
            stop.set()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_server_speaks_first_and_leaves(path: str, transport: str) -> None:
    """What it sent arrives, though the kernel tells the client of a reset: something it had sent was never read."""
    with Listener(path, transport=transport) as listener, connect(path, transport=transport) as client:
        client.send("never read")
        with listener.accept() as server:
            server.send("words")
            server.send("last words")
        assert client.recv(timeout=20) == "words"
        assert client.recv() == "last words"
        for _ in range(2):
            with pytest.raises(PeerClosedError):
                client.recv()


def slow_client(sock: socket.socket) -> Channel:
    """What ``connect`` returns, on a socket that was connected before: it says hello only now."""
    say_hello(sock, PICKLE_ANSWER.ours)
    channel = Channel(sock)
    channel._transport.greeting = PICKLE_ANSWER
    return channel


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_server_speaks_before_the_client_has_said_hello(path: str, transport: str) -> None:
    with Listener(path, transport=transport) as listener:
        late = socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport])
        late.connect(path)
        with listener.accept() as server:
            server.send("early")
            with slow_client(late) as client:
                assert client.recv() == "early"
                client.send("late")
                assert server.recv() == "late"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_hello_alone_is_nothing_to_receive(path: str, transport: str) -> None:
    """Neither side's; and the end of the connection is something."""
    with Listener(path, transport=transport) as listener:
        with socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport]) as silent:
            silent.connect(path)
            with listener.accept() as server:
                assert not server.poll()
                assert wait([server], 0.0) == []
                with pytest.raises(TimeoutError):
                    server.recv(timeout=0.01)
                with slow_client(silent) as client:  # the server's hello has come to it
                    assert not client.poll(0.01)
                    assert not server.poll(0.01)
                assert server.poll(20)
                with pytest.raises(PeerClosedError):
                    server.recv()
        with connect(path, transport=transport) as client, listener.accept() as server:
            assert not server.poll()
            assert not client.poll()
            client.send(1)
            assert server.poll()
            assert server.recv() == 1


def test_timeouts_of_accept(path: str) -> None:
    with Listener(path) as listener:
        for timeout in (0.0, 0.01, -1.0):
            with pytest.raises(TimeoutError):
                listener.accept(timeout)
        with connect(path), listener.accept(0.0), connect(path), listener.accept(20):
            pass


def test_iterating_until_another_thread_closes(path: str) -> None:
    with Listener(path) as listener:

        def visit() -> None:
            for number in range(3):
                with connect(path) as client:
                    client.send(number)
                    client.recv()
            listener.close()

        with running(visit):
            seen = []
            for channel in listener:
                with channel:
                    seen.append(channel.recv())
                    channel.send(None)
        assert seen == [0, 1, 2]
        with pytest.raises(ClosedError):
            listener.accept()


def test_two_threads_accept_and_close_wakes_both(path: str) -> None:
    served = []
    with Listener(path) as listener:

        def serve() -> None:
            for channel in listener:
                with channel:
                    served.append(channel.recv())
                    channel.send(None)

        with running(serve, serve):
            for number in range(50):
                with connect(path) as client:
                    client.send(number)
                    client.recv()
            listener.close()
    assert sorted(served) == list(range(50))


def test_descriptor_in_selectors_and_sets(path: str) -> None:
    with Listener(path) as listener, selectors.DefaultSelector() as selector, ChannelSet([listener]) as many:
        selector.register(listener, selectors.EVENT_READ)
        assert selector.select(0) == wait([listener], 0) == many.select(0) == []
        with connect(path):
            assert [key.fileobj for key, _ in selector.select(20)] == [listener]
            assert wait([listener]) == many.select(20) == [listener]
            listener.accept().close()
    with pytest.raises(ClosedError):
        listener.fileno()
    listener.close()


# who is slow


@requires_seqpacket
def test_a_thousand_silent_clients_delay_nobody(path: str) -> None:
    """They are accepted, and then it is for their handlers how long to wait."""
    with room_for(2300), contextlib.ExitStack() as stack, Listener(path) as listener:
        for _ in range(1000):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            silent.connect(path)
            stack.enter_context(listener.accept(timeout=0.0))
        with connect(path) as client:
            client.send("the 1,001st")
            with listener.accept(timeout=0.0) as server:
                assert server.recv(timeout=0.0) == "the 1,001st"


def fill(path: str, stack: contextlib.ExitStack) -> None:
    """Connect until the backlog has no room."""
    with contextlib.suppress(TimeoutError):
        while True:
            stack.enter_context(connect(path, timeout=0.0))


@requires_waiting_connect
def test_full_backlog(path: str) -> None:
    with contextlib.ExitStack() as stack, Listener(path, backlog=1) as listener:
        fill(path, stack)
        with pytest.raises(TimeoutError, match="backlog"):
            connect(path, timeout=0.05)
        timeouts = (20, None, 2**31, 1e300, math.inf)  # the kernel counts in 31 bits where a long has 32
        with running(
            *(lambda timeout=timeout: connect(path, timeout=timeout).close() for timeout in timeouts)
        ):  # type: ignore[misc]
            for _ in timeouts:
                listener.accept(20).close()


@requires_waiting_connect
def test_signals_while_the_backlog_is_full(path: str) -> None:
    """A handler that returns changes nothing; one that raises ends the wait, and nothing is left of it."""
    ticks = []
    armed = False

    def tick(*_: object) -> None:
        nonlocal armed
        ticks.append(1)
        if armed:
            armed = False
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack, Listener(path, backlog=1) as listener:
        fill(path, stack)
        before = signal.signal(signal.SIGALRM, tick)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            with pytest.raises(TimeoutError):
                connect(path, timeout=0.1)
            assert ticks
            seen = len(ticks)

            def make_room() -> None:
                wait_until(lambda: len(ticks) > seen + 3)
                listener.accept(20).close()

            with running(make_room), connect(path) as client:
                client.send("let in")
                fill(path, stack)
                with pytest.raises(KeyboardInterrupt):
                    armed = True
                    connect(path)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_keyboard_interrupt_while_accepting(path: str, timeout: float | None) -> None:
    with Listener(path) as listener:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt):
                listener.accept(timeout)
        finally:
            signal.signal(signal.SIGALRM, before)
        with connect(path) as client, listener.accept() as server:
            client.send(1)
            assert server.recv() == 1


@pytest.mark.parametrize("left", range(1, 3))
def test_no_descriptor_left_for_a_listener(path: str, left: int) -> None:
    """That is what the error says, however far it has come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Listener(path).close()  # what is loaded late is loaded
    fillers: list[FdHandle] = []
    with contextlib.ExitStack() as filler:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_numbers()) + 5, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(filler.enter_context(FdHandle(os.dup(0))))
            for _ in range(left):
                fillers.pop().close()
            with pytest.raises(OSError, match="Too many open files"):
                Listener(path).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Listener(path), connect(path):
        pass


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_no_descriptor_left_for_a_connection(path: str, timeout: float | None) -> None:
    """The connection stays queued, and accept gives it once there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Listener(path) as listener, connect(path) as client:
        client.send("patient")
        highest = max(open_numbers())
        with contextlib.ExitStack() as filler:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        filler.enter_context(FdHandle(os.dup(0)))
                for _ in range(2):
                    with pytest.raises(FdLimitError, match="stays queued") as caught:
                        listener.accept(timeout)
                    assert (caught.value.errno, caught.value.needed) == (errno.EMFILE, 1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with listener.accept(timeout) as server:
            assert server.recv() == "patient"


# what says what to do


def test_nobody_listens(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="start the listener first"):
        connect(path)
    with pytest.raises(FileNotFoundError, match=r"start the listener first.*" + "x" * 200):
        connect(tmp_path / ("x" * 200))
    Path(path).write_text("text")
    with pytest.raises(ConnectionRefusedError, match="no socket"):
        connect(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    with pytest.raises(ConnectionRefusedError, match=r"has ended.*sock"):
        connect(path)


@requires_seqpacket
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_another_type_of_socket(path: str, transport: str) -> None:
    other = {"seqpacket": "stream", "stream": "seqpacket"}[transport]
    with (
        Listener(path, transport=transport),
        pytest.raises(OSError, match=f"transport='{transport}'") as caught,
    ):
        connect(path, transport=other)
    assert caught.value.errno == errno.EPROTOTYPE


@pytest.mark.parametrize("address", ["", "a\0b", "\0", "\0" + "x" * 108])
def test_bad_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"abstract|empty"):
        Listener(address)
    with pytest.raises(ValueError, match=r"abstract|empty"):
        connect(address)


def test_bad_options(path: str) -> None:
    with pytest.raises(ValueError, match="transport"):
        Listener(path, transport="tcp")
    with pytest.raises(ValueError, match="transport"):
        connect(path, transport="tcp")
    with pytest.raises(ValueError, match="mode"):
        Listener(path, mode=0o1777)
    with pytest.raises(TypeError):
        Listener(None)  # type: ignore[arg-type]  # the point


def test_address_forms(tmp_path: Path) -> None:
    for address in (tmp_path / "p", os.fsencode(tmp_path / "b"), str(tmp_path / "s")):
        with Listener(address) as listener, connect(address) as client, listener.accept() as server:
            assert listener.address == os.fsdecode(address)
            client.send(1)
            assert server.recv() == 1


def test_listener_dropped_open(path: str) -> None:
    listeners = [Listener(path)]
    with pytest.warns(ResourceWarning, match="unclosed <Listener"):
        listeners.clear()
    assert not os.path.exists(path)


@requires_seqpacket
def test_repr(path: str) -> None:
    with Listener(path) as listener:
        assert repr(listener) == f"<Listener fd={listener.fileno()} seqpacket {path!r}>"
    assert repr(listener) == f"<Listener closed seqpacket {path!r}>"


# fork, and travelling


def accept_one(listener: Listener) -> int:
    """Serve one client, close the listener, return who the client was."""
    with listener, listener.accept(20) as server:
        server.send(server.recv() + 1)
        return server.peer.pid


def test_forked_listener(path: str) -> None:
    """Parent and child may both accept; the child's close leaves the file to its parent."""
    with Listener(path) as listener:
        with Child(accept_one, listener, method="fork") as child:
            with connect(path) as client:
                client.send(1)
                assert client.recv() == 2
            assert child.result() == os.getpid()
        with connect(path) as client, listener.accept() as server:
            client.send(5)
            assert server.recv() == 5


@pytest.mark.parametrize("method", METHODS)
def test_listener_as_argument_of_a_process(path: str, method: str) -> None:
    with Listener(path) as listener, Child(accept_one, listener, method=method) as child:
        with connect(path) as client:
            client.send(1)
            assert client.recv() == 2
        assert child.result() == os.getpid()
        assert os.path.exists(path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_listener_in_a_message(path: str, transport: str) -> None:
    near, far = Pipe()
    with near, far, Listener(path, transport=transport) as listener:
        near.send([listener, listener])
        first, second = far.recv()
        assert first is second
        assert (first.address, first.transport) == (path, transport)
        with connect(path, transport=transport) as client, first, first.accept() as server:
            client.send(1)
            assert server.recv() == 1
        assert os.path.exists(path)  # a copy does not remove it


def accept_two(listener: Listener) -> int:
    return sum(accept_and_add(listener) for _ in range(2))


def accept_and_add(listener: Listener) -> int:
    with listener.accept() as server:
        return int(server.recv())


def test_parent_stops_waiting_in_the_kernel_while_its_child_does(path: str) -> None:
    with Listener(path) as listener, Child(accept_two, listener, method="fork") as child:
        with connect(path) as client:
            client.send(1)
        with contextlib.suppress(TimeoutError):
            listener.accept(0.0).close()  # which is the child's, but for luck
            with connect(path) as client:
                client.send(1)
        with connect(path) as client:
            client.send(2)
            assert child.result() == 3


def test_moved_listener_takes_the_file_along(path: str) -> None:
    near, far = Pipe()
    with near, far:
        listener = Listener(path)
        near.send(move(listener))
        assert listener.closed
        with far.recv() as moved:
            assert os.path.exists(path)
            connect(path).close()
            moved.accept().close()
        assert not os.path.exists(path)


def echo(channel: Channel) -> None:
    with channel:
        for message in channel:
            channel.send(message)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_accepted_channel_goes_to_a_worker(path: str, transport: str, method: str) -> None:
    """Before its hello has come, which is the worker's to take."""
    with Listener(path, transport=transport) as listener:
        late = socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport])
        late.connect(path)
        server = listener.accept()
        with Child(echo, server, method=method, unwanted=(late,)) as child, slow_client(late) as client:
            server.close()
            for number in range(3):
                client.send(number)
                assert client.recv(timeout=20) == number
            client.close()
            child.result()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_client_channel_travels_before_it_was_answered(path: str, transport: str) -> None:
    with Listener(path, transport=transport) as listener:
        client = connect(path, transport=transport)
        with Child(echo, client, method="spawn") as child, listener.accept() as server:
            client.close()
            server.send("ping")
            assert server.recv(timeout=30) == "ping"
            server.close()
            child.result()


@requires_seqpacket
def test_forked_reader_may_have_taken_the_hello(path: str) -> None:
    """Both hold one end; whoever reads second finds a message where a hello was expected."""
    with Listener(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        late.connect(path)
        with listener.accept() as server, slow_client(late.dup()) as client:
            client.send("to the child")
            assert checked_child(server_recv, server, method="fork") == "to the child"
            client.send("to the parent")
            assert server.recv(timeout=20) == "to the parent"


def server_recv(server: Channel) -> Any:
    with server:
        return server.recv(timeout=20)
