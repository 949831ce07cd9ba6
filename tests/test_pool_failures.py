"""What goes wrong in a pool stays with the task it happened to: dead workers, limits, what cannot be pickled or rebuilt."""

from __future__ import annotations

import contextlib
import copyreg
import logging
import math
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import fdshare
from fdshare import (
    DecodeError,
    FdHandle,
    FdLimitError,
    NotSendableError,
    ProcessPoolExecutor,
    TaskTimeoutError,
    WorkerDiedError,
)
from fdshare.testing import room_for
from tests import pool_tasks as tasks
from tests.helpers import METHODS, QUICK_METHODS, limit_for, wait_until

TIMEOUT = 30

EXITS = {"SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV, "_exit": 7}


@contextlib.contextmanager
def pool_of(workers: int, method: str = "fork", **keywords: Any) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method), **keywords) as executor:
        executor.submit(tasks.pid).result(
            TIMEOUT
        )  # a fork inherits what is open: do it before the test opens anything
        yield executor


class Gate:
    """Holds tasks back until it is opened; tells how many have come to it."""

    def __init__(self) -> None:
        self.reader, self.writer = map(FdHandle, os.pipe())
        self.told, self.telling = map(FdHandle, os.pipe())

    def arguments(self) -> tuple[FdHandle, FdHandle]:
        return self.telling, self.reader

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert os.read(self.told.fileno(), 1) == b"!"

    def open(self) -> None:
        os.write(self.writer.fileno(), bytes(64))

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in (self.reader, self.writer, self.told, self.telling):
            handle.close()


# --- workers that die ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("manner", EXITS)
def test_death_fails_only_the_running_task(method: str, manner: str) -> None:
    with pool_of(2, method) as executor:
        handles = [tasks.pipe_with(b"%d" % i) for i in range(40)]
        futures: list[Any] = [
            executor.submit(tasks.read_handle, fdshare.move(handle)) for handle in handles[:20]
        ]
        doomed = executor.submit(tasks.crash, manner)
        futures += [executor.submit(tasks.read_handle, fdshare.move(handle)) for handle in handles[20:]]
        with pytest.raises(WorkerDiedError) as caught:
            doomed.result(TIMEOUT)
        assert [future.result(TIMEOUT) for future in futures] == [b"%d" % i for i in range(40)]
        assert caught.value.exitcode == EXITS[manner]
        assert caught.value.pid not in executor._processes
        wait_until(lambda: executor.stats().restarts == 1 and len(executor._processes) == 2)
        assert executor.stats().failed == 1


def test_death_of_an_idle_worker_loses_nothing() -> None:
    with pool_of(1) as executor:
        for _ in range(5):
            (process,) = executor._processes.values()
            os.kill(process.pid, signal.SIGKILL)
            assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
            wait_until(lambda process=process: process.pid not in executor._processes)  # type: ignore[misc]


def test_death_of_a_worker_runs_its_inbox_elsewhere_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pool_of(1) as executor, Gate() as gate:
        blocked = executor.submit(tasks.tell_and_wait, *gate.arguments())
        futures = [executor.submit(tasks.log_run, str(log), i) for i in range(10)]
        gate.wait()
        (pid,) = executor._processes
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            blocked.result(TIMEOUT)
        assert [future.result(TIMEOUT) for future in futures] == list(range(10))
    assert log.read_text().split() == [str(i) for i in range(10)]


def test_death_during_map_is_the_error_at_its_place() -> None:
    with pool_of(2) as executor:
        results = executor.map(
            tasks.run_one, [(operator.neg, i) if i != 20 else (os._exit, 1) for i in range(40)]
        )
        assert [next(results) for _ in range(20)] == [-i for i in range(20)]
        with pytest.raises(WorkerDiedError):
            next(results)


def test_death_before_ready_breaks_the_pool_in_the_end() -> None:
    with ProcessPoolExecutor(2, initializer=tasks.dying_initializer) as executor:
        futures = [executor.submit(operator.neg, i) for i in range(5)]
        for future in futures:
            with pytest.raises(BrokenProcessPool):
                future.result(TIMEOUT)
        with pytest.raises(BrokenProcessPool, match="before they were ready"):
            executor.submit(operator.neg, 1)


def test_death_while_half_a_large_result_is_sent() -> None:
    with pool_of(2) as executor:
        sizes = [8_000_000] * 12
        futures = [executor.submit(tasks.large_result, size) for size in sizes]
        for pid in list(executor._processes):
            os.kill(pid, signal.SIGKILL)
        for future, size in zip(futures, sizes, strict=True):
            error = future.exception(TIMEOUT)
            assert isinstance(error, WorkerDiedError) or len(future.result()) == size


def test_task_that_closes_what_is_not_its_own() -> None:
    with pool_of(1) as executor:
        with pytest.raises(WorkerDiedError):
            executor.submit(tasks.close_everything).result(TIMEOUT)
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


def test_grandchild_that_lives_on_does_not_hide_a_death() -> None:
    with pool_of(1) as executor, Gate() as gate:
        pid = executor.submit(tasks.fork_and_wait, *gate.arguments()).result(TIMEOUT)
        gate.wait()
        (worker,) = executor._processes
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: worker not in executor._processes)
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
        os.kill(pid, signal.SIGKILL)


def test_forked_child_that_returns_from_a_task_is_not_a_worker() -> None:
    with pool_of(1) as executor:
        (pid,) = executor._processes
        assert [executor.submit(tasks.fork_and_return).result(TIMEOUT) for _ in range(3)] == [pid] * 3


@pytest.mark.parametrize("method", METHODS)
def test_parent_killed_takes_its_workers_along(method: str, tmp_path: Path) -> None:
    program = (
        "import multiprocessing, os, sys, fdshare\n"
        "from tests import pool_tasks as tasks\n"
        "if __name__ == '__main__':\n"
        f"    pool = fdshare.ProcessPoolExecutor(2, multiprocessing.get_context({method!r}))\n"
        "    pool.submit(tasks.pid).result()\n"
        "    r, w = os.pipe()\n"
        "    pool.submit(tasks.run_forever, fdshare.FdHandle(w))\n"
        "    os.read(r, 1)\n"
        "    if len(pool._processes) == 1:\n"
        "        pool.submit(tasks.pid).result()\n"
        "    print(*pool._processes, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
        wait_until(lambda: not any(map(_runs, pids)), seconds=2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- what cannot be pickled or rebuilt ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "argument", "error"),
    [
        (operator.truth, tasks.RefusesToPickle(), NotSendableError),
        (operator.truth, tasks.ExitsAtPickle(), NotSendableError),
        (operator.truth, tasks.RefusesToUnpickle(), DecodeError),
        (operator.truth, tasks.ExitsAtUnpickle(), DecodeError),
        (tasks.make, tasks.RefusesToPickle, NotSendableError),
        (tasks.make, tasks.ExitsAtPickle, SystemExit),
        (tasks.make, tasks.RefusesToUnpickle, DecodeError),
        (tasks.make, tasks.ExitsAtUnpickle, DecodeError),
        (tasks.raise_one, tasks.UnpicklableError, NotSendableError),
        (sys.exit, 4, SystemExit),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_bad_object_is_its_own_tasks_error(function: Any, argument: Any, error: type[BaseException]) -> None:
    with pool_of(1) as executor:
        before = set(executor._processes)
        bad = executor.submit(function, argument)
        good = executor.submit(operator.neg, 1)
        assert isinstance(bad.exception(TIMEOUT), error)
        assert good.result(TIMEOUT) == -1
        assert set(executor._processes) == before


def test_exception_that_cannot_be_rebuilt_is_its_own_tasks_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # A library that Dask loads, perhaps for another test, gives all exceptions a way to be rebuilt.
    monkeypatch.delitem(copyreg.dispatch_table, tasks.UnloadableError, raising=False)
    with pool_of(1) as executor:
        error = executor.submit(tasks.raise_one, tasks.UnloadableError, 1, 2).exception(TIMEOUT)
        assert isinstance(error, DecodeError)
        assert "in raise_one" in str(error.__cause__)
        assert "UnloadableError: 1" in str(error.__cause__)
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


def test_exit_in_a_callback_ends_nothing() -> None:
    called = threading.Event()
    with pool_of(1) as executor:
        future = executor.submit(operator.neg, 1)
        future.add_done_callback(lambda _: sys.exit(3))
        future.add_done_callback(lambda _: called.set())
        assert called.wait(TIMEOUT)
        assert executor.submit(operator.neg, 2).result(TIMEOUT) == -2


def test_settled_by_somebody_else_ends_nothing() -> None:
    with pool_of(1) as executor, Gate() as gate:
        future = executor.submit(tasks.tell_and_wait, *gate.arguments())
        gate.wait()
        future.set_result("mine")
        gate.open()
        assert executor.submit(operator.neg, 2).result(TIMEOUT) == -2
        assert future.result() == "mine"


# --- limits ----------------------------------------------------------------------------------------------------------------


def test_timeout_kills_that_worker_only() -> None:
    with pool_of(2) as executor, Gate() as gate:
        limited = executor.options(timeout=0.1).submit(tasks.run_forever, gate.telling)
        gate.wait()
        others = [executor.submit(operator.neg, i) for i in range(50)]
        with pytest.raises(TaskTimeoutError, match=r"0\.1 s"):
            limited.result(TIMEOUT)
        assert [future.result(TIMEOUT) for future in others] == [-i for i in range(50)]
        assert executor.stats().restarts == 1


def test_timeout_counts_from_the_beginning_of_the_task() -> None:
    with pool_of(1) as executor, Gate() as gate:
        blocked = executor.submit(tasks.tell_and_wait, *gate.arguments())
        limited = executor.options(timeout=0.3).submit(operator.neg, 1)
        gate.wait()
        threading.Event().wait(0.4)  # it waits for longer than it may run
        gate.open()
        assert limited.result(TIMEOUT) == -1
        blocked.result(TIMEOUT)


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_timeout_beyond_what_the_system_counts(seconds: float) -> None:
    with pool_of(1) as executor:
        assert executor.options(timeout=seconds).submit(tasks.nap, 0.01).result(seconds) is None
        assert executor.submit(tasks.nap, 0.01).exception(seconds) is None
        assert list(executor.map(tasks.nap, [0.01], timeout=seconds)) == [None]


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_interrupt_while_the_pool_is_launched_leaves_it_usable(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                executor.submit(operator.neg, 1)
        assert executor.submit(operator.neg, 2).result(TIMEOUT) == -2


def test_timeout_in_map() -> None:
    with pool_of(2) as executor:
        results = executor.options(timeout=0.1).map(tasks.nap, [0, 0, 60])
        assert [next(results), next(results)] == [None, None]
        with pytest.raises(TaskTimeoutError):
            next(results)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_after_a_death(retries: int, tmp_path: Path) -> None:
    with pool_of(1) as executor:
        handle = tasks.pipe_with(b"x")
        future = executor.options(retries=retries).submit(
            tasks.log_and_crash_once, str(tmp_path / "log"), 5, fdshare.move(handle)
        )
        if retries:
            assert future.result(TIMEOUT) == 5
        else:
            assert isinstance(future.exception(TIMEOUT), WorkerDiedError)
        assert len((tmp_path / "log").read_text().split()) == 1 + (retries > 0)


def test_retries_end() -> None:
    with pool_of(1) as executor:
        with pytest.raises(WorkerDiedError):
            executor.options(retries=2).submit(tasks.crash, "_exit").result(TIMEOUT)
        wait_until(lambda: executor.stats().restarts == 3)


@pytest.mark.parametrize("method", METHODS)
def test_worker_without_room_for_the_descriptors_of_a_task(method: str) -> None:
    with pool_of(1, method, initializer=tasks.limit_descriptors, initargs=(40,)) as executor:
        handles = [tasks.pipe_with(b"%d" % i) for i in range(60)]
        too_many = executor.submit(tasks.identity, fdshare.move(handles))
        few = executor.submit(tasks.read_handle, fdshare.move(tasks.pipe_with(b"few")))
        with pytest.raises(FdLimitError):
            too_many.result(TIMEOUT)
        assert few.result(TIMEOUT) == b"few"


def test_parent_without_room_for_the_descriptors_of_a_result() -> None:
    import resource

    with pool_of(1) as executor:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_for(30), hard))
        try:
            too_many = executor.submit(tasks.many_pipes, 60)
            few = executor.submit(operator.neg, 1)
            with pytest.raises(FdLimitError):
                too_many.result(TIMEOUT)
            assert few.result(TIMEOUT) == -1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_parent_with_room_again_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(
        "fdshare.pool.manager.CHOKED_SECONDS", TIMEOUT
    )  # a busy machine may take long to make room
    with room_for(1000), pool_of(1) as executor:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_for(30), hard))
        try:
            future = executor.submit(tasks.many_pipes, 60)
            wait_until(lambda: bool(executor._executor_manager_thread._choked))  # type: ignore[union-attr]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert [tasks.read_handle(handle) for handle in future.result(TIMEOUT)] == [
            b"%d" % i for i in range(60)
        ]


# --- the end -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["terminate_workers", "kill_workers"])
def test_end_of_all_workers(end: str) -> None:
    with pool_of(2) as executor, Gate() as gate:
        running = [
            executor.submit(tasks.tell_and_wait, *gate.arguments()),
            executor.options(retries=1).submit(tasks.tell_and_wait, *gate.arguments()),
        ]
        gate.wait(2)
        waiting = [executor.submit(operator.neg, i) for i in range(20)]
        getattr(executor, end)()
        for future in running:
            with pytest.raises(WorkerDiedError):
                future.result(TIMEOUT)
        assert all(future.cancelled() for future in waiting)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(operator.neg, 1)
    assert executor.stats().restarts == 0


def test_death_after_shutdown_still_runs_what_waits() -> None:
    with pool_of(1) as executor, Gate() as gate:
        blocked = executor.submit(tasks.tell_and_wait, *gate.arguments())
        waiting = [executor.submit(operator.neg, i) for i in range(20)]
        gate.wait()
        executor.shutdown(wait=False)
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
        assert isinstance(blocked.exception(TIMEOUT), WorkerDiedError)
        assert [future.result(TIMEOUT) for future in waiting] == [-i for i in range(20)]


def test_fork_while_the_pool_is_busy_leaves_the_pool_alone() -> None:
    with pool_of(2) as executor, Gate() as gate:
        futures = [executor.submit(tasks.tell_and_wait, *gate.arguments()) for _ in range(2)]
        gate.wait(2)
        child = os.fork()
        if not child:
            try:
                executor.submit(operator.neg, 1)
            except RuntimeError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        gate.open()
        assert len({future.result(TIMEOUT) for future in futures}) == 2


def test_forked_stranger_does_not_keep_workers_alive(tmp_path: Path) -> None:
    program = (
        "import os, sys, fdshare\n"
        "from tests import pool_tasks as tasks\n"
        "pool = fdshare.ProcessPoolExecutor(1)\n"
        "pool.submit(tasks.pid).result()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "print(*pool._processes, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        parent.kill()
        wait_until(lambda: not _runs(pid), seconds=2)


def test_deaths_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fdshare.pool"), pool_of(1) as executor:
        (pid,) = executor._processes
        assert executor.submit(tasks.crash, "_exit").exception(TIMEOUT) is not None
        executor.submit(operator.neg, 1).result(TIMEOUT)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == f"worker {pid} has died: exit code 7"
    assert (vars(record)["worker"], vars(record)["exitcode"]) == (pid, 7)
