"""Semaphore and Event: units and a state that any thread of any process takes, gives, sets and waits for."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import pickle
import random
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import running, wait_until

import fdshare
from fdshare import ClosedError, Event, NotSendableError, Semaphore, sync, travelling
from fdshare.testing import Child, checked_child, leak_check

MECHANISMS = ("eventfd", "pipe")


@pytest.fixture(params=MECHANISMS, autouse=True)
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With eventfd, and without, as on macOS."""
    name: str = request.param
    monkeypatch.setattr(sync, "HAVE_EVENTFD", name == "eventfd")
    return name


# Each mechanism in forked children, and one in children started otherwise.
PLACES = [("eventfd", "fork"), ("eventfd", "forkserver"), ("pipe", "fork")]


@pytest.fixture
def event() -> Iterator[Event]:
    event = Event()
    yield event
    event.close()


# --- semaphore ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, 5, 3000])
def test_as_many_units_as_it_has(value: int) -> None:
    semaphore = Semaphore(value)
    assert [semaphore.acquire(blocking=False) for _ in range(value + 2)] == [True] * value + [False] * 2
    semaphore.release(2)
    semaphore.release()
    assert [semaphore.acquire(timeout=0) for _ in range(4)] == [True, True, True, False]


def test_a_wait_for_a_unit_that_does_not_come() -> None:
    semaphore = Semaphore(0)
    start = time.monotonic()
    assert not semaphore.acquire(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    assert not semaphore.acquire(timeout=-1)


@pytest.mark.parametrize("value", [-1, 2**64 - 1])
def test_a_semaphore_of_no_possible_value(value: int) -> None:
    with pytest.raises(ValueError, match="units"):
        Semaphore(value)
    with pytest.raises(TypeError):
        Semaphore(float(value))  # type: ignore[arg-type]


def test_more_units_than_can_be_counted(mechanism: str) -> None:
    semaphore = Semaphore(2**64 - 2 if mechanism == "eventfd" else 1)
    with pytest.raises(ValueError, match="count"):
        semaphore.release(1 if mechanism == "eventfd" else 1 << 24)
    with pytest.raises(ValueError, match="one unit"):
        semaphore.release(0)
    assert semaphore.acquire(blocking=False)


def hold_a_unit(semaphore: Semaphore, inside: Semaphore, times: int) -> None:
    for _ in range(times):
        with semaphore:
            assert inside.acquire(blocking=False), "more inside than units"
            inside.release()


@pytest.mark.parametrize(("mechanism", "method"), PLACES, indirect=["mechanism"])
def test_no_more_inside_than_units(mechanism: str, method: str) -> None:
    semaphore, room = Semaphore(2), Semaphore(2)
    children = [Child(hold_a_unit, semaphore, room, 50, method=method) for _ in range(2)]
    with running(*[functools.partial(hold_a_unit, semaphore, room, 50)] * 2):
        pass
    for child in children:
        child.result()
    assert [semaphore.acquire(timeout=0) for _ in range(3)] == [True, True, False]


def test_every_unit_is_taken_once() -> None:
    semaphore, count = Semaphore(0), 1000
    taken = [0] * 4

    def take(place: int) -> None:
        while semaphore.acquire(timeout=0.3):
            taken[place] += 1

    with running(*(functools.partial(take, place) for place in range(4))):
        for _ in range(count // 2):
            semaphore.release()
        semaphore.release(count // 2)
    assert sum(taken) == count


def test_it_is_readable_while_there_is_a_unit() -> None:
    semaphore, event = Semaphore(1), Event()
    assert fdshare.wait([event, semaphore], timeout=20) == [semaphore]
    semaphore.acquire()
    assert fdshare.wait([event, semaphore], timeout=0) == []


def _interrupted_units(eventfd: bool, seed: int, times: int) -> int:
    sync.HAVE_EVENTFD = eventfd
    semaphore, draw, hits, armed = Semaphore(10), random.Random(seed), 0, False

    def strike(*args: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    for _ in range(times):
        held = 0
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 200e-6))
            while True:
                held += semaphore.acquire()  # type: ignore[operator]
                held -= 1
                semaphore.release()
        except KeyboardInterrupt:
            hits += 1
        units = 0
        while semaphore.acquire(blocking=False):
            units += 1
        # One may be held: the interrupt struck between acquire and release, or after the write in release.
        assert units in (9, 10), "a unit was lost or made"
        semaphore.release(10)
    return hits


def test_an_interrupted_acquire_loses_no_unit(mechanism: str) -> None:
    assert checked_child(_interrupted_units, mechanism == "eventfd", 3, 200) == 200


# --- event ---------------------------------------------------------------------------------------------------------------


def test_set_and_cleared(event: Event) -> None:
    assert not event.is_set()
    assert not event.wait(0)
    for _ in range(3):
        event.set()
    assert event.is_set()
    assert event.wait()
    assert event.wait(-1)
    assert event.wait(float("inf"))
    event.clear()
    event.clear()
    assert not event.is_set()
    start = time.monotonic()
    assert event.wait(0.05) is False
    assert time.monotonic() - start >= 0.05


def test_setting_it_without_end(event: Event) -> None:
    for _ in range(70_000):  # more than a pipe holds
        event.set()
    assert event.is_set()
    event.clear()
    assert not event.is_set()


def answer(start: Event, done: Event) -> None:
    assert start.wait(30)
    done.set()


@pytest.mark.parametrize(("mechanism", "method"), PLACES, indirect=["mechanism"])
def test_it_lets_everybody_pass(mechanism: str, event: Event, method: str) -> None:
    done = [Event() for _ in range(3)]
    children = [Child(answer, event, each, method=method) for each in done[:2]]
    with running(functools.partial(answer, event, done[2])):
        assert not any(each.is_set() for each in done)
        event.set()
    for child in children:
        child.result()
    assert all(each.wait(0) for each in done)


def test_it_can_be_waited_for_among_others(event: Event) -> None:
    other = Event()
    a, b = fdshare.Pipe()
    with a, b, selectors.DefaultSelector() as selector, fdshare.ChannelSet([event, a]) as channels:
        assert fdshare.wait([event, other, a], timeout=0) == []
        event.set()
        assert fdshare.wait([other, event, a]) == [event]
        assert channels.select() == [event]
        selector.register(event, selectors.EVENT_READ)
        assert len(selector.select(20)) == 1


def test_an_event_loop_can_wait_for_it(event: Event) -> None:
    async def wait() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(event.fileno(), told.set)
        event.set()
        await asyncio.wait_for(told.wait(), 20)
        loop.remove_reader(event.fileno())

    asyncio.run(wait())


def test_an_interrupt_ends_the_wait(event: Event) -> None:
    def strike(*args: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for wait in (event.wait, Semaphore(0).acquire):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                wait()
    finally:
        signal.signal(signal.SIGALRM, before)


# --- both -------------------------------------------------------------------------------------------------------------------


def _relay(connection: Any) -> None:
    semaphore, event = connection.recv()
    semaphore.release(3)
    event.set()
    connection.close()


def test_they_travel_in_foreign_pickles_and_messages(event: Event) -> None:
    semaphore = Semaphore(0)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_relay, args=(there,))
    process.start()
    there.close()
    here.send((semaphore, event))
    assert event.wait(30)
    process.join()
    process.close()
    here.close()
    a, b = fdshare.Pipe()
    with a, b:
        a.send({"units": semaphore})
        arrived = b.recv()["units"]
    assert [each.acquire(blocking=False) for each in (semaphore, arrived) * 2] == [True, True, True, False]


def test_they_travel_as_pool_arguments_and_results(event: Event) -> None:
    with fdshare.ProcessPoolExecutor(1) as pool:
        pool.submit(Event.set, event).result(30)
        assert event.is_set()
        made = pool.submit(Semaphore, 7).result(30)
    assert sum(made.acquire(blocking=False) for _ in range(9)) == 7


@pytest.mark.parametrize("cls", [Event, Semaphore])
def test_a_closed_one(cls: type[Any]) -> None:
    thing = cls()
    assert not thing.closed
    thing.close()
    thing.close()
    assert thing.closed
    assert repr(thing) == f"<{cls.__name__} closed>"
    calls = [
        thing.fileno,
        *(
            [thing.set, thing.clear, thing.is_set, thing.wait]
            if cls is Event
            else [thing.acquire, thing.release]
        ),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(NotSendableError, match="closed"):
        pickle.dumps(thing)


def test_moved_ones_are_closed() -> None:
    a, b = fdshare.Pipe()
    with a, b:
        event = Event()
        a.send(fdshare.move(event))
        assert event.closed
        assert not b.recv().is_set()


def test_nothing_is_left_of_dropped_ones() -> None:
    with leak_check():
        for _ in range(20):
            things = [Event(), Semaphore(2), pickle.loads(pickle.dumps(Event()))]
        del things


def test_killing_who_uses_them_blocks_nobody(event: Event) -> None:
    semaphore = Semaphore(1)
    for _ in range(20):
        pid = os.fork()
        if not pid:
            while True:
                with semaphore:
                    event.set()
                    event.clear()
        assert not threading.Event().wait(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not semaphore.acquire(blocking=False):  # it died with the unit
            semaphore.release()
        else:
            semaphore.release()
    event.set()
    assert event.wait(0)


def is_waited_for(thing: Event | Semaphore) -> bool:
    return any(handle is thing._handles[0] for handle, _ in travelling._waiting)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("make", [Event, functools.partial(Semaphore, 0)])
def test_a_close_ends_the_waits_of_other_threads(make: Any, timeout: float | None) -> None:
    thing = make()

    def wait() -> None:
        with pytest.raises(ClosedError):
            (thing.wait if make is Event else thing.acquire)(timeout=timeout)

    with running(wait, wait):
        wait_until(lambda: is_waited_for(thing))
        thing.close()


def test_a_child_that_was_forked_beside_a_wait_closes_in_peace(event: Event) -> None:
    with running(lambda: event.wait(60)):
        wait_until(lambda: is_waited_for(event))
        pid = os.fork()
        if not pid:
            try:
                event.close()
            finally:
                os._exit(0 if event.closed else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert not event.wait(0.01)
        assert is_waited_for(event)
        event.set()
