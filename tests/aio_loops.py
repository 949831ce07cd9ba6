"""What the asyncio tests share: each event loop in turn, pairs of ends, tasks that are known to wait, and TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from helpers import KINDS, compose, verify

from fdshare import aio
from fdshare.aio import AsyncChannel

T = TypeVar("T")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

uvloop.new_event_loop().close()  # libuv keeps a pipe for signals as long as the process lives: let no test be blamed for it

Main = Callable[..., Coroutine[Any, Any, T]]


def run_in(loop: str, main: Main[T], *arguments: Any, seconds: float = 30.0) -> T:
    """Run a coroutine function to its end in a new event loop; a hang is a failure."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(asyncio.wait_for(main(*arguments), seconds))


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a coroutine function in a new event loop of each kind."""

    def run(main: Main[T], *arguments: Any) -> T:
        return run_in(request.param, main, *arguments)

    return run


async def settle(turns: int = 5) -> None:
    """Let the other tasks run until they wait: each step of theirs takes a turn of the loop or two."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def started(*coroutines: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    """Return tasks that have gone as far as they can without anybody else."""
    tasks = []
    for coroutine in coroutines:
        tasks.append(asyncio.create_task(coroutine))
        await settle()
    return tasks


async def send_all(channel: AsyncChannel, numbers: range, kinds: tuple[str, ...] = KINDS) -> None:
    """Send one message for each number, of each kind in turn."""
    for number in numbers:
        message, handles = compose(number, kinds[number % len(kinds)])
        try:
            await channel.send(message)
        finally:
            for handle in handles:
                handle.close()


async def receive_all(channel: AsyncChannel, numbers: range) -> None:
    """Receive exactly these messages, in this order."""
    assert [verify(await channel.recv()) for _ in numbers] == list(numbers)


async def fill(channel: AsyncChannel, size: int = 1000) -> int:
    """Send messages ``(number, bytes)`` until one would have to wait, which is given up; return how many were sent."""
    count = 0
    while True:
        try:
            async with asyncio.timeout(0.02):
                await channel.send((count, bytes(size)))
        except TimeoutError:
            return count
        count += 1


def pair(transport: str, **options: Any) -> tuple[AsyncChannel, AsyncChannel]:
    """Return two connected ends."""
    return aio.Pipe(transport=transport, **options)


def tls_contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what a server and its client need for TLS, with a certificate made in ``directory``."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=30
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    client.check_hostname = False
    return server, client
