"""Sockets with files of ``makefile()``: what these have read ahead keeps the socket, what they have not written goes first."""

from __future__ import annotations

import contextlib
import gc
import http.client
import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from travel import TIMEOUT, refusal

from fdshare import NotSendableError, Pipe, ProcessPoolExecutor, Queue, TypedCodec, move
from tests import pool_tasks as tasks

MODES = [
    ("rb", -1),
    ("rb", 0),
    ("r", -1),
    ("wb", -1),
    ("wb", 0),
    ("w", -1),
    ("rwb", -1),
    ("rwb", 0),
    ("rw", -1),
]
READERS = [(mode, buffering) for mode, buffering in MODES if "r" in mode and buffering]


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = socket.socketpair()
    with client, server:
        client.settimeout(TIMEOUT)
        server.settimeout(TIMEOUT)
        yield client, server


def sent(obj: Any) -> Any:
    here, there = Pipe()
    with here, there:
        here.send(obj, timeout=TIMEOUT)
        return there.recv(timeout=TIMEOUT)


@pytest.mark.parametrize(("mode", "buffering"), MODES)
def test_files_are_closed_with_a_moved_socket(mode: str, buffering: int) -> None:
    with connected() as (client, server), server.makefile(mode, buffering) as file:  # type: ignore[call-overload]
        client.sendall(b"body")
        with sent(move(server)) as received:
            assert server.fileno() == -1
            assert file.closed or file.buffer.closed
            for call in ("read", "readline", "write"):
                with pytest.raises((ValueError, OSError)):
                    getattr(file, call)(*(["x" if "b" not in mode else b"x"] if call == "write" else []))
            assert received.recv(100) == b"body"
        assert client.recv(1) == b""  # nobody holds it any more


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("mode", "buffering"), READERS)
def test_socket_with_bytes_read_ahead_is_refused(mode: str, buffering: int, moved: bool) -> None:
    with connected() as (client, server), server.makefile(mode, buffering) as file:  # type: ignore[call-overload]
        client.sendall(b"POST\r\nbody\r\n")
        file.readline()
        for _ in range(2):
            error = refusal({"sock": move(server) if moved else server})
            assert error.path == "message['sock']"
            assert "bytes were read ahead" in str(error.reason)
        body = file.readline()
        assert (body if isinstance(body, bytes) else body.encode()).strip() == b"body"  # still the sender's
        client.sendall(b"rest")
        with sent(move(server) if moved else server) as received:
            assert received.recv(100) == b"rest"
        assert (server.fileno() == -1) is moved


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("mode", ["wb", "w", "rwb", "rw"])
def test_what_was_written_goes_first(mode: str, moved: bool) -> None:
    with connected() as (client, server), server.makefile(mode) as file:  # type: ignore[call-overload]
        file.write("first " if "b" not in mode else b"first ")
        with sent(move(server) if moved else server) as received:
            received.sendall(b"second")
            assert client.recv(100) == b"first second"


def test_socket_whose_writer_is_stuck_is_refused() -> None:
    with connected() as (client, server):
        server.setblocking(False)
        file = server.makefile("wb")
        with contextlib.suppress(BlockingIOError):
            server.send(b"x" * (1 << 24))
        with contextlib.suppress(BlockingIOError):
            server.send(b"x")
        file.write(b"unsent")
        assert "cannot be sent ahead" in str(refusal(server).reason)
        while True:
            with contextlib.suppress(BlockingIOError):
                file.close()
                break
            client.recv(1 << 20)


def test_several_files_of_one_socket_and_those_of_another() -> None:
    with connected() as (client, server), connected() as (_, other):
        files = [server.makefile("rb"), server.makefile("wb"), server.makefile("r")]
        with other.makefile("rb") as foreign:
            client.sendall(b"one\ntwo\n")
            files[0].readline()
            refusal(server)
            files[0].readline()
            with sent(move(server)):
                pass
            assert not foreign.closed
            assert client.recv(1) == b""
        for file in files:
            file.close()


def test_file_that_nobody_can_find_keeps_the_socket() -> None:
    """As in a program that freezes what its workers are to share."""
    with connected() as (_, server), server.makefile("rb"):
        gc.collect()
        gc.freeze()
        try:
            assert "out of reach" in str(refusal(move(server)).reason)
        finally:
            gc.unfreeze()
        with sent(move(server)):
            pass


@pytest.mark.parametrize("mode", ["rb", "r", "wb"])
def test_file_itself_is_refused_with_the_way_out(mode: str) -> None:
    with connected() as (client, server), server.makefile(mode) as file:  # type: ignore[call-overload]
        client.sendall(b"one\ntwo\n")
        if "r" in mode:
            file.readline()
        assert "send the socket" in str(refusal(file).reason)
        assert "send the socket" in str(refusal(move(file)).reason)


@attrs.frozen
class Given:
    sock: socket.socket


def test_typed_message() -> None:
    pytest.importorskip("msgspec", reason="msgspec is not installed")
    here, there = Pipe(codec=TypedCodec(Given))
    with here, there, connected() as (client, server), server.makefile("rb") as file:
        client.sendall(b"one\ntwo\n")
        file.readline()
        with pytest.raises(NotSendableError, match="4 bytes were read ahead"):
            here.send(move(Given(server)), timeout=TIMEOUT)
        assert file.readline() == b"two\n"
        here.send(move(Given(server)), timeout=TIMEOUT)
        assert server.fileno() == -1
        there.recv(timeout=TIMEOUT).sock.close()
        assert client.recv(1) == b""


def test_queue_and_pool() -> None:
    with Queue() as queue, connected() as (client, server), server.makefile("rb") as file:
        queue.put(move(server))
        assert file.closed
        with queue.get(TIMEOUT):
            pass
        assert client.recv(1) == b""
    with ProcessPoolExecutor(1) as pool:
        pool.submit(tasks.pid).result(TIMEOUT)  # a fork inherits what is open
        pass_on(pool)


def pass_on(pool: ProcessPoolExecutor) -> None:
    with connected() as (client, server), server.makefile("rb") as file:
        client.sendall(b"one\ntwo\n")
        file.readline()
        with pytest.raises(NotSendableError, match="read ahead"):
            pool.submit(tasks.say, move(server), b"!").result(TIMEOUT)
        file.readline()
        assert pool.submit(tasks.say, move(server), b"!").result(TIMEOUT) == 1
        assert client.recv(2) == b"!"
        assert client.recv(1) == b""


def test_connection_of_an_http_server() -> None:
    """Its handler has a file to read from, and one to write to."""
    here, there = Pipe()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            here.send(move((self.rfile.read(size), self.connection)))
            self.server.handed_over = self.rfile.closed  # type: ignore[attr-defined]

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with here, there, http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        client = http.client.HTTPConnection(*server.server_address[:2], timeout=TIMEOUT)  # type: ignore[misc]
        client.request("POST", "/", body=b"body")
        body, connection = there.recv(timeout=TIMEOUT)
        thread.join(TIMEOUT)
        assert server.handed_over  # type: ignore[attr-defined]
        with connection:
            assert body == b"body"
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nanswered")
        with contextlib.closing(client):
            assert client.getresponse().read() == b"answered"
