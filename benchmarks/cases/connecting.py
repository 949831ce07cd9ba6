"""Named endpoints: from connect to the first message, and many connections that stay.

The first: seconds from the call of ``connect`` until the server has the first message in hand, both read from the one
monotonic clock of the machine; the server answers with its reading.  multiprocessing proves by a challenge each way
(``authkey``) what fdshare learns from the kernel, who the other is; without a key it checks nothing.  The second: as many
connections are made as there shall be, each with one message and its answer, and all of them are kept open to the end;
closing is not timed.
"""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.cases.support import End, need_descriptors
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_connect", "run_held"]

MESSAGE = ("resize", 48151, 0.75)
KEY = b"a shared secret"


class Endpoint(NamedTuple):
    """How one peer does it."""

    listen: Callable[[str], Any]
    connect: Callable[[str], End]


def _bare_listener(path: str) -> Any:
    from benchmarks.cases.bare import BareEnd

    class BareListener:
        def __init__(self) -> None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sock.bind(path)
            self._sock.listen(128)

        def accept(self) -> BareEnd:
            return BareEnd(self._sock.accept()[0])

        def close(self) -> None:
            self._sock.close()

    return BareListener()


def _bare_connect(path: str) -> Any:
    from benchmarks.cases.bare import BareEnd

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    return BareEnd(sock)


def _endpoint(peer: str) -> Endpoint:
    """Return how ``peer`` listens and connects; only what is measured gets imported."""
    if peer == "bare Python":
        return Endpoint(_bare_listener, _bare_connect)
    if peer == "fdshare":
        import fdshare

        return Endpoint(fdshare.Listener, fdshare.connect)
    from multiprocessing.connection import Client, Listener

    key = None if peer.endswith("without key") else KEY
    return Endpoint(
        lambda path: Listener(path, "AF_UNIX", backlog=128, authkey=key),
        lambda path: Client(path, "AF_UNIX", authkey=key),
    )


@contextmanager
def _served(peer: str, serve: Callable[[Any], None]) -> Iterator[Callable[[], End]]:
    """Run ``serve`` on a listener in a forked process and yield how to connect to it; a message of None ends it."""
    endpoint = _endpoint(peer)
    with tempfile.TemporaryDirectory(prefix="fdshare-bench-", dir="/tmp") as directory:
        path = os.path.join(directory, "sock")
        listener = endpoint.listen(path)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                serve(listener)
                status = 0
            except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the parent
                traceback.print_exc()
            finally:
                os._exit(status)
        try:
            yield lambda: endpoint.connect(path)
        finally:
            last = endpoint.connect(path)
            last.send(None)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            last.close()
            listener.close()
    if status:
        raise RuntimeError(f"the server ended with {status}")


def _answer_with_the_time(listener: Any) -> None:
    while True:
        channel = listener.accept()
        message = channel.recv()
        arrived = perf_counter()
        if message is None:
            return
        channel.send(arrived)
        channel.close()


def run_connect(peer: str, budget: float) -> Measurement:
    """Measure the seconds from connect to the first message at the server."""
    with _served(peer, _answer_with_the_time) as connect:

        def operate(n: int) -> float:
            took = 0.0
            for _ in range(n):
                start = perf_counter()
                channel = connect()
                channel.send(MESSAGE)
                took += channel.recv() - start
                channel.close()
            return took

        # Two thirds of each operation are not timed: the budget is for all of it.
        return Measurement(measure(operate, budget / 3))


def _answer_and_hold(listener: Any) -> None:
    held = []
    while True:
        channel = listener.accept()
        message = channel.recv()
        if message is None:
            return
        if message == "all":
            for other in held:
                other.close()
            held.clear()
            channel.send(message)
            channel.close()
            continue
        channel.send(message)
        held.append(channel)


def run_held(peer: str, budget: float, count: int) -> Measurement:
    """Measure the seconds for each of ``count`` connections that are all open in the end."""
    need_descriptors(count)
    with _served(peer, _answer_and_hold) as connect:

        def operate(n: int) -> float:
            took = 0.0
            for _ in range(n):
                held = []
                start = perf_counter()
                for _ in range(count):
                    channel = connect()
                    channel.send(MESSAGE)
                    channel.recv()
                    held.append(channel)
                took += perf_counter() - start
                for channel in held:
                    channel.close()
                last = connect()
                last.send("all")
                last.recv()
                last.close()
            return took

        seconds = measure(operate, budget)
    return Measurement([each / count for each in seconds])
