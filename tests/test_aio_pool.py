"""fdshare's process pool under an event loop: run_in_executor and wrap_future, with files, sockets and channels as arguments."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from aio_loops import run, settle

import fdshare
from fdshare import FdHandle, ProcessPoolExecutor, WorkerDiedError, aio, move
from fdshare.aio import AsyncChannel

__all__ = ["run"]

Run = Callable[..., Any]


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    # Forked: in a worker that imports this module, uvloop opens the pipe that it keeps.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        executor.submit(os.getpid).result()
        yield executor


def head(file: IO[str], count: int) -> tuple[int, str]:
    with file:
        return os.getpid(), file.read(count)


def greet(sock: socket.socket) -> int:
    with sock:
        sock.sendall(b"hello from %d" % os.getpid())
    return os.getpid()


def connected_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def hold(reader: FdHandle) -> str:
    with reader.to_file() as file:
        file.read()
    return "released"


def echo(channel: AsyncChannel) -> int:
    async def main() -> int:
        count = 0
        async with channel:
            async for message in channel:
                await channel.send(message)
                count += 1
        return count

    return asyncio.run(main())


def test_run_in_executor(run: Run, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("some words")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with open(path) as file:
            assert file.read(5) == "some "
            pid, words = await loop.run_in_executor(pool, head, file, 10)
        assert words == "words"
        assert pid != os.getpid()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = await loop.run_in_executor(pool, greet, theirs)
            assert ours.recv(100) == b"hello from %d" % pid
        ours, theirs = await loop.run_in_executor(pool, connected_pair)
        with ours, theirs:
            ours.send(b"x")
            assert theirs.recv(1) == b"x"

    run(main)


def test_wrap_future(run: Run, pool: ProcessPoolExecutor) -> None:
    async def main() -> None:
        ends = [socket.socketpair() for _ in range(20)]
        futures = [asyncio.wrap_future(pool.submit(greet, move(theirs))) for _, theirs in ends]
        assert all(theirs.fileno() < 0 for _, theirs in ends)
        pids = await asyncio.gather(*futures)
        for (ours, _), pid in zip(ends, pids, strict=True):
            with ours:
                assert ours.recv(100) == b"hello from %d" % pid

    run(main)


def test_the_loop_goes_on_meanwhile(run: Run, pool: ProcessPoolExecutor) -> None:
    async def main() -> None:
        read, write = os.pipe()
        with FdHandle(read) as reader, FdHandle(write) as writer:
            task = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(pool, hold, move(reader)))
            await settle(20)
            assert not task.done()
            writer.close()
            assert await task == "released"

    run(main)


def test_cancelled_future(run: Run, pool: ProcessPoolExecutor) -> None:
    """One that has not begun is cancelled in the pool too, and its descriptors are closed."""

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            pipes = [tuple(map(FdHandle, os.pipe())) for _ in range(2)]
            for _, writer in pipes:
                stack.enter_context(writer)
            busy = [asyncio.wrap_future(pool.submit(hold, move(reader))) for reader, _ in pipes]
            ours, theirs = map(stack.enter_context, socket.socketpair())
            waiting = [pool.submit(greet, theirs) for _ in range(40)]
            wrapped = [asyncio.wrap_future(future) for future in waiting]
            theirs.close()
            wrapped[-1].cancel()
            await settle()
            assert waiting[-1].cancelled()
            for _, writer in pipes:
                writer.close()
            assert await asyncio.gather(*busy) == ["released"] * 2
            await asyncio.gather(*wrapped[:-1])
            data = b""
            while more := ours.recv(1000):  # until all copies are closed
                data += more
            assert data.count(b"hello") == 39

    run(main)


def test_errors_come_through(run: Run, pool: ProcessPoolExecutor) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(pool, divmod, 1, 0)
        with pytest.raises(WorkerDiedError):
            await loop.run_in_executor(pool, os._exit, 3)
        with pytest.raises(fdshare.NotSendableError):
            await loop.run_in_executor(pool, print, loop)

    run(main)


def test_async_channel_as_argument(run: Run, pool: ProcessPoolExecutor) -> None:
    """The worker serves it in an event loop of its own, while this one talks to it."""

    async def main() -> None:
        ours, theirs = aio.Pipe()
        future = asyncio.wrap_future(pool.submit(echo, move(theirs)))
        async with ours:
            for number in range(20):
                await ours.send(number)
                assert await ours.recv() == number
        assert await future == 20

    run(main)
