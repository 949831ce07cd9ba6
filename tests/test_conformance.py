"""The conformance suite over both transports, and what the suite cannot say of every channel: many processes on one end,
forks in the middle of traffic, and a gigabyte."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections import Counter

import pytest
from helpers import (
    KINDS,
    METHODS,
    QUICK_METHODS,
    receive_all,
    requires_seqpacket,
    requires_unread_count,
    running,
    send_all,
    verify,
)

import fdshare
from fdshare import Channel, PeerClosedError
from fdshare.testing import (
    PLACES,
    ChannelConformance,
    Child,
    checked_child,
    numbered_handle,
    pattern,
    read_number,
    room_for,
)

QUICK_PLACES = ("same_process", *QUICK_METHODS)


@requires_seqpacket
class TestSeqpacket(ChannelConformance):
    """The suite over packets."""

    places = QUICK_PLACES

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="seqpacket")


class TestStream(ChannelConformance):
    """The suite over frames."""

    places = QUICK_PLACES

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="stream")


@pytest.mark.soak
class TestSeqpacketSpawned(TestSeqpacket):
    """The suite over packets, with processes that start afresh."""

    places = ("spawn",)


@pytest.mark.soak
class TestStreamSpawned(TestStream):
    """The suite over frames, with processes that start afresh."""

    places = ("spawn",)


@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], KINDS], ids=[*KINDS, "mixed"])
def test_messages_queued_before_anybody_reads(pair: tuple[Channel, Channel], kinds: tuple[str, ...]) -> None:
    """On a stream, bytes and descriptors of several messages coalesce in the kernel."""
    a, b = pair
    count = 3 if kinds == ("inline",) else len(KINDS)
    send_all(a, range(count), kinds)
    receive_all(b, range(count))


def test_traffic_in_both_directions(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    everything = range(200)
    with running(
        lambda: send_all(a, everything),
        lambda: send_all(b, everything),
        lambda: receive_all(a, everything),
        lambda: receive_all(b, everything),
        closing=pair,
    ):
        pass


def test_large_messages_in_both_directions(pair: tuple[Channel, Channel]) -> None:
    """Each more than in-flight bound allows to queue: both sides wait for each other's reader, and both go on."""
    a, b = pair
    a.max_inflight = b.max_inflight = 5 << 20
    content = pattern(3 << 20)

    def send(channel: Channel) -> None:
        for i in range(10):
            channel.send((i, content), timeout=30)

    def receive(channel: Channel) -> None:
        for i in range(10):
            number, received = channel.recv(timeout=30)
            assert (number, zlib.crc32(received)) == (i, zlib.crc32(content))

    with running(lambda: send(a), lambda: send(b), lambda: receive(a), lambda: receive(b), closing=pair):
        pass


def test_threads_receiving_on_one_end(pair: tuple[Channel, Channel]) -> None:
    """Each message goes to exactly one of them, whole."""
    a, b = pair
    seen: list[int] = []

    def receive() -> None:
        while (message := b.recv(timeout=30)) is not None:
            seen.append(verify(message))

    with running(*[receive] * 4, closing=pair):
        send_all(a, range(200))
        for _ in range(4):
            a.send(None)
    assert sorted(seen) == list(range(200))


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", PLACES)
def test_one_gibibyte(transport: str, place: str) -> None:
    suite = TestSeqpacket() if transport == "seqpacket" else TestStream()
    content = pattern(1 << 30)
    with suite.served(place) as near:
        near.send(("digest", content), timeout=120)
        assert near.recv(timeout=120) == ("bytes", 1 << 30, zlib.crc32(content))
        near.send(("echo", bytearray(content)), timeout=120)
        received = near.recv(timeout=120)
        assert received == content
        received[0] ^= 0xFF
        assert received != content


# several processes on one end


def _receive_until_none(channel: Channel) -> list[int]:
    with channel:
        numbers = []
        while (message := channel.recv(timeout=40)) is not None:
            numbers.append(verify(message))
        return numbers


def _send_some(channel: Channel, numbers: range, kinds: tuple[str, ...]) -> None:
    with channel:
        send_all(channel, numbers, kinds)


@requires_seqpacket
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_processes_receiving_on_one_end(method: str) -> None:
    """Each message goes to exactly one of them, whole, with its descriptors."""
    a, b = fdshare.Pipe(transport="seqpacket")
    with a, contextlib.ExitStack() as stack:
        with b:
            children = [
                stack.enter_context(Child(_receive_until_none, b, method=method, unwanted=(a,)))
                for _ in range(3)
            ]
        send_all(a, range(300))
        for _ in children:
            a.send(None, timeout=30)
        received = [child.result(40) for child in children]
    assert sorted(itertools.chain(*received)) == list(range(300))
    for numbers in received:
        assert numbers == sorted(numbers)


@requires_seqpacket
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_processes_sending_on_one_end(method: str) -> None:
    """Packets never mix, and each sender's stay in order."""
    a, b = fdshare.Pipe(transport="seqpacket")
    with a, contextlib.ExitStack() as stack:
        with b:
            for n in range(3):
                numbers = range(1000 * n, 1000 * n + 100)
                stack.enter_context(Child(_send_some, b, numbers, KINDS, method=method, unwanted=(a,)))
        received = [verify(a.recv(timeout=40)) for _ in range(300)]
        with pytest.raises(PeerClosedError):
            a.recv(timeout=40)
        for n in range(3):
            assert [number for number in received if number // 1000 == n] == list(
                range(1000 * n, 1000 * n + 100)
            )


# fork in the middle of traffic


def _close_all(*channels: Channel) -> None:
    for channel in channels:
        channel.close()


def test_fork_in_the_middle_of_traffic(pair: tuple[Channel, Channel]) -> None:
    """A child that has inherited both ends, with whatever was half done in them, closes them: nobody else notices."""
    a, b = pair
    numbers = range(400)
    with running(lambda: send_all(a, numbers), lambda: receive_all(b, numbers), closing=pair):
        for _ in range(15):
            checked_child(_close_all, a, b, method="fork")


@requires_unread_count
def test_fork_while_a_frame_is_half_sent(pair: tuple[Channel, Channel]) -> None:
    """The sender is stuck in the middle of a message when the child closes its copy of the channel."""
    a, b = pair
    numbers = range(40)
    # Nobody reads yet: the send buffer is full, and the sender waits inside a message.
    with running(lambda: send_all(a, numbers, ("inline",)), closing=pair):
        while fill_level(a) < 100_000:
            pass
        for _ in range(3):
            checked_child(_close_all, a, b, method="fork")
        receive_all(b, numbers)


def fill_level(channel: Channel) -> int:
    """How many bytes the kernel holds that were sent and not read."""
    import fcntl
    import struct
    import termios

    return int(struct.unpack("i", fcntl.ioctl(channel.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def _send_from_child(channel: Channel, number: int) -> None:
    send_all(channel, range(number, number + 8))
    channel.close()


@requires_seqpacket
def test_forked_child_sends_while_the_parent_does() -> None:
    """Whatever lock a thread of the parent held at the fork, the child's copy is free."""
    a, b = fdshare.Pipe(transport="seqpacket")
    received: list[int] = []

    def receive() -> None:
        while (message := b.recv(timeout=30)) is not None:
            received.append(verify(message))

    with a, b, running(receive, closing=(a, b)):
        with running(lambda: send_all(a, range(400))):
            for i in range(10):
                checked_child(_send_from_child, a, 1000 * (i + 1), method="fork", timeout=20)
        a.send(None)
    assert [number for number in received if number < 1000] == list(range(400))
    assert Counter(number // 1000 for number in received if number >= 1000) == dict.fromkeys(range(1, 11), 8)


# processes given a channel


@pytest.mark.parametrize("method", METHODS)
def test_both_ends_in_other_processes(transport: str, method: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with contextlib.ExitStack() as stack:
        with a, b:
            sender = stack.enter_context(
                Child(_send_some, a, range(100), KINDS, method=method, unwanted=(b,))
            )
            receiver = stack.enter_context(Child(receive_all, b, range(100), method=method, unwanted=(a,)))
        sender.result()
        receiver.result()


def test_bundle_of_all_kinds_needs_room_once(pair: tuple[Channel, Channel]) -> None:
    """A message with 5,000 descriptors beside ordinary ones: order is kept."""
    a, b = pair
    with room_for(16_000):
        handles = [numbered_handle(i) for i in range(5000)]

        def send() -> None:
            for message in ("before", handles, "after"):
                a.send(message)

        with running(send, closing=pair):
            assert b.recv(timeout=30) == "before"
            received = b.recv(timeout=30)
            assert b.recv(timeout=30) == "after"
        for handle in handles:
            handle.close()
        assert [read_number(handle) for handle in received] == list(range(5000))
