"""Queue: every item once, whoever puts, gets, waits, closes or dies; over SEQPACKET, and over datagrams where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import multiprocessing
import os
import pickle
import random
import resource
import select
import selectors
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import KINDS, METHODS, QUICK_METHODS, compose, running, verify, wait_until

import fdshare
from fdshare import (
    ClosedError,
    DecodeError,
    DescriptorsLostError,
    FdLimitError,
    NotSendableError,
    PeerClosedError,
    ProtocolError,
    Queue,
    QueueClosedError,
    ends,
)
from fdshare.blocking import other_threads
from fdshare.rights import open_numbers
from fdshare.testing import Child, checked_child, leak_check, numbered_handle, read_number

MIB = 1 << 20
SOCKETS = ("seqpacket", "dgram")


@pytest.fixture(params=SOCKETS)
def sockets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With SEQPACKET, and without, as on macOS."""
    name: str = request.param
    monkeypatch.setattr(ends, "HAVE_SEQPACKET", name == "seqpacket")
    return name


@pytest.fixture
def queue(sockets: str) -> Iterator[Queue]:
    with Queue() as queue:
        yield queue


def put_all(queue: Queue, numbers: range, kinds: tuple[str, ...] = KINDS) -> None:
    for number in numbers:
        message, handles = compose(number, kinds[number % len(kinds)])
        try:
            queue.put(message, timeout=30)
        finally:
            for handle in handles:
                handle.close()


def get_all(queue: Queue, count: int) -> list[int]:
    return [verify(queue.get(timeout=30)) for _ in range(count)]


@contextlib.contextmanager
def forked(function: Any, *args: Any) -> Iterator[int]:
    """Run a function in a forked child beside the block, which must not outlive it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
    if not pid:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ChildProcessError):
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGKILL)


# --- items --------------------------------------------------------------------------------------------------


def test_items_of_every_kind_in_their_order(queue: Queue) -> None:
    with running(lambda: put_all(queue, range(80))):
        assert get_all(queue, 80) == list(range(80))


def test_items_without_a_reader_yet(queue: Queue) -> None:
    put_all(queue, range(16))
    assert get_all(queue, 16) == list(range(16))


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_each_item_goes_to_exactly_one_of_many(method: str) -> None:
    """Producers and consumers in processes, and in threads beside them."""
    queue, found = Queue(), Queue()
    each, places = 64, 4
    producers = [
        Child(put_all, queue, range(place * each, (place + 1) * each), method=method) for place in (0, 1)
    ]
    consumers = [Child(pass_on, queue, found, method=method) for _ in range(2)]
    here: list[int] = []
    with running(
        functools.partial(put_all, queue, range(2 * each, 3 * each)),
        functools.partial(put_all, queue, range(3 * each, 4 * each)),
        functools.partial(note_all, queue, here),
        functools.partial(note_all, queue, here),
    ):
        for child in producers:
            child.result()
        wait_until(lambda: len(here) + found_so_far(found, here) == places * each)
        queue.close()
    for child in consumers:
        child.result()
    assert sorted(here) == list(range(places * each))


def found_so_far(found: Queue, here: list[int]) -> int:
    while not found.empty():
        here.append(found.get())
    return 0


def note_all(queue: Queue, numbers: list[int]) -> None:
    for item in queue:
        numbers.append(verify(item))


def pass_on(queue: Queue, found: Queue) -> None:
    for item in queue:
        found.put(verify(item))


def put_and_vanish(queue: Queue, how: str) -> None:
    with numbered_handle(5) as handle:
        queue.put("last words")
        queue.put([handle])
        queue.put(bytearray(3 * MIB))
        if how == "exit":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_what_was_put_outlives_its_producer(queue: Queue, how: str) -> None:
    with forked(put_and_vanish, queue, how):
        pass
    assert queue.get(timeout=0) == "last words"
    assert read_number(queue.get(timeout=0)[0]) == 5
    assert queue.get(timeout=0) == bytearray(3 * MIB)


def test_a_moved_descriptor_is_given_away(queue: Queue) -> None:
    handle = numbered_handle(9)
    queue.put(fdshare.move([handle]))
    assert handle.closed
    assert read_number(queue.get()[0]) == 9


def test_what_cannot_travel_is_refused_and_the_queue_goes_on(queue: Queue) -> None:
    with numbered_handle(1) as handle, pytest.raises(NotSendableError, match=r"message\[1\]"):
        queue.put([handle, threading.Lock()])
    queue.put("next")
    assert queue.get() == "next"


class Refuses:
    def __reduce__(self) -> tuple[Any, ...]:
        return (_refuse, ())


def _refuse() -> None:
    raise ValueError("this object refuses to be rebuilt")


@pytest.mark.parametrize("timeout", [None, 20])
def test_an_item_that_cannot_be_rebuilt_is_one_error(queue: Queue, timeout: float | None) -> None:
    queue.put(Refuses())
    with numbered_handle(1) as handle:
        queue.put([handle, Refuses()])
    queue.put("next")
    for _ in range(2):
        with pytest.raises(DecodeError, match="refuses"):
            queue.get(timeout)
    assert queue.get(timeout) == "next"


@pytest.mark.parametrize("garbage", [b"x", b"\x01" + bytes(39), bytes(100), b"\x03" + bytes(39)])
def test_a_foreign_packet_is_one_error(queue: Queue, garbage: bytes) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    socket.send_fds(queue._inlet.sock, [garbage], [reader])
    os.close(reader)
    queue.put("next")
    with pytest.raises((ProtocolError, DecodeError)):
        queue.get()
    assert queue.get() == "next"


# --- waiting ------------------------------------------------------------------------------------------------


def test_nothing_comes(queue: Queue) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="empty"):
        queue.get(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    with pytest.raises(TimeoutError):
        queue.get(timeout=0)
    assert queue.empty()
    queue.put(1)
    assert not queue.empty()
    assert queue.get(timeout=0) == 1


def test_a_waiting_get_is_woken(queue: Queue) -> None:
    got: list[Any] = []
    with running(*[lambda: got.append(queue.get())] * 3, *[lambda: got.append(queue.get(timeout=20))] * 3):
        for number in range(6):
            queue.put(number)
    assert sorted(got) == list(range(6))


def test_it_can_be_waited_for_among_others(queue: Queue) -> None:
    other = Queue()
    a, b = fdshare.Pipe()
    with a, b, other, selectors.DefaultSelector() as selector, fdshare.ChannelSet([queue, a]) as channels:
        assert fdshare.wait([queue, other, a], timeout=0) == []
        queue.put(1)
        assert fdshare.wait([other, queue, a]) == [queue]
        assert channels.select() == [queue]
        selector.register(queue, selectors.EVENT_READ)
        assert len(selector.select(20)) == 1
        assert multiprocessing.connection.wait([queue, other], 20) == [queue]


def test_a_default_timeout_of_sockets_changes_nothing(sockets: str) -> None:
    socket.setdefaulttimeout(0.01)
    try:
        with Queue() as queue:
            with running(lambda: queue.put(time.sleep(0.05))):
                assert queue.get() is None
            queue.put(queue)
            with queue.get() as again:
                assert os.get_blocking(again.fileno())
    finally:
        socket.setdefaulttimeout(None)


# --- bounds -------------------------------------------------------------------------------------------------


def fill(queue: Queue, item: Any) -> int:
    """Put until it is full; return how many fit."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            queue.put(item, timeout=0)
            count += 1
    return count


def test_a_full_queue_makes_a_put_wait(sockets: str) -> None:
    with Queue(maxbytes=20_000) as queue:
        count = fill(queue, "small")
        assert 10 <= count <= 40
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            queue.put("small", timeout=0.05)
        assert time.monotonic() - start >= 0.05
        with running(lambda: queue.put("late", timeout=20)):
            assert [queue.get(timeout=20) for _ in range(count + 1)] == ["small"] * count + ["late"]


@pytest.mark.parametrize("size", [200_000, MIB, 4 * MIB])
def test_large_items_are_bounded_by_their_bytes(sockets: str, size: int) -> None:
    maxbytes = 8 * MIB
    with Queue(maxbytes) as queue:
        count = fill(queue, bytearray(size))
        # A put begins while there is less than maxbytes; the kernel rounds what a packet weighs up, at most to the double.
        assert 0.5 * maxbytes / size <= count <= maxbytes / size + 1
        for _ in range(count):
            assert len(queue.get(timeout=0)) == size
        assert fill(queue, bytearray(size)) == count


def test_the_bound_holds_for_all_producers_together(sockets: str) -> None:
    with Queue(8 * MIB) as queue:
        with forked(fill, queue, bytearray(2 * MIB)):
            pass
        assert fill(queue, bytearray(2 * MIB)) == 0
        with pytest.raises(TimeoutError):
            queue.put(bytearray(2 * MIB), timeout=0.02)


def test_an_item_larger_than_the_bound_goes_into_an_empty_queue(sockets: str) -> None:
    with Queue(maxbytes=1) as queue:
        for item in ("x" * 100_000, bytearray(200_000), bytearray(3 * MIB)):
            queue.put(item, timeout=5)
            with pytest.raises(TimeoutError):
                queue.put(item, timeout=0)
            assert queue.get(timeout=5) == item


@pytest.mark.parametrize("maxbytes", [0, -1])
def test_a_bound_below_one(maxbytes: int) -> None:
    with pytest.raises(ValueError, match="maxbytes"):
        Queue(maxbytes)


def test_a_steady_flow_of_large_items(queue: Queue) -> None:
    with running(lambda: put_all(queue, range(60), ("large", "small", "large_and_fds"))):
        assert get_all(queue, 60) == list(range(60))


# --- closing ------------------------------------------------------------------------------------------------


def test_what_is_left_is_taken_first(queue: Queue) -> None:
    for number in range(5):
        queue.put(number)
    queue.close()
    with pytest.raises(QueueClosedError):
        queue.put("too late")
    assert list(queue) == list(range(5))
    for error in (ClosedError, PeerClosedError, EOFError, BrokenPipeError):
        with pytest.raises(error):
            queue.get()
        with pytest.raises(error):
            queue.put(1)
    assert queue.empty()
    assert queue.closed


def wait_for_the_end(queue: Queue, started: Queue, timeout: float | None) -> None:
    started.put("getting")
    with pytest.raises(QueueClosedError):
        queue.get(timeout)
    assert queue.closed


def put_until_the_end(queue: Queue, started: Queue, item: Any) -> None:
    started.put("putting")
    with pytest.raises(QueueClosedError):
        while True:
            queue.put(item)


@pytest.mark.parametrize("by", ["this process", "another"])
def test_closing_wakes_all_who_get(queue: Queue, by: str) -> None:
    started = Queue()
    waiting = [functools.partial(wait_for_the_end, queue, started, timeout) for timeout in (None, 30.0)]
    with forked(waiting[0]), forked(waiting[1]), running(*waiting):
        assert [started.get(timeout=20) for _ in range(4)] == ["getting"] * 4
        if by == "another":
            with forked(queue.close):
                pass
        else:
            queue.close()


@pytest.mark.parametrize(
    "item", ["small", bytearray(5000), bytearray(2 * MIB)], ids=["small", "inline", "large"]
)
@pytest.mark.parametrize("by", ["this process", "another"])
def test_closing_wakes_all_who_put(sockets: str, by: str, item: Any) -> None:
    started = Queue()
    with Queue(4 * MIB) as queue:
        putting = functools.partial(put_until_the_end, queue, started, item)
        with forked(putting), forked(putting), running(putting, putting):
            assert [started.get(timeout=20) for _ in range(4)] == ["putting"] * 4
            full = functools.partial(select.select, [], [queue._inlet.sock], [], 0)
            if sockets == "seqpacket":
                wait_until(lambda: not full()[1])
            if by == "another":
                with forked(queue.close):
                    pass
            else:
                queue.close()


def test_closing_tells_who_looks_later(queue: Queue) -> None:
    a, b = fdshare.Pipe()
    with a, b:
        a.send(queue)
        again = b.recv()
    queue.put("left")
    again.close()
    assert fdshare.wait([queue], timeout=20) == [queue]
    assert queue.get(timeout=0) == "left"
    assert fdshare.wait([queue], timeout=20) == [queue]
    with pytest.raises(QueueClosedError):
        queue.get(timeout=0)
    with pytest.raises(QueueClosedError):
        queue.put(1)
    again.close()


def test_closing_tells_an_event_loop_of_this_process(queue: Queue) -> None:
    async def gather() -> list[Any]:
        loop = asyncio.get_running_loop()
        items: list[Any] = []
        over = loop.create_future()

        def take() -> None:
            try:
                while True:
                    items.append(queue.get(timeout=0))
            except TimeoutError:
                pass
            except QueueClosedError:
                loop.remove_reader(
                    queue
                )  # closed it could not be: where others hold it too, it would stay in the epoll
                over.set_result(items)

        loop.add_reader(queue, take)
        queue.put(1)
        while not items:
            await asyncio.sleep(0)
        queue.close()  # it is empty
        return await asyncio.wait_for(over, 20)

    assert asyncio.run(gather()) == [1]
    with pytest.raises(QueueClosedError):
        queue.get(timeout=0)
    assert fdshare.wait([queue], 0) == [queue]
    queue.drop()
    with pytest.raises(QueueClosedError):
        queue.fileno()


def test_a_closed_queue_holds_no_descriptor(sockets: str) -> None:
    with leak_check():
        queue = Queue()
        queue.put(1)
        queue.close()
        assert queue.get() == 1
        with pytest.raises(QueueClosedError):
            queue.get()
        if sockets == "dgram":  # the event that says so stays as long as the object
            queue.drop()
    assert repr(queue) == "<Queue closed maxbytes=268435456>"
    for call in (queue.get, queue.fileno, functools.partial(queue.put, 1)):
        with pytest.raises(QueueClosedError):
            call()
    assert queue.empty()


def test_one_process_lets_go_and_the_others_go_on(queue: Queue) -> None:
    with Queue() as back:
        a, b = fdshare.Pipe()
        with a, b:
            a.send(queue)
            again = b.recv()
        again.put(1)
        again.drop()
        again.drop()
        with pytest.raises(QueueClosedError):
            again.put(2)
        with pytest.raises(QueueClosedError):
            again.get()
        with pytest.raises(NotSendableError, match="closed"):
            back.put(again)
    queue.put(3)
    assert [queue.get(), queue.get()] == [1, 3]


def test_nothing_is_left_of_a_dropped_queue(sockets: str) -> None:
    with leak_check():
        queue = Queue()
        with numbered_handle(1) as handle:
            queue.put([handle, bytearray(2 * MIB)])
        again = pickle.loads(pickle.dumps(queue))
        again.put(2)
        del queue, again


# --- at the limit of descriptors ----------------------------------------------------------------------------


def _get_at_the_limit(queue: Queue, counts: tuple[int, ...]) -> list[tuple[int, bool]]:
    """Take items with so many descriptors where two fit, each followed by a small one."""
    wait_until(lambda: not queue.empty())
    lost = []
    highest = max(open_numbers())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(20)]
    for filler in fillers[-2:]:
        os.close(filler)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(highest, *fillers) + 1, hard))
    with contextlib.suppress(OSError):  # the numbers below that are free
        while True:
            fillers.append(os.dup(0))
    for filler in fillers[-2:]:
        os.close(filler)
    del fillers[-2:]
    for count in counts:
        try:
            item = queue.get(timeout=30)
        except DescriptorsLostError as error:
            lost.append((error.expected, "gone" in str(error) and "limit" in str(error)))
        else:
            assert len(item) == count
            for handle in item:
                handle.close()
        assert queue.get(timeout=30) == "next"
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for filler in fillers:
        with contextlib.suppress(OSError):
            os.close(filler)
    return lost


def test_an_item_that_does_not_fit_is_a_typed_error_and_the_queue_goes_on(queue: Queue) -> None:
    counts = (1, 3, 2, 100, 300)
    for count in counts:
        handles = [numbered_handle(i) for i in range(count)]
        queue.put(handles)
        for handle in handles:
            handle.close()
        queue.put("next")
    assert checked_child(_get_at_the_limit, queue, counts) == [(3, True), (100, True), (300, True)]


def _put_too_many(queue: Queue, size: int) -> tuple[int, int]:
    """As an ordinary user with few descriptors; return how many are wanted and what the limit is, as the error says."""
    soft = 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with numbered_handle(1) as handle:
        item = [bytearray(size), handle]
        with pytest.raises(FdLimitError) as caught:
            for _ in range(200):
                queue.put(item, timeout=0.05)
        assert caught.value.errno == errno.ETOOMANYREFS
        for _ in range(10):
            queue.get(timeout=0)[1].close()
        queue.put(item, timeout=20)  # the same goes on when some were taken
    return caught.value.needed, caught.value.limit


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("size", [10, 200_000])
def test_too_many_descriptors_in_flight(sockets: str, size: int) -> None:
    with Queue(4 << 30) as queue:
        assert checked_child(_put_too_many, queue, size) == (1 + (size > 10), 60)


# --- interrupts, forks --------------------------------------------------------------------------------------


def _interrupted_get(dgram: bool, threads: int, count: int, seed: int) -> int:
    # An interrupt in a __del__ is only printed, and one in a close leaves that to the collector.
    warnings.simplefilter("ignore", ResourceWarning)
    sys.unraisablehook = lambda unraisable: None
    ends.HAVE_SEQPACKET = not dgram
    draw, hits, armed = random.Random(seed), 0, False
    queue = Queue()
    found: list[int] = []

    def strike(*args: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    def others() -> None:
        for number in queue:
            found.append(number)

    signal.signal(signal.SIGALRM, strike)
    beside = [threading.Thread(target=others) for _ in range(threads)]
    pid = os.fork()
    if not pid:
        for number in range(count):
            queue.put(number)
        queue.close()  # the end, which an interrupt cannot make one miss
        os._exit(0)
    for thread in beside:
        thread.start()
    result: Any = None
    over = False
    while not over:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 300e-6))
            while True:
                result = queue.get(None if draw.random() < 0.7 else 20)
                # No call, and so no interrupt, from here to the next line's end.
                found += [result]
                result = None
        except KeyboardInterrupt:
            hits += 1
            found += [] if result is None else [result]
            result = None
        except QueueClosedError:
            armed, over = False, True
    signal.setitimer(signal.ITIMER_REAL, 0)
    for thread in beside:
        thread.join()
    os.waitpid(pid, 0)
    while not queue.empty():
        found.append(queue.get(timeout=0))
    assert len(found) == len(set(found)), "an item came twice"
    assert sorted(found) == list(range(count)), "an item was lost"
    return hits


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("dgram", [False, True], ids=["seqpacket", "dgram"])
def test_an_interrupted_get_loses_nothing(dgram: bool, threads: int) -> None:
    assert checked_child(_interrupted_get, dgram, threads, 5_000, 5) > 10


def _waits_in_put(queue: Queue) -> None:
    """Make a forked child that acts once this process, which has no other thread, waits in a put."""
    wait_until(lambda: not select.select([], [queue._inlet.sock], [], 0)[1])


def _put_until_closed(by: str) -> None:
    assert not other_threads(), "this is about the wait in the send itself"
    ends.TICK_SECONDS = 60.0  # nothing looks again
    queue, count = Queue(), 0

    def close() -> None:
        _waits_in_put(queue)
        if by == "another process":
            queue.close()
        else:
            os.kill(os.getppid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, lambda *args: queue.close())
    with forked(close), pytest.raises(QueueClosedError):
        while True:
            queue.put(count)
            count += 1
    assert [queue.get() for _ in range(count)] == list(range(count))
    with pytest.raises(QueueClosedError):
        queue.get()


@pytest.mark.parametrize("by", ["another process", "a signal handler"])
def test_closing_wakes_a_put_of_the_only_thread(by: str) -> None:
    checked_child(_put_until_closed, by)


def _interrupted_put(count: int, seed: int) -> int:
    assert not other_threads()
    draw, hits, armed = random.Random(seed), 0, False
    queue, results = Queue(), Queue()

    def strike(*args: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    with forked(lambda: results.put(list(queue))):
        for number in range(count):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 100e-6))
                queue.put((number, 0))
                queue.put((number, 1))
                armed = False
            except KeyboardInterrupt:
                hits += 1
                queue.put((number, 2))
        signal.setitimer(signal.ITIMER_REAL, 0)
        queue.close()
        found: list[tuple[int, int]] = results.get(timeout=20)
    assert found == sorted(set(found)), "an item came twice, or out of order"
    ends_of = [[part for number, part in found if number == wanted] for wanted in range(count)]
    assert all(parts in ([0, 1], [0, 2], [0, 1, 2], [2]) for parts in ends_of), "an item was lost"
    return hits


def test_an_interrupted_put_puts_an_item_once_or_not_at_all() -> None:
    assert checked_child(_interrupted_put, 2_000, 6) > 10


class InterruptsOnce:
    """Interrupts whoever rebuilds it the first time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        if not self.path.exists():
            self.path.touch()
            raise KeyboardInterrupt


@pytest.mark.parametrize("timeout", [None, 20])
def test_an_item_interrupted_while_it_is_rebuilt_comes_again(
    queue: Queue, tmp_path: Path, timeout: float | None
) -> None:
    queue.put(InterruptsOnce(tmp_path / "mark"))
    queue.put("next")
    with pytest.raises(KeyboardInterrupt):
        queue.get(timeout)
    with forked(lambda: os._exit(queue.get(timeout=20) != "next")):  # the child has no part in it
        pass
    assert not queue.empty()
    assert type(queue.get(timeout)) is InterruptsOnce
    assert queue.empty()


# --- travelling ---------------------------------------------------------------------------------------------


def answer(tasks: Queue) -> None:
    for number, replies in tasks:
        with contextlib.closing(replies):
            replies.put(number * number)


@pytest.mark.parametrize("method", METHODS)
def test_a_queue_travels_in_a_queue(method: str) -> None:
    with Queue() as tasks, Child(answer, tasks, method=method) as child:
        for number in range(10):
            replies = Queue()
            tasks.put((number, replies))
            assert list(replies) == [number * number]
        tasks.close()
        child.result()


def _foreign(connection: Any) -> None:
    queue = connection.recv()
    queue.put("from there")
    queue.drop()
    connection.close()


def test_it_travels_in_a_foreign_pickle(queue: Queue) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_foreign, args=(there,))
    process.start()
    there.close()
    here.send(queue)
    assert queue.get(timeout=30) == "from there"
    process.join()
    process.close()
    here.close()


@pytest.mark.parametrize("sockets", ["seqpacket"], indirect=True)
def test_it_travels_as_a_pool_argument_and_result(queue: Queue) -> None:
    with fdshare.ProcessPoolExecutor(1) as pool:
        pool.submit(Queue.put, queue, "from a worker").result(30)
        with pool.submit(Queue, 12345).result(30) as made:
            assert made.maxbytes == 12345
    assert queue.get() == "from a worker"


def test_a_moved_queue_is_gone_here(queue: Queue) -> None:
    moved = Queue()
    moved.put("inside")
    queue.put(fdshare.move(moved))
    assert moved.closed
    with queue.get() as arrived:
        assert arrived.get() == "inside"


# --- deaths -------------------------------------------------------------------------------------------------


def _log(fd: int, number: int) -> None:
    os.write(fd, b"%d\n" % number)


def _produce(queue: Queue, log: int, numbers: Iterator[int]) -> None:
    for number in numbers:
        kind = KINDS[number % len(KINDS)]
        message, handles = compose(number, kind)
        queue.put(message)
        _log(log, number)
        for handle in handles:
            handle.close()


def _consume(queue: Queue, log: int) -> None:
    while True:
        _log(log, verify(queue.get()))


def run_under_kills(kills: int, seed: int, folder: Path) -> None:
    """Kill producers and consumers at random; nothing else is lost, nothing comes twice, nobody hangs."""
    draw = random.Random(seed)
    logs = [os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600) for name in ("put", "got")]
    queue = Queue(4 * MIB)
    first, dead = 0, [0, 0]
    children: list[tuple[int, int]] = []

    def start(role: int) -> None:
        nonlocal first
        numbers = iter(range(first, first + 1_000_000))
        first += 1_000_000
        pid = os.fork()
        if not pid:
            try:
                _consume(queue, logs[1]) if role else _produce(queue, logs[0], numbers)
            finally:
                os._exit(1)
        children.append((pid, role))

    for role in (0, 0, 1, 1):
        start(role)
    try:
        for _ in range(kills):
            size = os.fstat(logs[1]).st_size
            goal = size + draw.randrange(1000)
            wait_until(functools.partial(lambda goal: os.fstat(logs[1]).st_size >= goal, goal))
            pid, role = children.pop(draw.randrange(len(children)))
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            dead[role] += 1
            start(role)
    finally:
        for role in (0, 1):
            for pid in [pid for pid, its in children if its == role]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                dead[role] += 1
    while not queue.empty():
        _log(logs[1], verify(queue.get(timeout=0)))
    put, got = ([int(line) for line in (folder / name).read_text().split()] for name in ("put", "got"))
    for log in logs:
        os.close(log)
    queue.drop()
    assert len(put) > kills
    assert len(set(got)) == len(got), "an item came twice"
    assert len(set(put) - set(got)) <= dead[1], "more items lost than consumers died"
    assert len(set(got) - set(put)) <= dead[0], "more came than were put, or noted, by who died"


def test_random_deaths_of_producers_and_consumers(tmp_path: Path) -> None:
    run_under_kills(20, 1, tmp_path)


@pytest.mark.soak
def test_many_random_deaths_of_producers_and_consumers(tmp_path: Path) -> None:
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run_under_kills(300, seed, folder)
