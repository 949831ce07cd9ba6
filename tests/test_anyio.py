"""The same channels under trio, and under anyio on asyncio: their waiting, their cancellation, their interfaces."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trio
import trio.testing
from aio_loops import send_all
from helpers import KINDS, LARGE, QUICK_METHODS, running, verify

import fdshare
from fdshare import Channel, ClosedError, PeerClosedError, move
from fdshare.integrations.anyio import AnyioChannel, AnyioListener, Pipe, connect
from fdshare.testing import (
    AsyncEndpoint,
    ChannelConformance,
    Child,
    checked_child,
    numbered_handle,
    pattern,
    read_number,
)

trio._core._thread_cache.IDLE_TIMEOUT = (
    0.01  # seconds that trio keeps a thread for the next one who wants one
)
Main = Callable[..., Coroutine[Any, Any, Any]]
BACKENDS = ("trio", "asyncio")


def run_in(backend: str, main: Main, *arguments: Any) -> Any:
    async def bounded() -> Any:
        with anyio.fail_after(30):
            return await main(*arguments)

    return anyio.run(bounded, backend=backend)


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run an async function under trio, and on asyncio."""
    return lambda main, *arguments: run_in(request.param, main, *arguments)


async def receive_all(channel: AnyioChannel, numbers: range) -> None:
    assert [verify(await channel.receive()) for _ in numbers] == list(numbers)


async def fill(channel: AnyioChannel, size: int = 1000) -> int:
    count = 0
    while True:
        with anyio.move_on_after(0.02) as scope:
            await channel.send((count, bytes(size)))
        if scope.cancelled_caught:
            return count
        count += 1


Run = Callable[..., Any]


def test_messages_both_ways(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        numbers = range(3 * len(KINDS))
        async with a, b, anyio.create_task_group() as group:
            for channel in (a, b):
                group.start_soon(send_all, channel, numbers)
                group.start_soon(receive_all, channel, numbers)

    run(main)


def test_large_message_leaves_the_loop_free(run: Run, transport: str) -> None:
    async def main() -> None:
        rounds = 0

        async def count() -> None:
            nonlocal rounds
            while True:
                rounds += 1
                await anyio.lowlevel.checkpoint()

        a, b = Pipe(transport=transport)
        content = pattern(6 << 20)
        async with a, b, anyio.create_task_group() as group:
            group.start_soon(count)
            meanwhile = 0
            for _ in range(20):  # a thread may be done before anybody waits for it, now and then
                before = rounds
                await a.send(content)
                meanwhile += rounds - before
                assert await b.recv() == content
                if meanwhile > 1:
                    break
            assert meanwhile > 1
            group.cancel_scope.cancel()

    run(main)


def test_bytes(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        async with a, b:
            await a.send_bytes(b"abc")
            assert await b.recv_bytes() == b"abc"
            a.close()
            with pytest.raises(anyio.EndOfStream):
                await b.recv_bytes()
            with pytest.raises(anyio.BrokenResourceError):
                await b.send_bytes(b"")

    run(main)


def test_errors_are_of_both_families(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        async with a, b:
            await a.send("last words")
            await a.aclose()
            assert [message async for message in b] == ["last words"]
            for error in (anyio.EndOfStream, PeerClosedError, EOFError):
                with pytest.raises(error):
                    await b.receive()
            for error in (anyio.BrokenResourceError, PeerClosedError, BrokenPipeError):
                with pytest.raises(error):
                    await b.send(1)
        for error in (anyio.ClosedResourceError, ClosedError, OSError):
            with pytest.raises(error):
                await b.receive()
            with pytest.raises(error) as caught:
                await b.send(1)
            assert type(pickle.loads(pickle.dumps(caught.value))) is ClosedError

    run(main)


def test_object_stream(run: Run, transport: str) -> None:
    """anyio's own interface, as its generic code uses it."""

    async def main() -> None:
        a, b = Pipe(transport=transport)
        assert isinstance(a, anyio.abc.ObjectStream)
        async with a, b:
            await a.send(1)
            await a.send_eof()
            assert [message async for message in b] == [1]
            with pytest.raises(OSError, match="read-only"):
                await a.send(2)
            await b.send(3)
            assert await a.receive() == 3
            assert a.extra_attributes == {}
            assert a.extra(anyio.abc.SocketAttribute.family, None) is None
            with pytest.raises(anyio.TypedAttributeLookupError):
                a.extra(anyio.abc.SocketAttribute.family)

    run(main)


# waiting and cancellation


def test_close_wakes_all_who_wait(run: Run, transport: str) -> None:
    async def main() -> None:
        caught = []

        async def expect(call: Main, *arguments: Any) -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await call(*arguments)
            caught.append(call)

        a, b = Pipe(transport=transport)
        async with b:
            await fill(a)
            async with anyio.create_task_group() as group:
                for _ in range(2):
                    group.start_soon(expect, a.recv)
                    group.start_soon(expect, a.send, 1)
                await anyio.wait_all_tasks_blocked()
                a.close()
        assert len(caught) == 4

    run(main)


def test_cancelled_recv_has_taken_nothing(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        received = []
        async with a, b, anyio.create_task_group() as group:
            group.start_soon(send_all, a, range(40))
            delay = 0.0
            while len(received) < 40:
                delay = (delay + 0.00007) % 0.0006
                with anyio.move_on_after(delay):
                    received.append(await b.recv())
        assert [verify(message) for message in received] == list(range(40))

    run(main)


def test_cancelled_send_has_sent_nothing(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        async with a, b:
            sent = await fill(a, 60_000)
            with numbered_handle(1) as handle, anyio.move_on_after(0.01):
                await a.send(("never", [handle], bytes(LARGE)))
            async with anyio.create_task_group() as group:
                group.start_soon(a.send, ("next", None))
                for number in range(sent):
                    assert (await b.recv())[0] == number
                assert await b.recv() == ("next", None)

    run(main)


def test_every_call_is_a_checkpoint(transport: str) -> None:
    """trio's own check: it may be cancelled there, and lets others run."""

    async def main() -> None:
        a, b = Pipe(transport=transport)
        with trio.testing.assert_checkpoints():
            await a.send(1)
        with trio.testing.assert_checkpoints():
            assert await b.recv() == 1
        with trio.testing.assert_checkpoints():
            await a.send(bytes(LARGE))
        with trio.testing.assert_checkpoints():
            await b.recv()
        with trio.testing.assert_checkpoints():
            await a.send_bytes(b"")
        with trio.testing.assert_checkpoints():
            await b.recv_bytes()
        with trio.testing.assert_checkpoints():
            await a.send_eof()
        with trio.testing.assert_checkpoints(), pytest.raises(anyio.EndOfStream):
            await b.recv()
        for end in (a, b):
            with trio.testing.assert_checkpoints():
                await end.aclose()
        for call in (a.recv, lambda: a.send(1)):
            with trio.testing.assert_checkpoints(), pytest.raises(anyio.ClosedResourceError):
                await call()

    run_in("trio", main)


def test_nothing_is_done_in_a_cancelled_scope(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        await a.send(1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await b.recv()
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await a.send(2)
        assert scope.cancelled_caught
        assert await b.recv() == 1
        assert not b.poll()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await a.aclose()
        assert scope.cancelled_caught
        assert a.closed
        b.close()

    run(main)


def test_flags_of_the_shared_description_stay(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        async with a, b, anyio.create_task_group() as group:
            group.start_soon(b.recv)
            await anyio.wait_all_tasks_blocked()
            assert os.get_blocking(b.fileno())
            await a.send(1)

    run(main)


# from one library to the other, and to other processes


def test_one_library_after_the_other(transport: str) -> None:
    async def talk() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(a.send, 1)
            assert await b.recv() == 1

    async def leave_a_wait_behind() -> None:
        with anyio.move_on_after(0.001):
            await b.recv()

    a, b = Pipe(transport=transport)
    for backend in ("trio", "asyncio", "trio", "trio", "asyncio"):
        run_in(backend, talk)
        run_in(backend, leave_a_wait_behind)
    a.close()
    b.close()


def test_trio_in_another_thread(transport: str) -> None:
    a, b = Pipe(transport=transport)
    ready, done = threading.Event(), threading.Event()

    async def hold() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(b.recv)
            await anyio.wait_all_tasks_blocked()
            ready.set()
            await trio.to_thread.run_sync(done.wait)
            group.cancel_scope.cancel()

    with running(lambda: trio.run(hold)):
        assert ready.wait(20)
        with pytest.raises(RuntimeError, match="another thread"):
            b.to_sync()
        done.set()
    a.close()
    b.to_sync().close()


def test_it_travels(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        c, d = Pipe(transport=transport)
        async with a, b, c:
            await a.send(move(d))
            assert d.closed
            async with await b.recv() as moved:
                assert type(moved) is AnyioChannel
                await moved.send(1)
                assert await c.recv() == 1
            blocking, other = fdshare.Pipe(transport=transport)
            with other:
                async with AnyioChannel(blocking):
                    assert blocking.closed

    run(main)


def _echo(backend: str, channel: AnyioChannel) -> None:
    async def main() -> None:
        async with channel:
            async for message in channel:
                await channel.send(move(message))

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", QUICK_METHODS)
def test_argument_of_a_process(backend: str, method: str) -> None:
    async def main() -> None:
        async with a:
            with numbered_handle(4) as handle:
                await a.send(handle)
            assert read_number(await a.recv()) == 4

    a, b = Pipe()
    try:
        child = Child(_echo, backend, b, method=method, unwanted=(a,))
    finally:
        b.close()
    run_in(backend, main)
    child.result()


def _close_both(a: AnyioChannel, b: AnyioChannel) -> None:
    a.close()
    b.close()


def test_fork_of_a_process_whose_loop_waits(run: Run, transport: str) -> None:
    async def main() -> None:
        a, b = Pipe(transport=transport)
        async with a, b, anyio.create_task_group() as group:
            group.start_soon(receive_all, b, range(1))
            await anyio.wait_all_tasks_blocked()
            checked_child(_close_both, a, b, method="fork")
            await send_all(a, range(1))

    run(main)


# named endpoints


def test_connect_and_serve(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")

    async def handler(channel: AnyioChannel) -> None:
        async with channel:
            async for message in channel:
                await channel.send(-message)

    async def main() -> None:
        listener = AnyioListener(path, backlog=2)
        assert isinstance(listener, anyio.abc.Listener)
        assert listener.extra(anyio.abc.SocketAttribute.family, None) is None

        async def talk(number: int) -> None:
            async with await connect(path) as channel:
                await channel.send(number)
                assert await channel.recv() == -number

        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, handler)
            async with anyio.create_task_group() as clients:
                for number in range(1, 20):
                    clients.start_soon(talk, number)
            await listener.aclose()
        with pytest.raises(FileNotFoundError):
            await connect(path)
        with pytest.raises(anyio.ClosedResourceError):
            await listener.accept()

    run(main)


# the conformance suite


class TrioEndpoint(AsyncEndpoint):
    """The adapter over trio, whose loop runs in a thread too."""

    def __init__(self, channel: Channel) -> None:
        self.channel: Any = AnyioChannel(channel)
        self._done = trio.Event()
        ready = threading.Event()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            ready.set()
            await self._done.wait()

        self._thread = threading.Thread(target=trio.run, args=(main,), name="conformance trio")
        self._thread.start()
        ready.wait()

    def _call(self, make: Callable[[], Coroutine[Any, Any, Any]], timeout: float | None) -> Any:
        async def call() -> Any:
            try:
                with trio.fail_after(float("inf") if timeout is None else timeout):
                    return await make()
            except trio.TooSlowError:
                raise TimeoutError from None

        return trio.from_thread.run(call, trio_token=self._token)

    def close(self) -> None:
        if not self.channel.closed:
            self._call(self.channel.aclose, None)
            self._token.run_sync_soon(self._done.set)
            self._thread.join()


class TestTrio(ChannelConformance):
    """The suite over packets, on trio."""

    endpoint = TrioEndpoint
    places = ("same_process",)

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="seqpacket")


@pytest.mark.soak
class TestTrioStream(TestTrio):
    """The suite over frames, in processes of its own too."""

    places = ("same_process", "fork", "forkserver")

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="stream")
