"""What can go wrong between two generations of a server."""

from __future__ import annotations

import errno

from fdshare.errors import ClosedError, FdShareError

__all__ = ["HandoverBusyError", "HandoverError", "HandoverRevokedError", "RetiredError"]


class HandoverError(FdShareError, OSError):
    """A handover failed; whoever served before it still does."""

    def __init__(self, *args: object) -> None:
        super().__init__(
            *(args if len(args) == 2 else (errno.EPROTO, args[0] if args else "the handover failed"))
        )


class HandoverBusyError(HandoverError):
    """Another successor is being initialised, or the one that serves is not ready itself (errno EBUSY)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.EBUSY, args[0] if args else "busy")))


class HandoverRevokedError(HandoverError):
    """The predecessor took its offer back, and serves on: this process must not (errno ECANCELED)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.ECANCELED, args[0] if args else "revoked")))


class RetiredError(HandoverError, ClosedError):
    """A successor serves now: this process accepts no more (errno EBADF)."""

    def __init__(self, *args: object) -> None:
        OSError.__init__(
            self, *(args if len(args) == 2 else (errno.EBADF, args[0] if args else "a successor serves now"))
        )
