"""asyncio: channels whose waiting leaves the event loop free."""

from __future__ import annotations

from fdshare.aio.channel import AsyncChannel, Pipe

__all__ = ["AsyncChannel", "Pipe"]
