"""Queues between processes, one item at a time: ``fdshare.Queue`` beside ``multiprocessing.Queue``.

``queue-1``, ``queue-4``: so many producers put small items while as many consumers get them, until the last one was taken;
the item is the message of the small messages.  A producer ends its share with a mark, a consumer that gets a mark stops, so
the last mark is behind the last item whatever the order.
``queue-answer``: one item there by one queue, and back by another.
``queue-socket``: as ``queue-1``, an item is a connected socket, which the consumer closes.
``queue-array``: as ``queue-1``, an item is an array of 1 MiB of random bytes.

"bare Python" is ``pickle``, ``send`` and ``recv`` on a SEQPACKET pair: no descriptors, and nothing that says what went wrong.
"""

from __future__ import annotations

import os
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

from benchmarks.cases.small import MESSAGE
from benchmarks.measure import measure
from benchmarks.model import Measurement, Skipped

__all__ = ["COUNT", "child", "orders_of", "run_answers", "run_arrays", "run_items", "run_sockets"]

MIB = 1 << 20
MARK = None
COUNT = struct.Struct("=Q")
"""An order to a child: how often."""


class _BareQueue:
    """The least that a queue on one pair of sockets costs in Python."""

    def __init__(self) -> None:
        import pickle

        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._dumps, self._loads = pickle.dumps, pickle.loads

    def put(self, obj: Any) -> None:
        self._writer.send(self._dumps(obj, 5))

    def get(self) -> Any:
        return self._loads(self._reader.recv(65536))


def _queue_of(peer: str) -> Any:
    if peer == "fdshare":
        import fdshare

        return fdshare.Queue()
    if peer == "bare Python":
        return _BareQueue()
    import multiprocessing

    return multiprocessing.Queue()


@contextmanager
def child(serve: Callable[[int, int], None]) -> Iterator[tuple[int, int]]:
    """Run ``serve`` in a forked process; yield where to write its orders and where to read its answers."""
    order_reader, order_writer = os.pipe()
    answer_reader, answer_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(order_writer)
            os.close(answer_reader)
            serve(order_reader, answer_writer)
            status = 0
        except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the parent
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(order_reader)
    os.close(answer_writer)
    try:
        yield order_writer, answer_reader
    finally:
        os.close(order_writer)
        os.close(answer_reader)
        os.waitpid(pid, 0)


def orders_of(reader: int) -> Iterator[int]:
    """Yield the orders that come until the parent closes."""
    while order := os.read(reader, COUNT.size):
        yield COUNT.unpack(order)[0]


def _run(
    peer: str, budget: float, sides: int, make: Callable[[], Any], take: Callable[[Any], None]
) -> Measurement:
    queue = _queue_of(peer)

    def produce(orders: int, answers: int) -> None:
        put = queue.put
        for count in orders_of(orders):
            item = make()
            for _ in range(count):
                put(item)
            put(MARK)

    def consume(orders: int, answers: int) -> None:
        get = queue.get
        for _ in orders_of(orders):
            while (item := get()) is not MARK:
                take(item)
            os.write(answers, b"d")

    with ExitStack() as stack:
        consumers = [stack.enter_context(child(consume)) for _ in range(sides)]
        producers = [stack.enter_context(child(produce)) for _ in range(sides)]

        def operate(n: int) -> float:
            share = -(-n // sides)
            start = perf_counter()
            for orders, _ in consumers + producers:
                os.write(orders, COUNT.pack(share))
            for _, answers in consumers:
                if os.read(answers, 1) != b"d":
                    raise RuntimeError("a consumer has ended")
            return (perf_counter() - start) * n / (share * sides)

        return Measurement(measure(operate, budget))


def run_items(peer: str, budget: float, *, sides: int) -> Measurement:
    """Measure the seconds an item, ``sides`` producers and as many consumers."""
    return _run(peer, budget, sides, lambda: MESSAGE, lambda item: None)


def run_sockets(peer: str, budget: float) -> Measurement:
    """Measure the seconds a socket from one producer to one consumer."""
    pairs = []

    def make() -> socket.socket:
        pairs.append(socket.socketpair())
        return pairs[-1][0]

    return _run(peer, budget, 1, make, lambda item: item.close())


def run_arrays(peer: str, budget: float) -> Measurement:
    """Measure the seconds an array of 1 MiB from one producer to one consumer, which reads a byte of each page."""
    try:
        import numpy as np
    except ImportError:
        raise Skipped("needs NumPy") from None
    content = np.frombuffer(os.urandom(MIB), dtype=np.uint8)
    return _run(peer, budget, 1, lambda: content, lambda item: item[::4096].sum())


def run_answers(peer: str, budget: float) -> Measurement:
    """Measure an item there and back."""
    there, back = _queue_of(peer), _queue_of(peer)

    def answer(orders: int, answers: int) -> None:
        while (item := there.get()) is not MARK:
            back.put(item)

    with child(answer):

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                there.put(MESSAGE)
                back.get()
            return perf_counter() - start

        try:
            return Measurement(measure(operate, budget))
        finally:
            there.put(MARK)
