"""``fdshare.integrations.asyncio_server`` in one event loop that holds two generations, asyncio's and uvloop's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aio_loops import LOOPS, run_in, tls_contexts
from handovers import SOON, port_of

from fdshare.handover import Handover, HandoverRevokedError, loop
from fdshare.integrations.asyncio_server import Service, linger
from fdshare.integrations.uvicorn import make_server

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Lines:
    """A server of a word a line: answers each with its own name, and says so when it ends a connection."""

    def __init__(self, control: Path, name: str, **options: Any) -> None:
        self.handover = Handover(control, adopt=True, **options)
        self.service = Service(self.handover, drain=5.0)
        self.name = name.encode()
        self.accepted = 0

    async def handle(self, reader: Reader, writer: Writer) -> None:
        self.accepted += 1
        while True:
            try:
                line = await self.service.read_or_move(reader.readuntil(b"\n"), reader, writer, "lines")
            except asyncio.IncompleteReadError:
                break
            if line is None:
                return
            last = b" last" if self.service.retiring else b""
            writer.write(self.name + b" " + line.strip() + last + b"\n")
            if last:
                break
        await linger(reader, writer)

    async def begin(self) -> asyncio.Task[bool]:
        """Serve in a task, once it is ready."""
        ready = asyncio.Event()
        task = asyncio.ensure_future(self.service.serve(on_ready=lambda _: ready.set(), signals=False))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return task

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.handover.close()


Run = Callable[..., Any]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    def run(main: Callable[[], Awaitable[Any]]) -> Any:
        return run_in(request.param, main)  # type: ignore[arg-type]

    return run


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is blocked is found out soon."""
    monkeypatch.setattr(loop, "STOP_SECONDS", 2.0)


async def ask(reader: Reader, writer: Writer, word: bytes) -> bytes:
    writer.write(word + b"\n")
    return await asyncio.wait_for(reader.readline(), SOON)


async def connect(sock: socket.socket) -> tuple[Reader, Writer]:
    if sock.family == socket.AF_UNIX:
        return await asyncio.open_unix_connection(sock.getsockname())
    return await asyncio.open_connection(*sock.getsockname())


async def hang_up(writer: Writer) -> None:
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_the_second_generation_accepts_and_idle_connections_move(
    run: Run, control: Path, tmp_path: Path, family: str
) -> None:
    async def listen(server: Lines) -> socket.socket:
        if family == "tcp":
            return await server.service.start_server(server.handle, "lines", "127.0.0.1", 0)
        return await server.service.start_unix_server(server.handle, "lines", os.fspath(tmp_path / "s"))

    async def main() -> None:
        with Lines(control, "old") as old:
            sock = await listen(old)
            old_task = await old.begin()
            idle, half = await connect(sock), await connect(sock)
            assert await ask(*idle, b"one") == b"old one\n"
            assert await ask(*half, b"one") == b"old one\n"
            half[1].write(b"half a")
            with Lines(control, "new") as new:
                await listen(new)
                assert await ask(*idle, b"two") == b"old two\n"
                new_task = await new.begin()
                assert await asyncio.wait_for(old_task, SOON) is True
                assert await ask(*idle, b"three") == b"new three\n"
                assert await ask(*half, b" line") == b"new half a line\n"
                third = await connect(sock)
                assert await ask(*third, b"four") == b"new four\n"
                if family == "unix":
                    assert (tmp_path / "s").exists()
                for _, writer in (idle, half, third):
                    await hang_up(writer)
                new.service.end()
                assert await asyncio.wait_for(new_task, SOON) is False
        assert (old.accepted, new.accepted) == (2, 3)

    run(main)
    assert sorted(tmp_path.iterdir()) == []


def test_a_connection_that_is_busy_stays_and_is_told(run: Run, control: Path) -> None:
    """The answer at hand is given by the old one, with a word that it is the last."""

    async def main() -> None:
        go = asyncio.Event()

        async def handle(reader: Reader, writer: Writer) -> None:
            line = await reader.readline()
            await go.wait()
            writer.write(line.strip() + (b" last\n" if old.service.retiring else b"\n"))
            await linger(reader, writer)

        with Lines(control, "old") as old:
            sock = await old.service.start_server(handle, "lines", "127.0.0.1", 0)
            old_task = await old.begin()
            reader, writer = await connect(sock)
            writer.write(b"slow\n")
            with Lines(control, "new") as new:
                await new.service.start_server(new.handle, "lines", "127.0.0.1", 0)
                new_task = await new.begin()
                await asyncio.wait_for(old.handover.retired_async(), SOON)
                other = await connect(sock)
                assert await ask(*other, b"quick") == b"new quick\n"
                assert not old_task.done()
                assert sock.fileno() == -1  # should the new one die now, a third can listen there
                go.set()
                assert await asyncio.wait_for(reader.readline(), SOON) == b"slow last\n"
                await hang_up(writer)
                await hang_up(other[1])
                assert await asyncio.wait_for(old_task, SOON)
                new.service.end()
                await new_task

    run(main)


def test_what_is_not_done_in_time_is_cancelled(run: Run, control: Path) -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def handle(reader: Reader, writer: Writer) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
                writer.close()

        with Lines(control, "old") as old:
            old.service.drain = 0.05
            sock = await old.service.start_server(handle, "lines", "127.0.0.1", 0)
            task = await old.begin()
            reader, writer = await connect(sock)
            writer.write(b"x")
            while not old.service._handlers:
                await asyncio.sleep(0)
            old.service.end()
            assert await asyncio.wait_for(task, SOON) is False
            assert cancelled.is_set()
            assert await reader.read() == b""
            await hang_up(writer)

    run(main)


def test_a_tls_handshake_is_waited_for(run: Run, control: Path, tmp_path: Path) -> None:
    """A connection that was accepted is not lost for not having a handler yet."""
    server_context, client_context = tls_contexts(tmp_path)

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(Lines(control, "old"))
            sock = await old.service.start_server(old.handle, "lines", "127.0.0.1", 0, ssl=server_context)
            task = await old.begin()
            client = socket.create_connection(sock.getsockname(), SOON)
            while not old.service._acceptors.coming:  # it is accepted, and says nothing
                await asyncio.sleep(0.001)
            new = stack.enter_context(Lines(control, "new"))
            await new.service.start_server(new.handle, "lines", "127.0.0.1", 0, ssl=server_context)
            new_task = await new.begin()
            await asyncio.wait_for(old.handover.retired, SOON)
            assert not (await asyncio.wait((task,), timeout=0.05))[0]
            reader, writer = await asyncio.open_connection(
                sock=client, ssl=client_context, server_hostname="localhost"
            )
            assert await ask(reader, writer, b"word") == b"old word last\n"
            await hang_up(writer)
            assert await asyncio.wait_for(task, SOON)
            new.service.end()
            await new_task

    run(main)


class Greeter(asyncio.Protocol):
    """One of whose instances nothing can be noted."""

    __slots__ = ()

    def connection_made(self, transport: Any) -> None:
        transport.write(b"hello")
        transport.close()


def test_a_protocol_with_slots_is_served(run: Run, control: Path) -> None:
    async def main() -> None:
        with Handover(control) as handover:
            acceptor = loop.Acceptor(handover.listen("http", "127.0.0.1", 0), Greeter)
            handover.ready()
            await acceptor.start()
            reader, writer = await connect(acceptor.sock)
            assert await asyncio.wait_for(reader.read(), SOON) == b"hello"
            assert not acceptor.coming
            await hang_up(writer)
            acceptor.stop()

    run(main)


def test_what_is_queued_on_a_dropped_listener_is_accepted(run: Run, control: Path) -> None:
    async def main() -> None:
        with Lines(control, "old") as old:
            sock = await old.service.start_server(old.handle, "lines", "127.0.0.1", 0)
            task = await old.begin()
            with Lines(control, "new") as new:
                moved = await new.service.start_server(new.handle, "other", "127.0.0.1", 0)
                old.handover.on_stop(lambda: clients.append(socket.create_connection(address, SOON)))
                address, clients = sock.getsockname(), []
                new_task = await new.begin()  # a client connects after the loop has stopped accepting
                (client,) = clients
                assert port_of(moved) != address[1]
                reader, writer = await asyncio.open_connection(sock=client)
                assert await ask(reader, writer, b"word") == b"old word last\n"
                await hang_up(writer)
                assert await asyncio.wait_for(task, SOON)
                new.service.end()
                await new_task

    run(main)


def test_a_successor_that_fails_at_the_last_moment_leaves_the_loop_accepting(run: Run, control: Path) -> None:
    async def main() -> None:
        with Lines(control, "old") as old:
            sock = await old.service.start_server(old.handle, "lines", "127.0.0.1", 0)
            task = await old.begin()
            old.handover.offer("broken", lambda: 1 // 0)
            with Lines(control, "new") as new:
                await new.service.start_server(new.handle, "lines", "127.0.0.1", 0)
                with pytest.raises(HandoverRevokedError):
                    await new.service.serve(final=["broken"], signals=False)
            reader, writer = await connect(sock)
            assert await ask(reader, writer, b"still") == b"old still\n"
            await hang_up(writer)
            old.service.end()
            assert await asyncio.wait_for(task, SOON) is False

    run(main)


def test_a_successor_may_come_at_once(run: Run, control: Path) -> None:
    """Before the loop of the one that is ready has even begun to accept."""

    async def main() -> None:
        generations: list[Lines] = []
        tasks: list[asyncio.Task[bool]] = []
        try:
            for number in range(5):
                server = Lines(control, f"g{number}")
                generations.append(server)
                sock = await server.service.start_server(server.handle, "lines", "127.0.0.1", 0)
                tasks.append(await server.begin())
            reader, writer = await connect(sock)
            assert await ask(reader, writer, b"who") == b"g4 who\n"
            await hang_up(writer)
            assert await asyncio.wait_for(asyncio.gather(*tasks[:-1]), SOON) == [True] * 4
            generations[-1].service.end()
            await tasks[-1]
            assert [server.accepted for server in generations] == [0, 0, 0, 0, 1]
        finally:
            for server in generations:
                server.handover.close()

    run(main)


def test_uvicorn_waits_for_a_tls_handshake(run: Run, control: Path, tmp_path: Path) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    _, client_context = tls_contexts(tmp_path)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"old"})

    async def begin(handover: Handover) -> tuple[Any, asyncio.Task[None], socket.socket]:
        config = uvicorn.Config(
            application,
            ssl_certfile=tmp_path / "certificate.pem",
            ssl_keyfile=tmp_path / "key.pem",
            lifespan="off",
            log_config=None,
        )
        sock = handover.listen("http", "127.0.0.1", 0)
        server = make_server(config, handover, sock)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        return server, task, sock

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            old, task, sock = await begin(stack.enter_context(Handover(control, adopt=True)))
            client = socket.create_connection(sock.getsockname(), SOON)
            while not old.acceptors.coming:  # it is accepted, and says nothing
                await asyncio.sleep(0.001)
            new, new_task, _ = await begin(stack.enter_context(Handover(control, adopt=True)))
            while not old.acceptors._over:  # it is being shut down, which takes uvicorn 0.1 s by itself
                await asyncio.sleep(0.001)
            assert not (await asyncio.wait((task,), timeout=0.3))[0]
            reader, writer = await asyncio.open_connection(
                sock=client, ssl=client_context, server_hostname="localhost"
            )
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), SOON)
            assert b"connection: close" in answer.lower()
            assert answer.endswith(b"old\r\n0\r\n\r\n")
            await hang_up(writer)
            await asyncio.wait_for(task, SOON)
            new.should_exit = True
            await asyncio.wait_for(new_task, SOON)

    run(main)
