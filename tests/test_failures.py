"""What goes wrong on either side, made to go wrong: peers that die, close, lie or stall, and messages that cannot be rebuilt."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, TRANSPORTS, bare_pair, capture, close_pieces, inject, running, wait_until

import fdshare
from fdshare import (
    Channel,
    ClosedError,
    DecodeError,
    FdHandle,
    FdShareError,
    NotSendableError,
    PeerClosedError,
    ProtocolError,
    wire,
)
from fdshare.testing import Child, checked_child, leak_check, numbered_handle, pattern, read_number

PROMPTLY = 5.0  # seconds; without waking up it would be for ever, and a loaded machine is no error


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pair(transport: str) -> Iterator[tuple[Channel, Channel]]:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        yield a, b


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


# closed ends


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
    for round in range(100):
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
                for _ in range(round * 10):  # a little later each time
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


# messages that cannot be


class Job:
    def __init__(self, log: object) -> None:
        self.log = log


def test_unsendable_object_deep_inside(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    with numbered_handle(1) as handle, leak_check(closed=True):
        with pytest.raises(NotSendableError) as caught:
            a.send(
                {
                    "jobs": [0, 1, handle, Job(threading.Lock())],
                    "big": bytearray(LARGE),
                    "moved": fdshare.move(handle),
                }
            )
        assert caught.value.path == "message['jobs'][3].log"
        assert "message['jobs'][3].log" in str(caught.value)
        del caught
        assert not handle.closed
        assert not b.poll()
        a.send("goes on")
        assert b.recv() == "goes on"


class Explodes:
    """Raises ``error`` when it is rebuilt."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, (self.error,)


def _explode(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("extra", ["nothing", "descriptor", "bundle", "array"])
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_message_whose_unpickling_raises(
    pair: tuple[Channel, Channel], extra: str, timeout: float | None
) -> None:
    """DecodeError, its descriptors are closed (its pipe ends), and the channel goes on."""
    a, b = pair
    reader, writer = os.pipe()
    writers = [FdHandle(writer)]
    writers += [FdHandle.dup(writer) for _ in range({"bundle": 300}.get(extra, 0))]
    parts = {"nothing": [], "array": bytearray(LARGE)}.get(extra, writers)
    a.send([parts, Explodes(ValueError("on purpose"))])
    for handle in writers:
        handle.close()
    with leak_check():
        with pytest.raises(DecodeError, match="ValueError: on purpose") as caught:
            b.recv(timeout=timeout)
        assert isinstance(caught.value, pickle.UnpicklingError)
        assert isinstance(caught.value.__cause__, ValueError)
        del caught
    assert os.read(reader, 1) == b""
    os.close(reader)
    a.send("goes on")
    assert b.recv() == "goes on"


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_message_that_raises_no_ordinary_exception(
    pair: tuple[Channel, Channel], error: BaseException, timeout: float | None
) -> None:
    """It may pass through, but only once."""
    a, b = pair
    with numbered_handle(1) as handle:
        for message in (Explodes(error), [handle, Explodes(error)]):
            a.send(message)
            with leak_check(), pytest.raises((type(error), DecodeError)):
                b.recv(timeout=timeout)
    a.send("goes on")
    assert b.recv(timeout=timeout) == "goes on"


def test_class_that_only_the_sender_has(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    name = type("Vanishing", (), {"__module__": __name__})
    globals()["Vanishing"] = name
    try:
        a.send(name())
    finally:
        del globals()["Vanishing"]
    with pytest.raises(DecodeError, match="Vanishing"):
        b.recv()
    a.send("goes on")
    assert b.recv() == "goes on"


# messages never received


@pytest.mark.parametrize("how", ["receiver_closes", "both_close", "dropped"])
@pytest.mark.parametrize("count", [1, 300])
def test_message_never_received(transport: str, how: str, count: int) -> None:
    """Its descriptors are closed with the channel: the pipe in it ends."""
    reader, writer = os.pipe()
    a, b = fdshare.Pipe(transport=transport)
    with FdHandle(writer) as handle:
        duplicates = [FdHandle.dup(handle) for _ in range(count)]
        a.send(duplicates)
        a.send([handle, bytearray(LARGE)])
        for duplicate in duplicates:
            duplicate.close()
    if how == "dropped":
        b.close()
        del b
        a.close()
    else:
        b.close()
        if how == "both_close":
            a.close()
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(10_000), "a descriptor of a message that nobody received is still open"
    assert os.read(reader, 1) == b""
    os.close(reader)
    a.close()


def test_message_on_its_way_keeps_its_descriptors_open(pair: tuple[Channel, Channel]) -> None:
    """A write end in flight: no end of file, until the message was received and closed."""
    a, b = pair
    reader, writer = os.pipe()
    with FdHandle(writer) as handle:
        a.send([handle])
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert not poll.poll(20)
    b.recv()[0].close()
    assert os.read(reader, 1) == b""
    os.close(reader)


# peers that are killed


def _send_for_ever(channel: Channel, size: int, handles: int) -> None:
    number = 0
    while True:
        parts = [numbered_handle(i) for i in range(handles)]
        channel.send((number, parts, b"x" * size))
        for handle in parts:
            handle.close()
        number += 1


@pytest.mark.parametrize(
    ("size", "handles"),
    [(10, 0), (10, 3), (50_000, 1), (LARGE, 1)],
    ids=["small", "fds", "inline", "large"],
)
def test_sender_killed_within_its_messages(transport: str, size: int, handles: int) -> None:
    """What it had sent whole arrives, then the end is told; nothing of a half message is left over."""
    a, b = fdshare.Pipe(transport=transport)
    with b:
        with Child(_send_for_ever, a, size, handles, method="fork", unwanted=(b,)) as child:
            a.close()
            received = 0
            for _ in range(3):
                _check_numbered(b.recv(timeout=20), received, handles, size)
                received += 1
            child.kill()
        with leak_check(), pytest.raises(PeerClosedError):
            while True:
                _check_numbered(b.recv(timeout=20), received, handles, size)
                received += 1
        with pytest.raises(PeerClosedError):
            b.recv(timeout=20)


def _check_numbered(message: Any, number: int, handles: int, size: int) -> None:
    arrived, parts, content = message
    assert arrived == number
    assert [read_number(handle) for handle in parts] == list(range(handles))
    assert len(content) == size


def _receive_for_ever(channel: Channel) -> None:
    while True:
        channel.recv()


@pytest.mark.parametrize("size", [10, 50_000, LARGE])
def test_receiver_killed_under_a_sender(transport: str, size: int) -> None:
    a, b = fdshare.Pipe(transport=transport)
    a.max_inflight = 2 * LARGE
    with a, numbered_handle(1) as handle:
        with Child(_receive_for_ever, b, method="fork", unwanted=(a,)) as child:
            b.close()
            for _ in range(20):
                a.send(b"x" * size, timeout=20)
            os.kill(child.pid, signal.SIGSTOP)  # so that the sender blocks
            with contextlib.suppress(TimeoutError):
                while True:
                    a.send(b"x" * size, timeout=0.05)

            def block() -> None:
                with pytest.raises(PeerClosedError):
                    while True:
                        a.send([handle, b"x" * size])

            with running(block, closing=(a,)):
                child.kill()
        with pytest.raises(PeerClosedError):
            a.recv(timeout=20)


def _die(channel: Channel, count: int) -> None:
    for number in range(count):
        with numbered_handle(number) as handle:
            channel.send((number, handle))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_sender_killed_between_messages(transport: str, method: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with b, Child(_die, a, 20, method=method, unwanted=(b,)):
        a.close()
        for number in range(20):
            arrived, handle = b.recv(timeout=20)
            assert (arrived, read_number(handle)) == (number, number)
        with pytest.raises(PeerClosedError):
            b.recv(timeout=20)


# what the peer must not send


def test_protocol_error_closes_the_channel(transport: str) -> None:
    with bare_pair(transport) as (channel, bare), numbered_handle(1) as handle:
        channel.send([handle])
        inject(bare, [(b"\xff" * wire.HEADER_SIZE, [handle.fileno()])])
        with leak_check(), pytest.raises(ProtocolError) as caught:
            channel.recv(timeout=5)
        assert isinstance(caught.value, OSError)
        del caught
        assert channel.closed
        with pytest.raises(ClosedError):
            channel.recv()
        with pytest.raises(ClosedError):
            channel.send("x")
        close_pieces(capture(bare))


@pytest.mark.parametrize("cut", [1, 20, 39])
def test_end_in_the_middle_of_a_header(cut: int) -> None:
    with bare_pair("stream") as (channel, bare):
        inject(bare, [(wire.pack(wire.MESSAGE, payload_size=4)[:cut], [])])
        with pytest.raises(TimeoutError):
            channel.recv(timeout=0.01)
        bare.close()
        with pytest.raises(PeerClosedError):
            channel.recv(timeout=5)


def test_end_in_the_middle_of_a_message_with_descriptors() -> None:
    with bare_pair("stream") as (channel, bare), numbered_handle(1) as handle:
        inject(
            bare,
            [(wire.pack(wire.MESSAGE, descriptors=2, payload_size=100), []), (b"x", [handle.fileno()] * 2)],
        )
        with leak_check():
            with pytest.raises(TimeoutError):
                channel.recv(timeout=0.01)
            bare.close()
            with pytest.raises(PeerClosedError):
                channel.recv(timeout=5)
            channel.close()


def test_notice_without_its_packet() -> None:
    """Its packet may have gone to another reader; or its sender died in between."""
    notice = wire.pack(wire.NOTICE, descriptors=3)
    with bare_pair("seqpacket") as (channel, bare):
        inject(bare, [(notice, []), (notice, [])])
        assert not channel.poll(0.02)
        with pytest.raises(TimeoutError):
            channel.recv(timeout=0.02)
        assert fdshare.wait([channel], 0.02) == []
        inject(bare, [(pickle.dumps("plain"), [])])
        assert channel.poll(5)
        assert channel.recv(timeout=5) == "plain"
        inject(bare, [(notice, [])])
        bare.close()
        assert channel.poll(5)
        with pytest.raises(PeerClosedError):
            channel.recv()


def test_segment_on_a_message_of_bytes(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.send_bytes(pattern(LARGE))
    assert b.recv_bytes() == pattern(LARGE)
    with pytest.raises(FdShareError):
        a.send_bytes(b"not a pickle")
        b.recv(timeout=5)
    a.send("goes on")
    assert b.recv() == "goes on"
