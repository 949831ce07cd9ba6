"""Locks, semaphores, events and processes: what nobody waits for, and what others do.

``lock``, ``semaphore``: ``with`` around nothing, no other process wants it.
``lock-4``: four processes add one to a number in shared memory under the lock, all the time.
``event``: set one event, wait for another, which a second process sets when it has seen the first: there and back.
``process``: whether a child still runs, which multiprocessing asks by waitpid(2), as a child's parent can.

multiprocessing's are POSIX semaphores, taken in C without a system call; they know no holder and stay taken when one dies.
"""

from __future__ import annotations

import mmap
import os
import signal
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from benchmarks.cases.queues import COUNT, child, orders_of
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_alive", "run_contended", "run_event", "run_free"]

PROCESSES = 4


def _make(peer: str, name: str) -> Any:
    if peer == "fdshare":
        import fdshare

        return getattr(fdshare, name)()
    import multiprocessing

    return getattr(multiprocessing, name)()


def run_free(peer: str, budget: float, *, name: str) -> Measurement:
    """Measure taking and giving back what nobody else wants."""
    thing = _make(peer, name)

    def operate(n: int) -> float:
        start = perf_counter()
        for _ in range(n):
            with thing:
                pass
        return perf_counter() - start

    return Measurement(measure(operate, budget))


def run_contended(peer: str, budget: float) -> Measurement:
    """Measure the seconds an increment by four processes at once."""
    lock = _make(peer, "Lock")
    number = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def serve(orders: int, answers: int) -> None:
        for count in orders_of(orders):
            for _ in range(count):
                with lock:
                    number[0] += 1
            os.write(answers, b"d")

    with ExitStack() as stack:
        children = [stack.enter_context(child(serve)) for _ in range(PROCESSES)]

        def operate(n: int) -> float:
            share, before = -(-n // PROCESSES), number[0]
            start = perf_counter()
            for orders, _ in children:
                os.write(orders, COUNT.pack(share))
            for _, answers in children:
                os.read(answers, 1)
            took = perf_counter() - start
            if number[0] - before != share * PROCESSES:
                raise RuntimeError("the lock let two in at once")
            return took * n / (share * PROCESSES)

        return Measurement(measure(operate, budget))


def run_event(peer: str, budget: float) -> Measurement:
    """Measure an event there and one back."""
    there, back = _make(peer, "Event"), _make(peer, "Event")
    over = memoryview(mmap.mmap(-1, mmap.PAGESIZE))

    def answer(orders: int, answers: int) -> None:
        while True:
            there.wait()
            there.clear()
            if over[0]:
                return
            back.set()

    def operate(n: int) -> float:
        start = perf_counter()
        for _ in range(n):
            there.set()
            back.wait()
            back.clear()
        return perf_counter() - start

    with child(answer):
        try:
            return Measurement(measure(operate, budget))
        finally:
            over[0] = 1
            there.set()


def run_alive(peer: str, budget: float) -> Measurement:
    """Measure asking whether a process runs, which does."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    try:
        if peer == "fdshare":
            import fdshare

            handle = fdshare.ProcessHandle(process)

            def operate(n: int) -> float:
                start = perf_counter()
                for _ in range(n):
                    if not handle.alive:
                        raise RuntimeError("the child has ended")
                return perf_counter() - start
        else:

            def operate(n: int) -> float:
                start = perf_counter()
                for _ in range(n):
                    if not process.is_alive():
                        raise RuntimeError("the child has ended")
                return perf_counter() - start

        return Measurement(measure(operate, budget))
    finally:
        process.kill()
        process.join()
