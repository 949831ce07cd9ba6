"""Reference leaks, found as CPython's regression tests do (``-R 3:3``): after some rounds of the same work, no more objects.

Descriptors, threads and children are checked after every test, by conftest; here it is what the collector knows: waiters, tasks,
messages.  Blocks of memory would tell of bytes too, but go on growing for a hundred rounds of asyncio alone.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aio_loops import LOOPS, pair, run_in, settle, started
from helpers import LARGE, TRANSPORTS

from fdshare import FdHandle, PeerClosedError, aio, move
from fdshare.aio import AsyncChannel

WARMUPS, ROUNDS = 3, 3
PER_ROUND = 10
"""How often each round does the work: what is left behind once each time shows as many times."""

Work = Callable[[str, Path], Awaitable[None]]


async def talk(transport: str, _: Path) -> None:
    a, b = pair(transport)
    async with a, b:
        for message in (1, bytes(LARGE), [FdHandle(os.open(os.devnull, os.O_RDONLY))]):
            receiving = asyncio.ensure_future(b.recv())
            await settle(2)
            await a.send(move(message[0]) if isinstance(message, list) else message)
            received = await receiving
            if isinstance(received, FdHandle):
                received.close()


async def fill_up(channel: AsyncChannel) -> None:
    """Send until a task has to wait, and cancel that."""
    while True:
        (sending,) = await started(channel.send(bytes(60_000)))
        if not sending.done():
            sending.cancel()
            await settle(2)
            return


async def cancel(transport: str, _: Path) -> None:
    """Receivers that wait, at the socket and for their turn; senders likewise."""
    a, b = pair(transport)
    async with a, b:
        receivers = await started(b.recv(), b.recv())
        await fill_up(a)
        senders = await started(a.send(bytes(60_000)), a.send(bytes(LARGE)))
        for task in (*receivers, *senders):
            task.cancel()
        await asyncio.gather(*receivers, *senders, return_exceptions=True)


async def close_under_waiters(transport: str, _: Path) -> None:
    a, b = pair(transport)
    waiting = await started(b.recv(), b.recv(), a.recv())
    a.close()
    await settle()
    b.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def convert(transport: str, _: Path) -> None:
    a, b = pair(transport)
    async with a:
        await a.send("in the queue")
        blocking = b.to_sync()
        async with AsyncChannel(blocking) as again:
            assert await again.recv() == "in the queue"


async def serve(transport: str, directory: Path) -> None:
    async def handler(channel: AsyncChannel) -> None:
        async for message in channel:
            await channel.send(message)

    path = str(directory / "socket")
    async with (
        aio.serve(handler, path, transport=transport),
        await aio.connect(path, transport=transport) as channel,
    ):
        await channel.send("there")
        assert await channel.recv() == "there"


async def fail(transport: str, _: Path) -> None:
    a, b = pair(transport)
    async with b:
        await a.send("last")
        with pytest.raises(TypeError):
            await a.send(sys._getframe())
        a.close()
        assert [message async for message in b] == ["last"]
        with pytest.raises(PeerClosedError):
            await b.send("nobody")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("work", [talk, cancel, close_under_waiters, convert, serve, fail])
def test_nothing_grows(work: Work, loop: str, transport: str, tmp_path: Path) -> None:
    async def rounds() -> list[int]:
        objects = []
        for _ in range(WARMUPS + ROUNDS):
            for _ in range(PER_ROUND):
                await work(transport, tmp_path)
            await settle()
            gc.collect()
            objects.append(len(gc.get_objects()))
        return objects[WARMUPS - 1 :]

    counts = run_in(loop, rounds)
    grown = [after - before for before, after in itertools.pairwise(counts)]
    assert min(grown) < PER_ROUND // 2, f"objects left behind by each round of {PER_ROUND}: {grown}"
