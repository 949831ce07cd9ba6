"""ProcessHandle: waiting for, asking and signalling one process, from itself, its parent, and processes that are neither."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import METHODS, running

import fdshare
from fdshare import ClosedError, DecodeError, Event, FdHandle, NotSendableError, ProcessHandle, processes
from fdshare.testing import Child, leak_check

SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]


class Target:
    """A child that ends with a status when it is told to."""

    def __init__(self, status: int = 0) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        self.pid = os.fork()
        if not self.pid:
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR2])
            signal.sigwait([signal.SIGUSR2])
            os._exit(status)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def tell(self) -> None:
        """Tell it to end."""
        os.kill(self.pid, signal.SIGUSR2)

    def end(self) -> None:
        """Let it end; it is a zombie then."""
        self.tell()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> int:
        """Let it end, and wait for it."""
        if not self.pid:
            return 0
        self.tell()
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target(42)
    yield target
    target.reap()


@pytest.fixture
def handle(target: Target) -> Iterator[ProcessHandle]:
    with ProcessHandle(target.pid) as handle:
        yield handle


# --- what it says ---------------------------------------------------------------------------------------------------


def test_a_child_of_ours(target: Target, handle: ProcessHandle) -> None:
    assert handle.pid == target.pid
    assert handle.alive
    assert handle.exitcode is None
    assert repr(handle) == f"<ProcessHandle pid={target.pid} runs>"
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=str(target.pid)):
        handle.wait(0.05)
    assert time.monotonic() - start >= 0.05
    target.end()
    assert handle.wait() == handle.wait(0) == handle.exitcode == 42
    assert not handle.alive
    assert repr(handle) == f"<ProcessHandle pid={handle.pid} exitcode=42>"


def test_its_status_is_left_to_whoever_started_it(target: Target, handle: ProcessHandle) -> None:
    target.end()
    assert handle.wait(20) == 42
    assert target.reap() == 42
    assert handle.wait(0) == 42


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_is_its_end(target: Target, handle: ProcessHandle, signum: int) -> None:
    {signal.SIGTERM: handle.terminate, signal.SIGKILL: handle.kill}.get(
        signal.Signals(signum), lambda: handle.send_signal(signum)
    )()
    assert handle.wait(20) == -signum


def test_after_its_end_a_signal_goes_nowhere(target: Target, handle: ProcessHandle) -> None:
    target.reap()
    with pytest.raises(ProcessLookupError):
        handle.send_signal(0)
    handle.terminate()
    handle.kill()


def test_oneself() -> None:
    with ProcessHandle(os.getpid()) as handle:
        assert handle.alive
        handle.send_signal(0)


@pytest.mark.parametrize("when", ["before the parent has waited", "afterwards"])
@pytest.mark.parametrize("source", ["all", "old kernel"])
def test_the_status_of_a_process_that_is_not_ours(
    when: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grandchild: the kernel tells its parent, but /proc and new kernels tell us too."""
    monkeypatch.setattr(processes, "HAVE_EXIT_INFO", source == "all")
    here, there = fdshare.Pipe()
    pid = os.fork()
    if not pid:
        here.close()
        target = Target(7)
        with ProcessHandle(target.pid) as handle:
            there.send(handle)
        there.recv()
        target.end()
        if when == "afterwards":
            target.reap()
        there.send("ended")
        there.recv()
        target.reap()
        os._exit(0)
    there.close()
    with here, here.recv() as handle:
        assert handle.exitcode is None
        here.send("end")
        here.recv()
        expected = 7
        if when == "afterwards" and not (source == "all" and exit_info_works()):
            expected = None
        assert handle.wait(20) == expected
        here.send("leave")
    os.waitpid(pid, 0)


def exit_info_works() -> bool:
    """Whether this kernel tells the status of a process whose parent has waited (6.15)."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15)


def look_as_nobody(handle: ProcessHandle, ready: Event) -> int | None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with handle:
        with pytest.raises(PermissionError):
            handle.send_signal(0)
        ready.set()
        return handle.wait(20)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_stranger_is_not_told(target: Target, handle: ProcessHandle) -> None:
    """To whom /proc shows a status of zero, whatever it is."""
    ready = Event()
    child = Child(look_as_nobody, handle, ready)
    assert ready.wait(20)
    target.end()
    assert child.result() is None


def test_a_status_once_known_travels_along(
    target: Target, handle: ProcessHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "HAVE_EXIT_INFO", False)
    target.end()
    here, there = fdshare.Pipe()
    with here, there:
        here.send(handle)
        target.reap()
        with there.recv() as again:
            assert again.wait(0) == 42


# --- what it is made of --------------------------------------------------------------------------------------------------


def test_a_popen_keeps_its_status() -> None:
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as popen, ProcessHandle(popen) as handle:
        assert handle.pid == popen.pid
        handle.kill()
        assert handle.wait(20) == -signal.SIGKILL
        assert popen.returncode is None
        assert popen.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            ProcessHandle(popen)
        popen.pid = os.getpid()  # as if its number had been given to another
        with pytest.raises(ProcessLookupError, match="has ended"):
            ProcessHandle(popen)


@pytest.mark.parametrize("method", METHODS)
def test_a_process_of_multiprocessing(method: str) -> None:
    event = Event()
    process = multiprocessing.get_context(method).Process(target=Event.wait, args=(event,))
    with pytest.raises(ValueError, match="not started"):
        ProcessHandle(process)
    process.start()
    with ProcessHandle(process) as handle:
        assert handle.alive
        event.set()
        assert handle.wait(20) == 0
        process.join()
        assert process.exitcode == 0
        assert handle.wait(0) == 0
    with pytest.raises(ProcessLookupError):
        ProcessHandle(process)
    process.close()


@pytest.mark.parametrize("wrong", [0, -1])
def test_no_process_has_such_a_number(wrong: int) -> None:
    with pytest.raises(ValueError, match="number"):
        ProcessHandle(wrong)


@pytest.mark.parametrize("wrong", [2**31 - 1, 2**31, 2**32 + 1, 2**64, 10**30])
def test_no_process_has_a_number_as_large(wrong: int) -> None:
    class Started:
        pid, returncode = wrong, None

    for of in (wrong, Started()):
        with pytest.raises(ProcessLookupError):
            ProcessHandle(of)


@pytest.mark.parametrize("wrong", ["1", 1.0, True, object()])
def test_no_pid(wrong: Any) -> None:
    with pytest.raises(TypeError, match="pid"):
        ProcessHandle(wrong)


def test_a_process_that_is_gone() -> None:
    target = Target()
    pid = target.pid
    target.reap()
    with pytest.raises(ProcessLookupError):
        ProcessHandle(pid)


def test_a_system_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HAVE_PIDFD", False)
    with pytest.raises(NotImplementedError, match="Linux"):
        ProcessHandle(os.getpid())


# --- waiting among others ------------------------------------------------------------------------------------------------


def test_it_can_be_waited_for_among_others(target: Target, handle: ProcessHandle) -> None:
    a, b = fdshare.Pipe()
    with a, b, selectors.DefaultSelector() as selector, fdshare.ChannelSet([handle, a]) as channels:
        assert fdshare.wait([handle, a], timeout=0) == []
        target.end()
        assert fdshare.wait([a, handle], timeout=20) == [handle]
        assert channels.select(20) == [handle]
        selector.register(handle, selectors.EVENT_READ)
        assert len(selector.select(20)) == 1


def test_an_event_loop_can_wait_for_it(target: Target, handle: ProcessHandle) -> None:
    async def wait() -> int | None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(handle, ended.set)
        try:
            target.tell()
            await asyncio.wait_for(ended.wait(), 20)
        finally:
            loop.remove_reader(handle)
        return handle.wait(0)

    assert asyncio.run(wait()) == 42


def test_several_threads_wait(target: Target, handle: ProcessHandle) -> None:
    found: list[int | None] = []
    with running(*[lambda: found.append(handle.wait(20))] * 3):
        target.end()
    assert found == [42] * 3


# --- travelling ---------------------------------------------------------------------------------------------------------------


def wait_there(handle: ProcessHandle, ready: Event) -> tuple[bool, int | None]:
    with handle:
        alive = handle.alive
        ready.set()
        return alive, handle.wait(30)


@pytest.mark.parametrize("method", METHODS)
def test_another_process_waits_for_it(target: Target, handle: ProcessHandle, method: str) -> None:
    ready = Event()
    child = Child(wait_there, handle, ready, method=method)
    assert ready.wait(20)
    target.end()
    assert child.result() == (True, 42)


def test_another_process_kills_it(target: Target, handle: ProcessHandle) -> None:
    with fdshare.ProcessPoolExecutor(1) as pool:
        pool.submit(ProcessHandle.kill, handle).result(30)
    assert handle.wait(20) == -signal.SIGKILL


def test_it_travels_in_a_foreign_pickle_and_is_moved(target: Target, handle: ProcessHandle) -> None:
    with pickle.loads(pickle.dumps(handle)) as again:
        assert again.pid == handle.pid
        assert again.alive
        here, there = fdshare.Pipe()
        with here, there:
            here.send(fdshare.move(again))
            assert again.closed
            with there.recv() as third:
                third.kill()
    assert handle.wait(20) == -signal.SIGKILL


def test_what_is_no_process_is_refused() -> None:
    with FdHandle(os.eventfd(0)) as other, pytest.raises(DecodeError, match="something else"):
        processes.rebuild_process((other,), 1, None)  # type: ignore[arg-type]


def test_a_closed_handle(target: Target) -> None:
    handle = ProcessHandle(target.pid)
    handle.close()
    handle.close()
    assert handle.pid == target.pid
    assert repr(handle) == f"<ProcessHandle closed pid={target.pid}>"
    for call in (handle.wait, handle.kill, handle.fileno, lambda: handle.alive, lambda: handle.exitcode):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(NotSendableError, match="closed"):
        pickle.dumps(handle)


def test_nothing_is_left_of_a_dropped_handle(target: Target) -> None:
    with leak_check():
        for _ in range(5):
            ProcessHandle(target.pid)


# --- races ----------------------------------------------------------------------------------------------------------------------


def test_no_signal_meets_the_next_process_of_the_number() -> None:
    """Handles of ended processes are signalled while others start: none of those dies of it."""
    handles = []
    for _ in range(20):
        target = Target()
        handles.append(ProcessHandle(target.pid))
        target.reap()
    survivors = [Target(3) for _ in range(20)]
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            handle.send_signal(signal.SIGKILL)
        handle.kill()
        handle.close()
    for target in survivors:
        assert target.reap() == 3


def test_its_end_is_seen_while_its_parent_waits_for_it() -> None:
    """The status is asked for in the very moment in which somebody takes it: it is known, or None, never wrong."""
    for _ in range(25):
        target = Target(9)
        with ProcessHandle(target.pid) as handle:
            reaper = threading.Thread(target=target.reap)
            reaper.start()
            assert handle.wait(20) == 9 if exit_info_works() else handle.wait(20) in (9, None)
            reaper.join()
