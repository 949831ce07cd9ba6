"""``Connections``: what a retired predecessor sends to the process that serves now, such as idle keep-alive connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fdshare.channel import Channel
from fdshare.closing import Closing
from fdshare.errors import PeerClosedError, ProtocolError
from fdshare.handover import protocol

__all__ = ["Connections"]


class Connections(Closing):
    """Connections that the predecessor gives away while it drains; iterating yields them until it has ended.

    Made by ``Handover.connections``.  ``fileno()`` is readable when ``receive`` has something to do.
    """

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel

    def receive(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Return the next connection, and what was sent along with it.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            PeerClosedError: the predecessor has drained, or died; or there was none.
            TimeoutError: none came.
            DecodeError: this one cannot be rebuilt; it is closed, and the next one can be received.
            FdLimitError: no descriptor left for it; it stays queued.
            AccessDeniedError: the predecessor runs as somebody else by now, whom the policy does not admit.
        ClosedError: the handover was closed.
        """
        if self._channel is None:
            raise PeerClosedError("there is no predecessor")
        _, fields = protocol.receive(self._channel, "connection", timeout=timeout)
        pair = protocol.load(fields.get("pair"))
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ProtocolError("the predecessor has sent no connection")
        return pair

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield connections, and what was sent along, until the predecessor has ended."""
        while True:
            try:
                pair = self.receive()
            except PeerClosedError:
                return
            yield pair
            del pair  # it is the caller's alone

    @property
    def expected(self) -> bool:
        """Whether there is a predecessor that may send some."""
        return self._channel is not None and not self._channel.closed

    def fileno(self) -> int:
        """Borrow the descriptor, for ``fdshare.wait``, selectors and event loops.

        Raises:
            PeerClosedError: there is no predecessor.
            ClosedError: the handover was closed.
        """
        if self._channel is None:
            raise PeerClosedError("there is no predecessor")
        return self._channel.fileno()

    def close(self) -> None:
        """Take no more; the predecessor is told so by its next ``send_connection``.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        if self._channel is not None:
            self._channel.close()
