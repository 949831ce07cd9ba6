"""Closing sockets whose queues others have filled: in the thread of nobody who would have to wait for it.

The last close of a descriptor can take as long as its sender likes: that of a TCP socket with SO_LINGER and a full window, of a
file on a file system that he serves.  What lies in the queue of a socket is closed with the socket, or as it is read::

    dispose --> ours alone? stop what comes --> descriptors in its queue? --no--> closed here
                                                   | yes, or not to be told
                                                   v
                                  waiting --> a closer, of at most MAX_CLOSERS
                                     | all of them are held, and BATCH are waiting
                                     v
                                  inherited by a process that is killed then: the dying do not linger
"""

from __future__ import annotations

import _thread
import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from fdshare import native

if TYPE_CHECKING:
    from subprocess import Popen

__all__ = ["close_later", "dispose", "dispose_listener", "forks", "holds_descriptors"]

MAX_CLOSERS = 8
"""Threads that close at one time: one is enough, unless somebody holds it."""

BATCH = 64
"""Descriptors that wait for a closer before a process takes them along: as many as it takes to make that worth 2 ms."""

MAX_WAITING = 1024
"""Most descriptors that wait; beyond it, where no process can be started, closing is the caller's."""

PATIENCE_SECONDS = 0.05
"""How long a close is waited for all the same, so that it is usually done when the call returns: it takes 0.1 ms."""

CALM_SECONDS = 5.0
"""How long nobody is waited for after somebody has used up that patience."""

_waiting: deque[tuple[int, _thread.LockType]] = deque()
"""Descriptors, and locks that are released once they are closed."""

_free: deque[None] = deque([None] * MAX_CLOSERS)
_undertakers: deque[None] = deque([None])
"""Places for threads."""

_impatient_until = 0.0
_fork_count = 0


def forks() -> int:
    """Return how often this process has forked, in Python."""
    return _fork_count


def dispose(sock: socket.socket, *, alone: bool) -> None:
    """Close a connected socket; where it may take long, without waiting for that.

    Args:
        alone: nobody else has it, so that the other side can be kept from sending first.

    Raises:
        OSError: as close(2).
    """
    if alone:
        try:
            sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it has ended
    if sock.fileno() >= 0 and holds_descriptors(sock):
        close_later(sock.detach())
    else:
        sock.close()


def dispose_listener(sock: socket.socket, *, alone: bool) -> None:
    """Close a listening socket, and the connections that nobody has accepted; the same as for :func:`dispose`.

    Raises:
        OSError: as close(2).
    """
    if alone and _dispose_queued(sock):
        sock.close()
    else:
        dispose(sock, alone=False)


def _dispose_queued(listener: socket.socket) -> bool:
    """Let nobody connect any more, and dispose of who has; whether that was possible."""
    try:
        listener.shutdown(socket.SHUT_RD)
        listener.setblocking(False)
        while True:
            dispose(listener.accept()[0], alone=True)
    except BlockingIOError:  # none is left
        return True
    except OSError:  # no descriptor left, most likely
        return False


def holds_descriptors(sock: socket.socket) -> bool:
    """Whether descriptors wait in the queue of a socket, or in those of a listener's; also where that cannot be told."""
    try:
        info = os.open(f"/proc/self/fdinfo/{sock.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(info, _INFO_SIZE)
        finally:
            os.close(info)
        return int(text.partition(b"scm_fds:")[2].split(None, 1)[0]) > 0
    except (OSError, ValueError, IndexError):  # no /proc here, or a kernel before 5.11
        return True


_INFO_SIZE = 4096
"""Bytes of the description of a socket: it takes some 80."""


# --- closing it elsewhere ------------------------------------------------------------------------------------------------

# Without a lock of this module's own, which a signal handler could meet: each step is one of a deque, and whole.


def close_later(fd: int) -> None:
    """Close a descriptor, which is ours no more, without waiting for it for long."""
    global _impatient_until
    closed = native.allocate_lock()
    closed.acquire()
    _waiting.append((fd, closed))
    started = _start(_free, _close_all) or (
        len(_waiting) >= BATCH and not _free and _start(_undertakers, _bury_all)
    )
    if not started and (len(_waiting) > MAX_WAITING or len(_free) == MAX_CLOSERS):
        with contextlib.suppress(IndexError):
            _close(*_waiting.popleft())
    if time.monotonic() >= _impatient_until and not closed.acquire(timeout=PATIENCE_SECONDS):
        _impatient_until = time.monotonic() + CALM_SECONDS


def _start(places: deque[None], work: Callable[[], None]) -> bool:
    """Start a thread if there is a place for it."""
    try:
        places.pop()
    except IndexError:
        return False
    try:
        native.start_new_thread(work, ())
    except RuntimeError:  # the system has no more
        places.append(None)
        return False
    return True


def _close_all() -> None:
    """Close what is waiting, until nothing is."""
    while True:
        try:
            while True:
                _close(*_waiting.popleft())
        except IndexError:
            pass
        _free.append(None)
        if not _waiting:
            return
        try:  # something has come just now, and perhaps nobody for it
            _free.pop()
        except IndexError:
            return


def _close(fd: int, closed: _thread.LockType) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # it is closed all the same, and there is nobody to tell
    closed.release()


def _bury_all() -> None:
    """Take along what is waiting, as long as that is a lot."""
    while True:
        while len(_waiting) >= BATCH:
            _bury()
        _undertakers.append(None)
        if len(_waiting) < BATCH:
            return
        try:
            _undertakers.pop()
        except IndexError:
            return


def _bury() -> None:
    """Let a process have what is waiting, so that closing it here is not the last time, and kill it."""
    batch = []
    with contextlib.suppress(IndexError):
        while True:
            batch.append(_waiting.popleft())
    process = _start_process([fd for fd, _ in batch])
    for item in batch:
        _close(*item)  # where there is no process, this thread is held in its place
    if process is not None:
        process.kill()
        process.communicate()


def _start_process(fds: list[int]) -> Popen[bytes] | None:
    """Start a process that has these descriptors, too, and waits; None where that is not possible."""
    try:
        from shutil import which
        from subprocess import DEVNULL, PIPE, Popen

        command = [which("cat") or sys.executable]  # either reads its standard input to the end
        return Popen(command, pass_fds=fds, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL)
    except (OSError, ImportError):
        return None


def _count_fork() -> None:
    global _fork_count
    _fork_count += 1


def _after_fork() -> None:
    """Close the child's copies, which are not the last; its parent's threads are not here."""
    for places, count in ((_free, MAX_CLOSERS), (_undertakers, 1)):
        places.clear()
        places.extend([None] * count)
    while _waiting:
        _close(*_waiting.popleft())


os.register_at_fork(before=_count_fork, after_in_child=_after_fork)
