"""AsyncChannel: messages of every kind, waiting in turn, back-pressure, and an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from aio_loops import fill, pair, receive_all, run, run_in, send_all, settle, started
from helpers import KINDS, requires_seqpacket, requires_unread_count, verify

import fdshare
from fdshare import (
    Channel,
    ClosedError,
    FdHandle,
    FdLimitError,
    NotSendableError,
    PeerClosedError,
    wire,
)
from fdshare.aio import AsyncChannel
from fdshare.testing import Child, checked_child, numbered_handle, pattern, read_number

__all__ = ["run"]

Run = Callable[..., Any]


# messages


def test_messages_of_every_kind(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            numbers = range(5 * len(KINDS))
            await asyncio.gather(
                send_all(a, numbers), receive_all(b, numbers), send_all(b, numbers), receive_all(a, numbers)
            )

    run(main)


def test_message_to_a_waiting_task(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            for number in range(len(KINDS)):
                (task,) = await started(b.recv())
                await send_all(a, range(number, number + 1))
                assert verify(await task) == number

    run(main)


def test_bytes(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            for content in (b"", b"abc", pattern(wire.MAX_INLINE + 1), pattern(3 << 20)):
                (task,) = await started(b.recv_bytes())
                await a.send_bytes(memoryview(content))
                assert await task == content
            await a.send_bytes(memoryview(b"abcdef")[::2])
            assert await b.recv_bytes() == b"ace"

    run(main)


def test_iteration_ends_with_the_connection(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with b:
            async with a:
                for number in range(200):
                    await a.send(number)
            assert [message async for message in b] == list(range(200))
            with pytest.raises(PeerClosedError):
                await b.recv()
            with pytest.raises(PeerClosedError):
                await b.send("too late")

    run(main)


def test_poll(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            assert not b.poll()
            with numbered_handle(3) as handle:
                await a.send(handle)
            assert b.poll()
            assert read_number(await b.recv()) == 3
            assert not b.poll()
            await a.aclose()
            assert b.poll()
        with pytest.raises(ClosedError):
            b.poll()

    run(main)


def test_one_way(run: Run, transport: str) -> None:
    async def main() -> None:
        reader, writer = pair(transport, duplex=False)
        async with reader, writer:
            assert (reader.readable, reader.writable) == (True, False)
            assert (writer.readable, writer.writable) == (False, True)
            with pytest.raises(OSError, match="read-only"):
                await reader.send(1)
            with pytest.raises(OSError, match="write-only"):
                await writer.recv()
            with pytest.raises(OSError, match="write-only"):
                writer.poll()
            await writer.send(1)
            assert await reader.recv() == 1

    run(main)


def test_what_an_end_tells(transport: str) -> None:
    a, b = pair(transport, max_inflight=1 << 20)
    assert a.transport == transport
    assert a.max_inflight == 1 << 20
    a.max_inflight = 2 << 20
    assert a.max_inflight == 2 << 20
    assert a.peer == fdshare.PeerCredentials(os.getpid(), os.getuid(), os.getgid())
    assert repr(a) == f"<AsyncChannel fd={a.fileno()} {transport}>"
    assert not a.closed
    a.close()
    a.close()
    b.close()
    assert a.closed
    assert repr(a) == f"<AsyncChannel closed {transport}>"
    with pytest.raises(ClosedError):
        a.fileno()


def test_unsendable_and_undecodable(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            with numbered_handle(1) as handle:
                with pytest.raises(NotSendableError):
                    await a.send([handle, asyncio.get_running_loop()])
                await a.send([handle, _Refuses()])
                await a.send(_Refuses())
            await a.send("next")
            for _ in range(2):
                with pytest.raises(fdshare.DecodeError):
                    await b.recv()
            assert await b.recv() == "next"

    run(main)


class _Refuses:
    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("this object refuses to be rebuilt")


def test_moved_file_is_closed_once_it_was_sent(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            handle = numbered_handle(5)
            await a.send(fdshare.move(handle))
            assert handle.closed
            assert read_number(await b.recv()) == 5

    run(main)


def test_garbage_is_a_protocol_error_and_closes(run: Run, transport: str) -> None:
    async def main() -> None:
        kind = socket.SOCK_SEQPACKET if transport == "seqpacket" else socket.SOCK_STREAM
        ours, bare = socket.socketpair(socket.AF_UNIX, kind)
        with bare:
            async with AsyncChannel(Channel(ours)) as channel:
                (task,) = await started(channel.recv())
                bare.send(b"\x07" * wire.HEADER_SIZE)
                with pytest.raises(fdshare.ProtocolError):
                    await task
                assert channel.closed

    run(main)


def test_small_send_buffer(run: Run, transport: str) -> None:
    """A packet that does not fit at all goes through a segment."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            a._transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            content = pattern(60_000)
            (task,) = await started(b.recv())
            await a.send(content)
            assert await task == content

    run(main)


# waiting


def test_flags_of_the_shared_description_stay(run: Run, transport: str) -> None:
    """O_NONBLOCK belongs to all who share the socket, and libuv sets it on what it watches."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            assert os.get_blocking(a.fileno())
            assert os.get_blocking(b.fileno())
            reader, writer = await started(b.recv(), fill(a, 60_000))
            assert os.get_blocking(a.fileno())
            assert os.get_blocking(b.fileno())
            await writer
            await reader

    run(main)


def test_back_pressure(run: Run, transport: str) -> None:
    """A sender waits for room, and goes on when there is."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            sent = await fill(a)
            assert 0 < sent < 10_000
            (task,) = await started(a.send((sent, b"")))
            assert not task.done()
            assert [(await b.recv())[0] for _ in range(sent + 1)] == list(range(sent + 1))
            await task

    run(main)


@requires_seqpacket
def test_flow_of_descriptors_leaves_no_notice_behind(run: Run) -> None:
    async def main() -> None:
        a, b = pair("seqpacket")

        async def send() -> None:
            with numbered_handle(1) as handle:
                for _ in range(1000):
                    await a.send(handle)

        async with a, b:
            task = asyncio.create_task(send())
            for _ in range(1000):
                (await b.recv()).close()
            await task
            assert not b._transport._noticed  # type: ignore[attr-defined]

    run(main)


@requires_unread_count
def test_large_messages_in_flight_are_bounded(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport, max_inflight=5 << 20)
        async with a, b:
            content = pattern(3 << 20)
            await a.send(content)
            (task,) = await started(a.send(content))
            await asyncio.sleep(0.02)
            assert not task.done()
            assert await b.recv() == content
            await task
            assert await b.recv() == content

    run(main)


@pytest.mark.parametrize("size", [60_000, 3 << 20])
def test_both_sides_send_before_either_reads(run: Run, transport: str, size: int) -> None:
    async def main() -> None:
        a, b = pair(transport, max_inflight=5 << 20)
        content = pattern(size)

        async def send(channel: AsyncChannel) -> None:
            for _ in range(8):
                await channel.send(content)

        async def receive(channel: AsyncChannel) -> None:
            for _ in range(8):
                assert zlib.crc32(await channel.recv()) == zlib.crc32(content)

        async with a, b:
            await asyncio.gather(send(a), send(b), receive(a), receive(b))

    run(main)


def test_waiting_senders_have_their_turn_in_order(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            sent = await fill(a)
            tasks = await started(*[a.send((sent + i, b"")) for i in range(20)])
            numbers = [(await b.recv())[0] for _ in range(sent + 20)]
            await asyncio.gather(*tasks)
            assert numbers == list(range(sent + 20))

    run(main)


def test_waiting_receivers_have_their_turn_in_order(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            tasks = await started(*[b.recv() for _ in range(20)])
            for number in range(20):
                await a.send(number)
            assert await asyncio.gather(*tasks) == list(range(20))

    run(main)


def test_nobody_overtakes_who_waits(run: Run, transport: str) -> None:
    """Not even a task that finds room at once."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            (first,) = await started(b.recv())
            await a.send(1)
            await a.send(2)
            second = asyncio.create_task(b.recv())
            assert await asyncio.gather(first, second) == [1, 2]

    run(main)


def test_many_tasks_on_both_ends(run: Run, transport: str) -> None:
    """Every message arrives once, whole, with its descriptors, and each sender's in order."""

    async def main() -> None:
        a, b = pair(transport)
        received: list[int] = []

        async def receive() -> None:
            while (message := await b.recv()) is not None:
                received.append(verify(message))

        kinds = ("small", "inline", "one_fd", "large_and_fds", "many_fds")
        async with a, b:
            receivers = [asyncio.create_task(receive()) for _ in range(8)]
            await asyncio.gather(*[send_all(a, range(100 * n, 100 * n + 10), kinds) for n in range(30)])
            for _ in receivers:
                await a.send(None)
            await asyncio.gather(*receivers)
        assert sorted(received) == [100 * n + i for n in range(30) for i in range(10)]

    run(main)


def test_a_burst_leaves_time_for_others(run: Run, transport: str) -> None:
    """A task that always finds a message, and one that always finds room, let the loop go round."""

    async def main() -> None:
        a, b = pair(transport)
        rounds = 0

        async def count() -> None:
            nonlocal rounds
            while True:
                rounds += 1
                await asyncio.sleep(0)

        async with a, b:
            ticker = asyncio.create_task(count())
            for number in range(1000):
                await a.send(number)
                assert await b.recv() == number
            ticker.cancel()
        assert rounds > 5

    run(main)


def test_the_loop_goes_on_while_a_large_message_is_written(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        rounds = 0

        async def count() -> None:
            nonlocal rounds
            while True:
                rounds += 1
                await asyncio.sleep(0)

        async with a, b:
            content = pattern(6 << 20)
            ticker = asyncio.create_task(count())
            meanwhile = 0
            for _ in range(20):  # a thread may be done before anybody waits for it, now and then
                before = rounds
                await a.send(content)
                meanwhile += rounds - before
                assert zlib.crc32(await b.recv()) == zlib.crc32(content)
                if meanwhile:
                    break
            assert meanwhile
            ticker.cancel()

    run(main)


# the end of a connection


def test_close_wakes_all_who_wait(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with b:
            await fill(a)
            tasks = await started(a.recv(), a.recv(), a.send(1), a.send(2), a.recv_bytes())
            await a.aclose()
            for task in tasks:
                with pytest.raises(ClosedError):
                    await task
            with pytest.raises(ClosedError):
                await a.recv()
            with pytest.raises(ClosedError):
                await a.send(1)

    run(main)


@requires_unread_count
def test_close_wakes_who_waits_for_large_messages_to_be_taken(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport, max_inflight=1)
        async with b:
            content = bytes(1 << 20)
            await a.send(content)
            (task,) = await started(a.send(content))
            a.close()
            with pytest.raises(ClosedError):
                await task

    run(main)


def _hang(channel: Channel) -> None:
    channel.send("here")
    signal.pause()


def test_the_peers_death_wakes_all_who_wait(transport: str) -> None:
    there, here = fdshare.Pipe(transport=transport)

    async def main() -> None:
        async with AsyncChannel(here) as channel:
            assert await channel.recv() == "here"
            await fill(channel)
            tasks = await started(channel.recv(), channel.recv(), channel.send(1), channel.send(2))
            child.kill()
            for task in tasks:
                with pytest.raises(PeerClosedError):
                    await task

    try:
        child = Child(_hang, there, method="fork", unwanted=(here,))
    finally:
        there.close()
    with child:
        run_in("asyncio", main)


def _receive_at_the_limit(loop: str, transport: str) -> None:
    import resource

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            handles = [numbered_handle(number) for number in range(40)]
            await a.send(handles)
            await a.send("next")
            for handle in handles:
                handle.close()
            await settle()
            hog = [FdHandle.dup(0) for _ in range(20)]
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hog[-1].fileno() + 25, limit[1]))
            with pytest.raises(FdLimitError):
                await b.recv()
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for one in hog:
                one.close()
            assert [read_number(handle) for handle in await b.recv()] == list(range(40))
            assert await b.recv() == "next"

    run_in(loop, main)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_message_stays_queued_at_the_descriptor_limit(loop: str, transport: str) -> None:
    checked_child(_receive_at_the_limit, loop, transport, method="fork")
