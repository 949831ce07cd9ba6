"""Small messages in an event loop, at both ends: AsyncChannel against what one would write with asyncio alone.

"asyncio streams" are a reader and a writer on a Unix socket, pickles behind a length of four bytes; "multiprocessing" is its
Pipe, each call in the loop's default executor.  Round trip and one way are as in ``small.py``, with the same message.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from time import perf_counter
from typing import Any, Protocol, cast

from benchmarks.cases.small import MESSAGE
from benchmarks.cases.support import End, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement, Skipped

__all__ = ["PEERS", "run_one_way", "run_round_trip"]

PEERS = (
    "fdshare",
    "asyncio streams",
    "multiprocessing",
    "fdshare (uvloop)",
    "asyncio streams (uvloop)",
    "fdshare (trio)",
)

_LENGTH = struct.Struct("!I")


class _AsyncEnd(Protocol):
    async def send(self, obj: Any) -> None:
        """Send an object."""

    async def recv(self) -> Any:
        """Receive an object."""

    async def aclose(self) -> None:
        """Close this end."""


class _Streams:
    """Pickles over a reader and a writer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, obj: Any) -> None:
        data = pickle.dumps(obj, 5)
        self._writer.write(_LENGTH.pack(len(data)) + data)
        await self._writer.drain()

    async def recv(self) -> Any:
        (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        return pickle.loads(await self._reader.readexactly(size))

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


class _InExecutor:
    """A connection that blocks, in threads."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._run = asyncio.get_running_loop().run_in_executor

    async def send(self, obj: Any) -> None:
        await self._run(None, self._end.send, obj)

    async def recv(self) -> Any:
        return await self._run(None, self._end.recv)

    async def aclose(self) -> None:
        self._end.close()


def _pair(peer: str) -> tuple[End, End]:
    """Return what is connected, before the partner is forked."""
    if peer.startswith("fdshare"):
        import fdshare

        return cast("tuple[End, End]", fdshare.Pipe())
    if peer.startswith("asyncio"):
        return cast("tuple[End, End]", socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    import multiprocessing

    return multiprocessing.Pipe()


async def _open(peer: str, end: Any) -> _AsyncEnd:
    """Return one end for use in the event loop that runs now."""
    if peer == "fdshare (trio)":
        from fdshare.integrations.anyio import AnyioChannel

        return AnyioChannel(end)
    if peer.startswith("fdshare"):
        from fdshare.aio import AsyncChannel

        return AsyncChannel(end)
    if peer.startswith("asyncio"):
        return _Streams(*await asyncio.open_unix_connection(sock=end))
    return _InExecutor(end)


def _runner(peer: str) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Return what runs a coroutine in the event loop of ``peer``, the same one each time where that matters."""
    if peer.endswith("(trio)"):
        try:
            import trio
        except ImportError as error:
            raise Skipped("trio is not installed") from error

        async def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return await coroutine

        return lambda coroutine: trio.run(run, coroutine)
    if peer.endswith("(uvloop)"):
        try:
            import uvloop
        except ImportError as error:
            raise Skipped("uvloop is not installed") from error
        return asyncio.Runner(loop_factory=uvloop.new_event_loop).run
    return asyncio.Runner().run


async def _echo(end: _AsyncEnd) -> None:
    while True:
        await end.send(await end.recv())


async def _swallow(end: _AsyncEnd) -> None:
    while True:
        if await end.recv() is None:
            await end.send(None)


async def _round_trips(end: _AsyncEnd, n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await end.send(MESSAGE)
        await end.recv()
    return perf_counter() - start


async def _one_way(end: _AsyncEnd, n: int) -> float:
    start = perf_counter()
    for _ in range(n):
        await end.send(MESSAGE)
    await end.send(None)
    await end.recv()
    return perf_counter() - start


def _run(
    peer: str,
    budget: float,
    serve: Callable[[_AsyncEnd], Awaitable[None]],
    batch: Callable[[_AsyncEnd, int], Coroutine[Any, Any, float]],
) -> Measurement:
    run = _runner(peer)

    async def serve_opened(end: Any) -> None:
        await serve(await _open(peer, end))

    with with_partner(_pair(peer), lambda end: run(serve_opened(end))) as end:
        opened = run(_open(peer, end))
        try:
            return Measurement(measure(lambda n: cast(float, run(batch(opened, n))), budget))
        finally:
            run(opened.aclose())


def run_round_trip(peer: str, budget: float) -> Measurement:
    """Measure a round trip of one small message between two event loops."""
    return _run(peer, budget, _echo, _round_trips)


def run_one_way(peer: str, budget: float) -> Measurement:
    """Measure the seconds a message where the sender never waits for an answer but at the end."""
    return _run(peer, budget, _swallow, _one_way)
