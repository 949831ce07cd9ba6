"""Signals in the middle of a call: handlers that return, and handlers that raise at random moments, hundreds of times."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import compose, running, send_all, verify

import fdshare
from fdshare import Channel, FdHandle, PeerClosedError, move
from fdshare.testing import checked_child


class Interrupter:
    """Interrupts calls of the main thread at random moments, by an interval timer.

    It is armed only inside :meth:`__call__`, so nothing but the call under test is struck.
    """

    def __init__(self, longest: float, seed: int) -> None:
        self.hits = 0
        self._armed = False
        self._longest = longest
        self._random = random.Random(seed)
        signal.signal(signal.SIGALRM, self._strike)

    def _strike(self, *args: object) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def __call__(self, function: Callable[[], Any]) -> Any:
        """Call, and return the result, or None where it was interrupted."""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, self._longest))
                self._armed = True
                return function()
            finally:
                self._armed = False
        except KeyboardInterrupt:
            self.hits += 1
            return None

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


# one kind of each way through the code, weighted to what takes microseconds
INTERRUPTED_KINDS = (
    "small",
    "one_fd",
    "one_fd",
    "large_and_fds",
    "many_fds",
    "one_fd",
    "inline",
    "small",
    "one_fd",
    "bundle",
)


def expect_drops() -> None:
    """An interrupt on the way out of a call drops what it was returning, and one in a ``__del__`` is only printed."""
    warnings.simplefilter("ignore", ResourceWarning)
    sys.unraisablehook = lambda unraisable: None


def _interrupted_receiver(transport: str, count: int, seed: int) -> int:
    expect_drops()
    a, b = fdshare.Pipe(transport=transport)
    interrupt = Interrupter(400e-6, seed)
    last, received = -1, 0

    def send() -> None:
        send_all(a, range(count), INTERRUPTED_KINDS)
        a.close()  # the end, which an interrupt cannot make one miss

    with a, b, running(send, closing=(a, b)):
        with contextlib.suppress(PeerClosedError):
            while True:
                message = interrupt(lambda: b.recv(timeout=20))
                if message is not None:
                    number = verify(message)
                    assert number > last, "out of order, or twice"
                    last = number
                    received += 1
                del message
        interrupt.stop()
    assert received >= count - interrupt.hits, (
        f"{count - received} messages lost by {interrupt.hits} interrupts"
    )
    return interrupt.hits


def send_and_tell(channel: Channel, message: object) -> bool:
    """Send; True says that the call came back."""
    channel.send(message, timeout=20)
    return True


def _interrupted_sender(transport: str, count: int, seed: int) -> int:
    expect_drops()
    a, b = fdshare.Pipe(transport=transport)
    interrupt = Interrupter(400e-6, seed)
    received: list[int] = []

    def receive() -> None:
        while (message := b.recv(timeout=20)) != "end":
            received.append(verify(message))

    def say_end() -> None:  # in a thread: a lock that an interrupt left behind is the main thread's
        a.send("end", timeout=20)

    certain = []
    with a, b, running(receive, closing=(a, b)):
        for number in range(count):
            message, handles = compose(number, INTERRUPTED_KINDS[number % len(INTERRUPTED_KINDS)])
            if interrupt(functools.partial(send_and_tell, a, message)):
                certain.append(number)
            for handle in handles:
                handle.close()
        interrupt.stop()
        with running(say_end, closing=(a, b)):
            pass
    assert received == sorted(set(received)), "out of order, or twice"
    assert set(certain) <= set(received), "what was sent did not arrive"
    return interrupt.hits


@pytest.mark.parametrize("side", [_interrupted_receiver, _interrupted_sender], ids=["receiver", "sender"])
def test_keyboard_interrupt_at_random_moments(transport: str, side: Callable[[str, int, int], int]) -> None:
    """The channel stays in step, and no descriptor is left over (the child's own leak check)."""
    hits = checked_child(side, transport, 800, 1, timeout=55)
    assert hits >= 50, f"only {hits} calls were interrupted"


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("side", [_interrupted_receiver, _interrupted_sender], ids=["receiver", "sender"])
@pytest.mark.parametrize("seed", range(2, 12))
def test_keyboard_interrupt_for_long(transport: str, side: Callable[[str, int, int], int], seed: int) -> None:
    assert checked_child(side, transport, 30_000, seed, timeout=300) >= 2000


def _traffic_under_signals(transport: str) -> int:
    """Both directions through one end, in the main thread, with a handler that returns: calls are restarted."""
    count = 0

    def handler(*args: object) -> None:
        nonlocal count
        count += 1

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    a, b = fdshare.Pipe(transport=transport)

    def echo() -> None:
        for message in b:
            b.send(fdshare.move(message))

    with b, running(echo), a:
        for number in range(500):
            message, handles = compose(number, INTERRUPTED_KINDS[number % len(INTERRUPTED_KINDS)])
            a.send(message)
            for handle in handles:
                handle.close()
            assert verify(a.recv()) == number
    signal.setitimer(signal.ITIMER_REAL, 0)
    return count


def test_an_interrupt_while_a_message_is_copied_drops_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of a send of half a mebibyte: the segment's descriptors are closed, not left to the collector."""

    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt

    a, b = fdshare.Pipe()
    with a, b, monkeypatch.context() as patch:
        patch.setattr(os, "writev", interrupted)
        with pytest.raises(KeyboardInterrupt):
            a.send_bytes(bytes(500_000))
        gc.collect()  # and no ResourceWarning, which would be an error here
        patch.undo()
        a.send_bytes(b"next")
        assert b.recv_bytes() == b"next"


class Limit(Exception):
    """What a handler raises that bounds the time of a task: of no kind that fdshare knows."""


class Interrupted:
    """A signal comes while it is rebuilt, or while it is reduced."""

    def __init__(self, *, here: bool = False, handle: FdHandle | None = None) -> None:
        self.here, self.handle = here, handle

    def __reduce__(self) -> tuple[Any, ...]:
        if self.here:
            signal.raise_signal(signal.SIGUSR1)
        return rebuild_interrupted, (self.handle,)


def rebuild_interrupted(handle: FdHandle | None) -> None:
    signal.raise_signal(signal.SIGUSR1)


def limit_with_frame(number: int, frame: object) -> None:
    raise Limit


def limit_without_frame(*arguments: object) -> None:
    del arguments
    raise Limit


def timeout_of_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise TimeoutError


@pytest.fixture(params=[limit_with_frame, limit_without_frame, timeout_of_once])
def raised(request: pytest.FixtureRequest) -> Iterator[type[Exception]]:
    """A handler of SIGUSR1, as what it raises."""
    before = signal.signal(signal.SIGUSR1, request.param)
    yield TimeoutError if request.param is timeout_of_once else Limit
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("descriptors", [False, True])
def test_what_a_handler_raises_while_a_message_is_rebuilt_is_no_decode_error(
    transport: str, raised: type[Exception], descriptors: bool
) -> None:
    a, b = fdshare.Pipe(transport=transport)
    reader, writer = os.pipe()
    with a, b, FdHandle(reader) as handle, FdHandle(writer):
        a.send(Interrupted(handle=handle if descriptors else None))
        with pytest.raises(raised):
            b.recv()
        a.send("next")
        assert b.recv() == "next"  # the message itself is lost


def test_what_a_handler_raises_while_a_message_is_encoded_is_not_taken_for_a_refusal(
    transport: str, raised: type[Exception]
) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        with pytest.raises(raised):
            a.send([Interrupted(here=True)])
        a.send("next")
        assert b.recv() == "next"


def test_what_a_handler_raises_while_the_moved_is_closed(
    transport: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = socket.socket.close

    signals = iter([signal.SIGUSR1])

    def close_interrupted(sock: socket.socket) -> None:
        for number in signals:
            signal.raise_signal(number)
        close(sock)

    a, b = fdshare.Pipe(transport=transport)
    ours, theirs = socket.socketpair()
    with a, b, ours, theirs:
        monkeypatch.setattr(socket.socket, "close", close_interrupted)
        with pytest.raises(raised):
            a.send([move(ours), move(theirs)])
        monkeypatch.undo()
        assert (ours.fileno(), theirs.fileno()) == (-1, -1)
        for sock in b.recv():  # the message is out
            sock.close()


def test_what_a_handler_raises_while_an_item_is_rebuilt(raised: type[Exception]) -> None:
    with fdshare.Queue() as queue:
        queue.put(Interrupted())
        with pytest.raises(raised):
            queue.get()


def test_what_a_handler_raises_in_an_event_loop(raised: type[Exception]) -> None:
    async def main() -> None:
        a, b = fdshare.aio.Pipe()
        async with a, b:
            await a.send(Interrupted())
            with pytest.raises(raised):
                await b.recv()

    asyncio.run(main())


@pytest.mark.parametrize("receive", ["channel", "queue"])
def test_a_handler_may_end_a_wait_with_a_timeout_error(receive: str) -> None:
    """It is an OSError, of which the paths below make other things."""
    before = signal.signal(signal.SIGALRM, timeout_of_once)
    a, b = fdshare.Pipe()
    with a, b, fdshare.Queue() as queue:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError):
            b.recv() if receive == "channel" else queue.get()
    signal.signal(signal.SIGALRM, before)


def _interrupted_maker(seed: int) -> int:
    interrupt = Interrupter(60e-6, seed)
    lost = 0
    for _ in range(3000):
        before = len(os.listdir("/proc/self/fd"))
        swallowed.clear()
        interrupt(lambda: [end.close() for end in fdshare.Pipe()])
        gc.collect(0)
        lost += (len(os.listdir("/proc/self/fd")) - before) * (not swallowed)
    interrupt.stop()
    assert not lost
    return interrupt.hits


swallowed: list[object] = []


def _count_interrupts_of_pipe(seed: int) -> int:
    warnings.simplefilter("ignore", ResourceWarning)
    sys.unraisablehook = swallowed.append  # in a __del__, which goes on to its end no more
    return _interrupted_maker(seed)


def test_an_interrupt_within_pipe_loses_no_descriptor() -> None:
    assert checked_child(_count_interrupts_of_pipe, 1) >= 100


def test_signals_that_are_handled(transport: str) -> None:
    """EINTR: the calls are taken up again, with and without a timeout."""
    assert checked_child(_traffic_under_signals, transport) >= 100


def _timeout_under_signals(transport: str) -> float:
    signal.signal(signal.SIGALRM, lambda *args: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            a.recv(timeout=0.3)
        took = time.monotonic() - begin
        signal.setitimer(signal.ITIMER_REAL, 0)
        return took


def test_signals_do_not_stretch_a_timeout(transport: str) -> None:
    assert 0.3 <= checked_child(_timeout_under_signals, transport) < 5
