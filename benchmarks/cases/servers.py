"""Servers of several processes: who accepts, and what one slow worker does to everybody's clients.

Four workers answer one small HTTP request a connection.  The peers differ in how a connection reaches its worker:

================== ================================================================================================
fdshare            a master accepts and passes each connection to a worker that has nothing to do, over a Channel
shared socket      pre-forked: the workers accept on one listening socket
SO_REUSEPORT       each worker has a socket of its own, and the kernel picks one by a hash of the addresses
multiprocessing    as fdshare, over multiprocessing.Pipe
================== ================================================================================================

The client keeps eight connections under way.  "rate" is seconds a connection; "slow" is what a client waits while one of the
workers takes five milliseconds a request, at the median and at the 99th percentile of its connections.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.cases.support import End, pipe_of
from benchmarks.measure import measure
from benchmarks.model import Measurement, Skipped

__all__ = ["run_rate", "run_slow"]

WORKERS = 4
UNDER_WAY = 8
SLOW = 0.005
BATCH = 200
"""Connections of which a percentile is taken."""

BATCHES = 3
BACKLOG = 128

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


def serve(connection: socket.socket, pause: float) -> None:
    """Answer one request, and close."""
    with connection, suppress(OSError):
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            part = connection.recv(4096)
            if not part:
                return
            data += part
        if pause:
            time.sleep(pause)
        connection.sendall(ANSWER)


def accept_all(listener: socket.socket, pause: float) -> None:
    """Be a worker that accepts."""
    while True:
        serve(listener.accept()[0], pause)


def serve_all(end: End, pause: float) -> None:
    """Be a worker that is given connections, and says when it is done."""
    while True:
        serve(end.recv(), pause)
        end.send(None)


def dispatch(listener: socket.socket, ends: list[End], give: Callable[[End, socket.socket], None]) -> None:
    """Be the master: accept as long as a worker is idle, and give each connection to the one that has been idle longest."""
    poll = select.poll()
    by_number = {end.fileno(): end for end in ends}
    for number in by_number:
        poll.register(number, select.POLLIN)
    poll.register(listener, select.POLLIN)
    idle = list(ends)
    while True:
        for number, _ in poll.poll():
            if number in by_number:
                by_number[number].recv()
                idle.append(by_number[number])
                if len(idle) == 1:
                    poll.register(listener, select.POLLIN)
        while idle:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                break
            give(idle.pop(0), connection)
        if not idle:
            poll.unregister(listener)


def give_with_fdshare(end: Any, connection: socket.socket) -> None:
    import fdshare

    end.send(fdshare.move(connection))


def give_with_multiprocessing(end: Any, connection: socket.socket) -> None:
    end.send(connection)
    connection.close()


def listen(reuse_port: bool = False, port: int = 0) -> socket.socket:
    sock = socket.socket()
    if reuse_port:
        if not hasattr(socket, "SO_REUSEPORT"):
            raise Skipped("this system has no SO_REUSEPORT")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(BACKLOG)
    return sock


def fork(function: Callable[..., None], *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
    except (EOFError, ConnectionError):
        pass
    except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the parent
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


@contextmanager
def server(peer: str, pauses: list[float]) -> Iterator[tuple[str, int]]:
    """Run a server with one worker for each of ``pauses``, the seconds that it takes for a request; yield its address."""
    pids = []
    listener = listen(reuse_port=peer == "SO_REUSEPORT")
    address = listener.getsockname()
    opened: list[Any] = [listener]
    try:
        if peer == "SO_REUSEPORT":
            socks = [listener, *(listen(True, address[1]) for _ in pauses[1:])]
            opened += socks[1:]
            pids = [fork(accept_all, sock, pause) for sock, pause in zip(socks, pauses, strict=True)]
        elif peer == "shared socket":
            pids = [fork(accept_all, listener, pause) for pause in pauses]
        else:
            pairs = [pipe_of(peer) for _ in pauses]
            opened += [end for pair in pairs for end in pair]
            pids = [
                fork(partial(serve_all, there), pause)
                for (_, there), pause in zip(pairs, pauses, strict=True)
            ]
            listener.setblocking(False)
            give = give_with_fdshare if peer == "fdshare" else give_with_multiprocessing
            pids.append(fork(dispatch, listener, [here for here, _ in pairs], give))
        for thing in opened:
            thing.close()
        yield address
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def load(address: tuple[str, int], count: int) -> list[float]:
    """Make ``count`` connections, ``UNDER_WAY`` at a time; return how long each took, in seconds."""
    took: list[float] = []
    left = count
    with selectors.DefaultSelector() as selector:

        def begin() -> None:
            sock = socket.create_connection(address, 30)
            sock.sendall(REQUEST)
            selector.register(sock, selectors.EVENT_READ, perf_counter())

        for _ in range(min(UNDER_WAY, count)):
            begin()
            left -= 1
        while len(took) < count:
            for key, _ in selector.select():
                sock: Any = key.fileobj
                if sock.recv(4096):
                    continue  # the answer; the end comes too
                took.append(perf_counter() - key.data)
                selector.unregister(sock)
                sock.close()
                if left:
                    begin()
                    left -= 1
    return took


def run_rate(peer: str, budget: float) -> Measurement:
    """Measure the seconds a connection, with all workers alike."""
    with server(peer, [0.0] * WORKERS) as address:

        def operate(n: int) -> float:
            start = perf_counter()
            load(address, n)
            return perf_counter() - start

        return Measurement(measure(operate, budget))


def run_slow(peer: str, budget: float, *, percentile: int) -> Measurement:
    """Measure what a client waits while one worker is slow, in seconds, at a percentile."""
    with server(peer, [SLOW] + [0.0] * (WORKERS - 1)) as address:
        load(address, UNDER_WAY * 4)
        place = BATCH * percentile // 100 - 1
        return Measurement([sorted(load(address, BATCH))[place] for _ in range(BATCHES)])
