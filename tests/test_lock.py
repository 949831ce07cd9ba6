"""Lock: one inside, of all threads and processes; the dead let go and are told of; over each mechanism there is."""

from __future__ import annotations

import functools
import math
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import requires_memfd, running

import fdshare
from fdshare import ClosedError, DecodeError, FdHandle, Lock, NotSendableError, mutex
from fdshare.testing import Child, checked_child, leak_check

MECHANISMS = ("robust", "file", "record")


def use(mechanism: str) -> None:
    """Make this process use one mechanism for new locks; children that are not forked must call it too."""
    mutex.HAVE_ROBUST, mutex.HAVE_REOPEN = mechanism == "robust", mechanism == "file"


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pthread mutex; a file with a description for each process; a file with record locks, as on macOS."""
    name: str = request.param
    monkeypatch.setattr(mutex, "HAVE_ROBUST", name == "robust")
    monkeypatch.setattr(mutex, "HAVE_REOPEN", name == "file")
    return name


@pytest.fixture
def lock(mechanism: str) -> Iterator[Lock]:
    lock = Lock()
    yield lock
    lock.close()


@pytest.fixture
def counter() -> Iterator[Counter]:
    with Counter.new() as counter:
        yield counter


class Counter:
    """A number in shared memory that is increased in two steps, so that two at once lose one."""

    def __init__(self, handle: FdHandle) -> None:
        self.handle = handle

    @classmethod
    def new(cls) -> Counter:
        handle = FdHandle(os.memfd_create("counter"))
        os.pwrite(handle.fileno(), bytes(16), 0)
        return cls(handle)

    def get(self, place: int = 0) -> int:
        return int.from_bytes(os.pread(self.handle.fileno(), 8, 8 * place), "little")

    def set(self, value: int, place: int = 0) -> None:
        os.pwrite(self.handle.fileno(), value.to_bytes(8, "little"), 8 * place)

    def increase(self) -> None:
        self.set(self.get() + 1)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.handle.close()


def increase(lock: Lock, counter: Counter, times: int) -> None:
    for _ in range(times):
        with lock:
            counter.increase()


def increase_in_child(mechanism: str, lock: Lock, handle: FdHandle, times: int) -> None:
    use(mechanism)
    with Counter(handle) as counter:
        increase(lock, counter, times)


def fork(function: Callable[[], object]) -> int:
    """Run a function in a forked child that ends with it; return its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_inside(lock: Lock) -> None:
    """Let a child acquire the lock and be killed."""

    def hold() -> None:
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(fork(hold)) == -signal.SIGKILL


# --- one inside ------------------------------------------------------------------------------------------------------


@requires_memfd
def test_threads_exclude_each_other(lock: Lock, counter: Counter) -> None:
    with running(*[lambda: increase(lock, counter, 300)] * 4):
        pass
    assert counter.get() == 1200


# Each mechanism in forked children, and one in children started otherwise.
PLACES = [("robust", "fork"), ("robust", "forkserver"), ("file", "fork"), ("record", "fork")]


@pytest.mark.parametrize(("mechanism", "method"), PLACES, indirect=["mechanism"])
def test_processes_exclude_each_other(mechanism: str, counter: Counter, method: str) -> None:
    lock = Lock()
    arguments = (mechanism, lock, counter.handle, 500)
    children = [Child(increase_in_child, *arguments, method=method) for _ in range(2)]
    increase(lock, counter, 500)
    for child in children:
        child.result()
    assert counter.get() == 1500


def test_two_objects_are_one_lock(lock: Lock) -> None:
    here, there = fdshare.Pipe()
    with here, there:
        here.send(lock)
        again = there.recv()
    with lock:
        assert not again.acquire(blocking=False)
        assert not again.acquire(timeout=0.01)
        with pytest.raises(RuntimeError, match="not recursive"):  # it would wait for ever
            again.acquire()
    assert again.acquire(blocking=False)
    assert not lock.acquire(False)
    again.release()


def test_a_lock_that_is_not_to_be_had_is_false(lock: Lock) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            entered.set()
            assert leave.wait(20)

    with running(hold):
        entered.wait(20)
        assert lock.acquire(blocking=False) is False
        assert lock.acquire(timeout=0) is False
        assert lock.acquire(timeout=-0.5) is False
        start = time.monotonic()
        assert lock.acquire(timeout=0.12) is False
        assert time.monotonic() - start >= 0.12
        leave.set()
        assert lock.acquire(timeout=20) is True
        lock.release()


def test_a_waiting_thread_gets_in_at_once(lock: Lock) -> None:
    """Not after a poll's period: many hand-overs take less than as many of those."""
    turns, count = [0], 40

    def play(mine: int) -> None:
        while turns[0] < count:
            with lock:
                if turns[0] % 2 == mine:
                    turns[0] += 1

    with running(lambda: play(0), lambda: play(1)):
        pass
    assert turns[0] >= count


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_a_wait_beyond_what_the_system_counts(lock: Lock, seconds: float) -> None:
    assert list(lock._mutex.waits(seconds)) == [0]
    assert next(lock._mutex.unlocks) == 0


def test_with_gives_the_lock(lock: Lock) -> None:
    with lock as held:
        assert held is lock
        assert not held.abandoned


# --- misuse ------------------------------------------------------------------------------------------------------------


def test_it_is_not_recursive(lock: Lock) -> None:
    with lock:
        assert not lock.acquire(blocking=False)
        assert not lock.acquire(timeout=0.01)  # as threading's: only an endless wait is an error
        with pytest.raises(RuntimeError, match="not recursive"):
            lock.acquire()
    assert lock.acquire(blocking=False)
    lock.release()


def test_only_its_holder_releases_it(lock: Lock) -> None:
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()

    def release() -> None:
        with pytest.raises(RuntimeError, match="does not hold"):
            lock.release()

    with lock, running(release):
        pass


def test_a_closed_lock(lock: Lock) -> None:
    lock.acquire()
    lock.close()  # releases it
    lock.close()
    assert lock.closed
    assert repr(lock) == "<Lock closed>"
    with pytest.raises(ClosedError):
        lock.acquire()
    with pytest.raises(ClosedError):
        lock.acquire(blocking=False)
    with pytest.raises(NotSendableError, match="closed"):
        pickle.dumps(lock)


def test_a_lock_is_not_closed_under_another_thread(lock: Lock) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            entered.set()
            leave.wait(20)

    with running(hold):
        entered.wait(20)
        with pytest.raises(RuntimeError, match="another thread"):
            lock.close()
        leave.set()
    lock.close()


def test_nothing_is_left_of_a_dropped_lock(mechanism: str) -> None:
    with leak_check():
        for _ in range(50):
            lock = Lock()
            with lock:
                pass
            copy = pickle.loads(pickle.dumps(lock))
            assert copy.acquire(blocking=False)
            copy.release()
            del lock, copy


def test_a_lock_dropped_inside_does_no_harm(mechanism: str) -> None:
    """The kernel's list of what a thread holds points into the page, which must stay."""

    def drop() -> None:
        for _ in range(20):
            Lock().acquire()

    with running(drop):
        pass
    with Lock():
        pass


@requires_memfd
@pytest.mark.parametrize("kind", ["robust", "file"])
@pytest.mark.parametrize("content", [b"", bytes(8), bytes(4096), b"fdshare lock 1\0\0" + bytes(4080)])
def test_what_is_no_lock_is_refused(kind: str, content: bytes) -> None:
    with FdHandle(os.memfd_create("fake", os.MFD_CLOEXEC)) as fake:
        os.write(fake.fileno(), content)
        if (kind, len(content)) == ("file", 8):
            return
        with pytest.raises(DecodeError, match="not a lock"):
            mutex.open_mutex(fake.fileno(), kind)


@requires_memfd
def test_a_lock_of_another_c_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(Lock())
    monkeypatch.setattr(mutex, "layout_name", lambda: b"plan9".ljust(64, b"\0"))
    with pytest.raises(DecodeError, match="C library"):
        pickle.loads(data)


def test_a_lock_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DecodeError, match="unknown"):
        mutex.open_mutex(0, "spin")


# --- the dead ----------------------------------------------------------------------------------------------------------


def test_the_next_holder_is_told_of_a_death(lock: Lock) -> None:
    dies_inside(lock)
    with lock:
        assert lock.abandoned
    with lock:
        assert not lock.abandoned


def test_one_who_waits_is_told_of_a_death(lock: Lock) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        lock.acquire()
        os.write(writer, b"x")
        signal.pause()

    pid = fork(hold)
    os.read(reader, 1)
    told: list[bool] = []

    def wait() -> None:
        assert lock.acquire(timeout=20)
        told.append(lock.abandoned)
        lock.release()

    with running(wait, wait):
        assert not lock.acquire(timeout=0.05)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert sorted(told) == [False, True]
    os.close(reader)
    os.close(writer)


def test_it_is_told_again_where_the_next_holder_dies_too(lock: Lock) -> None:
    for _ in range(3):
        dies_inside(lock)
    assert lock.acquire(timeout=0)
    assert lock.abandoned
    lock.release()


def test_a_clean_end_is_no_death(lock: Lock) -> None:
    def hold() -> None:
        with lock:
            pass

    assert ended(fork(hold)) == 0
    with lock:
        assert not lock.abandoned


@requires_memfd
def test_a_thread_that_ends_inside_lets_go() -> None:
    lock = Lock()
    with running(lock.acquire):
        pass
    assert lock.acquire(timeout=20)
    assert lock.abandoned
    lock.release()
    assert lock.acquire(blocking=False)
    assert not lock.abandoned
    lock.release()


def test_a_holder_that_executes_another_program_lets_go(lock: Lock) -> None:
    def hold() -> None:
        lock.acquire()
        os.execv("/bin/true", ["true"])

    assert ended(fork(hold)) == 0
    assert lock.acquire(timeout=20)
    assert lock.abandoned
    lock.release()


# --- fork ---------------------------------------------------------------------------------------------------------------


def test_a_forked_child_is_not_the_holder(lock: Lock) -> None:
    def look() -> None:
        with pytest.raises(RuntimeError):
            lock.release()
        assert not lock.acquire(blocking=False)
        assert not lock.acquire(timeout=0.01)

    with lock:
        assert ended(fork(look)) == 0
        assert not pickle.loads(pickle.dumps(lock)).acquire(blocking=False) or lock._mutex.kind == "file"
    assert lock.acquire(blocking=False)
    assert not lock.abandoned
    lock.release()


def test_a_child_does_not_keep_its_dead_parents_lock(lock: Lock) -> None:
    reader, writer = os.pipe()

    def hold_and_fork() -> None:
        lock.acquire()
        pid = fork(signal.pause)
        os.write(writer, b"%d" % pid)
        os._exit(0)

    assert ended(fork(hold_and_fork)) == 0
    grandchild = int(os.read(reader, 20))
    try:
        assert lock.acquire(timeout=20)
        assert lock.abandoned
        lock.release()
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


@requires_memfd
def test_a_child_waits_for_its_parent(lock: Lock, counter: Counter) -> None:
    lock.acquire()
    pid = fork(lambda: increase(lock, counter, 1))
    assert counter.get() == 0
    lock.release()
    assert ended(pid) == 0
    assert counter.get() == 1


# --- travelling ----------------------------------------------------------------------------------------------------------


def acquire_later(channel: fdshare.Channel) -> bool:
    lock = channel.recv()
    with channel, lock:
        return bool(lock.abandoned)


@pytest.mark.parametrize(("mechanism", "method"), PLACES, indirect=["mechanism"])
def test_it_travels_in_a_message_to_a_running_process(mechanism: str, method: str) -> None:
    here, there = fdshare.Pipe()
    with here, Child(acquire_later, there, method=method, unwanted=(here,)) as child:
        there.close()
        lock = Lock()
        dies_inside(lock)
        here.send(lock)
        assert child.result() is True


def test_it_is_given_away_by_move(mechanism: str) -> None:
    lock = Lock()
    here, there = fdshare.Pipe()
    with here, there:
        here.send(fdshare.move([lock]))
        assert lock.closed
        (arrived,) = there.recv()
        with arrived:
            pass


@requires_memfd
def test_it_travels_as_a_pool_argument() -> None:
    mechanism = "robust"
    lock = Lock()
    with Counter.new() as counter, fdshare.ProcessPoolExecutor(2) as pool:
        for future in [pool.submit(increase_in_child, mechanism, lock, counter.handle, 50) for _ in range(6)]:
            future.result(30)
        assert counter.get() == 300


def _pickled(mechanism: str, connection: Any) -> None:
    use(mechanism)
    lock = connection.recv()
    with lock:
        connection.send("inside")
        connection.recv()
    connection.close()


@pytest.mark.parametrize("mechanism", ["robust", "file"], indirect=True)
def test_it_travels_in_a_foreign_pickle(mechanism: str) -> None:
    """By the stock Connection, whose pickles go through the broker."""
    lock = Lock()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_pickled, args=(mechanism, there))
    process.start()
    there.close()
    here.send(lock)
    assert here.recv() == "inside"
    assert not lock.acquire(blocking=False)
    here.send("leave")
    assert lock.acquire(timeout=20)
    lock.release()
    here.close()
    process.join()
    process.close()


def test_sending_it_does_not_lose_it(mechanism: str) -> None:
    """A duplicate that is closed would take a record lock along; nothing here makes one while it is sent."""
    lock = Lock()
    here, there = fdshare.Pipe()
    with here, there, lock:
        here.send(lock)
        assert ended(fork(lambda: os._exit(lock.acquire(blocking=False)))) == 0


def test_a_record_lock_that_the_system_dropped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    use_record = {"HAVE_ROBUST": False, "HAVE_REOPEN": False}
    for name, value in use_record.items():
        monkeypatch.setattr(mutex, name, value)
    lock = Lock()
    lock.acquire()
    FdHandle.dup(lock._handles[0]).close()
    dies_inside(lock)
    with pytest.raises(OSError, match="dropped the lock"):
        lock.release()
    with lock:
        assert lock.abandoned


# --- interrupts -----------------------------------------------------------------------------------------------------------


def _interrupted(mechanism: str, seed: int, times: int) -> int:
    use(mechanism)
    lock, draw, hits = Lock(), random.Random(seed), 0
    armed = False

    def strike(*args: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    stop = threading.Event()

    def contend() -> None:
        while not stop.is_set():
            with lock:
                pass

    thread = threading.Thread(target=contend)
    thread.start()
    try:
        for _ in range(times):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 300e-6))
                while True:
                    lock.acquire()
                    lock.release()
            except KeyboardInterrupt:
                hits += 1
            if lock._owner == threading.get_ident():  # struck between the two
                lock.release()
            assert lock.acquire(timeout=20), "it was taken by an interrupted call"
            lock.release()
    finally:  # a failure must not leave a process behind that contends for ever
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop.set()
        thread.join()
    return hits


@requires_memfd
def test_an_interrupted_acquire_takes_nothing() -> None:
    assert checked_child(_interrupted, "robust", 7, 500) == 500


def test_an_interrupt_ends_the_wait(mechanism: str) -> None:
    def wait() -> None:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            lock.acquire()

    lock = Lock()
    with lock:
        assert ended(fork(wait)) == 0
    assert lock.acquire(blocking=False)
    lock.release()


# --- killing at random -----------------------------------------------------------------------------------------------------


def _count_under_kills(lock: Lock, page: memoryview, target: int) -> None:
    """Increase a number until ``target``; it stands twice, so that a death between the two writes shows and can be repaired."""
    while True:
        with lock:
            page[2] += lock.abandoned
            first, second = page[0], page[1]
            if first != second:
                assert lock.abandoned, "torn, and nobody was told"
                assert first == second + 1
                page[1] = first
            elif first >= target:
                return
            else:
                page[0] = first + 1
                page[1] = first + 1


def run_under_kills(lock: Lock, processes: int, target: int, kills: int, seed: int) -> int:
    """Count in several processes while they are killed at random; return how many died inside."""
    draw = random.Random(seed)
    # A cast view writes its eight bytes at once; struct.pack_into would zero them first.
    page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    work = functools.partial(_count_under_kills, lock, page, target)
    pids = [fork(work) for _ in range(processes)]
    killed = 0
    deadline = time.monotonic() + 40 + target / 10_000
    try:
        while killed < kills and page[0] < target:
            goal = min(target, page[0] + draw.randrange(target // kills))
            while page[0] < goal:
                assert time.monotonic() < deadline, f"stuck at {page[0]}, {page[1]}"
                time.sleep(0)
            place = draw.randrange(processes)
            os.kill(pids[place], signal.SIGKILL)
            assert ended(pids[place]) in (0, -signal.SIGKILL)
            killed += 1
            pids[place] = fork(work)
        for place in range(processes):
            assert ended(pids[place]) == 0
            pids[place] = 0
        assert page[0] == page[1] == target
        return int(page[2])
    finally:
        for pid in filter(None, pids):
            os.kill(pid, signal.SIGKILL)
            ended(pid)


def test_counting_under_kills(lock: Lock) -> None:
    target = 250_000 if lock._mutex.kind == "robust" else 60_000
    run_under_kills(lock, 4, target, 60, seed=1)


@pytest.mark.soak
def test_counting_long_under_kills(lock: Lock) -> None:
    """8 processes, 100,000 increments each, until enough of them have died inside: a fast lock is done after few kills."""
    died = 0
    for seed in range(2, 12):
        died += run_under_kills(lock, 8, 800_000, 2000, seed)
        if died > 10:
            return
    pytest.fail(f"only {died} died inside")
