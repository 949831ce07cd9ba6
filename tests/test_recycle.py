"""Recycled segments: what a receiver looks into never changes, and everything is given back."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import signal
import threading
from collections.abc import Callable

import pytest
from helpers import bare_pair, capture, close_pieces, requires_proc, requires_seqpacket, wait_until

import fdshare
from fdshare import Channel, ChannelSet, DecodeError, Event, Queue, memory, recycle, wire
from fdshare.blocking import other_threads
from fdshare.rights import open_numbers
from fdshare.testing import Child, checked_child, pattern

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "ENABLED", True)
    monkeypatch.setattr(recycle, "STEADY_SECONDS", 1e6)  # each message is of a flow


def inode_of(pieces: list[tuple[bytes, list[int]]]) -> int:
    (fd,) = [fd for _, fds in pieces for fd in fds]
    return os.fstat(fd).st_ino


def memfds(process: int | str = "self") -> int:
    """How many descriptors of segments a process has open, this one unless told otherwise."""
    count = 0
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            count += "/memfd:fdshare" in os.readlink(f"/proc/{process}/fd/{name}")
        except FileNotFoundError:
            pass  # the listing's own
    return count


def content(number: int, size: int = SIZE) -> bytearray:
    return bytearray([number % 251]) * size


# --- used again, and never while somebody looks ---------------------------------------------------------------------


@requires_seqpacket
def test_segment_is_used_again_once_it_was_given_back() -> None:
    with bare_pair("seqpacket") as (channel, bare):
        inodes = []
        for size in (SIZE, SIZE, SIZE - 1, SIZE - MIB):
            channel.send(bytearray(size))
            pieces = capture(bare)
            inodes.append(inode_of(pieces))
            close_pieces(pieces)
        assert len(set(inodes)) == 1


@requires_seqpacket
def test_segment_that_somebody_holds_is_not_used() -> None:
    with bare_pair("seqpacket") as (channel, bare):
        held = []
        for _ in range(recycle.MOST_SEGMENTS + 3):
            channel.send(bytearray(SIZE))
            held.append(capture(bare))
        assert len({inode_of(pieces) for pieces in held}) == len(held)
        for pieces in held:
            close_pieces(pieces)


def test_queued_messages_keep_their_content(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = 1 << 30
    for number in range(12):
        a.send(content(number))
    assert [b.recv() == content(number) for number in range(12)] == [True] * 12


def test_views_keep_their_content_whatever_follows(pair: tuple[Channel, Channel]) -> None:
    """A random walk: some are held for long, some written to, some dropped at once."""
    numpy = pytest.importorskip("numpy")
    a, b = pair
    chance = random.Random(5)
    held: dict[int, object] = {}
    for number in range(80):
        a.send(numpy.full(chance.choice((SIZE, SIZE + 4096, 2 * SIZE + 1)), number, "u1"))
        array = b.recv()
        assert (array == number).all()
        if chance.random() < 0.4:
            held[number] = array[5::7]  # a view of a part
        if chance.random() < 0.2:
            array[:] = 255  # its own from now on, and nobody else's
            held[number] = None
        del array
        for key in list(held):
            if held[key] is not None:
                assert (held[key] == key).all()  # type: ignore[attr-defined]
            if chance.random() < 0.3:
                del held[key]


def test_a_write_stays_private_also_when_the_segment_is_used_again(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    original = content(1)
    a.send(original)
    mine = b.recv()
    mine[:] = content(2)
    a.send(original)
    assert b.recv() == original
    assert mine == content(2)
    del mine
    a.send(original)
    assert b.recv() == original


def test_senders_in_several_threads(pair: tuple[Channel, Channel]) -> None:
    a, b = pair

    def produce(first: int) -> None:
        for number in range(first, first + 10):
            a.send((number, content(number, 2 * MIB)))

    threads = [threading.Thread(target=produce, args=(first,)) for first in (0, 10, 20)]
    for thread in threads:
        thread.start()
    seen = set()
    for _ in range(30):
        number, data = b.recv(timeout=30)
        assert data == content(number, 2 * MIB)
        seen.add(number)
    for thread in threads:
        thread.join()
    assert seen == set(range(30))


@requires_proc
def test_fork_of_the_sender_writes_into_nothing_of_its_parent(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.send(content(1))
    b.recv()
    assert memfds()
    pid = os.fork()
    if pid == 0:
        try:
            kept = memfds()
            c, d = fdshare.Pipe()
            c.send(content(3))
            os._exit(0 if not kept and d.recv() == content(3) else 1)
        finally:
            os._exit(2)
    a.send(content(2))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b.recv() == content(2)


def _hold(channel: Channel) -> None:
    with channel:
        array = channel.recv()
        channel.send(len(array))
        signal.pause()


def test_dead_receiver_gives_back(pair: tuple[Channel, Channel]) -> None:
    """Killed while it holds a view, and while a message waits for it."""
    numpy = pytest.importorskip("numpy")
    a, b = pair
    with Child(_hold, b, method="fork", unwanted=(a,)) as child:
        b.close()
        a.send(numpy.ones(SIZE, "u1"))
        assert a.recv(timeout=30) == SIZE
        a.send(numpy.ones(SIZE, "u1"))
        assert not any(segment.is_free() for segment in recycle.kept)
        assert len(recycle.kept) == 2
        child.kill()
    a.close()  # and with it the message that nobody took
    assert not recycle.kept
    assert not memfds()


# --- what is kept is bounded and given up ------------------------------------------------------------------------------


@requires_proc
def test_one_large_message_alone_keeps_nothing(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recycle, "STEADY_SECONDS", 0.0)
    a, b = pair
    for _ in range(3):
        a.send(content(1))
        assert b.recv() == content(1)
        assert not memfds()


@requires_proc
def test_closing_the_last_channel_gives_up(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for _ in range(3):
        a.send(content(1))
        b.recv()
    c, d = fdshare.Pipe()
    with c, d:
        c.send(content(1))
        d.recv()
        a.close()
        assert memfds()
    assert not memfds()


@requires_proc
def test_unused_is_given_up_at_a_collection(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    a.send(content(1))
    b.recv()
    gc.collect()
    assert memfds()
    monkeypatch.setattr(recycle, "STEADY_SECONDS", -1.0)
    gc.collect()
    assert not memfds()


def _wait_by_set(channel: Channel) -> object:
    with ChannelSet([channel]) as channels:
        channels.select()
    return channel.recv()


WAITS: dict[str, Callable[[Channel, Queue, Event], object]] = {
    "recv": lambda channel, queue, event: channel.recv(),
    "recv in time": lambda channel, queue, event: channel.recv(timeout=60),
    "poll": lambda channel, queue, event: channel.poll(None) and channel.recv(),
    "wait": lambda channel, queue, event: fdshare.wait([channel]) and channel.recv(),
    "ChannelSet": lambda channel, queue, event: _wait_by_set(channel),
    "Queue": lambda channel, queue, event: queue.get(),
    "Event": lambda channel, queue, event: event.wait(),
}


def _idle_in(ways: list[str], transport: str) -> None:
    assert not other_threads()
    gc.disable()  # which would give up too
    for how in ways:
        recycle.STEADY_SECONDS = 1e6
        _idle(how, transport)


def _idle(how: str, transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    here, there = fdshare.Pipe(transport=transport)
    event, sender = Event(), os.getpid()
    with a, b, here, there, Queue() as queue:
        for _ in range(3):
            a.send(content(1))
            b.recv()
        assert memfds()
        recycle.STEADY_SECONDS = 0.02
        pid = os.fork()
        if not pid:
            status = 1
            try:
                wait_until(lambda: not memfds(sender))
                status = 0
            finally:
                there.send(True)
                queue.put(True)
                event.set()
                os._exit(status)
        assert WAITS[how](here, queue, event) is True
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not recycle.kept


@pytest.mark.parametrize(("transport", "ways"), [("seqpacket", list(WAITS)), ("stream", ["recv", "poll"])])
def test_unused_is_given_up_while_its_process_waits(transport: str, ways: list[str]) -> None:
    checked_child(_idle_in, ways, transport)


def test_unused_is_given_up_while_a_task_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        a, b = fdshare.aio.Pipe()
        async with a, b:
            for _ in range(3):
                await a.send(content(1))
                await b.recv()
            assert recycle.kept
            monkeypatch.setattr(recycle, "STEADY_SECONDS", 0.02)
            waiting = asyncio.ensure_future(a.recv())
            while recycle.kept:
                await asyncio.sleep(0.005)
            await b.send("work")
            assert await waiting == "work"

    gc.disable()  # which would give up too
    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        gc.enable()


@requires_seqpacket
def test_a_wait_that_is_over_before_gives_up_nothing() -> None:
    found = iter([[], [], ["found"]])
    asked = []

    def wait(seconds: float | None) -> list[str]:
        asked.append(seconds)
        return next(found)

    with bare_pair("seqpacket") as (channel, bare):
        assert recycle.idly(wait, 7) == []  # nothing is kept
        channel.send(bytearray(SIZE))
        close_pieces(capture(bare))
        assert recycle.idly(wait, recycle.STEADY_SECONDS) == []
        assert recycle.idly(wait, None) == ["found"]
        assert asked == [7, recycle.STEADY_SECONDS, recycle.STEADY_SECONDS]
        assert len(recycle.kept) == 1


@requires_proc
def test_a_signal_handler_does_not_wait_for_what_it_interrupts(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for number in range(3):
        a.send(content(number))
        assert b.recv() == content(number)
    kept = list(recycle.kept)
    with recycle._lock:  # as in the middle of a send
        a.send(content(4))
        assert b.recv() == content(4)
        gc.collect()
        a.close()
        assert recycle.kept == kept
    recycle.give_up()
    assert not memfds()


def test_what_is_kept_is_bounded(pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "most_kept", lambda: 10 * MIB)
    a, b = pair
    for size in (SIZE, 9 * MIB, 11 * MIB, SIZE, 2 * MIB, 3 * MIB):
        a.send(content(1, size))
        assert b.recv() == content(1, size)
        assert sum(segment.capacity for segment in recycle.kept) <= 10 * MIB
    held = []
    for _ in range(5):
        a.send(content(1))
        held.append(b.recv())
        assert sum(segment.capacity for segment in recycle.kept) <= 10 * MIB
    assert all(array == content(1) for array in held)


@requires_seqpacket
def test_typed_or_foreign_codecs_get_sealed_segments() -> None:
    with bare_pair("seqpacket") as (channel, bare):
        channel._codec = type("Other", (), {})()
        channel._send_outgoing(fdshare.codec.Outgoing([bytes(SIZE)]), wire.MESSAGE, None, wire.MAX_INLINE)
        pieces = capture(bare)
        assert wire.unpack(pieces[-1][0]).flags == wire.SEGMENT | wire.IN_SEGMENT
        close_pieces(pieces)


@requires_seqpacket
def test_untrusting_receiver_refuses_a_lease() -> None:
    with bare_pair("seqpacket") as (channel, bare):
        channel.send(pattern(SIZE))
        with pytest.raises(DecodeError, match="not sealed"):
            channel_message(bare, trusted=False)
        channel.send(pattern(SIZE))
        channel_message(bare, trusted=True)


def channel_message(bare: object, *, trusted: bool) -> fdshare.codec.Incoming:
    (_, _), (data, fds) = capture(bare)  # type: ignore[arg-type]
    handles = fdshare.handle.Handles(map(fdshare.FdHandle, fds))
    header = wire.unpack(data)
    assert header.flags & wire.LEASED
    return fdshare.packets.open_packet(header, data[wire.HEADER_SIZE :], handles, trusted=trusted)


# --- where it cannot be had ----------------------------------------------------------------------------------------------


def test_last_descriptor_is_not_spent_on_keeping() -> None:
    checked_child(_send_with_few_descriptors)


def _send_with_few_descriptors() -> None:
    numpy = pytest.importorskip("numpy")
    a, b = fdshare.Pipe()
    with a, b:
        for number in range(3):
            a.send(numpy.full(SIZE, number, "u1"))
            assert (b.recv() == number).all()
        recycle.give_up()
        used = len(open_numbers()) - 1
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        for spare in (1, 2, 3, 4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limits[1]))
            for number in range(3):
                a.send(numpy.full(SIZE, number, "u1"))
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                assert (b.recv() == number).all()
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, limits[1]))
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_proc_segments_are_sealed() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to go where there is no /proc")
    checked_child(_send_without_proc)


def _send_without_proc() -> None:
    import tempfile

    numpy = pytest.importorskip("numpy")
    a, b = fdshare.Pipe()
    memory.prepare_to_map()
    with tempfile.TemporaryDirectory() as empty, a, b:
        root = os.open("/", os.O_RDONLY)
        os.chroot(empty)
        try:
            for number in range(3):
                a.send(numpy.full(SIZE, number, "u1"))
                assert (b.recv() == number).all()
            assert not recycle.kept
        finally:
            os.fchdir(root)
            os.chroot(".")
            os.close(root)
