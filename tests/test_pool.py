"""ProcessPoolExecutor: what travels as argument and result, under each way of starting processes."""

from __future__ import annotations

import multiprocessing
import operator
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import requires_proc

import fdshare
from fdshare import FdHandle, NotSendableError, ProcessPoolExecutor
from tests import pool_tasks as tasks
from tests.helpers import METHODS, wait_until

TIMEOUT = 30


def open_gate(writer: int) -> None:
    """End every wait at the other end of a pipe: by bytes, as a forked worker may have inherited this end."""
    os.write(writer, bytes(64))
    os.close(writer)


@pytest.fixture(params=METHODS)
def pool(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context(request.param)) as executor:
        executor.submit(tasks.pid).result(
            TIMEOUT
        )  # a fork inherits what is open: do it before the test opens anything
        yield executor


@pytest.fixture
def forked() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        executor.submit(tasks.pid).result(TIMEOUT)
        yield executor


# --- arguments -----------------------------------------------------------------------------------------------------------


def test_argument_plain(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(tasks.add, 2, other=3).result(TIMEOUT) == 5


def test_argument_file_closed_at_once(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("what was written")
    with open(path) as file:
        futures = [pool.submit(tasks.read_all, file)]
    assert futures[0].result(TIMEOUT) == "what was written"


def test_argument_socket_closed_at_once(pool: ProcessPoolExecutor) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(TIMEOUT)
        future = pool.submit(tasks.say, theirs, b"hello")
        theirs.close()
        assert ours.recv(10) == b"hello"
        assert future.result(TIMEOUT) == 5
        assert ours.recv(10) == b""  # nobody holds a copy of the other end


def test_argument_moved_is_closed_here(pool: ProcessPoolExecutor) -> None:
    handle = tasks.pipe_with(b"moved")
    future = pool.submit(tasks.read_handle, fdshare.move(handle))
    assert handle.closed
    assert future.result(TIMEOUT) == b"moved"


def test_argument_moved_stays_open_where_submit_raises() -> None:
    executor = ProcessPoolExecutor(1)
    executor.shutdown()
    with tasks.pipe_with(b"kept") as handle:
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(tasks.read_handle, fdshare.move(handle))
        assert os.read(handle.fileno(), 10) == b"kept"


def test_argument_channel(pool: ProcessPoolExecutor) -> None:
    ours, theirs = fdshare.Pipe()
    with ours:
        future = pool.submit(tasks.answer, fdshare.move(theirs))
        ours.send("ping")
        assert ours.recv(timeout=TIMEOUT) == ("pong", "ping")
        assert future.result(TIMEOUT) == "answered"


def test_argument_attrs_object_with_file(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "w") as log:
        job = pool.submit(tasks.write_log, tasks.Job("task 7", log)).result(TIMEOUT)
    job.log.close()
    assert (job.name, path.read_text()) == ("task 7", "task 7 was here\n")


@pytest.mark.parametrize("size", [10, 100_000, 4_000_000])
def test_argument_array(forked: ProcessPoolExecutor, size: int) -> None:
    values = np.ones(size)
    future = forked.submit(tasks.total, values)
    values[:] = 5  # too late
    assert future.result(TIMEOUT) == size


def test_argument_300_descriptors(forked: ProcessPoolExecutor) -> None:
    handles = [tasks.pipe_with(b"%d" % i) for i in range(300)]
    future = forked.submit(tasks.identity, fdshare.move(handles))
    back = future.result(TIMEOUT)
    assert [tasks.read_handle(handle) for handle in back] == [b"%d" % i for i in range(300)]


def test_arguments_that_wait_keep_their_descriptors(forked: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    with FdHandle(reader) as gate:
        blocked = [forked.submit(tasks.wait_for, gate) for _ in range(2)]
        handles = [tasks.pipe_with(b"%d" % i) for i in range(100)]
        futures = [forked.submit(tasks.read_handle, handle) for handle in handles]
        for handle in handles:
            handle.close()
        open_gate(writer)
        assert [future.result(TIMEOUT) for future in futures] == [b"%d" % i for i in range(100)]
        assert [future.result(TIMEOUT) for future in blocked] == [None, None]


def test_pools_inside_tasks(forked: ProcessPoolExecutor) -> None:
    assert forked.submit(tasks.nested, "fork", 2).result(TIMEOUT) == 2


# --- functions ------------------------------------------------------------------------------------------------------------


def test_function_lambda_and_closure(pool: ProcessPoolExecutor) -> None:
    factor = 7
    assert pool.submit(lambda x: x * factor, 6).result(TIMEOUT) == 42
    assert list(pool.map(lambda x: x + factor, range(5))) == [7, 8, 9, 10, 11]


def test_function_closure_sees_changes_between_submits(forked: ProcessPoolExecutor) -> None:
    seen: list[int] = []
    number = 1

    def report() -> tuple[int, int]:
        return len(seen), number

    first = forked.submit(report).result(TIMEOUT)
    seen.append(1)
    number = 2
    assert (first, forked.submit(report).result(TIMEOUT)) == ((0, 1), (1, 2))


def test_function_closure_starts_anew_each_time(forked: ProcessPoolExecutor) -> None:
    seen: list[int] = []
    count = 0

    def note() -> tuple[int, int]:
        nonlocal count
        count += 1
        seen.append(count)
        return len(seen), count

    assert [forked.submit(note).result(TIMEOUT) for _ in range(5)] == [(1, 1)] * 5


def test_function_with_a_socket_in_its_closure(forked: ProcessPoolExecutor) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        for _ in range(2):
            forked.submit(lambda: theirs.sendall(b"x")).result(TIMEOUT)
        assert ours.recv(10) in (b"x", b"xx")


def test_function_of_an_interactive_main() -> None:
    program = (
        "import fdshare\n"
        "def square(x): return x * x\n"
        "def outer(x): return square(x) + 1\n"
        "with fdshare.ProcessPoolExecutor(2) as pool:\n"
        "    print(sum(pool.map(outer, range(100))), pool.submit(square, 5).result())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (run.stdout, run.stderr) == ("328450 25\n", "")


def test_function_is_loaded_once_by_a_worker() -> None:
    with ProcessPoolExecutor(1) as executor:
        ids = set(executor.map(lambda _: id(sys._getframe().f_code), range(50)))
    assert len(ids) == 1


# --- results --------------------------------------------------------------------------------------------------------------


def test_result_file(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("contents")
    with pool.submit(tasks.open_file, str(path)).result(TIMEOUT) as file:
        assert (file.read(), file.name) == ("contents", str(path))


def test_result_sockets(pool: ProcessPoolExecutor) -> None:
    one, other = pool.submit(tasks.open_pair).result(TIMEOUT)
    with one, other:
        one.sendall(b"across")
        assert other.recv(10) == b"across"


def test_result_moved(pool: ProcessPoolExecutor) -> None:
    assert tasks.read_handle(pool.submit(tasks.moved_pipe_with, b"moved").result(TIMEOUT)) == b"moved"


@pytest.mark.parametrize("size", [10, 100_000, 4_000_000])
def test_result_array_is_writable(forked: ProcessPoolExecutor, size: int) -> None:
    values = forked.submit(tasks.doubled, np.ones(size)).result(TIMEOUT)
    values[0] = 3
    assert values.sum() == 2 * size + 1


def test_result_exception_with_remote_traceback(pool: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="on purpose") as caught:
        pool.submit(tasks.fail, "on purpose").result(TIMEOUT)
    assert "in fail" in str(caught.value.__cause__)


def test_workers_keep_no_descriptors() -> None:
    with ProcessPoolExecutor(1) as executor:
        before = executor.submit(tasks.descriptors).result(TIMEOUT)
        for i in range(20):
            handle = tasks.pipe_with(b"%d" % i)
            executor.submit(tasks.read_handle, fdshare.move(handle)).result(TIMEOUT)
            executor.submit(tasks.pipe_with, b"x").result(TIMEOUT).close()
        with tasks.pipe_with(b"x") as handle:
            executor.submit(operator.truth, handle).result(TIMEOUT)  # takes it and drops it
        assert executor.submit(tasks.descriptors).result(TIMEOUT) == before


# --- map, cancel, callbacks, stats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 3, 100])
@pytest.mark.parametrize("buffersize", [None, 1, 7])
def test_map_in_order(forked: ProcessPoolExecutor, chunksize: int, buffersize: int | None) -> None:
    results = forked.map(operator.mul, range(50), range(60), chunksize=chunksize, buffersize=buffersize)
    assert list(results) == [i * i for i in range(50)]


def test_map_takes_in_no_more_than_buffersize(forked: ProcessPoolExecutor) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield len(taken)

    results = forked.map(operator.neg, endless(), buffersize=4)
    assert len(taken) == 4
    assert [next(results) for _ in range(3)] == [-1, -2, -3]
    assert len(taken) == 7
    results.close()  # type: ignore[attr-defined]


def test_map_times_out_and_cancels_the_rest(forked: ProcessPoolExecutor) -> None:
    reader, writer = os.pipe()
    with FdHandle(reader) as gate:
        results = forked.map(tasks.wait_for, [gate] * 20, timeout=0.1)
        with pytest.raises(TimeoutError):
            next(results)
        wait_until(lambda: forked.stats().queued == 0)
        open_gate(writer)


def test_map_of_files(forked: ProcessPoolExecutor, tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(20)]
    for path in paths:
        path.write_text(path.name)
    assert list(forked.map(tasks.read_all, (fdshare.move(path.open()) for path in paths))) == [
        path.name for path in paths
    ]


def test_cancel_takes_a_sent_task_back(forked: ProcessPoolExecutor) -> None:
    gates = [os.pipe() for _ in range(2)]
    told_reader, told_writer = os.pipe()
    with FdHandle(told_writer) as told:
        running = [
            forked.submit(tasks.tell_and_wait, told, fdshare.move(FdHandle(reader))) for reader, _ in gates
        ]
        for _ in gates:
            os.read(told_reader, 1)
        # In the inboxes, and behind them.
        handles = [tasks.pipe_with(b"x") for _ in range(8)]
        futures = [forked.submit(tasks.read_handle, fdshare.move(handle)) for handle in handles]
        assert all(future.cancel() for future in futures)
        assert all(future.cancelled() for future in futures)
        assert not any(future.cancel() for future in running)
        for _, writer in gates:
            open_gate(writer)
        assert len({future.result(TIMEOUT) for future in running}) == 2
    os.close(told_reader)
    assert forked.stats().cancelled == 8


def test_long_task_does_not_hold_up_short_ones(forked: ProcessPoolExecutor) -> None:
    list(forked.map(operator.neg, range(500)))  # short ones, so that much is sent ahead
    reader, writer = os.pipe()
    with FdHandle(reader) as gate:
        futures = [forked.submit(operator.neg, i) for i in range(10)]
        blocked = forked.submit(tasks.wait_for, gate)
        futures += [forked.submit(operator.neg, i) for i in range(200)]
        for future in futures:
            future.result(TIMEOUT)
        assert not blocked.done()
        open_gate(writer)
        blocked.result(TIMEOUT)


def test_callbacks_may_submit_and_shut_down() -> None:
    executor = ProcessPoolExecutor(1)
    done = threading.Event()
    results: list[Any] = []

    def then(future: Any) -> None:
        results.append(future.result())
        executor.submit(operator.neg, 2).add_done_callback(finish)

    def finish(future: Any) -> None:
        results.append(future.result())
        executor.shutdown(wait=False)
        done.set()

    executor.submit(operator.neg, 1).add_done_callback(then)
    assert done.wait(TIMEOUT)
    executor.shutdown()
    assert results == [-1, -2]


def test_no_thread_and_no_process_until_the_first_submit() -> None:
    before = threading.active_count()
    executor = ProcessPoolExecutor(2)
    assert threading.active_count() == before
    assert executor.stats().workers == ()
    executor.shutdown()


def test_stats_tell_of_workers_and_tasks() -> None:
    reader, writer = os.pipe()
    told_reader, told_writer = os.pipe()
    with ProcessPoolExecutor(1) as executor, FdHandle(told_writer) as told:
        executor.submit(operator.neg, 1).result(TIMEOUT)
        assert executor.submit(tasks.fail, "x").exception(TIMEOUT) is not None
        blocked = executor.submit(tasks.tell_and_wait, told, fdshare.move(FdHandle(reader)))
        os.read(told_reader, 1)
        queued = [executor.submit(operator.neg, 1) for _ in range(5)]
        stats = executor.stats()
        assert (stats.queued, stats.running, stats.done, stats.failed) == (5, 1, 1, 1)
        worker = stats.workers[0]
        assert (worker.state, worker.done) == ("busy", 2)
        assert worker.task_age is not None
        assert worker.resident is None or worker.resident > 1 << 20
        assert {task.future for task in executor._pending_work_items.values()} == {blocked, *queued}
        assert list(executor._processes) == [worker.pid]
        open_gate(writer)
        assert worker.pid == blocked.result(TIMEOUT)
        assert [future.result(TIMEOUT) for future in queued] == [-1] * 5
    os.close(told_reader)


@requires_proc
def test_idle_pool_uses_no_cpu() -> None:
    with ProcessPoolExecutor(2) as executor:
        pids = {executor.submit(tasks.pid).result(TIMEOUT) for _ in range(10)}

        def cpu() -> list[int]:
            return (
                [
                    int(field)
                    for pid in [*pids, os.getpid()]
                    for task in Path(f"/proc/{pid}/task").iterdir()
                    if task.name != str(os.getpid())  # this very thread
                    for field in (task / "stat").read_text().rpartition(")")[2].split()[11:13]
                ]
                + [switches(pid) for pid in pids]
            )

        def switches(pid: int) -> int:
            text = Path(f"/proc/{pid}/status").read_text()
            return int(text.rpartition("nonvoluntary_ctxt_switches:")[0].split("voluntary_ctxt_switches:")[1])

        before = cpu()
        threading.Event().wait(0.3)  # the time over which nothing must happen
        # What the last task left to do may be booked late; anything that ticks would come to dozens.
        assert all(now - then <= 2 for now, then in zip(cpu(), before, strict=True))


def test_progress_needs_rich_or_draws(forked: ProcessPoolExecutor) -> None:
    progress = pytest.importorskip("rich.progress")
    import io

    from rich.console import Console

    text = io.StringIO()
    with progress.Progress(console=Console(file=text, force_terminal=True, width=100)) as bar:
        assert list(forked.map(operator.neg, range(100), progress=bar)) == [-i for i in range(100)]
        assert [(task.completed, task.total) for task in bar.tasks] == [(100, 100)]


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.5}, TypeError),
    ],
)
def test_options_are_checked(keywords: dict[str, Any], error: type[Exception]) -> None:
    executor = ProcessPoolExecutor(1)
    with pytest.raises(error):
        executor.options(**keywords)


def test_not_sendable_is_the_futures_exception(forked: ProcessPoolExecutor) -> None:
    with pytest.raises(NotSendableError, match="lock"):
        forked.submit(operator.neg, threading.Lock()).result(TIMEOUT)
    assert forked.submit(operator.neg, 1).result(TIMEOUT) == -1
