"""What goes wrong on either side, made to go wrong: peers that die, close, lie or stall, and messages that cannot be rebuilt."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import threading
from typing import Any

import pytest
from helpers import (
    LARGE,
    QUICK_METHODS,
    bare_pair,
    capture,
    close_pieces,
    inject,
    requires_seqpacket,
    running,
)

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
from fdshare.testing import Child, leak_check, numbered_handle, pattern, read_number

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


@pytest.mark.parametrize("method", QUICK_METHODS)
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


@requires_seqpacket
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
