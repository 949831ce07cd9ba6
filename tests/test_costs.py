"""What a peer chooses costs its receiver no more than a bound says, and costs the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import attrs
import pytest
from helpers import SOCKET_TYPES, inject, requires_epoll, requires_seqpacket

import fdshare
from fdshare import (
    Channel,
    ChannelSet,
    ClosedError,
    FdHandle,
    NotSendableError,
    ProtocolError,
    TypedCodec,
    aio,
    wire,
)
from fdshare.codec import PickleCodec
from fdshare.testing import checked_child, numbered_handle, read_number


@attrs.frozen
class Ask:
    text: str


@attrs.frozen
class Give:
    file: FdHandle


CODECS = {"pickle": None, "typed": TypedCodec(Ask, Give, max_bytes=1 << 20)}


@contextlib.contextmanager
def ends(transport: str, sort: str) -> Iterator[tuple[Channel, socket.socket]]:
    ours, bare = socket.socketpair(socket.AF_UNIX, SOCKET_TYPES[transport])
    bare.settimeout(20)
    with bare, Channel(ours, codec=CODECS[sort]) as channel:
        yield channel, bare


@contextlib.contextmanager
def most_cpu(seconds: float) -> Iterator[None]:
    """Fail where this thread takes more of the processor's time; a loaded machine changes little in that."""
    before = time.thread_time()
    yield
    assert time.thread_time() - before < seconds


# --- notices --------------------------------------------------------------------------------------------------------------


KINDS_OF_NOTICES = {
    "plain": [wire.pack(wire.NOTICE, 0, count) for count in range(1, 251)],
    "bundles": [wire.pack(wire.NOTICE, wire.BUNDLE, 300 + count) for count in range(250)],
    "segments": [wire.pack(wire.NOTICE, wire.SEGMENT, count) for count in range(250)],
}


@requires_seqpacket
@pytest.mark.parametrize("kinds", KINDS_OF_NOTICES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_many_kinds_of_notices_cost_no_more_than_one(kinds: str, asynchronous: bool) -> None:
    checked_child(
        receive_among, kinds, asynchronous
    )  # without the test runner's threads, beside which room is not counted


def receive_among(kinds: str, asynchronous: bool) -> None:
    with ends("seqpacket", "pickle") as (channel, bare):
        bare.setblocking(False)
        with most_cpu(0.2):
            if asynchronous:
                asyncio.run(recv_among(KINDS_OF_NOTICES[kinds], channel.fileno(), bare))
            else:
                for _ in batches(KINDS_OF_NOTICES[kinds], bare):
                    with pytest.raises(TimeoutError):
                        channel.recv(timeout=0)
                    assert not channel.poll()
        bare.setblocking(True)
        with numbered_handle(1) as handle, Channel(socket.socket(fileno=os.dup(bare.fileno()))) as sender:
            sender.send([handle])
        (arrived,) = channel.recv(timeout=10)
        assert read_number(arrived) == 1
        arrived.close()


def batches(notices: list[bytes], bare: socket.socket) -> Iterator[None]:
    """Send as many as the socket takes, again and again."""
    left = notices[::-1]
    while left:
        with contextlib.suppress(BlockingIOError):
            while left:
                bare.send(left[-1])
                left.pop()
        yield


async def recv_among(notices: list[bytes], fd: int, bare: socket.socket) -> None:
    async with aio.AsyncChannel(Channel(socket.socket(fileno=os.dup(fd)))) as channel:
        for _ in batches(notices, bare):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(channel.recv(), 0.001)


async def recv_nothing(fd: int, codec: TypedCodec | None, seconds: float) -> None:
    async with aio.AsyncChannel(Channel(socket.socket(fileno=os.dup(fd)), codec=codec)) as channel:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.recv(), seconds)


MALFORMED = {
    "zero_field": bytes([wire.NOTICE, 0]) + b"\xff\xff" + bytes(36),
    "unknown_flag": bytes([wire.NOTICE, 0x80]) + bytes(38),
    "over_a_bound": bytes([wire.NOTICE, 0, 0, 0]) + b"\xff" * 4 + bytes(32),
    "refused_by_limits": wire.pack(wire.NOTICE, wire.BUNDLE, 3),
}


@requires_seqpacket
@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("way", ["wait", "select", "poll", "async_poll"])
def test_malformed_notice_is_told_by_its_own_channel_alone(what: str, way: str) -> None:
    with ends("seqpacket", "typed") as (honest, peer), ends("seqpacket", "typed") as (hostile, bare):
        bare.send(MALFORMED[what])
        with Channel(socket.socket(fileno=os.dup(peer.fileno())), codec=CODECS["typed"]) as sender:
            sender.send(Ask("hello"))
        for _ in range(2):  # looking takes nothing away
            assert ready_by(way, [honest, hostile]) == [honest, hostile]
        assert honest.recv(timeout=10) == Ask("hello")
        assert ready_by(way, [honest, hostile]) == [hostile]
        with pytest.raises(ProtocolError):
            hostile.recv(timeout=10)
        assert hostile.closed


def ready_by(way: str, channels: list[Channel]) -> list[Channel]:
    if way == "wait":
        return fdshare.wait(channels, 0)
    if way == "select":
        with ChannelSet(channels) as watched:
            return sorted(watched.select(0), key=channels.index)
    return [channel for channel in channels if channel.poll()]


@requires_seqpacket
@pytest.mark.parametrize("sort", CODECS)
def test_malformed_notice_closes_the_channel_whose_recv_meets_it(sort: str) -> None:
    """Whatever path it takes, a notice that was not looked at before."""
    with ends("seqpacket", sort) as (channel, bare):
        bare.send(MALFORMED["zero_field"])
        with pytest.raises(ProtocolError):
            channel.recv()
        with pytest.raises(ClosedError):
            channel.recv()


@requires_seqpacket
@pytest.mark.parametrize("sort", CODECS)
def test_malformed_notice_under_an_event_loop(sort: str) -> None:
    async def main(channel: Channel, bare: socket.socket) -> None:
        async with aio.AsyncChannel(channel) as ours, asyncio.timeout(20):
            bare.send(MALFORMED["zero_field"])
            for _ in range(2):
                assert ours.poll()
            with pytest.raises(ProtocolError):
                await ours.recv()
            with pytest.raises(ClosedError):
                await ours.recv()

    with ends("seqpacket", sort) as (channel, bare):
        asyncio.run(main(channel, bare))


# --- what is readable and not to be seen ------------------------------------------------------------------------------------

SO_PEEK_OFF = getattr(socket, "SO_PEEK_OFF", 42)


def send_urgent(channel: Channel, bare: socket.socket) -> None:
    try:
        bare.send(b"!", socket.MSG_OOB)
    except OSError:
        pytest.skip("needs urgent bytes on Unix sockets (Linux 5.15)")


def move_the_peek(channel: Channel, bare: socket.socket) -> None:
    """As whoever shares the channel's own socket can."""
    with socket.socket(fileno=os.dup(channel.fileno())) as shared:
        try:
            shared.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 1000)
        except OSError:
            pytest.skip("needs SO_PEEK_OFF")


Hide = Callable[[Channel, socket.socket], None]


def announce(bare: socket.socket, payload: bytes) -> None:
    """Send the header of a frame that brings a descriptor."""
    inject(bare, [(wire.pack(wire.MESSAGE, 0, 1, 0, len(payload)), [])])


@requires_epoll
@pytest.mark.parametrize("asynchronous", [False, True])
def test_urgent_byte_in_place_of_a_descriptor_keeps_no_processor_busy(asynchronous: bool) -> None:
    with ends("stream", "typed") as (channel, bare):
        announce(bare, b"x" * 10)
        send_urgent(channel, bare)
        with most_cpu(0.06):
            if asynchronous:
                asyncio.run(recv_nothing(channel.fileno(), CODECS["typed"], 0.4))
            else:
                with pytest.raises(TimeoutError):
                    channel.recv(timeout=0.4)


@requires_epoll
@pytest.mark.parametrize("hide", [send_urgent, move_the_peek])
def test_message_behind_what_a_peek_does_not_see_arrives(hide: Hide) -> None:
    payload = b"\x80\x05K\x07."
    with ends("stream", "pickle") as (channel, bare), numbered_handle(1) as handle:
        announce(bare, payload)
        hide(channel, bare)
        inject(bare, [(payload[:1], [handle.fileno()]), (payload[1:] + b"\x01", [])])
        with most_cpu(1.0):
            assert channel.recv(timeout=10) == 7


@requires_seqpacket
def test_packet_that_a_peek_does_not_see_is_seen_by_poll() -> None:
    with ends("seqpacket", "pickle") as (channel, bare):
        move_the_peek(channel, bare)
        assert not channel.poll()
        bare.send(b"\x80\x05K\x07.")
        with most_cpu(0.06):
            assert channel.poll(0.3)
            assert fdshare.wait([channel], 0.3) == [channel]
        assert channel.recv(timeout=10) == 7


# --- naming what cannot travel ------------------------------------------------------------------------------------------------


def test_part_that_is_nested_too_deeply_is_named_at_once() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    codec = PickleCodec()
    with most_cpu(0.5), pytest.raises(NotSendableError, match="recursion") as caught:
        codec.encode({"jobs": [1, deep]})
    assert (caught.value.path or "").startswith("message['jobs'][1]")
    assert len(str(caught.value)) < 300


def test_search_for_what_cannot_travel_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what it has found until then: a part that holds the one that cannot."""
    monkeypatch.setattr("fdshare.codec._PROBE_SECONDS", 0.0)
    with pytest.raises(NotSendableError, match="lock") as caught:
        PickleCodec().encode({"jobs": [1, threading.Lock()]})
    assert caught.value.path == "message"


# --- nonces -------------------------------------------------------------------------------------------------------------------


def test_processes_of_one_number_have_nonces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first processes of two PID namespaces, which may share an end."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    reader, writer = os.pipe()
    ours = {wire.nonce() for _ in range(100)}
    pid = os.fork()
    if not pid:
        os.write(writer, b"".join(wire.nonce().to_bytes(8, "little") for _ in range(100)))
        os._exit(0)
    os.waitpid(pid, 0)
    ours |= {wire.nonce() for _ in range(100)}
    with open(reader, "rb") as file:
        os.close(writer)
        data = file.read()
    theirs = {int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)}
    assert len(ours) == 200
    assert len(theirs) == 100
    assert not ours & theirs
