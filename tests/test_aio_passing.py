"""A connection passes: between Channel and AsyncChannel, between event loops, and to other processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from aio_loops import fill, pair, receive_all, run, run_in, send_all, settle, started
from helpers import (
    KINDS,
    METHODS,
    bare_pair,
    capture,
    close_pieces,
    inject,
    requires_seqpacket,
    running,
    verify,
)
from helpers import receive_all as receive_all_blocking
from helpers import send_all as send_all_blocking

import fdshare
from fdshare import Channel, ChannelSet, ClosedError, NotSendableError, PeerClosedError, aio, move, wait
from fdshare.aio import AsyncChannel
from fdshare.testing import Child, checked_child, numbered_handle, pattern, read_number

__all__ = ["run"]

Run = Callable[..., Any]


# between Channel and AsyncChannel


def test_both_ways_with_messages_queued(run: Run, transport: str) -> None:
    """Whatever had arrived goes along."""

    async def main() -> None:
        a, b = fdshare.Pipe(transport=transport)
        send_all_blocking(a, range(4))
        async_b = AsyncChannel(b)
        assert b.closed
        await receive_all(async_b, range(2))
        b = async_b.to_sync()
        assert async_b.closed
        receive_all_blocking(b, range(2, 3))
        async with AsyncChannel(AsyncChannel(b)) as async_b, AsyncChannel(a) as async_a:
            await receive_all(async_b, range(3, 4))
            await send_all(async_b, range(8))
            await receive_all(async_a, range(8))

    run(main)


def test_spent_ends_say_so(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = fdshare.Pipe(transport=transport)
        async_a = AsyncChannel(a)
        for use in (a.recv, lambda: a.send(1), a.poll, a.fileno, lambda: a.send([a, 1])):
            with pytest.raises((ClosedError, NotSendableError)):
                use()
        with pytest.raises(ClosedError):
            AsyncChannel(a)
        with async_a.to_sync():
            for make in (async_a.recv, lambda: async_a.send(1), async_a.recv_bytes):
                with pytest.raises(ClosedError):
                    await make()
            with pytest.raises(ClosedError):
                async_a.to_sync()
            async_a.close()
        a.close()
        b.close()

    run(main)


def test_options_are_kept(transport: str) -> None:
    reader, writer = fdshare.Pipe(False, transport=transport, max_inflight=12345)
    for end, readable in ((reader, True), (writer, False)):
        again = AsyncChannel(end).to_sync()
        with again:
            assert (again.readable, again.writable) == (readable, not readable)
            assert again.max_inflight == 12345
            assert again.transport == transport


def test_codec_is_kept(run: Run, transport: str) -> None:
    class Upper(fdshare.codec.PickleCodec):
        def encode(self, obj: Any) -> Any:
            return super().encode(obj.upper())

    async def main() -> None:
        a, b = aio.Pipe(transport=transport, codec=Upper())
        async with a, b:
            await a.send("word")
            assert await b.recv() == "WORD"
            with a.to_sync() as blocking:
                blocking.send("word")
                assert await b.recv() == "WORD"

    run(main)


def test_half_a_frame_goes_along(run: Run) -> None:
    """With the descriptors that have come already."""

    async def main() -> None:
        ours, bare = socket.socketpair()
        with bare_pair("stream") as (sender, other), numbered_handle(6) as handle:
            sender.send(handle)
            pieces = capture(other)
        assert [len(fds) for _, fds in pieces] == [0, 1, 0]
        with bare:
            channel = AsyncChannel(Channel(ours))
            (task,) = await started(channel.recv())
            inject(bare, pieces[:2])
            close_pieces(pieces)
            await settle()
            task.cancel()
            async with AsyncChannel(channel.to_sync()) as channel:
                inject(bare, pieces[2:])
                assert read_number(await channel.recv()) == 6

    run(main)


def test_given_up_frame_goes_along(run: Run) -> None:
    async def main() -> None:
        a, b = pair("stream")
        sent = await fill(a, 60_000)
        blocking = a.to_sync()
        receiver = b.to_sync()
        with blocking, receiver, running(lambda: blocking.send(("next", None)), closing=(blocking, receiver)):
            assert [receiver.recv()[0] for _ in range(sent + 1)] == [*range(sent), "next"]

    run(main)


def test_packet_in_hand_goes_along(run: Run) -> None:
    """One that the loop's poller has reported, for a task that was cancelled before it could look."""

    async def main() -> None:
        a, b = pair("seqpacket")
        async with a:
            (task,) = await started(b.recv())
            await a.send("in hand")
            b._waits._reader._on_event()  # type: ignore[attr-defined]  # as the loop would, in one go with what follows
            task.cancel()
            await settle()
            assert b._transport.arrived is not None
            assert b.poll()
            with b.to_sync() as blocking, ChannelSet([blocking]) as many:
                assert blocking.poll()
                for _ in range(2):
                    assert wait([blocking], 20) == many.select(20) == [blocking]
                assert blocking.recv() == "in hand"
                assert many.select(0) == []
                await a.send("on its way")
                assert many.select(20) == [blocking]
                assert blocking.recv() == "on its way"

    run(main)


def test_thread_that_waits_in_the_channel_gets_closed_error(run: Run, transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    waiting = threading.Event()

    def receive() -> None:
        waiting.set()
        with pytest.raises(ClosedError):
            b.recv()

    async def main() -> None:
        async with AsyncChannel(b) as channel, AsyncChannel(a) as other:
            await other.send(1)
            assert await channel.recv() == 1

    with running(receive, closing=(a, b)):
        waiting.wait()
        run(main)


def test_tasks_that_wait_in_the_async_channel_get_closed_error(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with b:
            sent = await fill(a)
            tasks = await started(a.recv(), a.recv(), a.send(1), a.send(2))
            with a.to_sync():
                for task in tasks:
                    with pytest.raises(ClosedError):
                        await task
                for number in range(sent):
                    assert (await b.recv())[0] == number

    run(main)


# between event loops


def test_one_loop_after_the_other(transport: str) -> None:
    """Whichever way the first one was left."""
    a, b = pair(transport)

    async def leave_a_wait_behind() -> None:
        await settle()
        await started(b.recv(), b.recv())

    async def talk(number: int) -> None:
        (task,) = await started(b.recv())
        await a.send(number)
        assert await task == number

    for number, loop in enumerate(["asyncio", "uvloop", "asyncio"]):
        run_in(loop, leave_a_wait_behind)
        run_in(loop, talk, number)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    for number, loop in enumerate([first, second, first, second]):  # none of them closed
        loop.run_until_complete(talk(number))
    a.close()
    b.close()
    first.close()
    second.close()


def test_loop_that_runs_in_another_thread(run: Run, transport: str) -> None:
    a, b = pair(transport)
    ready, done = threading.Event(), threading.Event()

    async def hold() -> None:
        await started(b.recv())
        ready.set()
        while not done.is_set():
            await asyncio.sleep(0.001)

    async def intrude() -> None:
        with pytest.raises(RuntimeError, match="another thread"):
            await b.recv()
        with pytest.raises(RuntimeError, match="another thread"):
            b.to_sync()
        with pytest.raises(RuntimeError, match="another thread"):
            AsyncChannel(b)

    with running(lambda: run(hold)):
        try:
            assert ready.wait(20)
            run(intrude)
        finally:
            done.set()
    a.close()
    b.close()


def test_dropped_open(run: Run, transport: str) -> None:
    """A warning, and nothing stays in the loop: the number may be somebody else's at once."""

    async def main() -> None:
        a, b = pair(transport)
        with a.to_sync() as other:
            (task,) = await started(b.recv())
            task.cancel()
            await settle()
            del task
            with pytest.warns(ResourceWarning, match="unclosed <AsyncChannel"):
                del b
            with pytest.raises(PeerClosedError):
                other.recv()
            c, d = pair(transport)  # likely with the same numbers
            async with c, d:
                tasks = await started(c.recv(), d.recv())
                await c.send(1)
                await d.send(2)
                assert await asyncio.gather(*tasks) == [2, 1]

    run(main)


def test_collected_by_another_thread(run: Run, transport: str) -> None:
    """The loop forgets the number first, and then the socket is closed."""

    async def main() -> None:
        a, b = pair(transport)
        (task,) = await started(b.recv())
        task.cancel()
        await settle()
        del task
        number = b.fileno()
        box = [b]
        del b

        def drop() -> None:
            with pytest.warns(ResourceWarning):
                box.clear()

        async with a:
            await asyncio.to_thread(drop)
            with pytest.raises(PeerClosedError):
                await a.recv()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)

    run(main)


# to other processes


def test_async_channel_in_a_message(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        c, d = pair(transport)
        async with a, b, c:
            await a.send({"channel": d, "again": d})
            received = await b.recv()
            assert type(received["channel"]) is AsyncChannel
            assert received["again"] is received["channel"]
            async with received["channel"] as copy:
                await copy.send(1)
                assert await c.recv() == 1
            await a.send(move(d))
            assert d.closed
            async with await b.recv() as moved:
                (task,) = await started(moved.recv())
                await c.send(2)
                assert await task == 2
            with pytest.raises(NotSendableError, match="closed"):
                await a.send(moved)

    run(main)


def _echo_in_a_child(channel: AsyncChannel) -> None:
    async def main() -> None:
        async with channel:
            async for message in channel:
                await channel.send(move(message))

    asyncio.run(main())


@pytest.mark.parametrize("method", METHODS)
def test_async_channel_as_argument_of_a_process(transport: str, method: str) -> None:
    async def main() -> None:
        async with a:
            with numbered_handle(4) as handle:
                await a.send(handle)
            assert read_number(await a.recv()) == 4

    a, b = pair(transport)
    try:
        child = Child(_echo_in_a_child, b, method=method, unwanted=(a,))
    finally:
        b.close()
    run_in("asyncio", main)
    child.result()


def test_fork_of_a_process_whose_loop_waits(run: Run, transport: str) -> None:
    """The child has inherited the loop's poller, and closes or goes on with the channel; the parent's loop does not notice."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            await fill(a)
            tasks = await started(a.recv(), a.send((-1, b"")))
            checked_child(_close_both, a, b, method="fork")
            assert not any(task.done() for task in tasks)
            await b.send("still here")
            assert await tasks[0] == "still here"
            while (await b.recv())[0] >= 0:
                pass
            await tasks[1]

    run(main)


def _close_both(a: AsyncChannel, b: AsyncChannel) -> None:
    assert not a.poll()
    a.close()
    b.close()


@requires_seqpacket
def test_forked_child_goes_on_in_a_loop_of_its_own(run: Run) -> None:
    async def main() -> None:
        a, b = pair("seqpacket")
        async with a:
            (task,) = await started(b.recv())
            child = Child(_echo_in_a_child, b, method="fork", unwanted=(a,))
            await a.send(1)
            await task
            b.close()
            await a.send(2)
            assert await a.recv() == 2
        child.result()

    run(main)


def _tell(channel: AsyncChannel) -> None:
    with channel.to_sync() as blocking:
        blocking.send(os.getpid())


def test_plain_process_arguments(transport: str) -> None:
    async def main() -> None:
        async with a:
            process = multiprocessing.get_context("spawn").Process(target=_tell, args=(b,))
            process.start()
            b.close()
            assert await a.recv() == process.pid
            with pytest.raises(PeerClosedError):
                await a.recv()
            process.join()
            process.close()

    a, b = pair(transport)
    run_in("asyncio", main)


def test_selectors_and_wait_see_it(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            assert fdshare.wait([b], 0) == []
            await a.send(pattern(10))
            assert fdshare.wait([b], 0) == [b]
            assert select.select([b], [], [], 0)[0] == [b]
            await b.recv()

    run(main)


def test_every_kind_after_passing_on_at_each_message(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        for number in range(2 * len(KINDS)):
            (task,) = await started(send_all(a, range(number, number + 1)))
            b = AsyncChannel(b.to_sync())
            assert verify(await b.recv()) == number
            await task
            a = AsyncChannel(a.to_sync())
        a.close()
        b.close()

    run(main)
