"""``Lock``, ``Semaphore`` and ``Event``: between threads and between processes, made anywhere, sent anywhere."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from itertools import repeat
from threading import get_ident
from typing import TYPE_CHECKING, Any

from fdshare.mutex import BUSY, LOST, OWNER_DIED, Mutex, make_mutex, open_mutex
from fdshare.travelling import Kept, Travelling, travels

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Lock"]


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_locks):
        lock._owner = 0  # the parent's thread


os.register_at_fork(after_in_child=_after_fork)


class Lock(Travelling):
    """Only one thread of all the processes that have it is inside; when that one dies, the kernel lets the next one in.

    It belongs to the thread that acquired it: only that one can release it, and it is released when the thread ends,
    however it ends.  The next holder finds :attr:`abandoned` True then.  It is not recursive.

        with lock:
            if lock.abandoned:
                ...  # repair what the dead holder may have left half done
            ...

    Raises:
        OSError: no descriptor or no memory left.
    """

    __slots__ = ("_mutex", "_owner", "_tries", "_unlocks", "abandoned")

    abandoned: bool
    """Whether the holder before this one died inside; to be read while one holds the lock."""

    def __init__(self) -> None:
        self._adopt(*make_mutex())

    def _adopt(self, handle: Kept, mutex: Mutex) -> None:
        self._handles = (handle,)
        self._owner = 0  # the thread of this process that is inside by this object
        self._mutex = mutex
        _locks.add(self)
        self._tries = mutex.tries
        self._unlocks = mutex.unlocks
        self.abandoned = False

    def _options(self) -> tuple[Any, ...]:
        return (self._mutex.kind,)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Get in; return whether that was possible.

        Args:
            blocking: False returns at once.
            timeout: most seconds to wait; None waits for ever.

        Raises:
            RuntimeError: this thread is inside already, and would wait for ever.
            ClosedError: this object was closed.
            OSError: no descriptor left for it (only where locks are files).
        """
        # No call between the taking and the return: an interrupt could strike there, and leave it taken.
        me = get_ident()
        for code in self._tries:  # noqa: B007 -- one step, see mutex.py
            break
        if not code:
            self._owner = me
            self.abandoned = False
            return True
        if code == OWNER_DIED:
            for _ in self._mutex.mends:
                break
            self._owner = me
            self.abandoned = True
            return True
        return self._acquire_slowly(me, code, blocking, timeout)

    def _acquire_slowly(self, me: int, code: int, blocking: bool, timeout: float | None) -> bool:
        self._check_open()
        if code != BUSY:
            raise OSError(code, "a lock that does not work")
        if not blocking or (timeout is not None and timeout <= 0):
            return False
        if self._owner == me:
            raise RuntimeError("this thread holds the lock already, and it is not recursive")
        deadline = None if timeout is None else time.monotonic() + timeout
        at_most = self._mutex.signals if threading.main_thread().ident == me else None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if at_most is not None:
                left = at_most if left is None else min(left, at_most)
            waits = self._mutex.waits(left)
            for code in waits:  # noqa: B007
                break
            if not code:
                self._owner = me
                self.abandoned = False
                return True
            if code == OWNER_DIED:
                for _ in self._mutex.mends:
                    break
                self._owner = me
                self.abandoned = True
                return True
            if code != errno.ETIMEDOUT:
                raise OSError(code, "a lock that does not work")
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def release(self) -> None:
        """Let the next one in.

        Raises:
            RuntimeError: this thread is not inside.
            OSError: the system had dropped the lock before (ENOLCK; only where locks are files and there is no /proc).
        """
        if self._owner != get_ident():
            raise RuntimeError("this thread does not hold the lock")
        self._owner = 0
        for code in self._unlocks:  # noqa: B007
            break
        if code == LOST:
            raise OSError(
                LOST, "a descriptor of the lock was closed while it was held, and the system dropped the lock"
            )
        if code:
            raise RuntimeError("this thread does not hold the lock")

    def close(self) -> None:
        """Let go of it in this process, after releasing it where this thread is inside.  Twice is harmless.

        Raises:
            RuntimeError: another thread of this process is inside.
            OSError: as close(2).
        """
        if self._owner == get_ident():
            self.release()
        elif self._owner:
            raise RuntimeError("another thread holds the lock")
        self._tries = repeat(errno.EBADF)
        self._mutex.close()
        super().close()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        mutex = getattr(self, "_mutex", None)  # unset where __init__ raised
        if mutex is not None:
            (mutex.abandon if self._owner else mutex.close)()


def rebuild_lock(handles: tuple[Kept, ...], kind: str) -> Lock:
    lock = Lock.__new__(Lock)
    lock._adopt(handles[0], open_mutex(handles[0].fileno(), kind))
    return lock


travels(Lock, rebuild_lock)
