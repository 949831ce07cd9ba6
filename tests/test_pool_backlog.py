"""The bound on the memory of large arguments: who waits for it, and who must not."""

from __future__ import annotations

import asyncio
import multiprocessing
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import fdshare
from fdshare import FdHandle, ProcessPoolExecutor
from tests import pool_tasks as tasks
from tests.helpers import wait_until

TIMEOUT = 30
MIB = 1 << 20


def large(mebibytes: int = 1) -> Any:
    return np.ones(mebibytes * MIB, "u1")


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    """A pool with one worker and room for one array and a half."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), max_inflight=MIB + MIB // 2) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        yield executor


class Gate:
    """Holds tasks back until it is opened."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        self.reader = FdHandle(reader)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        os.write(self.writer, bytes(64))
        os.close(self.writer)
        self.reader.close()


def beside(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call ``function`` in a thread; return what waits for its outcome."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 -- the caller gets it
            outcome.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> Any:
        try:
            return outcome.result(TIMEOUT)
        finally:
            thread.join()

    return finish


def wait_until_held_up(pool: ProcessPoolExecutor, count: int = 1) -> None:
    wait_until(lambda: len(pool._pool._held_up) == count)


@pytest.mark.parametrize("bound", [0, -1])
def test_bound_is_checked(bound: int) -> None:
    with pytest.raises(ValueError, match="max_inflight"):
        ProcessPoolExecutor(1, max_inflight=bound)


def test_submit_waits_until_a_task_is_done(pool: ProcessPoolExecutor) -> None:
    with Gate() as gate:
        # One more than there are workers goes past the bound, so that no worker waits.
        futures = [pool.submit(tasks.wait_for, gate.reader, large()) for _ in range(2)]
        later = [beside(lambda: pool.submit(operator.length_hint, large())) for _ in range(3)]
        wait_until_held_up(pool, 3)
        small = pool.submit(operator.neg, 1)  # is not held up
    assert small.result(TIMEOUT) == -1
    assert [len(future.result(TIMEOUT)) for future in futures] == [MIB] * 2
    assert [finish().result(TIMEOUT) for finish in later] == [MIB] * 3
    assert (pool._pool.load, pool._pool.loads) == (0, 0)


def test_map_takes_no_more_than_the_bound() -> None:
    most = 0

    def arrays() -> Iterator[Any]:
        nonlocal most
        for _ in range(60):
            most = max(most, pool._pool.load)
            yield large(2)

    with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), max_inflight=8 * MIB) as pool:
        # Slower than the arrays are made, on a busy machine too.
        assert list(pool.map(lambda array: time.sleep(0.005) or len(array), arrays())) == [2 * MIB] * 60
        assert 4 * MIB < most <= 8 * MIB + 1000


def test_no_bound_at_all() -> None:
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), max_inflight=None) as pool,
        Gate() as gate,
    ):
        pool.submit(tasks.wait_for, gate.reader)
        for _ in range(20):
            pool.submit(operator.length_hint, large())
        assert pool._pool.load >= 20 * MIB


def test_cancelled_and_failed_tasks_make_room(pool: ProcessPoolExecutor) -> None:
    with Gate() as gate:
        told, telling = os.pipe()
        pool.submit(tasks.tell_and_wait, fdshare.move(FdHandle(telling)), gate.reader)
        os.read(told, 1)
        os.close(told)
        futures = [pool.submit(operator.length_hint, large()) for _ in range(2)]
        finish = beside(lambda: pool.submit(operator.length_hint, large()))
        wait_until_held_up(pool)
        assert futures[0].cancel()
        assert futures[1].cancel()
        future = finish()
    assert future.result(TIMEOUT) == MIB
    with pytest.raises(fdshare.NotSendableError):
        pool.submit(operator.truth, (large(), threading.Lock())).result(TIMEOUT)
    assert pool._pool.load == 0


def test_death_makes_room(pool: ProcessPoolExecutor) -> None:
    for _ in range(5):
        with pytest.raises(fdshare.WorkerDiedError):
            pool.submit(tasks.crash, "_exit", large()).result(TIMEOUT)
    assert pool._pool.load == 0


def test_callbacks_do_not_wait(pool: ProcessPoolExecutor) -> None:
    futures: list[Any] = []
    called = threading.Event()

    def submit_many(_: Any) -> None:
        futures.extend(pool.submit(operator.length_hint, large()) for _ in range(8))
        called.set()

    pool.submit(tasks.nap, 0.02).add_done_callback(submit_many)
    assert called.wait(TIMEOUT)
    assert [future.result(TIMEOUT) for future in futures] == [MIB] * 8


def test_callback_that_needs_a_lock_of_the_one_who_submits(pool: ProcessPoolExecutor) -> None:
    lock = threading.RLock()  # a callback of what is done already is called here
    called = threading.Semaphore(0)

    def call_back(_: Any) -> None:
        with lock:
            called.release()

    with lock:
        futures = [pool.submit(operator.length_hint, large()) for _ in range(2)]
        for future in futures:
            future.add_done_callback(call_back)
        futures += [pool.submit(operator.length_hint, large()) for _ in range(4)]
    assert [future.result(TIMEOUT) for future in futures] == [MIB] * 6
    assert called.acquire(timeout=TIMEOUT)
    assert called.acquire(timeout=TIMEOUT)


def test_event_loops_do_not_wait(pool: ProcessPoolExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        with FdHandle(reader) as gate:
            blocked = loop.run_in_executor(pool, tasks.wait_for, gate)
            others = [loop.run_in_executor(pool, operator.length_hint, large()) for _ in range(6)]
            os.write(writer, bytes(8))  # what only this thread can do
            os.close(writer)
            await blocked
            return await asyncio.gather(*others)

    assert asyncio.run(main()) == [MIB] * 6


@pytest.mark.parametrize("end", ["shutdown", "kill_workers"])
def test_end_while_a_submit_waits(end: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), max_inflight=MIB) as pool:
        pool.submit(tasks.pid).result(TIMEOUT)
        with Gate() as gate:
            for _ in range(2):
                pool.submit(tasks.wait_for, gate.reader, large())
            finish = beside(lambda: pool.submit(operator.length_hint, large()))
            wait_until_held_up(pool)
            if end == "shutdown":
                pool.shutdown(wait=False)
            else:
                pool.kill_workers()
            with pytest.raises(RuntimeError, match="after shutdown"):
                finish()


def test_tasks_read_by_their_waiters_make_room(pool: ProcessPoolExecutor) -> None:
    array = large()
    for _ in range(10):
        assert pool.submit(operator.length_hint, array).result(TIMEOUT) == MIB
    assert (pool._pool.load, pool._pool.loads) == (0, 0)
