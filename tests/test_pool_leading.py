"""The thread that waits for an answer reads it itself; whoever else has an interest is served all the same."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import operator
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fdshare
from fdshare import DecodeError, FdHandle, ProcessPoolExecutor, WorkerDiedError
from fdshare.pool.pool import STREAK
from tests import pool_tasks as tasks
from tests.helpers import wait_until

TIMEOUT = 30

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="a leader needs epoll")


def wait_in_a_row(pool: ProcessPoolExecutor) -> None:
    """Make the pool expect that the caller comes for the next answer."""
    for i in range(STREAK + 2):
        assert pool.submit(operator.neg, i).result(TIMEOUT) == -i
    assert pool._pool.streak >= STREAK


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        wait_in_a_row(executor)
        yield executor


def worker_of(pool: ProcessPoolExecutor) -> Any:
    (worker,) = pool._pool.workers.values()
    return worker


def answer_is_there(pool: ProcessPoolExecutor, future: Any) -> bool:
    """Wait until the worker has answered; on a busy machine the manager may have looked before us."""
    poll = select.poll()
    poll.register(worker_of(pool).channel.fileno(), select.POLLIN)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if poll.poll(10) or future._state == "FINISHED":
            return True
    return False


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run ``function`` in a thread; return what waits for its result."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 -- the caller gets it
            future.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> Any:
        try:
            return future.result(TIMEOUT)
        finally:
            thread.join()

    return finish


def wait_until_led(pool: ProcessPoolExecutor) -> None:
    wait_until(lambda: worker_of(pool).lead is not None)


# --- the leader ----------------------------------------------------------------------------------------------------------


def test_manager_sleeps_while_the_caller_waits(pool: ProcessPoolExecutor) -> None:
    manager = pool._executor_manager_thread
    assert manager is not None
    status = Path(f"/proc/self/task/{manager.native_id}/status")

    def switches() -> int:
        text = status.read_text()
        return int(text.rpartition("nonvoluntary_ctxt_switches:")[0].split("voluntary_ctxt_switches:")[1])

    before = switches()
    for i in range(200):
        assert pool.submit(operator.neg, i).result(TIMEOUT) == -i
    assert switches() - before < 20


def test_first_answer_is_led_too() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(tasks.pid).result(TIMEOUT)
        assert pool._pool.streak <= 1
        before = pool.stats()
        assert pool.submit(operator.neg, 4).result(TIMEOUT) == -4
        assert pool.stats().done == before.done + 1


@pytest.mark.parametrize("how", ["result", "exception"])
def test_exceptions_arrive_with_their_traceback(pool: ProcessPoolExecutor, how: str) -> None:
    future = pool.submit(tasks.fail, "on purpose")
    if how == "result":
        with pytest.raises(ValueError, match="on purpose") as caught:
            future.result(TIMEOUT)
        error: BaseException | None = caught.value
    else:
        error = future.exception(TIMEOUT)
    assert error is not None
    assert "in fail" in str(error.__cause__)
    assert pool.stats().failed == 1


def test_answers_of_every_size_and_kind(pool: ProcessPoolExecutor) -> None:
    for _ in range(3):
        wait_in_a_row(pool)
        assert pool.submit(tasks.doubled, np.ones(4_000_000)).result(TIMEOUT).sum() == 8_000_000
        wait_in_a_row(pool)
        assert len(pool.submit(tasks.large_result, 100_000).result(TIMEOUT)) == 100_000
        wait_in_a_row(pool)
        assert tasks.read_handle(pool.submit(tasks.pipe_with, b"x").result(TIMEOUT)) == b"x"
        assert [
            tasks.read_handle(handle) for handle in pool.submit(tasks.many_pipes, 300).result(TIMEOUT)
        ] == [b"%d" % i for i in range(300)]


def test_result_that_cannot_be_rebuilt(pool: ProcessPoolExecutor) -> None:
    for make in (tasks.RefusesToUnpickle, tasks.ExitsAtUnpickle):
        assert isinstance(pool.submit(tasks.make, make).exception(TIMEOUT), DecodeError)
        wait_in_a_row(pool)


def test_timeout_while_leading(pool: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 5)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0)
    os.write(writer, bytes(8))
    os.close(writer)
    assert future.result(TIMEOUT) == 5


def test_death_while_leading(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        pool.submit(tasks.crash, "SIGKILL").result(TIMEOUT)
    wait_in_a_row(pool)


# --- nobody came for the answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["done", "running", "wait", "as_completed", "result_0", "cancel"])
def test_answer_that_lies_unseen_is_found_at_a_look(pool: ProcessPoolExecutor, look: str) -> None:
    future = pool.submit(operator.neg, 5)
    assert answer_is_there(pool, future)
    if look == "done":
        assert future.done()
    elif look == "running":
        assert not future.running()
    elif look == "wait":
        assert concurrent.futures.wait([future], timeout=0).done == {future}
    elif look == "as_completed":
        assert list(concurrent.futures.as_completed([future], timeout=0)) == [future]
    elif look == "result_0":
        assert future.result(0) == -5
    else:
        assert not future.cancel()
    assert future.result(TIMEOUT) == -5


def test_answer_with_descriptors_that_lies_unseen(pool: ProcessPoolExecutor) -> None:
    future = pool.submit(tasks.pipe_with, b"x")
    assert answer_is_there(pool, future)
    assert future.done()
    assert tasks.read_handle(future.result(0)) == b"x"


def test_answer_that_lies_unseen_counts_as_done(pool: ProcessPoolExecutor) -> None:
    done = pool.stats().done
    assert answer_is_there(pool, pool.submit(operator.neg, 5))
    stats = pool.stats()
    assert (stats.running, stats.done) == (0, done + 1)


def test_callback_is_called_though_nobody_waits(pool: ProcessPoolExecutor) -> None:
    called = threading.Event()
    threads: list[str] = []

    def note(_: Any) -> None:
        threads.append(threading.current_thread().name)
        called.set()

    pool.submit(tasks.nap, 0.05).add_done_callback(note)
    assert called.wait(TIMEOUT)
    assert threads == ["fdshare-pool"]


def test_tasks_that_nobody_waits_for_do_not_hold_up_others(pool: ProcessPoolExecutor) -> None:
    futures = [pool.submit(operator.neg, i) for i in range(100)]
    assert futures[-1].result(TIMEOUT) == -99
    assert all(future.done() for future in futures)
    assert list(pool.map(operator.neg, range(50))) == [-i for i in range(50)]


@pytest.mark.parametrize("end", ["shutdown", "collected"])
def test_end_while_an_answer_lies_unseen(end: str) -> None:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    wait_in_a_row(pool)
    manager = pool._executor_manager_thread
    assert manager is not None
    future = pool.submit(operator.neg, 5)
    assert answer_is_there(pool, future)
    if end == "shutdown":
        pool.shutdown()
    else:
        gone = weakref.ref(pool)
        del pool
        gc.collect()
        assert gone() is None
        manager.join(TIMEOUT)
    assert not manager.is_alive()
    assert future.result(0) == -5


# --- others beside the leader -------------------------------------------------------------------------------------------


def test_many_threads_wait_for_one_future(pool: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 7)
    waiters = [in_thread(lambda: future.result(TIMEOUT))]
    wait_until_led(pool)
    waiters += [in_thread(lambda: future.result(TIMEOUT)) for _ in range(7)]
    os.write(writer, bytes(8))
    os.close(writer)
    assert [finish() for finish in waiters] == [7] * 8


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_many_threads_wait_for_their_own(workers: int) -> None:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:

        def work(first: int) -> list[int]:
            return [pool.submit(operator.neg, first + i).result(TIMEOUT) for i in range(150)]

        finishers = [in_thread(lambda first=first: work(first)) for first in range(0, 1000, 200)]  # type: ignore[misc]
        for first, finish in zip(range(0, 1000, 200), finishers, strict=True):
            assert finish() == [-(first + i) for i in range(150)]
        assert pool.stats().done == 750


def test_callback_beside_a_leader(pool: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 7)
    finish = in_thread(lambda: future.result(TIMEOUT))
    wait_until_led(pool)
    seen: list[Any] = []
    called = threading.Event()
    future.add_done_callback(lambda future: (seen.append(future.result()), called.set()))
    os.write(writer, bytes(8))
    os.close(writer)
    assert called.wait(TIMEOUT)
    assert (finish(), seen) == (7, [7])


def test_second_task_beside_a_leader(pool: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 7)
    finish = in_thread(lambda: future.result(TIMEOUT))
    wait_until_led(pool)
    other = pool.submit(operator.neg, 3)
    os.write(writer, bytes(8))
    os.close(writer)
    assert (other.result(TIMEOUT), finish()) == (-3, 7)


def test_cancelled_under_a_leader(pool: ProcessPoolExecutor) -> None:
    (pid,) = pool._processes
    os.kill(pid, signal.SIGSTOP)
    try:
        future = pool.submit(operator.neg, 3)
        finish = in_thread(lambda: future.result(TIMEOUT))
        wait_until_led(pool)
        assert future.cancel()
        with pytest.raises(CancelledError):
            finish()
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_in_a_row(pool)


@pytest.mark.parametrize("end", ["kill_workers", "shutdown"])
def test_end_under_a_leader(end: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        wait_in_a_row(pool)
        reader, writer = os.pipe()
        told, telling = os.pipe()
        future = pool.submit(
            tasks.tell_and_wait, fdshare.move(FdHandle(telling)), fdshare.move(FdHandle(reader))
        )
        os.read(told, 1)
        finish = in_thread(lambda: future.result(TIMEOUT))
        wait_until_led(pool)
        if end == "shutdown":
            pool.shutdown(wait=False)
            os.write(writer, bytes(8))
            assert finish() > 0
        else:
            pool.kill_workers()
            with pytest.raises(WorkerDiedError):
                finish()
        os.close(writer)
        os.close(told)


def test_fork_under_a_leader(pool: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 7)
    finish = in_thread(lambda: future.result(TIMEOUT))
    wait_until_led(pool)
    child = os.fork()
    if not child:
        code = 1
        try:
            future.result(0.01)
        except TimeoutError:
            code = 0  # as with the standard executor, nothing arrives here
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    os.write(writer, bytes(8))
    os.close(writer)
    assert finish() == 7


# --- signals --------------------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    """What the signal handler raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Set what SIGALRM does."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda function: signal.signal(signal.SIGALRM, lambda *_: function()) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_interrupts_lose_nothing(alarm: Callable[[Callable[[], Any]], None]) -> None:
    """An exception out of a signal handler, at any point of ``result``: the next call finds the answer."""
    armed = False
    draw = random.Random(5)

    def interrupt() -> None:
        if armed:
            raise Interrupt

    alarm(interrupt)
    interrupted = 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        wait_in_a_row_of_two = [pool.submit(operator.neg, i).result(TIMEOUT) for i in range(10)]
        assert wait_in_a_row_of_two == [-i for i in range(10)]
        for number in range(600):
            future = pool.submit(operator.neg, number)
            while True:
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 6e-5), 3e-5)
                    result = future.result(TIMEOUT)
                    armed = False
                    break
                except Interrupt:
                    armed = False
                    interrupted += 1
                    if draw.random() < 0.2:  # leave it to the manager
                        assert not concurrent.futures.wait([future], TIMEOUT).not_done
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert result == -number
        assert pool.stats().done == 610
    assert interrupted > 40


@pytest.mark.parametrize("what", ["same", "other", "wait", "shutdown"])
def test_handler_that_waits_in_the_leading_thread(
    pool: ProcessPoolExecutor, alarm: Callable[[Callable[[], Any]], None], what: str
) -> None:
    reader, writer = os.pipe()
    future = pool.submit(tasks.wait_for, fdshare.move(FdHandle(reader)), 7)
    seen: list[Any] = []

    def handle() -> None:
        os.write(writer, bytes(8))
        if what == "same":
            seen.append(future.result(TIMEOUT))
        elif what == "other":
            seen.append(pool.submit(operator.neg, 1).result(TIMEOUT))
        elif what == "wait":
            seen.append(len(concurrent.futures.wait([future], TIMEOUT).done))
        else:
            pool.shutdown()
            seen.append(future.done())

    alarm(handle)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    assert future.result(TIMEOUT) == 7
    os.close(writer)
    assert seen == [{"same": 7, "other": -1, "wait": 1, "shutdown": True}[what]]


def test_interpreter_exits_while_a_daemon_thread_leads(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, threading, fdshare\n"
        "from tests import pool_tasks as tasks\n"
        "if __name__ == '__main__':\n"
        "    pool = fdshare.ProcessPoolExecutor(1, multiprocessing.get_context('fork'))\n"
        "    for i in range(5):\n"
        "        pool.submit(tasks.pid).result()\n"
        "    future = pool.submit(tasks.nap, 0.2, 'done')\n"
        "    threading.Thread(target=future.result, daemon=True).start()\n"
        "    pool.submit(print, 'last', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "last\n", "")
