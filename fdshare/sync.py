"""``Lock``, ``Semaphore`` and ``Event``: between threads and between processes, made anywhere, sent anywhere.

============= ============================ ========================= ==========================================
class         what travels                 where there is no eventfd readable, so that ``fdshare.wait`` takes it
============= ============================ ========================= ==========================================
``Lock``      see mutex.py                                           no: being free now says nothing about later
``Semaphore`` an eventfd that counts down  a pipe, a byte a unit     while there is a unit
``Event``     an eventfd                   a pipe, empty or not      while it is set
============= ============================ ========================= ==========================================

The eventfds and pipes do not block: they are made here, and nobody else waits in a read of them.
"""

from __future__ import annotations

import errno
import fcntl
import operator
import os
import sys
import termios
import threading
import time
import weakref
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any

from fdshare import holders, native, system
from fdshare.blocking import tried_later
from fdshare.errors import ClosedError
from fdshare.handle import own, own_pipe
from fdshare.mutex import BUSY, FOREIGN, LOST, OWNER_DIED, Mutex, make_mutex, open_mutex
from fdshare.travelling import Kept, Readable, Travelling, keep, travels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["Event", "Lock", "Semaphore"]


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _all_locks() -> list[Lock]:
    while True:
        try:
            return list(_locks)
        except RuntimeError:  # another thread has made one meanwhile
            pass


def _after_fork() -> None:
    moved = holders.forked_away()
    for lock in list(_locks):
        lock._owner = 0  # the parent's thread
        if moved and lock._mutex.is_foreign():
            lock._tries = repeat(errno.EXDEV)


os.register_at_fork(after_in_child=_after_fork)


class Lock(Travelling):
    """Only one thread of all the processes that have it is inside; when that one dies, the kernel lets the next one in.

    It belongs to the thread that acquired it: only that one can release it, and it is released when the thread ends,
    however it ends.  The next holder finds :attr:`abandoned` True then.  It is not recursive.  ::

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

    def acquire(
        self, blocking: bool = True, timeout: float | None = None, *, block: bool | None = None
    ) -> bool:
        """Get in; return whether that was possible.

        Args:
            blocking: False returns at once.
            timeout: most seconds to wait; None waits for ever, and so does -1, as with ``threading.Lock``.
            block: what ``multiprocessing.Lock`` calls ``blocking``.

        Raises:
            RuntimeError: this thread is inside already, and would wait for ever.
            ClosedError: this object was closed, perhaps while this waited.
            OSError: EXDEV in a process that was forked into another PID namespace than the lock is of; no descriptor left
                for it (only where locks are files).
        """
        me = threading.get_ident()
        attempt = tries = self._tries
        deadline = None
        while True:
            for code in attempt:  # noqa: B007 -- one step, see mutex.py
                break
            if not code or code == OWNER_DIED:
                # No call from the taking to the return: an interrupt could strike there, and leave it taken.
                self._owner = me
                self.abandoned = code != 0
                if code:
                    for _ in self._mutex.mends:
                        break
                return True
            if attempt is tries:
                timeout = None if timeout == -1 else timeout
                waits = self._may_wait(me, code, blocking if block is None else block, timeout)
                if timeout is not None and deadline is None:
                    deadline = time.monotonic() + timeout
            elif code != errno.ETIMEDOUT:
                raise OSError(code, "a lock that does not work")
            else:
                self._check_open()
                waits = deadline is None or time.monotonic() < deadline
            if not (waits and attempt is tries) and self._mutex.is_forsaken():
                attempt = tries
            elif waits:
                attempt = self._wait_until(me, deadline)
            else:
                return False

    def _may_wait(self, me: int, code: int, blocking: bool, timeout: float | None) -> bool:
        """Whether to wait after the first try, which gave ``code``; raises where no waiting would help."""
        self._check_open()
        if code != BUSY:
            raise OSError(code, FOREIGN if code == errno.EXDEV else "a lock that does not work")
        if not blocking or (timeout is not None and timeout <= 0):
            return False
        if timeout is None and (self._owner == me or (len(_locks) > 1 and self._is_held_elsewhere(me))):
            raise RuntimeError("this thread holds the lock already, and it is not recursive")
        return True

    def _is_held_elsewhere(self, me: int) -> bool:
        """Whether this thread is inside by another object of the same lock: there is one for each time that it was received."""
        try:
            mine = os.fstat(self._handles[0].fileno())
        except OSError:
            self._check_open()  # by another thread, just now
            raise
        inside = [lock._handles[0].fileno() for lock in _all_locks() if lock._owner == me]
        return any(os.path.samestat(mine, os.fstat(fd)) for fd in inside)

    def _wait_until(self, me: int, deadline: float | None) -> Iterator[int]:
        if native.is_patched():  # whoever is inside may be of this thread, which must not wait in the kernel
            return tried_later(self._tries)
        mutex = self._mutex
        at_most = mutex.signals if threading.main_thread().ident == me else mutex.looks
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if at_most is not None:
            left = at_most if left is None else min(left, at_most)
        return mutex.waits(left)

    def release(self) -> None:
        """Let the next one in.

        Raises:
            RuntimeError: this thread is not inside.
            OSError: the system had dropped the lock before (ENOLCK; only where locks are files and there is no /proc).
        """
        if self._owner != threading.get_ident():
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

    def locked(self) -> bool:
        """Whether somebody is inside at this moment.

        Raises:
            ClosedError, NotImplementedError: this object was closed; the C library, as it is not glibc, does not tell.
        """
        self._check_open()
        return self._mutex.is_held()

    def close(self) -> None:
        """Let go of it in this process, after releasing it where this thread is inside.  Twice is harmless.

        Raises:
            RuntimeError: another thread of this process is inside.
            OSError: as close(2).
        """
        if self._owner == threading.get_ident():
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


# --- what is readable ------------------------------------------------------------------------------------------------------

HAVE_EVENTFD = system.HAVE_EVENTFD
"""Whether there are eventfds, or pipes do their work; read at each use, so that tests can switch it off."""

_LARGEST = 2**64 - 2
"""What an eventfd can count to."""

_MOST = 1 << 16
"""Bytes read at once to clear an event: what a pipe of Linux holds; an eventfd gives its eight."""

_CHUNK = 512
"""Bytes written to a pipe at once, whole or not at all: POSIX promises no more (PIPE_BUF)."""


def _number(value: int) -> bytes:
    return value.to_bytes(8, sys.byteorder)


_ONE = _number(1)


def _raise_closed() -> object:
    raise ClosedError("this Semaphore was closed")


def _make_pipe() -> tuple[Kept, Kept]:
    reader, writer = own_pipe()
    os.set_blocking(reader.fileno(), False)
    os.set_blocking(writer.fileno(), False)
    return keep(reader), keep(writer)


class _Counting(Readable):
    """An eventfd, or the two ends of a pipe."""

    __slots__ = ()

    def _adopt(self, handles: tuple[Kept, ...]) -> None:
        self._handles = handles

    def _write(self, data: bytes) -> None:
        self._check_open()
        os.write(self._handles[-1].fileno(), data)


class Semaphore(_Counting):
    """A number of units, to be taken and given back by any thread of any process that has it.

    It only counts: the units that a dead process had taken do not come back, as nobody knows which they were.  Where that
    matters, use a :class:`Lock`, or give each worker a channel whose end tells of its death.

    Args:
        value: units to begin with.

    Raises:
        ValueError: it is negative, or more than the system counts to (2**64 - 2; what a pipe holds where there is no eventfd).
        TypeError: it is no whole number.
        OSError: no descriptor left.
    """

    __slots__ = ("_give", "_take")

    # Each step is one system call for one unit.
    _take: Iterator[object]
    _give: Iterator[object]

    def __init__(self, value: int = 1) -> None:
        value = operator.index(value)
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"a semaphore of {value} units")
        if HAVE_EVENTFD:
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE
            self._adopt((keep(own(os.eventfd, 0, flags)),))
        else:
            self._adopt(_make_pipe())
        if value:
            self.release(value)

    def _adopt(self, handles: tuple[Kept, ...]) -> None:
        super()._adopt(handles)
        unit = _ONE if len(handles) == 1 else b"\0"
        self._take = starmap(os.read, repeat((handles[0].fileno(), len(unit))))
        self._give = starmap(os.write, repeat((handles[-1].fileno(), unit)))

    def acquire(
        self, blocking: bool = True, timeout: float | None = None, *, block: bool | None = None
    ) -> bool:
        """Take one unit; return whether there was one.

        Args:
            blocking: False returns at once.
            timeout: most seconds to wait; None waits for ever.
            block: what ``multiprocessing.Semaphore`` calls ``blocking``.

        Raises:
            ClosedError: this object was closed.
        """
        deadline = None
        while True:
            try:
                for _ in self._take:
                    return True  # no call lies between the taking and this: an interrupt would lose the unit
            except BlockingIOError:
                pass  # none is left, or somebody else was faster
            except OSError:
                self._check_open()  # by another thread, just now
                raise
            if not (blocking if block is None else block):
                return False
            if timeout is not None and deadline is None:
                deadline = time.monotonic() + timeout
            if not self._is_readable(None if deadline is None else deadline - time.monotonic()):
                return False

    def release(self, n: int = 1) -> None:
        """Give back, or add, ``n`` units.

        Raises:
            ValueError: ``n`` is below 1, or there would be more than the system counts to; none of them, or, without
                eventfd, not all of them were added.
            ClosedError: this object was closed.
        """
        if n < 1:
            raise ValueError(f"release({n}): one unit at least")
        try:
            if n == 1:
                for _ in self._give:
                    return
            if len(self._handles) == 1:
                self._write(_number(n))
                return
            for done in range(0, n, _CHUNK):
                self._write(bytes(min(_CHUNK, n - done)))
        except (BlockingIOError, OverflowError) as error:
            raise ValueError("more units than the system can count") from error

    def locked(self) -> bool:
        """Whether no unit is left at this moment; raises ClosedError where this object was closed."""
        return not self._is_readable(0)

    def get_value(self) -> int:
        """Return how many units are left at this moment.

        Raises:
            ClosedError, NotImplementedError: this object was closed; the system does not tell (without ``/proc``).
        """
        fd = self.fileno()
        if len(self._handles) > 1:  # a byte for each
            units = bytearray(4)
            fcntl.ioctl(fd, termios.FIONREAD, units)
            return int.from_bytes(units, sys.byteorder)
        try:
            with open(f"/proc/self/fdinfo/{fd}") as info:
                return next(int(line.split()[1], 16) for line in info if line.startswith("eventfd-count:"))
        except (OSError, StopIteration) as error:
            self._check_open()
            raise NotImplementedError(
                "the count of a semaphore stands in /proc, which is not here"
            ) from error

    def close(self) -> None:
        """Let go of it in this process, where who waits for it gets a ClosedError; the others keep theirs.  Twice is harmless.

        Raises:
            OSError: as close(2).
        """
        self._take = self._give = starmap(_raise_closed, repeat(()))
        super().close()

    def __enter__(self) -> Semaphore:
        self.acquire()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()


class Event(_Counting):
    """Set or not, for all threads of all processes that have it; :meth:`wait` waits until it is.

    It is a state and not a pulse: who waits while it is set and cleared at once may see neither.

    Raises:
        OSError: no descriptor left.
    """

    __slots__ = ()

    def __init__(self) -> None:
        if HAVE_EVENTFD:
            self._adopt((keep(own(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)),))
        else:
            self._adopt(_make_pipe())

    def is_set(self) -> bool:
        """Whether it is set.

        Raises:
            ClosedError: this object was closed.
        """
        return self._is_readable(0)

    def set(self) -> None:
        """Set it, which lets everybody pass who waits; harmless where it is set.

        Raises:
            ClosedError: this object was closed.
        """
        try:
            self._write(_ONE)
        except BlockingIOError:  # as full as can be: it is set
            pass

    def clear(self) -> None:
        """Clear it, so that the next ones wait; harmless where it is not set.

        Raises:
            ClosedError: this object was closed.
        """
        fd = self.fileno()
        try:
            os.read(fd, _MOST)
            while len(self._handles) > 1:  # a pipe may hold more
                os.read(fd, _MOST)
        except BlockingIOError:
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; return whether it is.

        Args:
            timeout: most seconds to wait; None waits for ever.

        Raises:
            ClosedError: this object was closed.
        """
        return self._is_readable(timeout)


def rebuild_semaphore(handles: tuple[Kept, ...]) -> Semaphore:
    semaphore = Semaphore.__new__(Semaphore)
    semaphore._adopt(handles)
    return semaphore


def rebuild_event(handles: tuple[Kept, ...]) -> Event:
    event = Event.__new__(Event)
    event._adopt(handles)
    return event


travels(Semaphore, rebuild_semaphore)
travels(Event, rebuild_event)
