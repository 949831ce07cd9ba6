"""asyncio: channels and listeners whose waiting leaves the event loop free."""

from __future__ import annotations

from fdshare.aio.channel import AsyncChannel, Pipe
from fdshare.aio.endpoint import Listener, connect
from fdshare.aio.serving import Server, serve
from fdshare.aio.streams import MovedStream, detach, detach_transport

__all__ = [
    "AsyncChannel",
    "Listener",
    "MovedStream",
    "Pipe",
    "Server",
    "connect",
    "detach",
    "detach_transport",
    "serve",
]
