"""TypedCodec under an event loop: the same messages, the same refusals."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import SOCKET_TYPES
from typed_messages import DESCRIPTORS, Empty, Handles

from fdshare import Channel, DecodeError, NotSendableError, ProtocolError, TypedCodec, aio, wire
from fdshare.testing import numbered_handle, read_number


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_messages_travel(transport: str) -> None:
    async def main() -> None:
        here, there = aio.Pipe(codec=DESCRIPTORS, transport=transport)
        async with here, there:
            with numbered_handle(5) as handle:
                await here.send(Handles(handle))
            async with asyncio.timeout(20):
                assert read_number((await there.recv()).one) == 5
            with pytest.raises(NotSendableError):
                await here.send({"a": 1})

    asyncio.run(main())


def test_hostile_peer(transport: str, tmp_path: Path) -> None:
    codec = TypedCodec(Empty, Handles, max_bytes=1000, recv_fds=1)
    good = msgspec.msgpack.encode(["Empty"])
    bomb = pickle.dumps(Bomb(tmp_path / "bomb"), 5)
    end = b"\x01" if transport == "stream" else b""

    async def main() -> None:
        ours, bare = socket.socketpair(socket.AF_UNIX, SOCKET_TYPES[transport])
        with bare:
            async with aio.AsyncChannel(Channel(ours, codec=codec)) as channel, asyncio.timeout(20):
                for payload in (bomb, bytes(2000), b""):
                    bare.send(wire.pack(wire.MESSAGE, payload_size=len(payload)) + payload + end)
                    with pytest.raises(DecodeError):
                        await channel.recv()
                bare.send(wire.pack(wire.MESSAGE, payload_size=len(good)) + good + end)
                assert await channel.recv() == Empty()
                bare.send(bomb + bytes(50))
                with pytest.raises(ProtocolError):
                    await channel.recv()
                assert channel.closed

    asyncio.run(main())
    assert not (tmp_path / "bomb").exists()
