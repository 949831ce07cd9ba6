"""Process pools: tasks a second, latency, arrays and sockets, and the way to the first result.

Every peer runs the same functions of this module on workers forked (loky: started its own way) once before the
measurement.  Tasks: ``map`` with chunksize 1 on two workers, seconds a task.  Latency: one submit and its result.  Arrays: one
there, or one back.  Socket: one open TCP socket as argument; the standard pools need multiprocessing's reduction, which pickles
it as a token and connects back.  Start: from the constructor to the first result, and the end of the pool by itself.
Idle: the processor time that the pool's threads and processes take in a second without tasks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from time import perf_counter
from typing import Any, Protocol

from benchmarks.measure import measure
from benchmarks.model import Measurement, Skipped

__all__ = ["run_argument", "run_idle", "run_latency", "run_result", "run_socket", "run_start", "run_tasks"]


IDLE_SECONDS = 0.1
"""How long an idle pool is watched at a time."""

LEAST = 1e-9
"""Seconds that no processor time at all is counted as: a duration of zero is none."""


class Pool(Protocol):
    """What the peers have in common here."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run one task and wait for its result."""

    def map(self, function: Callable[..., Any], items: range) -> Iterator[Any]:
        """Run one task for each item."""


class _Futures:
    def __init__(self, executor: Any) -> None:
        self.executor = executor

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(function, *args).result()

    def map(self, function: Callable[..., Any], items: range) -> Iterator[Any]:
        results: Iterator[Any] = self.executor.map(function, items, chunksize=1)
        return results


class _Imap:
    def __init__(self, pool: Any, **options: Any) -> None:
        self.pool = pool
        self.options = options

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply(function, args)

    def map(self, function: Callable[..., Any], items: range) -> Iterator[Any]:
        results: Iterator[Any] = self.pool.imap(function, items, **self.options)
        return results


@contextmanager
def pool_of(peer: str, workers: int) -> Iterator[Pool]:
    """Yield a pool of ``peer``.

    Raises:
        Skipped: it is not installed.
    """
    fork = get_context("fork")
    if peer == "fdshare":
        import fdshare

        with fdshare.ProcessPoolExecutor(workers, fork) as executor:
            yield _Futures(executor)
    elif peer == "concurrent.futures":
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(workers, fork) as standard:
            yield _Futures(standard)
    elif peer == "multiprocessing.Pool":
        with fork.Pool(workers) as pool:
            yield _Imap(pool)
    elif peer == "loky":
        try:
            from loky import ProcessPoolExecutor as LokyExecutor
        except ImportError as error:
            raise Skipped("loky is not installed") from error
        with LokyExecutor(workers) as loky:
            yield _Futures(loky)
    else:
        try:
            from mpire import WorkerPool
        except ImportError as error:
            raise Skipped("mpire is not installed") from error
        with WorkerPool(workers, start_method="fork", keep_alive=True) as mpire:
            yield _Imap(mpire, chunk_size=1)


def same(value: Any) -> Any:
    """The smallest task."""
    return value


def size_of(value: Any) -> int:
    """Take something large."""
    return len(value)


def make(size: int) -> Any:
    """Return something large."""
    import numpy

    return numpy.ones(size, dtype="u1")


def peer_of(sock: socket.socket) -> int:
    """Take a socket and close it."""
    with sock:
        return sock.fileno()


def run_tasks(peer: str, budget: float) -> Measurement:
    """Measure the seconds a task of ``map`` with chunksize 1 on two workers."""
    with pool_of(peer, 2) as pool:
        for _ in pool.map(same, range(100)):
            pass

        def operate(n: int) -> float:
            start = perf_counter()
            count = sum(1 for _ in pool.map(same, range(n)))
            took = perf_counter() - start
            if count != n:
                raise RuntimeError(f"{n} tasks gave {count} results")
            return took

        return Measurement(measure(operate, budget))


def _calls(
    peer: str, budget: float, function: Callable[..., Any], argument: Callable[[], Any]
) -> Measurement:
    with pool_of(peer, 2) as pool:
        for _ in range(10):
            pool.call(function, argument())

        def operate(n: int) -> float:
            took = 0.0
            for _ in range(n):
                value = argument()
                start = perf_counter()
                pool.call(function, value)
                took += perf_counter() - start
            return took

        return Measurement(measure(operate, budget))


def run_latency(peer: str, budget: float) -> Measurement:
    """Measure one submit and its result, with the pool idle."""
    return _calls(peer, budget, same, lambda: 1)


def run_argument(peer: str, budget: float, *, size: int) -> Measurement:
    """Measure a task that takes an array of ``size`` bytes."""
    array = make(size)
    return _calls(peer, budget, size_of, lambda: array)


def run_result(peer: str, budget: float, *, size: int) -> Measurement:
    """Measure a task that returns an array of ``size`` bytes."""
    return _calls(peer, budget, make, lambda: size)


def run_socket(peer: str, budget: float) -> Measurement:
    """Measure a task that takes an open TCP socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return _calls(peer, budget, peer_of, lambda: sock)


def run_start(peer: str, budget: float, *, workers: int) -> Measurement:
    """Measure the time from the constructor to the first result."""

    def operate(n: int) -> float:
        took = 0.0
        for _ in range(n):
            start = perf_counter()
            with pool_of(peer, workers) as pool:
                pool.call(same, 1)
                took += perf_counter() - start
        return took

    return Measurement(measure(operate, budget))


def run_idle(peer: str, budget: float) -> Measurement:
    """Measure the processor seconds a second that an idle pool takes: all but the calling thread, which sleeps.

    Raises:
        Skipped: the system does not tell.
    """
    if not os.path.exists("/proc/thread-self/children"):
        raise Skipped("no /proc that tells of children and their processor time")
    with pool_of(peer, 2) as pool:
        for _ in pool.map(same, range(100)):
            pass
        time.sleep(IDLE_SECONDS)  # what the last task has left is done
        seconds = []
        for _ in range(max(2, round(budget / IDLE_SECONDS))):
            before, start = _processor_seconds(), perf_counter()
            time.sleep(IDLE_SECONDS)
            used = _processor_seconds() - before
            seconds.append(max(used, LEAST) / (perf_counter() - start))
        return Measurement(seconds)


def _processor_seconds() -> float:
    """Sum up what every other thread of this process and every descendant has used."""
    me = threading.get_native_id()
    used, pids = 0, [os.getpid()]
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                pids += map(int, children.read().split())
            if int(thread) != me:
                with open(f"/proc/{pid}/task/{thread}/schedstat") as schedstat:
                    used += int(schedstat.read().split()[0])
    return used / 1e9
