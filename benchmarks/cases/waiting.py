"""Waiting for one ready channel among many: ``ChannelSet`` against ``multiprocessing.connection.wait``.

N connected pairs are open and one small message is queued on one of them.  Only the wait itself is timed; the message is
taken off outside the clock.  The other ends live in a second process, for their number would not fit in one; a few,
spread evenly, stay here to write to.  "selectors" is a ``DefaultSelector`` on multiprocessing's connections, kept between
waits: what a careful user would write by hand.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

from benchmarks.cases.support import need_descriptors, pipe_of
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_wait"]

WRITERS = 10
"""How many channels are written to in turn."""

BATCH = 200
"""Descriptors in one hand-over to the holder: below what the kernel takes at once (253)."""


@contextmanager
def _holder() -> Iterator[Callable[[list[int]], None]]:
    """Yield a function that hands descriptors to a process which only keeps them open."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            while there.recvmsg(1, socket.CMSG_SPACE(BATCH * 4))[0]:
                there.send(b"k")
        finally:
            os._exit(0)
    there.close()

    def hold(fds: list[int]) -> None:
        socket.send_fds(here, [b"f"], fds)
        here.recv(1)

    try:
        yield hold
    finally:
        here.close()
        os.waitpid(pid, 0)


def run_wait(peer: str, budget: float, *, count: int) -> Measurement:
    """Measure one wait among ``count`` channels."""
    need_descriptors(count + BATCH)
    with ExitStack() as stack:
        hold = stack.enter_context(_holder())
        readers, writers = _open_pairs(peer, count, hold, stack)
        wait = _waiter(peer, readers, stack)

        def operate(n: int) -> float:
            total = 0.0
            for i in range(n):
                writers[i % len(writers)].send(i)
                start = perf_counter()
                ready = wait()
                total += perf_counter() - start
                (reader,) = ready
                if reader.recv() != i:
                    raise RuntimeError("the wrong channel was reported ready")
            return total

        return Measurement(measure(operate, budget))


def _open_pairs(
    peer: str, count: int, hold: Callable[[list[int]], None], stack: ExitStack
) -> tuple[list[Any], list[Any]]:
    readers, writers = [], []
    away: list[Any] = []
    every = max(1, count // WRITERS)
    for i in range(count):
        reader, writer = pipe_of(peer)
        stack.callback(reader.close)
        readers.append(reader)
        if i % every == every // 2:
            stack.callback(writer.close)
            writers.append(writer)
        else:
            away.append(writer)
        if len(away) == BATCH or (away and i == count - 1):
            hold([end.fileno() for end in away])
            for end in away:
                end.close()
            away.clear()
    return readers, writers


def _waiter(peer: str, readers: list[Any], stack: ExitStack) -> Callable[[], list[Any]]:
    if peer == "fdshare":
        import fdshare

        channels = fdshare.ChannelSet()
        if hasattr(channels, "close"):
            stack.callback(channels.close)
        for reader in readers:
            channels.add(reader)
        return lambda: list(channels.select(None))
    if peer == "selectors":
        selector = stack.enter_context(selectors.DefaultSelector())
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ)
        return lambda: [key.fileobj for key, _events in selector.select()]
    from multiprocessing.connection import wait

    return lambda: wait(readers)
