"""asyncio's own connections move from one event loop to another, with what was read and written; the peer goes on talking."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aio_loops import run, run_in, settle, started, tls_contexts

import fdshare
from fdshare import ClosedError, NotSendableError, PeerClosedError, ProcessPoolExecutor, aio
from fdshare.aio import MovedStream, detach, detach_transport
from fdshare.testing import Child, pattern

__all__ = ["run"]

Run = Callable[..., Any]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Callable[[], tuple[socket.socket, socket.socket]]:
    """Make a connected pair of stream sockets."""
    return tcp_pair if request.param == "tcp" else socket.socketpair


Pair = Callable[[], tuple[socket.socket, socket.socket]]


@contextlib.asynccontextmanager
async def connection(pair: Pair) -> AsyncIterator[tuple[Streams, Streams]]:
    """Two ends with asyncio's streams."""
    ends = [await asyncio.open_connection(sock=sock) for sock in pair()]
    try:
        yield ends[0], ends[1]
    finally:
        for _, writer in ends:
            writer.close()
        await settle(10)


async def talk(ours: Streams, theirs: Streams) -> None:
    for (_, writer), (reader, _) in ((ours, theirs), (theirs, ours)):
        writer.write(b"a line\n")
        assert await reader.readline() == b"a line\n"


def test_moved_within_a_process(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            await talk(ours, theirs)
            moved = await detach(*ours)
            assert moved.unread == b""
            assert ours[1].is_closing()
            theirs[1].write(b"meanwhile\n")
            ours = await moved.open()
            assert moved.closed
            assert await ours[0].readline() == b"meanwhile\n"
            await talk(ours, theirs)
            ours[1].close()
            assert await theirs[0].read() == b""

    run(main)


def test_unread_bytes_come_first(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            theirs[1].write(b"used\nunread\n")
            assert await ours[0].readline() == b"used\n"
            moved = await detach(*ours)
            assert moved.unread == b"unread\n"
            theirs[1].write(b"later\n")
            reader, writer = await moved.open(limit=100)
            assert await reader.readline() == b"unread\n"
            assert await reader.readline() == b"later\n"
            writer.close()

    run(main)


def test_unsent_bytes_go_out_first(run: Run, pair: Pair) -> None:
    """However many: the move waits for the peer to read."""

    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            content = pattern(8 << 20)
            ours[1].write(content)
            assert ours[1].transport.get_write_buffer_size()
            (task,) = await started(detach(*ours))
            assert not task.done()
            assert await theirs[0].readexactly(len(content)) == content
            reader, writer = await (await task).open()
            await talk((reader, writer), theirs)
            writer.close()

    run(main)


def test_cancelled_move_has_done_nothing(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            content = pattern(8 << 20)
            ours[1].write(content)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await detach(*ours)
            assert await theirs[0].readexactly(len(content)) == content
            await talk(ours, theirs)

    run(main)


def test_cancelled_open_has_done_nothing(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            theirs[1].write(b"unread\n")
            await ours[0].readexactly(1)
            moved = await detach(*ours)
            for steps in range(3):
                task = asyncio.create_task(moved.open())
                await settle(steps)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    ours = await task
                    break
            else:
                ours = await moved.open()
            assert await ours[0].readline() == b"nread\n"
            await talk(ours, theirs)
            ours[1].close()

    run(main)


def test_end_of_the_stream_is_found_again(run: Run, pair: Pair) -> None:
    """By the new owner, who can still write."""

    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            theirs[1].write(b"last words")
            theirs[1].write_eof()
            await ours[0].readexactly(5)
            await settle()
            reader, writer = await (await detach(*ours)).open()
            assert await reader.read() == b"words"
            writer.write(b"answer")
            writer.close()
            assert await theirs[0].read() == b"answer"

    run(main)


def test_peer_that_goes_before_everything_was_read(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            ours[1].write(pattern(8 << 20))
            (task,) = await started(detach(*ours))
            theirs[1].transport.abort()
            with pytest.raises((PeerClosedError, ConnectionError)):
                await task

    run(main)


# what cannot be moved


def test_closed_connection(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, _):
            ours[1].close()
            with pytest.raises(ClosedError):
                await detach(*ours)

    run(main)


def test_while_another_task_reads(run: Run, pair: Pair) -> None:
    async def main() -> None:
        async with connection(pair) as (ours, theirs):
            (task,) = await started(ours[0].readline())
            with pytest.raises(RuntimeError, match="another task"):
                await detach(*ours)
            theirs[1].write(b"a line\n")
            assert await task == b"a line\n"

    run(main)


def test_pipe_of_a_process(run: Run) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "input()", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with pytest.raises(NotSendableError, match="no socket"):
            await detach(process.stdout, process.stdin)
        await process.communicate(b"\n")

    if sys.platform == "linux":
        run_in("asyncio", main)


def test_tls(run: Run, tmp_path: Path) -> None:
    server_context, client_context = tls_contexts(tmp_path)

    async def main() -> None:
        refused = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with pytest.raises(NotSendableError, match="TLS"):
                await detach(reader, writer)
            refused.set()
            writer.write(await reader.readline())
            writer.close()

        server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=server_context)
        async with server:
            address = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(
                *address, ssl=client_context, server_hostname="localhost"
            )
            writer.write(b"still there\n")
            assert await reader.readline() == b"still there\n"
            await refused.wait()
            with pytest.raises(NotSendableError, match="TLS"):
                await detach(reader, writer)
            channel, _ = fdshare.Pipe()
            with channel, _, pytest.raises(NotSendableError, match="detach"):
                channel.send(writer.transport)
            writer.close()
            with contextlib.suppress(ssl.SSLError, OSError):
                await writer.wait_closed()

    run(main)


def test_plain_sending_says_what_to_do(run: Run, pair: Pair) -> None:
    async def main() -> None:
        a, b = aio.Pipe()
        async with a, b, connection(pair) as (ours, _):
            shown = ours[1].get_extra_info("socket")
            for thing in (*ours, ours[1].transport, shown):
                with pytest.raises(NotSendableError, match=r"message\['conn'\].*fdshare\.aio\.detach"):
                    await a.send({"conn": thing})
            await talk(ours, _)

    run(main)


def test_sockets_of_a_server_can_be_sent(run: Run) -> None:
    async def main() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        a, b = aio.Pipe()
        async with a, b:
            server = await asyncio.start_server(handler, "127.0.0.1", 0)
            with pytest.raises(NotSendableError, match="its sockets"):
                await a.send(server)
            with pytest.raises(NotSendableError, match=r"without move\(\)"):
                await a.send(fdshare.move(server.sockets[0]))
            await a.send(server.sockets[0])
            listening = await b.recv()
            assert type(listening) is socket.socket
            address = listening.getsockname()
            server.close()
            await settle()
            server = await asyncio.start_server(handler, sock=listening)
            async with server:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(b"hello\n")
                assert await reader.read() == b"hello\n"
                writer.close()

    run(main)


# to other processes


def _serve_moved(loop: str, channel: fdshare.Channel) -> None:
    async def main() -> None:
        async with aio.AsyncChannel(channel) as messages:
            async for moved in messages:
                reader, writer = await moved.open()
                while line := await reader.readline():
                    writer.write(b"%d %s" % (os.getpid(), line))
                writer.close()
                await writer.wait_closed()

    run_in(loop, main)


@pytest.mark.parametrize(
    ("loop", "method"),
    [("asyncio", "fork"), ("uvloop", "fork"), ("asyncio", "spawn"), ("uvloop", "forkserver")],
)
def test_moved_to_another_process(loop: str, method: str, pair: Pair) -> None:
    async def main() -> None:
        async with aio.AsyncChannel(here) as channel, connection(pair) as (ours, theirs):
            theirs[1].write(b"first\nsecond\n")
            assert await ours[0].readline() == b"first\n"
            ours[1].write(b"here\n")
            moved = await detach(*ours)
            await channel.send(moved)
            assert moved.closed
            assert await theirs[0].readline() == b"here\n"
            assert await theirs[0].readline() == b"%d second\n" % child.pid
            theirs[1].write(b"third\n")
            theirs[1].write_eof()
            assert await theirs[0].read() == b"%d third\n" % child.pid

    here, there = fdshare.Pipe()
    try:
        child = Child(_serve_moved, loop, there, method=method, unwanted=(here,))
    finally:
        there.close()
    run_in(loop, main)
    child.result()


def test_failed_send_leaves_it_here(run: Run, pair: Pair) -> None:
    async def main() -> None:
        a, b = aio.Pipe()
        async with connection(pair) as (ours, theirs):
            moved = await detach(*ours)
            b.close()
            async with a:
                with pytest.raises(PeerClosedError):
                    await a.send(moved)
            with pytest.raises(NotSendableError):
                await a.send([moved, asyncio.get_running_loop()])
            assert not moved.closed
            ours = await moved.open()
            await talk(ours, theirs)
            ours[1].close()

    run(main)


def _answer(moved: MovedStream) -> int:
    with moved, moved.to_socket() as sock:
        sock.setblocking(True)
        sock.sendall(moved.unread + b"from the pool\n")
    return os.getpid()


def test_argument_of_a_pool(pair: Pair) -> None:
    async def main(pool: ProcessPoolExecutor) -> None:
        async with connection(pair) as (ours, theirs):
            theirs[1].write(b"unread ")
            theirs[1].write(b"x")
            await ours[0].readexactly(0)
            while not ours[0]._buffer.endswith(b"x"):  # type: ignore[attr-defined]
                await asyncio.sleep(0)
            moved = await detach(*ours)
            assert await asyncio.wrap_future(pool.submit(_answer, moved)) != os.getpid()
            assert await theirs[0].read() == b"unread xfrom the pool\n"
            moved.close()

    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result()  # a worker that was forked later would have inherited the connection
        run_in("asyncio", main, pool)


# protocols


class Lines(asyncio.Protocol):
    """A protocol that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.got.append("made")

    def data_received(self, data: bytes) -> None:
        self.got.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.got.append(exc)


def test_protocol_of_ones_own(run: Run, pair: Pair) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        left, right = pair()
        transport, protocol = await loop.create_connection(Lines, sock=left)
        with right:
            right.setblocking(False)
            transport.write(b"one")
            moved = await detach_transport(transport)
            await settle(10)
            assert protocol.got == ["made", None]
            assert await loop.sock_recv(right, 10) == b"one"
            await loop.sock_sendall(right, b"later")
            moved = MovedStream(moved.to_socket(), b"unread")
            transport, protocol = await moved.connect(Lines)
            while b"".join(protocol.got[1:]) != b"unreadlater":
                await asyncio.sleep(0.001)
            assert protocol.got[0] == "made"
            transport.write(b"two")
            assert await loop.sock_recv(right, 10) == b"two"
            transport.close()
            await settle(10)

    run(main)


def test_moved_stream_as_an_object(pair: Pair) -> None:
    left, right = pair()
    with right:
        with MovedStream(left, b"abc") as moved:
            assert repr(moved) == f"<MovedStream fd={moved.fileno()} unread=3>"
        moved.close()
        assert repr(moved) == "<MovedStream closed unread=3>"
        for use in (moved.fileno, moved.to_socket):
            with pytest.raises(ClosedError):
                use()
        assert right.recv(1) == b""
