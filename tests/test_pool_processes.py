"""The processes of a pool: what each costs its parent, how it ends, and that nothing but the pool's own is signalled."""

from __future__ import annotations

import asyncio
import multiprocessing
import operator
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from fdshare import FdHandle, FdLimitError, ProcessPoolExecutor, TaskTimeoutError, WorkerDiedError, system
from fdshare.pool import executor as executors
from fdshare.pool import workers
from fdshare.rights import open_numbers
from tests import pool_tasks as tasks
from tests.helpers import (
    METHODS,
    QUICK_METHODS,
    limit_for,
    requires_eventfd,
    requires_pidfd,
    requires_proc,
    wait_until,
)

TIMEOUT = 30

ROOT = Path(__file__).resolve().parent.parent

COMMON = 5
"""Descriptors that a pool has beside those of its workers: to wait, to be woken, the life line, the template, a leader's bell."""


def pool_of(workers: int, method: str = "fork", **keywords: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), **keywords)


def run(program: str, *, seconds: float = 60) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def limits() -> Iterator[Any]:
    """Sets the limit of descriptors; it is what it was afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most=soft: resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- descriptors ------------------------------------------------------------------------------------------------------


@requires_pidfd
@requires_eventfd
@requires_proc
@pytest.mark.parametrize("method", METHODS)
def test_worker_costs_three_descriptors(method: str) -> None:
    with pool_of(1, method) as warm:  # the fork server, and the tracker of multiprocessing
        warm.submit(tasks.pid).result(TIMEOUT)
    before = len(open_numbers())
    with pool_of(4, method) as executor:
        tasks.fill(executor, 4)
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
        assert len(open_numbers()) - before <= 3 * 4 + COMMON
        victim = next(iter(executor._processes))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in executor._processes and len(executor._processes) == 4)
        tasks.fill(executor, 4)
        assert len(open_numbers()) - before <= 3 * 4 + COMMON
    assert len(open_numbers()) == before


MANY = """
import multiprocessing, os, resource, signal, sys, time
count, limit, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
from fdshare import ProcessPoolExecutor, WorkerDiedError
from tests import pool_tasks as tasks
if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.pool_tasks"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with ProcessPoolExecutor(count, multiprocessing.get_context(method)) as pool:
        # By files, as this program has not a descriptor left.
        list(pool.map(tasks.meet_at, [sys.argv[4] + "/first"] * count, [count] * count))
        assert len(pool._processes) == count
        try:
            pool.submit(tasks.crash, "_exit").result(20)
        except WorkerDiedError as error:
            print(error.exitcode)
        list(pool.map(tasks.meet_at, [sys.argv[4] + "/second"] * count, [count] * count))
        process = next(iter(pool._processes.values()))
        process.join(0.01)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join(20)
        assert not process.is_alive()
"""


@requires_pidfd
@requires_proc
@pytest.mark.parametrize(
    ("count", "limit", "method"), [(24, 64, "fork"), (24, 64, "forkserver"), (300, 1024, "fork")]
)
def test_many_workers_start_under_a_low_limit(count: int, limit: int, method: str, tmp_path: Path) -> None:
    program = tmp_path / "many.py"
    program.write_text(MANY)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(count), str(limit), method, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # Where there are so few descriptors nothing is kept to ask the fork server with.
    assert result.stdout == ("None\n" if method == "forkserver" else "7\n")


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_submit_at_the_limit_is_refused_and_the_pool_goes_on(method: str, limits: Any) -> None:
    with pool_of(1, method) as warm:
        warm.submit(tasks.pid).result(TIMEOUT)
    with pool_of(2, method) as executor:
        refused = 0
        for free in range(1, 30):
            limit = limit_for(free)
            limits(limit)
            try:
                executor.submit(tasks.pid)
            except FdLimitError as error:
                refused += error.limit == limit
            else:
                break
            finally:
                limits()
        assert refused > 5
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


def test_argument_at_the_limit_is_refused_and_the_pool_goes_on(limits: Any) -> None:
    with pool_of(1) as executor, tasks.pipe_with(b"x") as handle:
        executor.submit(tasks.pid).result(TIMEOUT)
        limits(3)
        with pytest.raises(FdLimitError):
            executor.submit(tasks.read_handle, handle)
        limits()
        assert executor.submit(tasks.read_handle, handle).result(TIMEOUT) == b"x"


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_last_worker_that_cannot_be_replaced_at_the_limit(method: str, limits: Any) -> None:
    with pool_of(1, method) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        # Less than its own that come free.
        with FdHandle.dup(0) as one, FdHandle.dup(0) as other:
            executor.submit(tasks.pid).result(TIMEOUT)
            (pid,) = executor._processes
            limits(3)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: executor._pool.short)
            with pytest.raises(FdLimitError):
                executor.submit(tasks.pid)
            limits()
            assert one.fileno() != other.fileno()
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


# --- signals ----------------------------------------------------------------------------------------------------------


def end_by_sigterm(executor: ProcessPoolExecutor, *, early: bool = True) -> None:
    """Have one worker of a pool ended, in a task and outside of one, with ``early`` perhaps before its first line."""
    reader, writer = map(FdHandle, os.pipe())
    told, telling = map(FdHandle, os.pipe())
    with reader, writer, told, telling:
        future = executor.submit(tasks.tell_and_wait, telling, reader)
        os.read(told.fileno(), 1)
        (pid,) = executor._processes
        os.kill(pid, signal.SIGTERM)
        error = future.exception(TIMEOUT)
    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == -signal.SIGTERM
    wait_until(lambda: executor._processes and pid not in executor._processes)
    (pid,) = executor._processes
    if not early:
        assert executor.submit(tasks.pid).result(TIMEOUT) == pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: executor._processes and pid not in executor._processes)
    assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


@pytest.mark.parametrize("way", ["handler", "ignored", "blocked"])
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_sigterm_ends_a_worker_whatever_the_parent_does_with_it(method: str, way: str) -> None:
    if way == "blocked":
        before: Any = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    else:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN if way == "ignored" else lambda *_: None)
    try:
        with pool_of(1, method) as executor:
            # A fork server that was started while it was ignored has workers that lose it until their first line.
            end_by_sigterm(executor, early=method == "fork")
    finally:
        if way == "blocked":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        else:
            signal.signal(signal.SIGTERM, before)


def test_sigterm_of_a_worker_is_not_told_to_the_parents_event_loop() -> None:
    told: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, told.append, signal.SIGTERM)
        with pool_of(1) as executor:
            await loop.run_in_executor(None, end_by_sigterm, executor)
        await asyncio.sleep(0)
        assert not told
        loop.remove_signal_handler(signal.SIGTERM)

    asyncio.run(main())


def test_sigterm_right_after_the_fork() -> None:
    """The worker has the parent's handler until its first line, and must not call it."""
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(os.getpid()))
    try:
        for _ in range(10):
            executor = pool_of(2)
            executor.submit(tasks.pid)
            executor.terminate_workers()
            began = time.monotonic()
            executor.shutdown()
            assert time.monotonic() - began < executors.TERMINATE_SECONDS
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not called


def ignore_sigterm(told: FdHandle) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tasks.run_forever(told)


@pytest.mark.parametrize("stopped", [False, True])
def test_terminate_ends_workers_that_ignore_it(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "TERMINATE_SECONDS", 0.05)
    told, telling = map(FdHandle, os.pipe())
    with told, telling, pool_of(1) as executor:
        future = executor.submit(ignore_sigterm, telling)
        os.read(told.fileno(), 1)
        if stopped:
            os.kill(next(iter(executor._processes)), signal.SIGSTOP)
        executor.terminate_workers()
        error = future.exception(TIMEOUT)
        assert isinstance(error, WorkerDiedError)
        assert error.exitcode == -signal.SIGKILL


@requires_pidfd
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_no_signal_for_a_number_that_may_be_anothers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    with pool_of(1, method) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        (worker,) = executor._pool.workers.values()
        monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        with executor._pool.lock, FdHandle(os.pidfd_open(worker.pid)) as held:  # nobody looks at its end
            signal.pidfd_send_signal(held.fileno(), signal.SIGKILL)
            assert worker.body is not None
            wait_until(worker.body.has_ended)
            if method == "fork":
                os.waitpid(worker.pid, 0)
            worker.signal(signal.SIGTERM)
            worker.process.terminate()
            worker.process.kill()
            worker.kill()
        monkeypatch.undo()
    assert not sent


# --- whose end somebody else waits for --------------------------------------------------------------------------------


def wait_for_all(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@requires_proc
@pytest.mark.parametrize("handler", [signal.SIG_IGN, wait_for_all])
@pytest.mark.parametrize("method", METHODS)
def test_workers_that_somebody_else_waits_for(method: str, handler: Any) -> None:
    with pool_of(1, method) as warm:
        warm.submit(tasks.pid).result(TIMEOUT)
    before = len(open_numbers()), len(multiprocessing.active_children())
    former = signal.signal(signal.SIGCHLD, handler)
    try:
        with pool_of(2, method) as executor:
            tasks.fill(executor, 2)
            for _ in range(3):
                error = executor.submit(tasks.crash, "SIGKILL").exception(TIMEOUT)
                assert isinstance(error, WorkerDiedError)
                assert error.exitcode in (-signal.SIGKILL, None)
            assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
    finally:
        signal.signal(signal.SIGCHLD, former)
    assert (len(open_numbers()), len(multiprocessing.active_children())) == before


# --- daemonic processes -----------------------------------------------------------------------------------------------


def use_a_pool(method: str, told: Any, stays: bool) -> None:
    executor = pool_of(2, method)
    tasks.fill(executor, 2)
    assert multiprocessing.current_process().daemon
    told.send(list(executor._processes))
    if stays:
        signal.pause()
    executor.shutdown()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["shutdown", "SIGKILL", "SIGTERM"])
def test_daemonic_process_has_a_pool_that_ends_with_it(method: str, end: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        process = multiprocessing.get_context("fork").Process(
            target=use_a_pool, args=(method, theirs, end != "shutdown"), daemon=True
        )
        process.start()
        assert ours.poll(TIMEOUT)
        pids = ours.recv()
        if end != "shutdown":
            assert process.pid is not None
            os.kill(process.pid, getattr(signal, end))
        process.join(TIMEOUT)
        assert process.exitcode == (0 if end == "shutdown" else -getattr(signal, end))
        wait_until(lambda: not any(map(tasks.runs, pids)))
        process.close()


# --- workers that do not get ready ------------------------------------------------------------------------------------


def hang_once(path: str) -> None:
    """As an initializer, or an import: never come back in the first process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    signal.pause()


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_timeout_covers_a_worker_that_never_gets_ready(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool_of(1, method, initializer=hang_once, initargs=(str(tmp_path / "first"),)) as executor:
        limited = executor.options(timeout=0.1).submit(operator.neg, 1)
        other = executor.submit(operator.neg, 2)
        wait_until((tmp_path / "first").exists)
        monkeypatch.setattr(executor._pool, "start_seconds", 0.3)
        executor._pool.wake()
        with pytest.raises(TaskTimeoutError, match="not ready"):
            limited.result(TIMEOUT)
        assert other.result(TIMEOUT) == -2
        assert executor._pool.start_seconds >= 0.6
        assert executor.options(timeout=5).submit(operator.neg, 3).result(TIMEOUT) == -3


def test_timeout_leaves_a_slow_start_its_time() -> None:
    with pool_of(1, initializer=tasks.nap, initargs=(0.3,)) as executor:
        assert executor.options(timeout=0.1).submit(operator.neg, 1).result(TIMEOUT) == -1
        assert executor._pool.start_seconds >= workers.START_SECONDS


def test_timeout_covers_a_worker_that_is_stopped_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(1, initializer=tasks.stop_once, initargs=(os.getpid(),)) as executor:
        monkeypatch.setattr(executor._pool, "start_seconds", 0.2)
        with pytest.raises(TaskTimeoutError, match="not ready"):
            executor.options(timeout=0.1).submit(operator.neg, 1).result(TIMEOUT)
        executor.kill_workers()


# --- replaced workers, with the start method fork ---------------------------------------------------------------------

_before: Any = None
_lock = threading.Lock()


def see() -> Any:
    with _lock:
        return _before


def replace_one(executor: ProcessPoolExecutor) -> int:
    """Kill a worker; return the pid of the one in its place."""
    known = set(executor._processes)
    os.kill(next(iter(known)), signal.SIGKILL)
    wait_until(lambda: len(executor._processes) == len(known) and set(executor._processes) - known)
    (pid,) = set(executor._processes) - known
    return int(pid)


def test_replaced_worker_does_not_wait_for_a_lock_of_the_parent() -> None:
    global _before
    _before = "as at the first submit"
    with pool_of(1) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        _before = "later"
        with _lock:
            pid = replace_one(executor)
            assert executor.submit(see).result(TIMEOUT) == "as at the first submit"
            assert executor.submit(tasks.pid).result(TIMEOUT) == pid
        assert executor.submit(tasks.parent).result(TIMEOUT) == (os.getpid(), True)
        assert executor.submit(lambda: signal.getsignal(signal.SIGINT)).result(TIMEOUT) is not signal.SIG_IGN


def test_replaced_worker_runs_the_initializer_as_it_was() -> None:
    class Local:
        """Nothing that could be pickled."""

        lock = threading.Lock()

    with pool_of(1, initializer=tasks.set_global, initargs=(Local,)) as executor:
        assert executor.submit(tasks.crash, "_exit").exception(TIMEOUT) is not None
        assert executor.submit(tasks.type_of_global).result(TIMEOUT) == "Local"


@requires_proc
def test_replaced_worker_inherits_nothing_of_the_pool() -> None:
    own = tasks.open_links()
    with pool_of(3) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        for _ in range(3):
            replace_one(executor)
        for future in [executor.submit(tasks.open_links) for _ in range(30)]:
            links = [link for link in future.result(TIMEOUT) if link not in own]
            assert sum(link.startswith("socket:") for link in links) == 1  # its own inbox
            assert not [link for link in links if link.startswith(("anon_inode:", "pidfd:", "/memfd:"))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_template_workers_are_spawned(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdshare.pool import template

    with pool_of(1) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        monkeypatch.setattr(template, "ANSWER_SECONDS", 0.1)
        forking = executor._pool.starter._template
        assert forking is not None
        os.kill(forking._pid, number)
        replace_one(executor)
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


def test_template_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal, fdshare\n"
        "from tests import pool_tasks as tasks\n"
        "pool = fdshare.ProcessPoolExecutor(2, __import__('multiprocessing').get_context('fork'))\n"
        "pool.submit(tasks.crash, '_exit').exception()\n"
        "pool.submit(tasks.pid).result()\n"
        "print(pool._pool.starter._template._pid, *pool._processes, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 3
    wait_until(lambda: not any(map(tasks.runs, pids)))


def test_standard_semantics_need_no_template() -> None:
    with pool_of(1, restart_workers=False) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        assert executor._pool.starter._template is None
        with pytest.raises(BrokenProcessPool):
            executor.submit(tasks.crash, "_exit").result(TIMEOUT)


def test_systems_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdshare.pool import manager

    monkeypatch.setattr(system, "HAVE_PIDFD", False)
    monkeypatch.setattr(manager, "DEATH_TICK", 1.0)
    with pool_of(2) as executor:
        tasks.fill(executor, 2)
        for _ in range(2):
            error = executor.submit(tasks.crash, "_exit").exception(TIMEOUT)
            assert isinstance(error, WorkerDiedError)
            assert error.exitcode == 7
        tasks.fill(executor, 2)
        executor.terminate_workers()
