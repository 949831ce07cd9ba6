"""The exception tree: every error fdshare raises, each also the built-in that a standard caller would catch.

Two families must not be confused: *we* misused the library (``ClosedError``, ``NotSendableError``,
``MessageTooLargeError``), or *the other side or the system* failed us (the rest).  Every message names the
figure that was exceeded and what to do next.  All of them survive pickling, attributes included, because tasks raise
them in one process and callers catch them in another.
"""

from __future__ import annotations

import errno
import pickle
import queue

__all__ = [
    "AccessDeniedError",
    "ClosedError",
    "DecodeError",
    "DescriptorsLostError",
    "FdLimitError",
    "FdShareError",
    "HandoffExpiredError",
    "MessageTooLargeError",
    "NoSpaceError",
    "NotSendableError",
    "PeerClosedError",
    "ProtocolError",
    "QueueClosedError",
    "QueueEmptyError",
    "QueueFullError",
    "SealError",
    "TaskTimeoutError",
]


class FdShareError(Exception):
    """Base of every error that fdshare raises by itself."""


class ClosedError(FdShareError, OSError):
    """This side was closed: the handle, channel or listener can no longer be used (errno EBADF)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.EBADF, args[0] if args else "closed")))


class PeerClosedError(FdShareError, BrokenPipeError, EOFError):
    """The other side was closed or died, while receiving (as EOFError) or sending (as BrokenPipeError)."""

    def __init__(self, *args: object) -> None:
        super().__init__(
            *(args if len(args) == 2 else (errno.EPIPE, args[0] if args else "the peer has closed"))
        )


class QueueClosedError(ClosedError, PeerClosedError, ValueError):
    """Somebody closed the queue: nothing can be put any more, and what was in it was taken (errno EPIPE).

    A queue has no other side, so this is an error of both; a ValueError is what ``multiprocessing.Queue`` raises.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(
            *(args if len(args) == 2 else (errno.EPIPE, args[0] if args else "the queue was closed"))
        )


class QueueEmptyError(FdShareError, TimeoutError, queue.Empty):
    """Nothing came in time, or nothing was there and no waiting was asked for."""


class QueueFullError(FdShareError, TimeoutError, queue.Full):
    """The queue stayed full, or was full and no waiting was asked for; nothing was put."""


class NotSendableError(FdShareError, TypeError, pickle.PicklingError):
    """An object cannot travel.

    ``path`` (str or None) is the way to it inside the message, such as ``message['jobs'][3].log``; ``type_name`` (str or
    None) is its type; ``reason`` (str or None) is why, and what to do instead.
    """

    def __init__(
        self, *args: object, path: str | None = None, type_name: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(*args)
        self.path = path
        self.type_name = type_name
        self.reason = reason


class DecodeError(FdShareError, pickle.UnpicklingError):
    """A message arrived whole and could not be rebuilt; its descriptors are closed and the channel goes on."""


class FdLimitError(FdShareError, OSError):
    """No room for descriptors: EMFILE at the receiver (nothing is lost, the message stays queued) or at the sender
    while it prepared a message; ETOOMANYREFS where the sending user has too many descriptors in flight.

    ``needed`` is how many descriptors were wanted (0 where unknown), ``limit`` the soft limit RLIMIT_NOFILE.
    """

    def __init__(self, *args: object, needed: int = 0, limit: int = 0) -> None:
        super().__init__(*args)
        self.needed = needed
        self.limit = limit


class DescriptorsLostError(FdShareError, OSError):
    """The kernel or a security module dropped descriptors of a message that had been taken from the queue.

    ``expected`` and ``received`` are the counts; what did arrive was closed.
    """

    def __init__(self, *args: object, expected: int = 0, received: int = 0) -> None:
        super().__init__(
            *(args if len(args) == 2 else (errno.EIO, args[0] if args else "descriptors were lost"))
        )
        self.expected = expected
        self.received = received


class ProtocolError(FdShareError, OSError):
    """The peer sent what the protocol forbids: the channel is closed (errno EPROTO)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.EPROTO, args[0] if args else "protocol error")))


class MessageTooLargeError(FdShareError, ValueError):
    """Something is over a named bound: the message says which one, its value, and what was asked for."""


class NoSpaceError(FdShareError, OSError):
    """No room for a large message's segment, or for shared memory (ENOSPC, ENOMEM, EFBIG): found before it is used."""


class SealError(FdShareError, OSError, BufferError):
    """Shared memory cannot be sealed: something could still write into it (EBUSY), or this system has no seals (ENOTSUP)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.EBUSY, args[0] if args else "still writable")))


class AccessDeniedError(FdShareError, PermissionError):
    """The peer's credentials did not pass the policy, or a security module forbade the descriptors (errno EACCES)."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args if len(args) == 2 else (errno.EACCES, args[0] if args else "access denied")))


class HandoffExpiredError(FdShareError, LookupError):
    """A brokered handle was already taken, or its lease ran out."""


class TaskTimeoutError(FdShareError, TimeoutError):
    """The task ran past its limit; its worker was killed."""
