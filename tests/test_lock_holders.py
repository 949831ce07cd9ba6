"""Lock: holders that the kernel passes over, and other PID namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import resource
import signal
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
from helpers import running

import fdshare
from fdshare import DecodeError, Lock, holders, mutex
from fdshare.testing import checked_child

pytestmark = pytest.mark.skipif(not mutex._is_robust_here(), reason="needs robust mutexes")

CLONE_NEWPID = 0x2000_0000


@pytest.fixture
def lock() -> Iterator[Lock]:
    lock = Lock()
    yield lock
    lock.close()


def fork(function: Callable[[], object]) -> int:
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


@contextlib.contextmanager
def holder_that_executes(lock: Lock, *, thread: bool) -> Iterator[Callable[[], object]]:
    """A child that holds the lock, and on a call executes a program, by another thread or by its main one."""
    channel, theirs = socket.socketpair()

    def hold() -> None:
        lock.acquire()
        theirs.send(b"inside")
        theirs.recv(1)
        os.dup2(theirs.fileno(), 1)
        os.execv("/bin/sh", ["sh", "-c", "echo executed; exec sleep 60"])

    def start() -> None:
        if not thread:
            hold()
        threading.Thread(target=hold).start()
        signal.pause()

    pid = fork(start)
    with channel, theirs:
        assert channel.recv(10) == b"inside"
        yield lambda: channel.send(b"x") and channel.recv(10)
    os.kill(pid, signal.SIGKILL)
    ended(pid)


# --- left taken by the kernel ------------------------------------------------------------------------------------------

BY_WHICH = pytest.mark.parametrize("thread", [True, False], ids=["by another thread", "by the main thread"])


@BY_WHICH
def test_who_executes_a_program_lets_go(lock: Lock, thread: bool) -> None:
    with holder_that_executes(lock, thread=thread) as execute:
        assert lock.locked()
        execute()
        assert not lock.locked()
        assert lock.acquire(blocking=False)
        assert lock.abandoned
        lock.release()
        with lock:
            assert not lock.abandoned


@BY_WHICH
def test_who_waits_when_a_program_is_executed_gets_in(lock: Lock, thread: bool) -> None:
    got, waits = [], threading.Semaphore(0)

    def wait() -> None:
        waits.release()
        assert lock.acquire(timeout=30)
        got.append(lock.abandoned)
        lock.release()

    with holder_that_executes(lock, thread=thread) as execute, running(wait, wait):
        for _ in range(2):
            assert waits.acquire(timeout=20)
        execute()
    assert sorted(got) == [False, True]


def _more_than_the_kernel_releases() -> list[bool]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    locks = [Lock() for _ in range(2060)]

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(hold)
    assert ended(pid) == -signal.SIGKILL
    told = [lock.acquire(blocking=False) and lock.abandoned for lock in locks]
    for lock in locks:
        lock.close()
    return told


def test_a_dead_holder_of_more_than_the_kernel_releases() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("needs 4096 descriptors")
    assert all(checked_child(_more_than_the_kernel_releases))


@pytest.mark.parametrize("end", ["unreaped", "exec"])
def test_a_holder_whose_number_is_still_there(monkeypatch: pytest.MonkeyPatch, lock: Lock, end: str) -> None:
    """Of the kernel's list nothing is left to be walked; what stands in the mutex is as it leaves it."""
    monkeypatch.setattr(mutex, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(mutex.RobustMutex, "looks", 0.02)
    pid = fork(lambda: os.execv("/bin/sleep", ["sleep", "60"] if end == "exec" else ["sleep", "0"]))
    if end == "unreaped":
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    else:
        while holders.is_holder(pid, lock._mutex._inode):  # type: ignore[attr-defined]  # of a robust one
            pass
    lock._mutex._word.value = pid  # type: ignore[attr-defined]  # of a robust one
    assert lock.acquire(timeout=20)
    assert lock.abandoned
    lock.release()
    os.kill(pid, signal.SIGKILL)
    ended(pid)


def test_a_holder_that_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch, lock: Lock) -> None:
    monkeypatch.setattr(mutex, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(mutex.RobustMutex, "looks", 0.01)
    reader, writer = os.pipe()

    def hold() -> None:
        with lock:
            os.write(writer, b"x")
            signal.pause()

    pid = fork(hold)
    os.read(reader, 1)
    assert not lock.acquire(timeout=0.15)
    assert lock.locked()
    with running(lambda: None):
        assert not lock.acquire(timeout=0.05)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert lock.acquire(timeout=20)
    assert lock.abandoned
    lock.release()
    os.close(reader)
    os.close(writer)


# --- other PID namespaces ------------------------------------------------------------------------------------------------


def elsewhere(function: Callable[[], object]) -> None:
    """Run a function in a forked child that is the first process of a PID namespace."""

    def unshare() -> None:
        if ctypes.CDLL(None).unshare(CLONE_NEWPID):
            os._exit(77)
        os._exit(ended(fork(function)))

    status = ended(fork(unshare))
    if status == 77:
        pytest.skip("needs the right to make a PID namespace")
    assert status == 0


def test_a_lock_is_refused_in_another_namespace(lock: Lock) -> None:
    here, there = fdshare.Pipe()

    def receive() -> None:
        with pytest.raises(DecodeError, match="PID namespace"):
            there.recv(timeout=20)
        assert there.recv(timeout=20) == "and the channel goes on"
        with pytest.raises(DecodeError, match="PID namespace"):
            pickle.loads(pickle.dumps(lock))

    with here, there:
        here.send([lock])
        here.send("and the channel goes on")
        elsewhere(receive)


def test_a_child_in_another_namespace_is_told(lock: Lock) -> None:
    def use() -> None:
        for arguments in ({}, {"blocking": False}, {"timeout": 0.1}):
            with pytest.raises(OSError, match="PID namespace") as caught:
                lock.acquire(**arguments)  # type: ignore[arg-type]  # mypy takes them all for one
            assert caught.value.errno == errno.EXDEV
        with pytest.raises(RuntimeError):
            lock.release()
        with Lock() as own:  # of its own namespace
            assert own.locked()
        assert ended(fork(lambda: own.acquire(timeout=20))) == 0

    elsewhere(use)
    with lock:
        assert not lock.abandoned


def test_a_file_lock_is_of_use_in_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutex, "HAVE_ROBUST", False)
    lock = Lock()

    def use() -> None:
        assert not lock.acquire(timeout=0.02)

    with lock:
        elsewhere(use)
    elsewhere(lock.acquire)
    with lock:
        assert lock.abandoned


def test_a_lock_of_a_namespace_that_is_not_told_is_never_taken_from_its_holder(
    monkeypatch: pytest.MonkeyPatch, lock: Lock
) -> None:
    monkeypatch.setattr(holders, "_namespace", 0)
    word = lock._mutex._word  # type: ignore[attr-defined]  # of a robust one
    word.value = 0x3FFF_FFF0  # no thread's number
    assert not lock.acquire(blocking=False)
    assert pickle.loads(pickle.dumps(lock)).acquire(blocking=False) is False
    word.value = 0


def test_a_namespace_is_told_without_proc() -> None:
    with open("/proc/self/ns/pid") as link:
        inode = os.fstat(link.fileno()).st_ino
    assert checked_child(_namespace_without_proc) in (inode, 0)


def _namespace_without_proc() -> int:
    stat = os.stat

    def refuse(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if path == "/proc/self/ns/pid":
            raise FileNotFoundError
        return stat(path, *args, **kwargs)  # type: ignore[arg-type]  # as they came

    os.stat = refuse  # type: ignore[assignment]  # in this process, which ends
    try:
        return holders._ask_namespace()
    finally:
        os.stat = stat


def test_the_page_names_its_namespace(lock: Lock) -> None:
    page = os.pread(lock._handles[0].fileno(), 8, mutex._NAMESPACE_AT)
    assert struct.unpack("=Q", page) == (os.stat("/proc/self/ns/pid").st_ino,)
