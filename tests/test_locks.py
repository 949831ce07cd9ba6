"""Locks of one process under interrupts: after a ``with`` that was left, however, nobody is inside."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fdshare import locks

MAKERS = pytest.mark.parametrize("make", [locks.make_lock, locks.make_rlock], ids=["lock", "rlock"])
TRIES = 1000
LONGEST = 60e-6  # seconds until an interrupt: that many dozens of times through the block


class Interrupt(Exception):
    """What the signal handler raises."""


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Have ``Interrupt`` raised in this thread, once, after some seconds."""

    def strike(*args: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, strike)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def go_in_and_out(lock: Any) -> None:
    while True:
        with lock:
            pass


@MAKERS
def test_no_interrupt_leaves_a_lock_taken(make: Callable[[], Any], alarm: Callable[[float], None]) -> None:
    draw = random.Random(1)
    lock = make()
    for _ in range(TRIES):
        with pytest.raises(Interrupt):
            alarm(draw.uniform(1e-6, LONGEST))
            go_in_and_out(lock)
        assert is_free(lock)


def is_free(lock: Any) -> bool:
    """Whether another thread could take it."""
    found: list[bool] = []

    def look() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


@MAKERS
def test_it_excludes_and_lets_in(make: Callable[[], Any]) -> None:
    lock = make()
    with lock as taken:
        assert taken
        assert not is_free(lock)
    assert is_free(lock)
    with pytest.raises(KeyError), lock:
        raise KeyError
    assert is_free(lock)
    assert lock.acquire(timeout=1)
    lock.release()


@MAKERS
def test_a_condition_waits_over_it(make: Callable[[], Any]) -> None:
    lock = make()
    condition = threading.Condition(lock)
    waiting = threading.Event()
    ready = False

    def wait() -> None:
        with condition:
            waiting.set()
            assert condition.wait_for(lambda: ready, 20)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(20)
    with lock:
        ready = True
        condition.notify_all()
    thread.join(20)
    assert not thread.is_alive()


def test_rlock_lets_its_thread_in_again() -> None:
    lock = locks.make_rlock()
    condition = threading.Condition(lock)
    with lock, condition, lock:
        assert lock._is_owned()
        assert not condition.wait(0.001)  # let go of thrice, and taken thrice
        assert not is_free(lock)
    assert is_free(lock)
    assert not lock._is_owned()
