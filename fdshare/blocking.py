"""Waiting beside whoever may close what is waited for: threads of Python, threads that C has made, and, where waiting is
cooperative, others of the same thread.

Beside a thread of Python a wait makes at once what wakes it for a close.  A ``recv`` without a time limit, the commonest,
looks for a tick first: most waits are short, and what wakes one takes 10 us to make and to watch.  So does every wait where no
thread of Python is; only then it asks the kernel who else there is.
"""

from __future__ import annotations

import _thread
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator

from fdshare import native, recycle, system
from fdshare.handle import own, own_pipe
from fdshare.native import IN, Poll

__all__ = [
    "TICK_MILLISECONDS",
    "TICK_SECONDS",
    "Waker",
    "other_threads",
    "python_threads",
    "tried_later",
    "wait_beside",
    "wake",
]

TICK_SECONDS = 0.05
"""How long it takes at most until a wait notices that somebody else has closed what it waits for."""

TICK_MILLISECONDS = 50

python_threads = _thread._count
"""How many Python threads there are beside the main one, in 30 ns."""

_ALONE = 3
"""Links of /proc/self/task with one thread: two of any directory, and one for each thread."""


def other_threads() -> bool:
    """Whether anybody else may do something while this thread waits; the kernel's word, in 2 us."""
    if python_threads() or native.is_patched() or sys.platform != "linux":
        return True
    try:
        return os.stat("/proc/self/task").st_nlink != _ALONE
    except OSError:  # nobody tells
        return True


class Waker:
    """Ends the poll of a blocked thread from another one."""

    def __init__(self) -> None:
        if system.HAVE_EVENTFD:
            self.reader = self.writer = own(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.reader, self.writer = own_pipe()

    def wake(self) -> None:
        try:
            os.write(self.writer.fileno(), (1).to_bytes(8, sys.byteorder))
        except OSError:
            pass  # its thread has gone on, or was interrupted before it could say so

    def close(self, *exc: object) -> None:
        for handle in vars(self).values():  # none, where no descriptor was left for it
            handle.close()

    def __enter__(self) -> Waker:
        return self

    __exit__ = __del__ = close  # an interrupt may come before the "with"


def wake(wakers: set[Waker]) -> None:
    """Wake who waits; where waiting is cooperative, let them leave: event loops break on what is closed under them."""
    for waker in tuple(wakers):
        waker.wake()
    while wakers and native.is_patched():
        time.sleep(0)


PAUSE_SECONDS = 0.002
"""How long others run before something is tried again, where waiting is cooperative."""


def tried_later(tries: Iterator[int]) -> Iterator[int]:
    """Let others run, and return ``tries`` as a wait: one that says EBUSY has come to its end (ETIMEDOUT)."""
    time.sleep(PAUSE_SECONDS)
    return (errno.ETIMEDOUT if code == errno.EBUSY else code for code in tries)


def _poll(poll: Poll, deadline: float | None) -> int:
    ready = recycle.poll_idly(poll, None if deadline is None else deadline - time.monotonic())
    return ready[0][1] if ready else 0


def wait_beside(
    poll: Poll, deadline: float | None, wakers: set[Waker], check_open: Callable[[], object]
) -> int:
    """Wait until ``poll`` finds something, the time is up, or a close.

    Args:
        poll: of this call alone.
        deadline: of time.monotonic(), in seconds; None waits for ever.
        wakers: where a close finds what to wake.
        check_open: raises after a close.

    Returns:
        the events of one descriptor, 0 when the time is up.

    Raises:
        ClosedError: from ``check_open``.
    """
    # Beside Python's threads a close must not wait for a tick; where waiting is cooperative, nothing may be closed that is
    # watched: see wake.
    if not (python_threads() or native.is_patched()):
        tick = time.monotonic() + TICK_SECONDS
        found = _poll(poll, tick if deadline is None else min(tick, deadline))
        check_open()
        if found or (deadline is not None and deadline <= tick):
            return found
    if not other_threads():  # only a signal handler could close it under us
        found = _poll(poll, deadline)
        check_open()
        return found
    try:
        waker = Waker()
    except OSError:  # no descriptor left: look often instead
        found = 0
        while not found and (deadline is None or time.monotonic() < deadline):
            tick = time.monotonic() + TICK_SECONDS
            found = _poll(poll, tick if deadline is None else min(tick, deadline))
            check_open()
        return found
    with waker:
        poll.register(waker.reader.fileno(), IN)
        wakers.add(waker)
        try:
            check_open()
            found = _poll(poll, deadline)
        finally:
            wakers.discard(waker)
    check_open()
    return found
