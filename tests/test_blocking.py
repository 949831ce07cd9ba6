"""Waits beside others: threads of C, other holders of a description, and sends of other threads."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import running, wait_until

import fdshare
from fdshare import Channel, ClosedError, rights
from fdshare.blocking import TICK_SECONDS, other_threads, python_threads
from fdshare.testing import checked_child
from fdshare.transport import FEWEST_LOOKS, MANY_UNSEEN

_START = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class ThreadOfC:
    """Runs a function in a thread that pthread_create has made, of which the threading module knows nothing."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._library = ctypes.CDLL(None)
        self._start = _START(lambda _: function() and None)
        self._id = ctypes.c_ulong()

    def __enter__(self) -> None:
        assert not self._library.pthread_create(ctypes.byref(self._id), None, self._start, None)

    def __exit__(self, *exc: object) -> None:
        assert not self._library.pthread_join(self._id, None)


def _flow(far: Channel, near: Channel, messages: int = FEWEST_LOOKS + MANY_UNSEEN + 1) -> None:
    """Pass so many that reads no longer begin with a look."""
    for number in range(messages):
        far.send(number)
    assert [near.recv() for _ in range(messages)] == list(range(messages))


def _closed_by_a_thread_of_c(make: str) -> None:
    ready, go = os.pipe()
    if make == "listener":
        thing: Any = fdshare.Listener(f"\0fdshare-{os.getpid()}")
        wait: Callable[[], Any] = thing.accept
        others: list[Any] = []
    elif make == "set":
        near, far = fdshare.Pipe()
        thing = fdshare.ChannelSet([near])
        wait, others = thing.select, [near, far]
    elif make == "event":
        thing = fdshare.Event()
        wait, others = thing.wait, []
    else:
        thing, far = fdshare.Pipe(transport=make.removesuffix(" in a flow"))
        wait, others = thing.recv, [far]
        if make.endswith(" in a flow"):
            _flow(far, thing)

    def close_soon() -> None:
        os.read(ready, 1)
        time.sleep(0.1)  # into the wait, in whichever part of it: each must end
        thing.close()

    assert not python_threads()
    with ThreadOfC(close_soon):
        assert other_threads()
        os.write(go, b"x")
        with pytest.raises(ClosedError):
            wait()
    for one in others:
        one.close()
    os.close(ready)
    os.close(go)


@pytest.mark.parametrize("make", ["seqpacket", "seqpacket in a flow", "stream", "listener", "set", "event"])
def test_a_close_by_a_thread_of_c_ends_a_wait(make: str) -> None:
    checked_child(_closed_by_a_thread_of_c, make, method="forkserver")


def _looked_for() -> None:
    near, far = fdshare.Pipe()
    with near, far:
        _flow(far, near)
        assert near._transport.looks < -MANY_UNSEEN
        signal.signal(signal.SIGALRM, lambda *_: far.send("late"))
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # into the wait: the read before it has found nothing
        assert near.recv() == "late"
        assert near._transport.looks == FEWEST_LOOKS
        far.send("next")
        assert near.recv() == "next"
        assert near._transport.looks == FEWEST_LOOKS - 1


def test_reads_of_a_flow_begin_without_a_look_until_one_finds_nothing() -> None:
    checked_child(_looked_for, method="forkserver")


def _received_beside_a_thread_of_c() -> None:
    near, far = fdshare.Pipe()
    count = 3000
    theirs: list[int] = []
    mine: list[int] = []

    def receive(into: list[int]) -> None:
        try:
            while True:
                into.append(far.recv())
        except fdshare.PeerClosedError:
            pass

    pid = os.fork()
    if not pid:
        far.close()
        for number in range(count):
            near.send(number)
        os._exit(0)
    near.close()
    with ThreadOfC(lambda: receive(theirs)):
        receive(mine)
    os.waitpid(pid, 0)
    far.close()
    assert sorted(mine + theirs) == list(range(count))


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
def test_a_close_beside_a_thread_of_python_waits_for_no_tick(transport: str) -> None:
    """What wakes the wait is there from its beginning; the best of some, as the machine may be busy."""

    def seconds_until_it_can_be_woken() -> float:
        near, far = fdshare.Pipe(transport=transport)
        with far, near:

            def wait() -> None:
                with pytest.raises(ClosedError):
                    near.recv(timeout=30)

            begin = time.monotonic()
            with running(wait):
                wait_until(lambda: bool(near._transport._wakers))
                seconds = time.monotonic() - begin
                near.close()
        return seconds

    assert min(seconds_until_it_can_be_woken() for _ in range(8)) < TICK_SECONDS / 2


def test_nothing_arrives_twice_beside_a_thread_of_c() -> None:
    checked_child(_received_beside_a_thread_of_c, method="forkserver")


def test_a_send_on_a_stream_holds_its_deadline_behind_that_of_another_thread() -> None:
    here, there = fdshare.Pipe(transport="stream")
    with pytest.raises(TimeoutError):
        while True:  # until it is full
            here.send(bytes(60_000), timeout=0.0)

    def send_for_ever() -> None:
        with pytest.raises(ClosedError):
            here.send("first")

    with there, running(send_for_ever):
        end = time.monotonic() + 20
        while not here._transport._wakers:  # it waits, and has its turn
            assert time.monotonic() < end
            time.sleep(0.005)
        for timeout in (0.0, 0.1):
            before = time.monotonic()
            with pytest.raises(TimeoutError):
                here.send("late", timeout=timeout)
            assert time.monotonic() - before < 5
        here.close()


def test_no_wait_writes_into_a_description_that_others_hold(transport: str) -> None:
    here, there = fdshare.Pipe(transport=transport)
    received: list[object] = []
    with there, here, socket.socket(fileno=os.dup(here.fileno())) as held:
        with running(lambda: received.append(here.recv())):
            with pytest.raises(TimeoutError):
                there.recv(timeout=0.1)  # meanwhile the other one has begun to wait
            there.send(1)
        assert received == [1]
        assert os.get_blocking(held.fileno())
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            assert not any(held.getsockopt(socket.SOL_SOCKET, option, 16))


def test_threads_share_no_poll_object() -> None:
    """Where there is no /proc each thread that receives many descriptors asks for room by one."""
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(300):
                rights.is_top_free(200)
        except RuntimeError as error:
            errors.append(error)

    with running(ask), running(ask), running(ask):
        pass
    assert not errors
