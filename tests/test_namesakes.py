"""Queue, Lock, Semaphore and Event take the calls of their namesakes in queue, threading and multiprocessing."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import logging.handlers
import multiprocessing
import os
import queue as queues
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import running

import fdshare
from fdshare import (
    ClosedError,
    Event,
    Lock,
    Queue,
    QueueClosedError,
    QueueEmptyError,
    QueueFullError,
    Semaphore,
    ends,
    mutex,
    sync,
)
from fdshare.testing import checked_child, numbered_handle

needs_count = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what lies in a socket")


@pytest.fixture(params=["seqpacket", "dgram"])
def queue(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setattr(ends, "HAVE_SEQPACKET", request.param == "seqpacket")
    with Queue() as queue:
        yield queue


def fill(queue: Queue) -> int:
    count = 0
    while True:
        try:
            queue.put_nowait(count)
        except queues.Full:
            return count
        count += 1


def took(function: Callable[[], object], error: type[BaseException]) -> float:
    """Return how long it took to raise ``error``."""
    start = time.monotonic()
    with pytest.raises(error):
        function()
    return time.monotonic() - start


# --- Queue ------------------------------------------------------------------------------------------------------------

AT_ONCE: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((False,), {}),
    ((0,), {}),
    ((False, 30), {}),
    ((), {"block": False}),
    ((), {"block": False, "timeout": 30}),
    ((), {"timeout": 0}),
    ((True, 0), {}),
    ((None, 30), {}),
]
IN_A_MOMENT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0.05,), {}),
    ((True, 0.05), {}),
    ((1, 0.05), {}),
    ((True,), {"timeout": 0.05}),
    ((), {"timeout": 0.05}),
    ((), {"block": True, "timeout": 0.05}),
]


@pytest.mark.parametrize(("args", "kwargs"), AT_ONCE)
def test_a_call_that_does_not_wait(queue: Queue, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for error in (queues.Empty, QueueEmptyError, TimeoutError):
        assert took(lambda: queue.get(*args, **kwargs), error) < 20
    fill(queue)
    for error in (queues.Full, QueueFullError, TimeoutError):
        assert took(lambda: queue.put("more", *args, **kwargs), error) < 20
    assert queue.get(*args, **kwargs) == 0


@pytest.mark.parametrize(("args", "kwargs"), IN_A_MOMENT)
def test_a_call_that_waits_for_a_while(queue: Queue, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert took(lambda: queue.get(*args, **kwargs), queues.Empty) >= 0.05
    queue.put("there", *args, **kwargs)
    assert queue.get(*args, **kwargs) == "there"
    fill(queue)
    assert took(lambda: queue.put("more", *args, **kwargs), queues.Full) >= 0.05


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((True,), {}), ((None,), {}), ((True, None), {})])
def test_a_call_that_waits_for_ever(queue: Queue, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    got: list[object] = []
    with running(lambda: got.append(queue.get(*args, **kwargs))):
        queue.put("late", *args, **kwargs)
    assert got == ["late"]


def test_a_large_item_is_refused_in_the_same_way(queue: Queue) -> None:
    fill(queue)
    for item in ("x" * 100_000, bytearray(1 << 20)):
        with pytest.raises(queues.Full):
            queue.put_nowait(item)


@needs_count
def test_what_is_in_it_is_counted(queue: Queue) -> None:
    assert (queue.qsize(), queue.empty(), queue.full()) == (0, True, False)
    with numbered_handle(1) as handle:
        for item in (1, "x" * 70_000, [handle], bytearray(1 << 20), ""):
            queue.put(item)
    for left in (5, 4, 3, 2, 1):
        assert (queue.qsize(), queue.empty(), queue.full()) == (left, False, False)
        item = queue.get_nowait()
        if isinstance(item, list):
            item[0].close()
    assert (queue.qsize(), queue.empty()) == (0, True)


@needs_count
def test_full_is_when_a_put_would_wait(queue: Queue) -> None:
    count = 0
    while not queue.full():
        queue.put_nowait(count)
        count += 1
    assert took(lambda: queue.put_nowait(count), queues.Full) < 20
    assert queue.qsize() == count
    queue.get()
    assert not queue.full()


@needs_count
def test_a_count_leaves_nothing_behind_for_others(queue: Queue) -> None:
    for number in range(20):
        queue.put(number)
    pid = os.fork()
    if not pid:  # it is killed in a count, which goes by a place that all share
        child = os.getpid()
        threading.Thread(target=lambda: os.kill(child, signal.SIGKILL), daemon=True).start()
        while True:
            queue.qsize()
    os.waitpid(pid, 0)
    assert not queue.empty()
    assert queue.qsize() == 20
    assert [queue.get(timeout=0) for _ in range(20)] == list(range(20))


@needs_count
def test_counting_beside_those_who_put_and_get(queue: Queue) -> None:
    counts: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            counts.append(queue.qsize())
            queue.empty()

    def play() -> None:
        try:
            number = 0
            while len(counts) < 50:
                number += 1
                queue.put(number, True, 20)
                assert queue.get(True, 20) == number
        finally:
            done.set()

    with running(play, count):
        pass
    assert max(counts) <= 2  # and not each item that came meanwhile


def test_a_closed_queue(queue: Queue) -> None:
    queue.put(1)
    queue.close()
    queue.join_thread()
    queue.cancel_join_thread()
    for error in (ValueError, QueueClosedError):  # the first as from multiprocessing's
        with pytest.raises(error):
            queue.put_nowait(2)
    assert not queue.full()
    assert queue.get_nowait() == 1
    with pytest.raises(QueueClosedError):
        queue.get(False)
    assert queue.empty()
    assert queue.qsize() == 0


def _log(queue: Queue, number: int) -> None:
    logger = logging.getLogger(f"child {number}")
    logger.propagate = False
    logger.addHandler(logging.handlers.QueueHandler(queue))  # type: ignore[arg-type]  # typeshed wants a queue.Queue
    for count in range(20):
        logger.warning("%d from %d", count, number)


def test_records_of_many_processes_are_logged_by_one_listener() -> None:
    out = io.StringIO()
    with Queue() as queue:
        listener = logging.handlers.QueueListener(queue, logging.StreamHandler(out))  # type: ignore[arg-type]  # as above
        listener.start()
        processes = [
            multiprocessing.get_context("fork").Process(target=_log, args=(queue, number))
            for number in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
            process.close()
        listener.stop()
        _log(queue, 2)
        assert queue.empty() is False
    lines = out.getvalue().splitlines()
    for number in (0, 1):
        assert [line for line in lines if line.endswith(str(number))] == [
            f"{n} from {number}" for n in range(20)
        ]


# --- Lock -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["robust", "file", "record"])
def lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lock]:
    monkeypatch.setattr(mutex, "HAVE_ROBUST", request.param == "robust")
    monkeypatch.setattr(mutex, "HAVE_REOPEN", request.param == "file")
    lock = Lock()
    yield lock
    lock.close()


def test_the_ways_to_acquire(lock: Lock) -> None:
    for args, kwargs in [
        ((), {}),
        ((True,), {}),
        ((False,), {}),
        ((True, -1), {}),
        ((True, 5), {}),
        ((), {"block": True}),
        ((), {"block": False}),
        ((), {"block": True, "timeout": None}),
        ((), {"blocking": False, "timeout": -1}),
    ]:
        assert lock.acquire(*args, **kwargs) is True  # type: ignore[arg-type]  # mypy takes them all for one
        assert lock.locked()
        lock.release()
        assert not lock.locked()


def test_the_ways_not_to_wait(lock: Lock) -> None:
    def try_all() -> None:
        assert lock.locked()
        assert not lock.acquire(False)
        assert not lock.acquire(block=False)
        assert not lock.acquire(block=False, timeout=30)
        assert not lock.acquire(True, 0)
        assert not lock.acquire(block=True, timeout=-2)

    with lock, running(try_all):
        pass


def test_minus_one_waits_for_ever(lock: Lock) -> None:
    inside, got = threading.Event(), []

    def hold() -> None:
        with lock:
            inside.set()
            time.sleep(0.1)  # as long as the other one waits, not for something to happen

    with running(hold):
        assert inside.wait(20)
        got.append(lock.acquire(True, -1))
        lock.release()
    assert got == [True]


def test_locked_is_of_all_processes(lock: Lock) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lock.acquire()
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    assert lock.locked()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not lock.locked()
    with lock:  # and it was left as it was
        assert lock.abandoned
    os.close(reader)
    os.close(writer)


def test_threadings_condition_takes_it(lock: Lock) -> None:
    condition, items = threading.Condition(lock), []  # type: ignore[arg-type]  # of typeshed: its own locks only

    def put() -> None:
        with condition:
            items.append(1)
            condition.notify()

    with condition, running(put):
        assert condition.wait_for(lambda: items, 20)


def test_a_closed_lock_is_not_asked(lock: Lock) -> None:
    lock.close()
    with pytest.raises(ClosedError):
        lock.locked()


def test_a_close_ends_the_wait_of_another_thread() -> None:
    """Of another object of the same lock, as one that is held is not closed."""
    lock = Lock()
    here, there = fdshare.Pipe()
    with here, there:
        here.send(lock)
        other = there.recv()

    def wait() -> None:
        waits.set()
        with pytest.raises(ClosedError):
            other.acquire()

    waits = threading.Event()
    with lock, running(wait):
        assert waits.wait(20)
        other.close()


# --- Semaphore and Event ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["eventfd", "pipe"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setattr(sync, "HAVE_EVENTFD", name == "eventfd" and sync.HAVE_EVENTFD)
    return name


def test_a_semaphore_tells_its_value(kind: str) -> None:
    semaphore = Semaphore(3)
    for left in (2, 1, 0):
        assert semaphore.acquire(block=False)
        assert semaphore.get_value() == left
        assert semaphore.locked() == (not left)
    assert not semaphore.acquire(block=False)
    assert not semaphore.acquire(True, 0.01)
    assert not semaphore.acquire(timeout=-1)
    semaphore.release(20)
    assert semaphore.get_value() == 20
    semaphore.close()
    for ask in (semaphore.get_value, semaphore.locked):
        with pytest.raises(ClosedError):
            ask()


def test_an_event_is_asked_as_its_namesakes_are(kind: str) -> None:
    event = Event()
    assert event.wait(0) is False
    assert event.wait(timeout=0.01) is False
    assert event.wait(-1) is False
    event.set()
    assert event.is_set() is True
    assert event.wait() is True
    event.clear()
    assert event.is_set() is False
    event.close()


# --- interrupts ---------------------------------------------------------------------------------------------------------


class _Struck(Exception):
    pass


def _lost_by_interrupts(make: Callable[[], Any], fallback: bool, hits: int) -> int:
    """Make and close one again and again while a handler raises; return how many descriptors that has lost."""
    if fallback:
        ends.HAVE_SEQPACKET = sync.HAVE_EVENTFD = mutex.HAVE_ROBUST = False
    draw, strikes, lost = random.Random(11), 0, 0
    swallowed: list[object] = []

    def strike(*_: object) -> None:
        nonlocal strikes
        strikes += 1
        raise _Struck

    def play() -> None:
        made = make()
        (made.drop if isinstance(made, Queue) else made.close)()

    def play_until_struck(count: int) -> None:
        """A loop of its own: what strikes on a loop's way back is not always seen by a ``try`` right around it."""
        while strikes == count:
            play()

    play()
    known = set(os.listdir("/proc/self/fd"))
    sys.unraisablehook = swallowed.append
    signal.signal(signal.SIGALRM, strike)
    for count in range(hits):
        swallowed.clear()
        before = len(os.listdir("/proc/self/fd"))
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 2e-4))
            play_until_struck(count)
        except _Struck:
            pass
        gc.collect(1)  # a file's mutex refers to itself
        if not swallowed:  # by a __del__, which then has not done its work: nobody can help that
            lost += len(os.listdir("/proc/self/fd")) - before
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    swallowed.clear()
    gc.collect()
    for number in set(os.listdir("/proc/self/fd")) - known:
        with contextlib.suppress(OSError):  # that of the listing itself
            os.close(int(number))
    return lost


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("fallback", [False, True], ids=["linux", "elsewhere"])
@pytest.mark.parametrize("make", [Queue, Lock, Semaphore, Event], ids=lambda make: str(make.__name__))
def test_an_interrupted_constructor_loses_no_descriptor(make: Callable[[], Any], fallback: bool) -> None:
    assert checked_child(_lost_by_interrupts, make, fallback, 300) == 0
