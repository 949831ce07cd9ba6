"""The life line: the kernel kills a pool's workers when their parent is gone, in whatever code they are.

One pipe serves the whole pool: the parent has the only end to write to, and each worker a *description* of the other end, since
that is what remembers whom to kill.  Such a description comes from opening the pipe anew by its name in /proc.  Where there is
none, a worker has a pipe of its own.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import os
import select
import signal
import sys

from fdshare.handle import FdHandle, HandleList, Handles, own, own_pipe

__all__ = ["LifeLine", "die_with_parent"]


class LifeLine:
    """The parent's end."""

    def __init__(self) -> None:
        reader, self._writer = own_pipe()
        reader.close()

    def end(self) -> tuple[FdHandle, FdHandle | None]:
        """Make the end for one worker, armed: who calls :func:`die_with_parent` is killed by its hang-up.

        Returns:
            the end; and where it is that of a pipe of its own, the parent's end of that.

        Raises:
            OSError: no descriptor left.
        """
        writer = None
        try:
            reader = own(os.open, f"/proc/self/fd/{self._writer.fileno()}", _FLAGS)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            reader, writer = own_pipe()
        if sys.platform == "linux":
            # Said here, as it would take longer in the worker.
            fcntl.fcntl(reader.fileno(), fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(reader.fileno(), fcntl.F_SETFL, os.O_ASYNC)
        return reader, writer

    def check_room(self, count: int) -> None:
        """Look whether there is room for so many descriptors.

        Raises:
            OSError: there is not.
        """
        handles: HandleList = Handles()
        try:
            for _ in range(count):
                handles.append(FdHandle.dup(self._writer))
        finally:
            handles.close()

    def fileno(self) -> int:
        """Borrow the descriptor that a fork inherits."""
        return self._writer.fileno()

    def close(self) -> None:
        """Let go of it, which kills every worker that is left."""
        self._writer.close()


_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def die_with_parent(life: FdHandle) -> None:
    """In the worker: arrange that the kernel kills this process when the parent is gone, also in the middle of a task.

    PR_SET_PDEATHSIG would do so when the parent's *thread* ends, and forgets itself when the process changes its user.
    """
    fd = life.fileno()
    if sys.platform == "linux":
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    else:
        _thread.start_new_thread(_watch, (fd,))
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if poll.poll(0):  # gone before it was asked for
        os._exit(1)


def _watch(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    os._exit(1)
