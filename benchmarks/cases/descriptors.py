"""Messages that carry descriptors: sockets and single handles, and 5,000 at once.

A message with N open TCP sockets (or one plain descriptor) goes there; the receiver rebuilds the objects, checks how
many they are, closes them, and answers with a small message.  At 5,000 the receiver answers before it closes, and the
closing is timed by itself.  ``multiprocessing`` sends a socket by its own reduction (a thread in the sender to which the
receiver connects back).  It has nothing like a handle that is simply sent: against one ``FdHandle`` stands its message with
one socket, and beside it what its internals offer for a plain descriptor, ``DupFd`` and ``send_handle``/``recv_handle``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from operator import methodcaller
from time import perf_counter
from typing import Any

from benchmarks.cases.native import run_native
from benchmarks.cases.support import End, need_descriptors, pipe_of, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_handle", "run_many", "run_sockets"]

ANSWER_SIZE = 8


def _open_sockets(stack: ExitStack, count: int) -> list[socket.socket]:
    return [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]


def _round_trips(end: End, send: Callable[[], None], count: int) -> Callable[[int], float]:
    def operate(n: int) -> float:
        start = perf_counter()
        for _ in range(n):
            send()
            answer = end.recv()
        took = perf_counter() - start
        if answer != count:
            raise RuntimeError(f"{count} descriptors were sent and {answer} arrived")
        return took

    return operate


def run_sockets(peer: str, budget: float, *, count: int) -> Measurement:
    """Measure a message with ``count`` sockets, and a small answer."""
    need_descriptors(4 * count)  # the sender's, multiprocessing's duplicates of them, and those of the thread
    if peer == "C":
        return run_native("roundtrip", ANSWER_SIZE, count, budget)

    def serve(end: End) -> None:
        while True:
            sockets = end.recv()
            for sock in sockets:
                sock.close()
            end.send(len(sockets))

    def serve_one(end: End) -> None:
        while True:
            end.recv().close()
            end.send(1)

    with with_partner(pipe_of(peer), serve_one if count == 1 else serve) as end, ExitStack() as stack:
        sockets = _open_sockets(stack, count)
        message = sockets[0] if count == 1 else sockets
        return Measurement(measure(_round_trips(end, lambda: end.send(message), count), budget))


def run_handle(peer: str, budget: float) -> Measurement:
    """Measure a message with one plain descriptor (an ``FdHandle``, a ``DupFd``), and a small answer."""
    if peer in ("C", "multiprocessing"):
        return run_sockets(peer, budget, count=1)
    receive, sender = _handle_peers(peer)

    def serve(end: End) -> None:
        while True:
            receive(end)
            end.send(1)

    with with_partner(pipe_of(peer), serve) as end, open("/dev/null", "rb", buffering=0) as file:
        send, close = sender(end, os.dup(file.fileno()))
        try:
            return Measurement(measure(_round_trips(end, send, 1), budget))
        finally:
            close()


def _handle_peers(
    peer: str,
) -> tuple[Callable[[End], None], Callable[[Any, int], tuple[Callable[[], None], Any]]]:
    """Return (how the receiver takes and closes one, how to get the sender's (send, close) for an end and a number)."""
    if peer == "fdshare":
        import fdshare

        def receive(end: End) -> None:
            end.recv().close()

        def sender(end: Any, fd: int) -> tuple[Callable[[], None], Any]:
            handle = fdshare.FdHandle(fd)
            return lambda: end.send(handle), handle.close

        return receive, sender
    from multiprocessing import reduction

    if peer == "send_handle":

        def receive_raw(end: Any) -> None:
            os.close(reduction.recv_handle(end))

        def sender_raw(end: Any, fd: int) -> tuple[Callable[[], None], Any]:
            return lambda: reduction.send_handle(end, fd, 0), lambda: os.close(fd)

        return receive_raw, sender_raw

    def receive_dup(end: End) -> None:
        os.close(end.recv().detach())

    def sender_dup(end: Any, fd: int) -> tuple[Callable[[], None], Any]:
        return lambda: end.send(reduction.DupFd(fd)), lambda: os.close(fd)

    return receive_dup, sender_dup


def run_many(peer: str, budget: float, *, count: int) -> Measurement:
    """Measure one message with ``count`` plain descriptors: seconds a descriptor, with "close" apart."""
    need_descriptors(2 * count)
    if peer == "C":
        whole = run_native("separate", ANSWER_SIZE, count, budget)
        return Measurement(
            [took / count for took in whole.seconds],
            {"close": [took / count for took in whole.extra["close"]]},
        )

    close: Callable[[Any], None] = os.close if peer == "multiprocessing" else methodcaller("close")

    def serve(end: End) -> None:
        while True:
            things = end.recv()
            if close is os.close:
                things = [token.detach() for token in things]
            end.send(len(things))
            start = perf_counter()
            for thing in things:
                close(thing)
            end.send(perf_counter() - start)

    closings: list[float] = []
    with with_partner(pipe_of(peer), serve) as end, ExitStack() as stack:
        send = _many_sender(peer, end, stack, count)

        def operate(n: int) -> float:
            total = 0.0
            for _ in range(n):
                start = perf_counter()
                send()
                answer = end.recv()
                total += perf_counter() - start
                closings.append(end.recv())
            if answer != count:
                raise RuntimeError(f"{count} descriptors were sent and {answer} arrived")
            return total

        seconds = measure(operate, budget)
    return Measurement([took / count for took in seconds], {"close": [took / count for took in closings]})


def _many_sender(peer: str, end: End, stack: ExitStack, count: int) -> Callable[[], None]:
    if peer == "fdshare (sockets)":
        sockets = _open_sockets(stack, count)
        return lambda: end.send(sockets)
    if peer == "fdshare":
        import fdshare

        handles = [
            stack.enter_context(fdshare.FdHandle(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)))
            for _ in range(count)
        ]
        return lambda: end.send(handles)
    files = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]
    for fd in files:
        stack.callback(os.close, fd)
    from multiprocessing import reduction

    return lambda: end.send([reduction.DupFd(fd) for fd in files])
