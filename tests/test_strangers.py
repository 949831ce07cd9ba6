"""What a stranger at the door, or a peer that is not trusted, can cost those who do not talk to him: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from aio_loops import run, started
from helpers import SOCKET_TYPES, TRANSPORTS, wait_until

import fdshare
from fdshare import (
    AccessDeniedError,
    BytesCodec,
    Channel,
    FdHandle,
    FdLimitError,
    Listener,
    MessageTooLargeError,
    ProtocolError,
    TypedCodec,
    aio,
    any_user,
    connect,
    disposal,
)
from fdshare.greeting import hello_of
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, numbered_handle, read_number

__all__ = ["run"]

LONG = 20
"""Seconds that a close takes where it waits."""

SOON = 5
"""Seconds after which something has waited for a close."""

Run = Callable[..., Any]


@attrs.frozen
class Text:
    text: str


@attrs.frozen
class Given:
    handle: FdHandle


NONE_AT_ALL = [
    TypedCodec(Text, max_bytes=8192, recv_fds=0),
    TypedCodec(Text, Given, recv_fds=0, send_fds=1),
    BytesCodec(max_fds=0),
]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@contextlib.contextmanager
def lingering(count: int = 1) -> Iterator[list[socket.socket]]:
    """Sockets whose last close waits for LONG, at most until the block is left."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=count))
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # less than what is sent: the rest waits
        found = []
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(sink.getsockname()))
            stack.enter_context(sink.accept()[0])
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 16))
            sock.setblocking(True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LONG))
            found.append(sock)
        yield found
    wait_until(
        lambda: len(disposal._free) == disposal.MAX_CLOSERS and disposal._undertakers
    )  # their other ends are closed: nothing waits any more


def give_away(bare: socket.socket, sock: socket.socket, data: bytes = b"x") -> None:
    socket.send_fds(bare, [data], [sock.fileno()])
    sock.close()


def raw(path: str, transport: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport])
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def nobody(peer: object) -> bool:
    return False


def policy(*answers: bool) -> Callable[[object], bool]:
    rest = iter(answers)
    return lambda peer: next(rest)


def took(function: Callable[[], object]) -> float:
    before = time.monotonic()
    function()
    return time.monotonic() - before


# who is refused


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_refused_stranger_keeps_nobody_from_accept(path: str, transport: str) -> None:
    with (
        lingering() as (tcp,),
        Listener(path, transport=transport, allow=policy(False, True)) as listener,
        raw(path, transport) as bare,
        connect(path, transport=transport) as client,
    ):
        give_away(bare, tcp)
        before = time.monotonic()
        with listener.accept(timeout=LONG) as server:
            assert time.monotonic() - before < SOON
            client.send(1)
            assert server.recv() == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_refused_stranger_keeps_no_event_loop(run: Run, path: str, transport: str) -> None:
    async def main() -> None:
        async with aio.Listener(path, transport=transport, allow=nobody) as listener:
            with lingering() as (tcp,), raw(path, transport) as bare:
                give_away(bare, tcp)
                (task,) = await started(listener.accept())
                before = time.monotonic()
                await asyncio.sleep(0.01)
                assert time.monotonic() - before < SOON
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    run(main)


def slowly(peer: object) -> bool:
    """A refusal that takes long, as where hundreds of descriptors are to be closed."""
    time.sleep(0.01)
    return False


def test_many_who_are_refused_do_not_keep_accept_beyond_its_time(path: str) -> None:
    with Listener(path, allow=slowly) as listener, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(raw(path, "seqpacket"))

        def accept() -> None:
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0)

        assert took(accept) < 0.5


def test_many_who_are_refused_leave_turns_to_the_event_loop(run: Run, path: str) -> None:
    async def main() -> None:
        async with aio.Listener(path, allow=slowly) as listener:
            with contextlib.ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(raw(path, "seqpacket"))
                before = time.monotonic()
                task = asyncio.create_task(listener.accept())
                for _ in range(3):
                    await asyncio.sleep(0)
                assert time.monotonic() - before < 0.4
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    run(main)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_strangers_than_threads(path: str, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond those a process takes them along, which has no time to linger."""
    monkeypatch.setattr(disposal, "MAX_CLOSERS", 2)
    monkeypatch.setattr(disposal, "_free", deque([None] * 2))
    monkeypatch.setattr(disposal, "BATCH", 3)
    with (
        lingering(8) as found,
        Listener(path, transport=transport, allow=nobody) as listener,
        contextlib.ExitStack() as stack,
    ):
        for tcp in found:
            give_away(stack.enter_context(raw(path, transport)), tcp)
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0.1)
        assert time.monotonic() - before < SOON
        wait_until(lambda: len(disposal._waiting) < 3)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_a_listener_does_not_wait_for_who_is_queued(path: str, transport: str) -> None:
    with lingering() as (tcp,):
        listener = Listener(path, transport=transport)
        with raw(path, transport) as bare, connect(path, transport=transport) as client:
            give_away(bare, tcp)
            assert took(listener.close) < SOON
            with pytest.raises(EOFError):
                client.recv(timeout=SOON)
        with pytest.raises(FileNotFoundError):
            raw(path, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_a_listener_that_others_have_leaves_their_clients(path: str, transport: str) -> None:
    listener = Listener(path, transport=transport)
    with FdHandle.dup(listener) as copy, raw(path, transport):
        listener._give_away()  # as a handover does: the file stays
        with Listener(copy) as other, other.accept(timeout=SOON):
            pass
    os.unlink(path)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_refused_server_keeps_no_client(path: str, transport: str) -> None:
    """It may have sent something before the client has looked who it is; here the client looks late."""
    with lingering() as (tcp,), socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport]) as sock:
        sock.bind(path)
        sock.listen()
        accepted: list[socket.socket] = []

        def late(peer: object) -> bool:
            accepted.append(sock.accept()[0])
            give_away(accepted[0], tcp)
            return False

        def refused() -> None:
            with pytest.raises(AccessDeniedError, match="not trusted here"):
                connect(path, transport=transport, allow=late)

        assert took(refused) < SOON
        accepted[0].close()


# who is admitted, and not trusted


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_a_channel_does_not_wait_for_its_queue(path: str, transport: str) -> None:
    codec = TypedCodec(Given)
    with (
        lingering() as (tcp,),
        Listener(path, codec=codec, transport=transport) as listener,
        raw(path, transport) as bare,
        listener.accept(timeout=SOON) as server,
    ):
        give_away(bare, tcp)
        assert took(server.close) < SOON


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_a_shared_channel_leaves_the_other_end_of_it(transport: str) -> None:
    """What comes is stopped only where nobody else has it."""
    codec = TypedCodec(Given)
    left, right = fdshare.Pipe(transport=transport, codec=codec)
    with right, FdHandle.dup(left) as copy:
        left.close()
        with Channel(copy.to_socket(), codec=codec) as again, numbered_handle(4) as handle:
            right.send(Given(handle))
            with again.recv(timeout=SOON).handle as received:
                assert read_number(received) == 4


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_descriptors_with_a_hello_keep_nobody(path: str, transport: str) -> None:
    codec = TypedCodec(Given)
    with (
        lingering() as (tcp,),
        Listener(path, codec=codec, transport=transport, allow=any_user) as listener,
        raw(path, transport) as bare,
    ):
        give_away(bare, tcp, hello_of(codec).data)
        before = time.monotonic()
        with listener.accept(timeout=LONG) as server, pytest.raises((ProtocolError, TimeoutError)):
            server.recv(timeout=0.05)
        assert time.monotonic() - before < SOON


# none at all


def check_refused(bare: socket.socket) -> None:
    """Descriptors are refused at the sender, bytes are not."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS
    except OSError:
        pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
    with pytest.raises(PermissionError):
        socket.send_fds(bare, [b"x"], [bare.fileno()])
    bare.send(b"x")


@pytest.mark.parametrize("codec", NONE_AT_ALL, ids=lambda codec: codec.name[:5])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("form", ["path", "inherited", "aio"])
def test_server_takes_no_descriptor_before_accept_either(
    path: str, transport: str, codec: Any, form: str
) -> None:
    with contextlib.ExitStack() as stack:
        if form == "inherited":
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport]))
            sock.bind(path)
            sock.listen()
            stack.enter_context(Listener(sock, codec=codec))
        elif form == "path":
            stack.enter_context(Listener(path, codec=codec, transport=transport))
        else:
            listener = aio.Listener(path, codec=codec, transport=transport)
            stack.callback(listener.close)
        check_refused(stack.enter_context(raw(path, transport)))


@pytest.mark.parametrize("codec", NONE_AT_ALL, ids=lambda codec: codec.name[:5])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_client_takes_no_descriptor_from_connect_on(path: str, transport: str, codec: Any) -> None:
    def late(peer: object) -> bool:
        with sock.accept()[0] as accepted:
            check_refused(accepted)
        return False

    with socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport]) as sock:
        sock.bind(path)
        sock.listen()
        with pytest.raises(AccessDeniedError):
            connect(path, transport=transport, codec=codec, allow=late)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_takes_none_takes_what_fits_into_a_packet(path: str, transport: str) -> None:
    server_codec, client_codec = BytesCodec(max_fds=0), BytesCodec()
    with (
        Listener(path, codec=server_codec, transport=transport) as listener,
        connect(path, codec=client_codec, transport=transport) as client,
        listener.accept(timeout=SOON) as server,
    ):
        server.send(b"hello")
        assert client.recv(timeout=SOON)[0] == b"hello"  # and it has the server's hello now
        client.send(bytes(1 << 16), timeout=SOON)
        assert server.recv(timeout=SOON)[0] == bytes(1 << 16)
        with pytest.raises(MessageTooLargeError, match="the peer takes 65536"):
            client.send(bytes((1 << 16) + 1))
        server.send(bytes(1 << 20), timeout=SOON)
        assert client.recv(timeout=SOON)[0] == bytes(1 << 20)


# who takes nothing, and who takes all


def drop_privileges() -> None:
    if os.geteuid():
        pytest.skip("becoming another user needs root; this user's own limits are the system's")
    user = 50_000 + os.getpid() % 10_000
    os.setregid(user, user)
    os.setreuid(user, user)


def _greedy(transport: str, form: str) -> None:
    drop_privileges()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    name = f"\0greedy-{os.getpid()}"
    codec = BytesCodec() if form == "bytes" else None

    def message(handle: FdHandle) -> Any:
        return (b"x", [handle] * 3) if codec else [handle]

    with Listener(name, transport=transport, codec=codec) as listener, numbered_handle(7) as handle:
        greedy = [connect(name, transport=transport, codec=codec) for _ in range(3)]
        servers = [listener.accept(timeout=SOON) for _ in greedy]
        for server in servers:
            with pytest.raises(FdLimitError, match="max_untaken is 32") as caught:
                for _ in range(300):
                    server.send(message(handle), timeout=0.05)
            assert caught.value.errno == errno.ETOOMANYREFS
            del caught
        with connect(name, transport=transport, codec=codec) as client, listener.accept() as server:
            for _ in range(50):
                server.send(message(handle), timeout=SOON)
                received = client.recv(timeout=SOON)
                for one in received[1] if codec else received:
                    one.close()
        for channel in (*greedy, *servers):
            channel.close()


@pytest.mark.parametrize("form", ["pickle", "bytes"])
def test_peer_that_takes_nothing_leaves_descriptors_to_others(transport: str, form: str) -> None:
    checked_child(_greedy, transport, form, method="fork")


def test_bound_on_untaken_descriptors(path: str, transport: str) -> None:
    """Waits for the receiver, whose reading makes room; a message of more goes into an empty queue."""
    with (
        Listener(path, transport=transport, max_untaken=4, max_inflight=1 << 20) as listener,
        connect(path, transport=transport, max_untaken=5, max_inflight=1 << 21) as client,
        listener.accept() as server,
        numbered_handle(1) as handle,
    ):
        assert (server.max_untaken, client.max_untaken) == (4, 5)
        assert (server.max_inflight, client.max_inflight) == (1 << 20, 1 << 21)
        for _ in range(2):
            for _ in range(4):
                server.send(handle, timeout=SOON)
            with pytest.raises(FdLimitError):
                server.send(handle, timeout=0.02)
            server.send("no descriptors")
            for _ in range(4):
                client.recv(timeout=SOON).close()
            assert client.recv(timeout=SOON) == "no descriptors"
        copies = [FdHandle.dup(handle) for _ in range(300)]
        server.send(fdshare.move(copies), timeout=SOON)
        for one in client.recv(timeout=SOON):
            one.close()
        left, right = fdshare.Pipe()
        with left, right:
            left.send(server)
            with right.recv() as copy:
                assert copy.max_untaken == 4


def test_bound_on_untaken_descriptors_in_a_loop(run: Run, path: str, transport: str) -> None:
    async def main() -> None:
        async with (
            aio.Listener(path, transport=transport, max_untaken=4, max_inflight=1 << 20) as listener,
            await aio.connect(path, transport=transport, max_untaken=4) as client,
            await listener.accept() as server,
        ):
            assert (server.max_untaken, server.max_inflight) == (4, 1 << 20)
            with numbered_handle(1) as handle:
                for _ in range(4):
                    await server.send(handle)
                before = time.process_time()
                with pytest.raises(FdLimitError, match="max_untaken is 4"):
                    await server.send(handle)
                assert time.process_time() - before < 0.5  # of the second that it has waited
                (task,) = await started(server.send(handle))
                for _ in range(4):
                    (await client.recv()).close()
                await task
            (await client.recv()).close()

    run(main)


def test_pipes_have_no_bound_of_their_own(transport: str) -> None:
    left, right = fdshare.Pipe(transport=transport)
    with left, right:
        assert left.max_untaken == float("inf")
        left.max_untaken = 3
        assert left.max_untaken == 3
    with left._transport.sock, pytest.raises(ValueError, match="max_untaken"):
        Channel(left._transport.sock, max_untaken=0)


# no descriptor left


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[Callable[[], None]]:
    """Leave room for none in the block, until what it is given is called."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_numbers()) + 2, limits[1]))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(FdHandle.dup(0))

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    try:
        yield make_room
    finally:
        make_room()
        for handle in taken:
            handle.close()


def _goes_on(path: str) -> None:
    with (
        Listener(path) as listener,
        connect(path) as first,
        connect(path) as second,
        no_descriptor_left() as make_room,
    ):
        timer = threading.Timer(0.05, make_room)
        timer.start()
        for channel, client in zip(listener, (first, second), strict=False):
            client.send(1)
            with channel:
                assert channel.recv(timeout=SOON) == 1
            if client is second:
                break
        timer.join()


def test_iterating_goes_on_where_no_descriptor_was_left(path: str) -> None:
    checked_child(_goes_on, path, method="fork")


def _closed_while_cramped(path: str) -> None:
    listener = Listener(path)
    with connect(path), no_descriptor_left():
        timer = threading.Timer(0.05, listener.close)
        timer.start()
        for channel in listener:
            channel.close()
            raise AssertionError("somebody came")
        timer.join()


def test_closing_ends_iterating_where_no_descriptor_is_left(path: str) -> None:
    checked_child(_closed_while_cramped, path, method="fork")


async def _accept_cramped(path: str) -> None:
    async with aio.Listener(path) as listener, await aio.connect(path):
        iterator = aiter(listener)
        async with await aio.connect(path):
            (await anext(iterator)).close()  # what the loop needs is there
            with no_descriptor_left() as make_room:
                task = asyncio.create_task(anext(iterator))
                await asyncio.sleep(0.05)
                assert not task.done()
                make_room()
                (await task).close()


def _iterate_in_a_loop(path: str) -> None:
    asyncio.run(asyncio.wait_for(_accept_cramped(path), LONG))


def test_iterating_in_a_loop_goes_on_where_no_descriptor_was_left(path: str) -> None:
    checked_child(_iterate_in_a_loop, path, method="fork")
