"""Closed ends and timeouts: every call hears of a close at once, wherever it is blocked, and a timeout loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import LARGE, bare_pair, capture, close_pieces, inject, running, wait_until

import fdshare
from fdshare import (
    Channel,
    ClosedError,
    PeerClosedError,
)
from fdshare.testing import checked_child, numbered_handle, pattern, read_number

PROMPTLY = 5.0  # seconds; without waking up it would be for ever, and a loaded machine is no error


def fill(channel: Channel, message: object = b"x" * 10_000) -> int:
    """Send until nothing more goes in; return how many went."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            channel.send(message, timeout=0)
            count += 1
    return count


def wait_for_sleep(thread: threading.Thread) -> None:
    """Wait until a thread sleeps in the kernel, as one that is blocked in a call does."""
    status = Path(f"/proc/self/task/{thread.native_id}/stat")
    if status.exists():
        wait_until(lambda: status.read_text().rsplit(")", 1)[1].split()[0] == "S")


def test_error_when_the_peer_has_closed(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    b.close()
    for call in (a.recv, lambda: a.recv(timeout=1), a.recv_bytes, lambda: a.recv_bytes_into(bytearray(9))):
        with pytest.raises(PeerClosedError) as caught:
            call()
        assert isinstance(caught.value, EOFError)
    for call in (lambda: a.send("small"), lambda: a.send(bytearray(LARGE)), lambda: a.send_bytes(b"x")):
        with pytest.raises(PeerClosedError) as caught:
            call()
        assert isinstance(caught.value, BrokenPipeError)
    with numbered_handle(1) as handle:
        with pytest.raises(PeerClosedError):
            a.send([fdshare.move(handle)])
        assert not handle.closed
    assert a.poll()
    assert list(a) == []
    del caught


def test_error_when_this_side_was_closed(pair: tuple[Channel, Channel]) -> None:
    a, _ = pair
    a.close()
    a.close()
    assert a.closed
    calls: list[Callable[[], object]] = [
        a.recv,
        lambda: a.recv(timeout=0),
        a.recv_bytes,
        lambda: a.recv_bytes_into(bytearray(9)),
        lambda: a.send("small"),
        lambda: a.send(bytearray(LARGE)),
        lambda: a.send_bytes(b"x"),
        a.poll,
        a.fileno,
        lambda: a.peer,
        lambda: list(a),
    ]
    for call in calls:
        with pytest.raises(ClosedError) as caught:
            call()
        assert isinstance(caught.value, OSError)
        assert not isinstance(caught.value, EOFError)
    with numbered_handle(1) as handle:
        with pytest.raises(ClosedError):
            a.send([fdshare.move(handle)])
        assert not handle.closed
    assert "closed" in repr(a)


def test_messages_sent_before_a_close_arrive(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    with numbered_handle(4) as handle:
        a.send("plain")
        a.send([handle])
        a.send(bytearray(LARGE))
    a.close()
    assert b.recv() == "plain"
    assert read_number(b.recv()[0]) == 4
    assert len(b.recv()) == LARGE
    with pytest.raises(PeerClosedError):
        b.recv()


BLOCKED: dict[str, Callable[[Channel], object]] = {
    "recv": lambda channel: channel.recv(),
    "recv_with_timeout": lambda channel: channel.recv(timeout=60),
    "recv_bytes": lambda channel: channel.recv_bytes(),
    "poll": lambda channel: channel.poll(None),
    "iteration": lambda channel: next(iter(channel)),
    "send": lambda channel: channel.send(b"x" * 50_000),
    "send_with_timeout": lambda channel: channel.send(b"x" * 50_000, timeout=60),
    "send_bytes": lambda channel: channel.send_bytes(b"x" * 50_000),
    "send_with_descriptor": lambda channel: send_a_handle(channel),
}


def send_a_handle(channel: Channel) -> None:
    with numbered_handle(1) as handle:
        channel.send([handle, b"x" * 50_000])


@pytest.mark.parametrize("call", BLOCKED)
@pytest.mark.parametrize("threads", [1, 3])
def test_close_under_a_blocked_call(pair: tuple[Channel, Channel], call: str, threads: int) -> None:
    """In another thread: ClosedError, at once."""
    a, _ = pair
    if call.startswith("send"):
        fill(a)
    told: list[float] = []

    def block() -> None:
        with pytest.raises(ClosedError):
            BLOCKED[call](a)
        told.append(time.monotonic())

    blocked = [threading.Thread(target=block) for _ in range(threads)]
    for thread in blocked:
        thread.start()
    for thread in blocked:
        wait_for_sleep(thread)
    begin = time.monotonic()
    a.close()
    for thread in blocked:
        thread.join(PROMPTLY)
    assert len(told) == threads, "a call did not return"
    assert max(told) - begin < PROMPTLY


@pytest.mark.parametrize("call", ["recv", "send"])
def test_close_under_a_call_at_any_moment(transport: str, call: str) -> None:
    """Not only when it is blocked already."""
    for round in range(20):
        a, b = fdshare.Pipe(transport=transport)
        with a, b:
            if call == "send":
                fill(a)
            begun = threading.Event()

            def block(a: Channel = a, begun: threading.Event = begun) -> None:
                begun.set()
                with pytest.raises(ClosedError):
                    BLOCKED[call](a)

            with running(block):
                begun.wait()
                for _ in range(round * 50):  # a little later each time
                    pass
                a.close()


@pytest.mark.parametrize(
    ("call", "error"),
    [("recv", PeerClosedError), ("recv_with_timeout", PeerClosedError), ("send", PeerClosedError)],
)
def test_peer_closes_under_a_blocked_call(
    pair: tuple[Channel, Channel], call: str, error: type[Exception]
) -> None:
    a, b = pair
    if call == "send":
        fill(a)

    def block() -> None:
        with pytest.raises(error):
            BLOCKED[call](a)

    thread = threading.Thread(target=block)
    thread.start()
    wait_for_sleep(thread)
    b.close()
    thread.join(PROMPTLY)
    assert not thread.is_alive()


def test_peer_closes_under_a_blocked_poll(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    with running(lambda: a.poll(None)):
        b.close()


def _closed_by_a_signal_handler(transport: str, call: str) -> None:
    """The main thread alone, blocked in its fast path: only a handler can close the channel under it."""
    a, b = fdshare.Pipe(transport=transport)
    if call.startswith("send"):
        fill(a)
    signal.signal(signal.SIGALRM, lambda *args: a.close())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with b, pytest.raises(ClosedError):
        BLOCKED[call](a)


@pytest.mark.parametrize("call", ["recv", "recv_with_timeout", "poll", "send"])
def test_close_by_a_signal_handler_under_a_blocked_call(transport: str, call: str) -> None:
    checked_child(_closed_by_a_signal_handler, transport, call, timeout=20)


def test_one_thread_receives_while_another_sends(pair: tuple[Channel, Channel]) -> None:
    """A blocked recv does not keep the same end from sending."""
    a, b = pair
    with running(lambda: a.recv(timeout=30), closing=pair):
        a.send("question", timeout=10)
        assert b.recv(timeout=10) == "question"
        b.send("answer")


# timeouts


def test_recv_timeout(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for timeout in (0, 0.0, 0.05):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            b.recv(timeout=timeout)
        assert timeout <= time.monotonic() - begin < PROMPTLY
        assert not b.poll(timeout)
    a.send("here")
    assert b.recv(timeout=0) == "here"


def test_send_timeout_sends_nothing_and_keeps_the_descriptors(pair: tuple[Channel, Channel]) -> None:
    """What was sent whole arrives, what was not can be sent again."""
    a, b = pair
    sent = 0
    with numbered_handle(3) as handle:
        with pytest.raises(TimeoutError):
            while True:
                a.send((sent, b"x" * 20_000), timeout=0.05)
                sent += 1
        for _ in range(3):
            with pytest.raises(TimeoutError):
                a.send(("never", b"y" * 20_000, fdshare.move(handle)), timeout=0.02)
            assert not handle.closed
        for number in range(sent):
            assert b.recv(timeout=5)[0] == number
        assert not b.poll(0.01)
        a.send(("again", b"y" * 20_000, fdshare.move(handle)), timeout=5)
        assert handle.closed
    word, content, received = b.recv(timeout=5)
    assert (word, content) == ("again", b"y" * 20_000)
    assert read_number(received) == 3


def test_frame_given_up_is_finished_by_a_close() -> None:
    """A stream sender that timed out in the middle and closed: its peer sees whole messages, then the end."""
    a, b = fdshare.Pipe(transport="stream")
    with b:
        sent = fill(a, b"x" * 50_000)
        a.close()
        assert [len(b.recv(timeout=5)) for _ in range(sent)] == [50_000] * sent
        with pytest.raises(PeerClosedError):
            b.recv(timeout=5)


def test_recv_timeout_in_the_middle_of_a_frame() -> None:
    with bare_pair("stream") as (channel, bare), numbered_handle(6) as handle:
        with bare_pair("stream") as (other, source):
            other.send([handle, pattern(5000)])
            pieces = capture(source)
        for data, fds in pieces:
            middle = len(data) // 2
            for part, numbers in (
                (data[:middle], fds if middle else []),
                (data[middle:], [] if middle else fds),
            ):
                if part:
                    inject(bare, [(part, numbers)])
                    if (part, numbers) != (data[middle:], []) or data is not pieces[-1][0]:
                        with pytest.raises(TimeoutError):
                            channel.recv(timeout=0.01)
        received, content = channel.recv(timeout=5)
        assert read_number(received) == 6
        assert content == pattern(5000)
        close_pieces(pieces)
