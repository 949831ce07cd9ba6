"""What an event loop holds of fdshare's: a blocking object of which only the waiting is done here; its descriptor and its end."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Self

from fdshare.aio.waiting import InLoop
from fdshare.handle import Outside

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Held"]


class Held(InLoop):
    """A channel or a listener in an event loop."""

    _inner: Any
    """The one that blocks; unset where ``__init__`` raised."""

    @property
    def closed(self) -> bool:
        """Whether it was closed in this process."""
        return bool(self._inner.closed)

    @property
    def transport(self) -> str:
        """How packets are kept apart: "seqpacket" by the kernel, "stream" by length-prefixed frames."""
        return str(self._inner.transport)

    def fileno(self) -> int:
        """Borrow the descriptor's number; reading from it breaks what is here.

        Raises:
            ClosedError: it is closed.
        """
        return int(self._inner.fileno())

    def close(self) -> None:
        """Close it at once; tasks that wait in it get ClosedError.  Twice is harmless.

        A channel's peer gets PeerClosedError, and who is queued at a listener is disconnected.

        Raises:
            OSError: as close(2).
        """
        if not self.closed:
            self._leave_loop(self._inner.close)

    async def aclose(self) -> None:
        """Close it, as :meth:`close` does: there is nothing to wait for.

        Raises:
            OSError: as close(2).
        """
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if "_inner" in vars(self) and not self.closed:
            text = f"unclosed {self!r}"
            try:
                self.close()
            finally:
                warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)
