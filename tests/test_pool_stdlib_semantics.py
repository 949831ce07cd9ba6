"""What the standard executor does, done alike: run against both where that makes sense, so that neither drifts."""

from __future__ import annotations

import concurrent.futures
import fcntl
import gc
import multiprocessing
import operator
import os
import struct
import subprocess
import sys
import termios
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import fdshare
from tests import pool_tasks as tasks
from tests.helpers import METHODS, wait_until

TIMEOUT = 30

Factory = Callable[..., Any]


def strict(*args: Any, **keywords: Any) -> Any:
    """The pool in its standard mode."""
    return fdshare.ProcessPoolExecutor(*args, restart_workers=False, **keywords)


EXECUTORS = {
    "standard": concurrent.futures.ProcessPoolExecutor,
    "fdshare": fdshare.ProcessPoolExecutor,
    "fdshare_strict": strict,
}

every = pytest.mark.parametrize("make", EXECUTORS.values(), ids=EXECUTORS)
breakable = pytest.mark.parametrize(
    "make", [EXECUTORS["standard"], EXECUTORS["fdshare_strict"]], ids=["standard", "fdshare_strict"]
)


@every
@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"max_workers": 0}, ValueError),
        ({"max_workers": -1}, ValueError),
        ({"initializer": 5}, TypeError),
        ({"max_tasks_per_child": "x"}, TypeError),
        ({"max_tasks_per_child": 0}, ValueError),
        ({"max_tasks_per_child": 1, "mp_context": multiprocessing.get_context("fork")}, ValueError),
    ],
)
def test_arguments_are_checked(make: Factory, keywords: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make(**keywords)


@every
@pytest.mark.parametrize("method", METHODS)
def test_initializer_runs_in_each_worker(make: Factory, method: str) -> None:
    context = multiprocessing.get_context(method)
    with make(2, context, initializer=tasks.set_global, initargs=("set",)) as executor:
        assert [executor.submit(tasks.get_global).result(TIMEOUT) for _ in range(6)] == ["set"] * 6


@every
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_initializer_that_fails_breaks_the_pool(make: Factory) -> None:
    with make(1, initializer=tasks.failing_initializer, initargs=("x",)) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(operator.neg, 1).result(TIMEOUT)
        with pytest.raises(BrokenProcessPool):
            executor.submit(operator.neg, 1)


@every
def test_initializer_gets_what_only_inheritance_carries(make: Factory) -> None:
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    with make(1, context, initializer=tasks.set_global, initargs=(lock,)) as executor:
        assert executor.submit(tasks.lock_global).result(TIMEOUT)
        assert not lock.acquire(block=False)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_initializer_gets_what_a_channel_carries(method: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context(method)
    (tmp_path / "file").write_text("content")
    lock = context.Lock()
    with open(tmp_path / "file") as file:
        executor = fdshare.ProcessPoolExecutor(1, context, tasks.set_global, ([lock, file],))
        with executor:
            assert executor.submit(lambda: tasks.get_global()[1].read()).result(TIMEOUT) == "content"
            assert executor.submit(lambda: tasks.get_global()[0].acquire()).result(TIMEOUT)
            assert not lock.acquire(block=False)


def test_initializer_may_be_a_lambda_under_spawn() -> None:
    with fdshare.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=lambda: tasks.set_global(8)
    ) as executor:
        assert executor.submit(tasks.get_global).result(TIMEOUT) == 8


@pytest.mark.parametrize(
    "make", [EXECUTORS["fdshare"], strict], ids=["fdshare", "fdshare_strict"]
)  # gh-115634
@pytest.mark.parametrize("most", [1, 3])
def test_max_tasks_per_child(make: Factory, most: int) -> None:
    with make(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=most) as executor:
        pids = [future.result(TIMEOUT) for future in [executor.submit(tasks.pid) for _ in range(6)]]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [most] * (6 // most)


@every
def test_after_shutdown_nothing_is_taken(make: Factory) -> None:
    executor = make(1)
    future = executor.submit(operator.neg, 1)
    executor.shutdown()
    assert future.result(0) == -1
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(operator.neg, 1)
    executor.shutdown()


@every
def test_shutdown_cancels_futures(make: Factory) -> None:
    executor = make(1)
    futures = [executor.submit(tasks.nap, 0.02, i) for i in range(40)]
    executor.shutdown(cancel_futures=True)
    cancelled = sum(future.cancelled() for future in futures)
    assert 20 < cancelled < 40
    assert all(future.done() for future in futures)
    with pytest.raises(CancelledError):
        futures[-1].result()


@every
def test_wait_and_as_completed(make: Factory) -> None:
    with make(2) as executor:
        futures = [executor.submit(operator.neg, i) for i in range(20)]
        done, rest = concurrent.futures.wait(futures, TIMEOUT)
        assert (len(done), len(rest)) == (20, 0)
        futures = [executor.submit(operator.neg, i) for i in range(20)]
        assert {future.result() for future in concurrent.futures.as_completed(futures, TIMEOUT)} == set(
            range(0, -20, -1)
        )


def test_wait_sees_cancelled_futures() -> None:
    with fdshare.ProcessPoolExecutor(1) as executor:
        futures = [executor.submit(tasks.nap, 0.01) for _ in range(10)]
        assert futures[-1].cancel()
        assert not concurrent.futures.wait(futures, TIMEOUT).not_done


@every
@pytest.mark.parametrize("chunksize", [1, 4])
def test_map_raises_at_the_place_of_the_error(make: Factory, chunksize: int) -> None:
    with make(2) as executor:
        results = executor.map(operator.floordiv, [12] * 8, [1, 2, 3, 4, 0, 1, 1, 1], chunksize=chunksize)
        assert [next(results) for _ in range(4)] == [12, 6, 4, 3]
        with pytest.raises(ZeroDivisionError) as caught:
            next(results)
        assert "RemoteTraceback" in type(caught.value.__cause__).__name__
        with pytest.raises(StopIteration):
            next(results)


@every
def test_map_checks_chunksize(make: Factory) -> None:
    with make(1) as executor, pytest.raises(ValueError, match="chunksize"):
        executor.map(operator.neg, [1], chunksize=0)


@every
def test_collected_executor_ends_by_itself(make: Factory) -> None:
    executor = make(1)
    future = executor.submit(operator.neg, 1)
    thread = executor._executor_manager_thread
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    assert future.result(TIMEOUT) == -1
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@breakable
def test_death_breaks_the_pool(make: Factory) -> None:
    with make(1) as executor:
        futures = [
            executor.submit(tasks.crash, "_exit"),
            *(executor.submit(operator.neg, 1) for _ in range(5)),
        ]
        for future in futures:
            with pytest.raises(BrokenProcessPool):
                future.result(TIMEOUT)
        with pytest.raises(BrokenProcessPool):
            executor.submit(operator.neg, 1)


@breakable
@pytest.mark.parametrize("cls", [tasks.RefusesToUnpickle, tasks.ExitsAtUnpickle])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_argument_that_cannot_be_rebuilt_breaks_the_pool(make: Factory, cls: type) -> None:
    with make(1) as executor, pytest.raises(BrokenProcessPool):
        executor.submit(operator.truth, cls()).result(TIMEOUT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", ["concurrent.futures", "fdshare"])
def test_interpreter_that_exits_finishes_its_tasks(library: str, method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import multiprocessing, {library}\n"
        "from tests import pool_tasks as tasks\n"
        "if __name__ == '__main__':\n"
        f"    pool = {library}.ProcessPoolExecutor(1, multiprocessing.get_context({method!r}))\n"
        "    for i in range(5):\n"
        f"        pool.submit(tasks.log_run, {str(tmp_path / 'log')!r}, i)\n"
        "    pool.shutdown(wait=False)\n"
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
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3", "4"]


def test_asyncio_awaits_its_futures() -> None:
    import asyncio

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        with fdshare.ProcessPoolExecutor(2) as executor:
            return await asyncio.gather(*(loop.run_in_executor(executor, operator.neg, i) for i in range(10)))

    assert asyncio.run(main()) == [-i for i in range(10)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what lies unread in a socket")
def test_cancel_is_refused_once_the_answer_was_taken() -> None:
    entered, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def hold(_: Any) -> None:
        entered.release()
        go_on.acquire(timeout=TIMEOUT)

    with fdshare.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        first = executor.submit(operator.neg, 0)
        first.add_done_callback(hold)
        assert entered.acquire(timeout=TIMEOUT)
        inbox = next(iter(executor._pool.workers.values())).inbox

        def unread() -> int:
            return int(struct.unpack("i", fcntl.ioctl(inbox.fileno(), termios.TIOCOUTQ, bytes(4)))[0])

        # Two answers come while the pool's thread is held up: it takes both at once, then settles one after the other.
        argument = bytes(1 << 15)
        reader, writer = map(fdshare.FdHandle, os.pipe())
        with reader, writer:
            second = executor.submit(len, argument)
            second.add_done_callback(hold)
            third = executor.submit(tasks.wait_for, reader, argument)
            wait_until(unread)
            one = unread()
            os.write(writer.fileno(), b"!")
            wait_until(lambda: unread() > one)
        go_on.release()
        assert entered.acquire(timeout=TIMEOUT)
        assert not third.cancel()
        go_on.release()
        assert (second.result(TIMEOUT), third.result(TIMEOUT)) == (len(argument), argument)
        assert (executor._pool.load, executor._pool.loads) == (0, 0)
    assert (executor.stats().done, executor.stats().cancelled) == (3, 0)


# --- workers that are not replaced ------------------------------------------------------------------------------------

Futures = list[concurrent.futures.Future[int]]


def with_work_for_another(make: Factory) -> tuple[Any, fdshare.FdHandle, Futures]:
    """Return an executor whose worker leaves after its task, which ends once something comes from the descriptor."""
    executor = make(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=1)
    started, starting = map(fdshare.FdHandle, os.pipe())
    going, go_on = map(fdshare.FdHandle, os.pipe())
    with started, starting, going:
        futures = [executor.submit(tasks.tell_and_wait, starting, going), executor.submit(operator.neg, 1)]
        os.read(started.fileno(), 1)
    return executor, go_on, futures


@pytest.mark.parametrize("name", ["fdshare", "fdshare_strict"])
def test_work_of_a_collected_executor_when_its_worker_leaves(name: str) -> None:
    """The standard executor gives it up; see gh-152967."""
    executor, go_on, (first, second) = with_work_for_another(EXECUTORS[name])
    thread = executor._executor_manager_thread
    del executor
    gc.collect()
    with go_on:
        os.write(go_on.fileno(), b"!")
    assert first.result(TIMEOUT)
    if name == "fdshare":
        assert second.result(TIMEOUT) == -1
    else:
        with pytest.raises(BrokenProcessPool, match="garbage collected"):
            second.result(TIMEOUT)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_executor_that_is_let_go_of_finishes_what_its_worker_holds() -> None:
    future = strict(1).submit(operator.neg, 1)
    gc.collect()
    assert future.result(TIMEOUT) == -1


@pytest.mark.parametrize("make", [fdshare.ProcessPoolExecutor, strict], ids=["fdshare", "fdshare_strict"])
def test_no_worker_follows_while_all_are_being_ended(make: Factory) -> None:
    executor, go_on, (first, second) = with_work_for_another(make)
    thread = executor._executor_manager_thread
    with executor._shutdown_lock:
        executor._force_shutting_down = True
    assert executor._force_shutting_down
    with go_on:
        os.write(go_on.fileno(), b"!")
    assert first.result(TIMEOUT)
    with pytest.raises(BrokenProcessPool, match="forcefully shut down"):
        second.result(TIMEOUT)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_worker_that_cannot_be_started_after_the_last_one() -> None:
    class Context(type(multiprocessing.get_context("forkserver"))):  # type: ignore[misc]
        def Process(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: N802 -- multiprocessing's name
            if threading.current_thread().name == "fdshare-pool":
                raise OSError("no process left")
            return super().Process(*arguments, **keywords)

    executor, go_on, (first, second) = with_work_for_another(
        lambda workers, _, **keywords: strict(workers, Context(), **keywords)
    )
    with go_on:
        os.write(go_on.fileno(), b"!")
    assert first.result(TIMEOUT)
    with pytest.raises(BrokenProcessPool, match="could not be started"):
        second.result(TIMEOUT)
    executor.shutdown()


@pytest.mark.parametrize("operation", ["terminate", "kill"])
def test_ending_of_workers_has_its_standard_name(operation: str) -> None:
    called: list[str] = []

    class Recording(fdshare.ProcessPoolExecutor):
        def _force_shutdown(self, operation: str) -> None:
            called.append(operation)
            super()._force_shutdown(operation=operation)

    with Recording(1) as executor:
        with pytest.raises(ValueError, match="Unsupported operation"):
            executor._force_shutdown(operation="invalid")
        getattr(executor, f"{operation}_workers")()
    assert called == ["invalid", operation]
