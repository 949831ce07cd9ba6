"""Cancelled tasks: a recv has taken nothing, a send has sent all or nothing, and the next one goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aio_loops import fill, pair, run, send_all, settle, started
from helpers import KINDS, LARGE, compose, requires_unread_count, verify

from fdshare import Channel, ClosedError, aio, move, wire
from fdshare.aio import AsyncChannel
from fdshare.aio.end import BURST
from fdshare.testing import numbered_handle, pattern, read_number

__all__ = ["run"]

Run = Callable[..., Any]

STEPS = range(6)
"""Turns of the loop between an event and the cancellation: from before the event to after the task has noticed it."""


async def outcome(task: asyncio.Task[Any]) -> Any:
    """Return what a task returned, or ``"cancelled"``."""
    try:
        return await task
    except asyncio.CancelledError:
        return "cancelled"


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_recv_has_taken_nothing(run: Run, transport: str, kind: str) -> None:
    """At whatever step between the message's arrival and the task's."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            for steps in STEPS:
                (task,) = await started(b.recv())
                message, handles = compose(7, kind)
                await a.send(message)
                for handle in handles:
                    handle.close()
                await settle(steps)
                task.cancel()
                found = await outcome(task)
                assert verify(await b.recv() if found == "cancelled" else found) == 7
                assert not b.poll()

    run(main)


def test_cancelled_receiver_leaves_the_message_to_the_next(run: Run, transport: str) -> None:
    """To the one that waits behind it already."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            for steps in STEPS:
                first, second, third = await started(b.recv(), b.recv(), b.recv())
                await a.send(1)
                await settle(steps)
                first.cancel()
                await a.send(2)
                await a.send(3)
                found = [await outcome(first), await second]
                if found[0] == "cancelled":
                    assert found[1] == 1
                    assert await third == 2
                    assert await b.recv() == 3
                else:
                    assert [*found, await third] == [1, 2, 3]

    run(main)


def test_cancelled_waiters_in_the_queue(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            for steps in STEPS:
                tasks = await started(*[b.recv() for _ in range(6)])
                await a.send(1)
                await settle(steps)
                for task in tasks[1:5]:
                    task.cancel()
                await a.send(2)
                assert [await outcome(task) for task in tasks] == [1, *["cancelled"] * 4, 2]

    run(main)


def test_timeouts_between_messages(run: Run, transport: str) -> None:
    """Many small waits for one message after the other."""

    async def main() -> None:
        a, b = pair(transport)
        received = []
        async with a, b:
            sender = asyncio.create_task(send_all(a, range(60)))
            while len(received) < 60:
                try:
                    async with asyncio.timeout(random.random() / 2000):
                        received.append(verify(await b.recv()))
                except TimeoutError:
                    pass
            await sender
        assert received == list(range(60))

    run(main)


TINY = 0.0003  # uvloop rounds it to nothing


def test_tiny_timeouts_make_progress(run: Run, transport: str) -> None:
    """Beyond the burst after which a call first lets the other tasks run: that must not be the end of each that follows."""
    count = 5 * BURST

    async def trying(call: Callable[[int], Coroutine[Any, Any, Any]]) -> list[Any]:
        done: list[Any] = []
        while len(done) < count:
            with contextlib.suppress(TimeoutError):
                done.append(await asyncio.wait_for(call(len(done)), TINY))
        return done

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            _, received = await asyncio.gather(trying(a.send), trying(lambda _: b.recv()))
            assert received == list(range(count))

    run(main)


def test_tiny_timeouts_of_accept(run: Run, transport: str, tmp_path: Path) -> None:
    """As above, where those who came before are refused."""
    path = tmp_path / "socket"
    known = 0

    def last_of_many(peer: object) -> bool:
        nonlocal known
        known += 1
        return known > 2 * BURST

    async def main() -> None:
        async with aio.Listener(path, transport=transport, allow=last_of_many) as listener:
            clients = [await aio.connect(path, transport=transport) for _ in range(2 * BURST + 1)]
            accepted = None
            while accepted is None:
                with contextlib.suppress(TimeoutError):
                    accepted = await asyncio.wait_for(listener.accept(), TINY)
            for channel in (accepted, *clients):
                channel.close()

    run(main)


# sending


@pytest.mark.parametrize("kind", ["small", "inline", "one_fd", "large_and_fds", "bundle"])
def test_cancelled_send_has_sent_nothing(run: Run, transport: str, kind: str) -> None:
    """Nor anything of it, where it was in the middle of a frame."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            sent = await fill(a, 60_000)
            sent += await _fill_on(a, sent)
            (task,) = await started(send_all(a, range(1000, 1001), (kind,)))
            assert not task.done()
            task.cancel()
            assert await outcome(task) == "cancelled"
            (after,) = await started(a.send(("after", b"")))
            assert [(await b.recv())[0] for _ in range(sent)] == list(range(sent))
            assert (await b.recv())[0] == "after"
            await after
            await _talk(a, b)

    run(main)


async def _fill_on(channel: AsyncChannel, first: int) -> int:
    """Fill what is left with small messages, numbered on; return how many."""
    count = 0
    try:
        while True:
            async with asyncio.timeout(0.01):
                await channel.send((first + count, b""))
            count += 1
    except TimeoutError:
        return count


async def _talk(a: AsyncChannel, b: AsyncChannel) -> None:
    """Send something both ways, with descriptors."""
    for sender, receiver in ((a, b), (b, a)):
        with numbered_handle(9) as handle:
            await sender.send(handle)
        assert read_number(await receiver.recv()) == 9


@pytest.mark.parametrize("steps", STEPS)
def test_send_cancelled_while_room_comes(run: Run, transport: str, steps: int) -> None:
    """It was sent, or it was not; the caller knows which."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            sent = await fill(a, 60_000)
            with numbered_handle(5) as handle:
                (task,) = await started(a.send(("last", pattern(60_000), handle)))
                expected: list[Any] = list(range(sent))
                received = [(await b.recv())[0] for _ in expected]
                await settle(steps)
                task.cancel()
                if await outcome(task) != "cancelled":
                    expected.append("last")
                await a.send(("end", b""))
                while received[-1:] != ["end"]:
                    number, *rest = await b.recv()
                    if number == "last":
                        assert read_number(rest[1]) == 5
                    received.append(number)
                assert received == [*expected, "end"]

    run(main)


def test_cancelled_sender_gives_its_turn_on(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            sent = await fill(a)
            tasks = await started(*[a.send((sent + i, b"")) for i in range(10)])
            for i in (0, 3, 4, 9):
                tasks[i].cancel()
            kept = [sent + i for i in (1, 2, 5, 6, 7, 8)]
            assert [(await b.recv())[0] for _ in range(sent + len(kept))] == [*range(sent), *kept]
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not b.poll()

    run(main)


def test_moved_handle_stays_with_a_cancelled_sender(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            await fill(a)
            with numbered_handle(3) as handle:
                (task,) = await started(a.send(move(handle)))
                task.cancel()
                assert await outcome(task) == "cancelled"
                assert read_number(handle) == 3

    run(main)


def test_cancelled_while_a_thread_writes_the_segment(run: Run, transport: str) -> None:
    """The task waits for the thread, which reads the caller's memory, and then nothing is sent."""

    async def main() -> None:
        a, b = pair(transport)
        async with a, b:
            content = bytearray(pattern(6 << 20))
            for steps in range(3):
                task = asyncio.create_task(a.send(content))
                await settle(1 + steps)
                task.cancel()
                if await outcome(task) == "cancelled":
                    content[:] = bytes(len(content))  # nobody looks into it any more
                    content[:] = pattern(len(content))
                    await a.send("nothing")
                    assert await b.recv() == "nothing"
                else:
                    assert await b.recv() == content

    run(main)


@requires_unread_count
def test_cancelled_while_large_messages_are_in_flight(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport, max_inflight=LARGE)
        async with a, b:
            await a.send(bytes(LARGE))
            (task,) = await started(a.send(bytes(LARGE)))
            task.cancel()
            assert await outcome(task) == "cancelled"
            assert len(await b.recv()) == LARGE
            await a.send(bytes(LARGE))
            assert len(await b.recv()) == LARGE
            assert not b.poll()

    run(main)


def test_frame_that_was_given_up_is_completed_by_close(run: Run) -> None:
    """Where there is room again: the receiver drops it, and then finds the end, not an error."""

    async def main() -> None:
        a, b = pair("stream")
        async with b:
            sent = await fill(a, 60_000)
            assert a._transport._frame[-1] == 0  # type: ignore[union-attr]  # a frame was begun, and given up
            for number in range(sent):
                assert (await b.recv())[0] == number
            a.close()
            assert [message async for message in b] == []

    run(main)


def test_descriptors_of_a_frame_that_was_given_up_are_dropped(run: Run) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        a, b = AsyncChannel(Channel(ours)), AsyncChannel(Channel(theirs))
        async with a, b:
            reader, writer = socket.socketpair()
            with reader:
                with writer:
                    (task,) = await started(a.send((writer, bytes(wire.ALWAYS_INLINE - 200))))
                    task.cancel()
                    assert await outcome(task) == "cancelled"
                (task,) = await started(a.send("next"))
                assert await b.recv() == "next"
                await task
                assert reader.recv(1) == b""  # nobody holds the other end

    run(main)


def test_random_cancellations_of_both_sides(run: Run, transport: str) -> None:
    """What a send has said was sent arrives, once and in order; what it has not does not."""
    dice = random.Random(5)

    async def main() -> None:
        a, b = pair(transport)
        sent: list[int] = []
        received: list[int] = []

        async def send() -> None:
            for number in range(150):
                message, handles = compose(number, KINDS[number % len(KINDS)])
                try:
                    async with asyncio.timeout(dice.random() / 1000):
                        await a.send(message)
                        sent.append(number)
                except TimeoutError:
                    pass
                finally:
                    for handle in handles:
                        handle.close()
            await a.aclose()

        async def receive() -> None:
            while True:
                try:
                    async with asyncio.timeout(dice.random() / 1000):
                        message = await b.recv()
                except TimeoutError:
                    continue
                except EOFError:
                    return
                received.append(verify(message))
                await asyncio.sleep(dice.random() / 2000)

        async with a, b:
            await asyncio.gather(send(), receive())
        assert received == sent
        assert sent

    run(main)


def test_close_while_cancelled_tasks_unwind(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = pair(transport)
        async with b:
            await fill(a)
            tasks = await started(a.send(1), a.send(2), a.recv(), a.recv())
            tasks[0].cancel()
            tasks[2].cancel()
            a.close()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in found] == [asyncio.CancelledError, ClosedError] * 2

    run(main)
