"""connect, Listener and serve in an event loop: who is served, by how many tasks, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aio_loops import LOOPS, run, run_in, settle, started
from helpers import TRANSPORTS

import fdshare
from fdshare import AccessDeniedError, ClosedError, FdHandle, FdLimitError, PeerClosedError, aio
from fdshare.aio import AsyncChannel
from fdshare.testing import Child, checked_child, numbered_handle, read_number

__all__ = ["run"]

Run = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


async def echo(channel: AsyncChannel) -> None:
    async for message in channel:
        await channel.send(message)


# connecting and accepting


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_connect_and_accept(run: Run, path: str, transport: str) -> None:
    async def main() -> None:
        async with aio.Listener(path, transport=transport) as listener:
            assert (listener.address, listener.transport, listener.closed) == (path, transport, False)
            (task,) = await started(listener.accept())
            async with await aio.connect(path, transport=transport) as client, await task as server:
                assert client.peer.pid == server.peer.pid == os.getpid()
                await client.send("hello")
                assert await server.recv() == "hello"
                with numbered_handle(3) as handle:
                    await server.send(handle)
                assert read_number(await client.recv()) == 3
        assert not os.path.exists(path)
        with pytest.raises(ClosedError):
            await listener.accept()
        with pytest.raises(FileNotFoundError):
            await aio.connect(path)

    run(main)


def test_the_other_side_may_be_blocking(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path) as listener:
            with fdshare.connect(path) as client:
                client.send(1)
                async with await listener.accept() as server:
                    assert await server.recv() == 1
                    await server.send(2)
                    assert client.recv() == 2
        with fdshare.Listener(path) as blocking:
            async with await aio.connect(path) as client, AsyncChannel(blocking.accept()) as server:
                await client.send(3)
                assert await server.recv() == 3

    run(main)


def test_listener_of_a_blocking_one(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(fdshare.Listener(path)) as listener:
            (task,) = await started(listener.accept())
            async with await aio.connect(path), await task:
                pass

    run(main)


def test_tasks_accept_in_order(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path) as listener:
            tasks = await started(*[listener.accept() for _ in range(5)])
            tasks[1].cancel()
            clients = [await aio.connect(path) for _ in range(4)]
            for number, client in enumerate(clients):
                await client.send(number)
            servers = [await task for task in tasks[:1] + tasks[2:]]
            assert [await server.recv() for server in servers] == list(range(4))
            for channel in clients + servers:
                channel.close()

    run(main)


def test_cancelled_accept_has_taken_nobody(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path) as listener:
            for steps in range(5):
                (task,) = await started(listener.accept())
                async with await aio.connect(path):
                    await settle(steps)
                    task.cancel()
                    try:
                        server = await task
                    except asyncio.CancelledError:
                        server = await listener.accept()
                    server.close()

    run(main)


def test_close_wakes_who_accepts(run: Run, path: str) -> None:
    async def main() -> None:
        listener = aio.Listener(path)
        tasks = await started(listener.accept(), listener.accept())
        (iteration,) = await started(anext(listener, "the end"))
        await listener.aclose()
        listener.close()
        for task in tasks:
            with pytest.raises(ClosedError):
                await task
        assert await iteration == "the end"
        assert repr(listener).startswith("<aio.Listener closed")

    run(main)


def test_full_backlog_is_waited_for(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path, backlog=0) as listener:
            tasks = await started(*[aio.connect(path) for _ in range(4)])
            assert not all(task.done() for task in tasks)
            for _ in range(4):
                (await listener.accept()).close()
            for task in tasks:
                (await task).close()

    run(main)


def test_refused_peer_is_told_and_the_next_one_comes(run: Run, path: str) -> None:
    async def main() -> None:
        answers = iter([False, True])
        async with aio.Listener(path, allow=lambda peer: next(answers)) as listener:
            (task,) = await started(listener.accept())
            async with await aio.connect(path) as refused:
                for _ in range(3):  # the socket tells of it once
                    with pytest.raises(AccessDeniedError):
                        await refused.recv()
                    assert refused.poll()
            async with await aio.connect(path), await task:
                pass
        async with aio.Listener(path):
            with pytest.raises(AccessDeniedError):
                await aio.connect(path, allow=lambda peer: False)

    run(main)


def _accept_at_the_limit(loop: str, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path) as listener, await aio.connect(path) as client:
            await settle()
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            with FdHandle.dup(0) as highest:
                waits = listener._enter()  # an event loop may want a descriptor for itself
                assert waits.is_here()
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), limit[1]))
            with pytest.raises(FdLimitError):
                await listener.accept()
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            async with await listener.accept() as server:
                await client.send(1)
                assert await server.recv() == 1

    run_in(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_accept_at_the_descriptor_limit(loop: str, path: str) -> None:
    checked_child(_accept_at_the_limit, loop, path, method="fork")


def test_listener_travels(run: Run, path: str) -> None:
    async def main() -> None:
        a, b = aio.Pipe()
        async with a, b:
            async with aio.Listener(path) as listener:
                await a.send(listener)
            async with await b.recv() as copy:
                assert type(copy) is aio.Listener
                await a.send(fdshare.move(copy))
                assert copy.closed
            async with await b.recv() as moved, await aio.connect(moved.address), await moved.accept():
                pass

    listener_file = Path(path)
    with pytest.raises(FileNotFoundError):  # the one that made the file removes it
        run(main)
    assert not listener_file.exists()


# serving


def test_serve_many_peers(run: Run, path: str) -> None:
    async def talk(number: int) -> None:
        async with await aio.connect(path) as channel:
            for i in range(5):
                with numbered_handle(number + i) as handle:
                    await channel.send(handle)
                assert read_number(await channel.recv()) == number + i

    async def handler(channel: AsyncChannel) -> None:
        async for handle in channel:
            await channel.send(fdshare.move(handle))

    async def main() -> None:
        async with aio.serve(handler, path) as server:
            await asyncio.gather(*[talk(10 * n) for n in range(40)])
            while server.connections:
                await asyncio.sleep(0)

    run(main)


def test_three_ways_to_serve(path: str) -> None:
    async def use() -> None:
        async with await aio.connect(path) as channel:
            await channel.send(1)
            assert await channel.recv() == 1

    async def in_a_block() -> None:
        async with aio.serve(echo, path):
            await use()

    async def until_closed() -> None:
        server = await aio.serve(echo, path)
        await use()
        await server.aclose()
        await server.aclose()

    async def as_a_task() -> None:
        (task,) = await started(aio.serve(echo, path))
        await use()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def in_a_group() -> None:
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(aio.serve(echo, path))
                await settle()
                await use()
                raise ValueError

    for main in (in_a_block, until_closed, as_a_task, in_a_group):
        run_in("asyncio", main)
        assert not os.path.exists(path)


def test_serving_that_never_began_leaves_nothing(path: str) -> None:
    async def main() -> None:
        aio.serve(echo, path)
        asyncio.create_task(aio.serve(echo, path)).cancel()
        with pytest.raises(FileNotFoundError):
            async with aio.serve(echo, path + "/no/directory"):
                pass

    run_in("asyncio", main)


def test_what_a_handler_raises_ends_one_connection(
    run: Run, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(channel: AsyncChannel) -> None:
        if await channel.recv() == "fail":
            raise ValueError("on purpose")
        await echo(channel)

    async def main() -> None:
        async with aio.serve(handler, path), await aio.connect(path) as good, await aio.connect(path) as bad:
            await good.send("begin")
            await bad.send("fail")
            with pytest.raises(PeerClosedError):
                await bad.recv()
            await good.send(1)
            assert await good.recv() == 1

    run(main)
    (record,) = [record for record in caplog.records if record.name == "fdshare"]
    assert record.exc_info is not None
    assert "on purpose" in str(record.exc_info[1])


def test_peer_that_goes_is_no_error(run: Run, path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(channel: AsyncChannel) -> None:
        while True:
            await channel.recv()

    async def main() -> None:
        async with aio.serve(handler, path) as server:
            (await aio.connect(path)).close()
            await asyncio.sleep(0.001)
            while server.connections:
                await asyncio.sleep(0)

    with caplog.at_level(logging.INFO):
        run(main)
    assert not [record for record in caplog.records if record.name == "fdshare"]


@pytest.mark.parametrize("say", [b"", b"GET / HTTP/1.0\r\n\r\n"])
def test_peer_without_a_hello_is_not_served(
    run: Run, path: str, say: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody waits for it meanwhile."""
    served = []

    async def handler(channel: AsyncChannel) -> None:
        served.append(channel)
        await echo(channel)

    async def main() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bare:
            async with aio.serve(handler, path, transport="stream", hello_timeout=0.05) as server:
                bare.connect(path)
                bare.send(say)
                async with await aio.connect(path, transport="stream") as channel:
                    await channel.send(1)
                    assert await channel.recv() == 1
                while server.connections:
                    await asyncio.sleep(0.01)
                assert len(served) == 1

    with caplog.at_level(logging.INFO):
        run(main)
    assert "did not say hello" in caplog.text


def test_close_lets_handlers_finish(run: Run, path: str) -> None:
    """What they had received is answered; then they find the end, and nobody new comes."""

    async def handler(channel: AsyncChannel) -> None:
        async for number in channel:
            await asyncio.sleep(0.001)
            await channel.send(-number)
        await channel.send("the end")

    async def main() -> None:
        async with aio.serve(handler, path) as server, await aio.connect(path) as channel:
            for number in range(1, 6):
                await channel.send(number)
            assert await channel.recv() == -1
            server.close()
            with pytest.raises(FileNotFoundError):
                await aio.connect(path)
            assert [message async for message in channel] == [-2, -3, -4, -5, "the end"]
            with pytest.raises(PeerClosedError):
                await channel.send("too late")
            await server.aclose()

    run(main)


def test_handlers_that_do_not_finish_are_cancelled(run: Run, path: str) -> None:
    cancelled = []

    async def handler(channel: AsyncChannel) -> None:
        await channel.send("here")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    async def main() -> None:
        server = await aio.serve(handler, path, grace=0.01)
        async with await aio.connect(path) as channel:
            assert await channel.recv() == "here"
            await server.aclose()
            assert cancelled == [1]
            with pytest.raises(PeerClosedError):
                await channel.recv()

    run(main)


def _serve_at_the_limit(loop: str, path: str) -> None:
    async def handler(channel: AsyncChannel) -> None:
        await channel.send("welcome")

    async def main() -> None:
        async with aio.serve(handler, path) as server, await aio.connect(path) as first:
            assert await first.recv() == "welcome"
            async with await aio.connect(path) as second:
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await second.recv()
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
                assert await second.recv() == "welcome"
            assert not server.listener.closed

    run_in(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_serving_goes_on_after_the_descriptor_limit(loop: str, path: str) -> None:
    checked_child(_serve_at_the_limit, loop, path, method="fork")


def _serve(path: str) -> None:
    async def main() -> None:
        async with aio.serve(echo, path) as server:
            await server.serve_forever()

    asyncio.run(main())


def test_clients_survive_a_killed_server(path: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    channel = await aio.connect(path)
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    await asyncio.sleep(0.005)
        async with channel:
            await channel.send(1)
            assert await channel.recv() == 1
            (task,) = await started(channel.recv())
            child.kill()
            with pytest.raises(PeerClosedError):
                await task
            with pytest.raises(ConnectionRefusedError):
                await aio.connect(path)

    with Child(_serve, path, method="fork") as child:
        run_in("asyncio", main)
    os.unlink(path)
