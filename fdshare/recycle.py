"""Segments that are used again: a steady flow of large messages costs one copy each, not fresh pages on both sides.

A recycled segment is a memfd that this process keeps, with its pages and its mapping.  Each message gets a *lease* of it: a
read-only description of its own (opened through /proc/self/fd) that holds a shared flock.  The kernel keeps that lock
as long as anything refers to the description, and nothing else can let go of it:

================================== =======================
what refers to the description     until
================================== =======================
the sender's handle                the message was sent, or given up
a packet that waits in a socket    it is received, or both ends are closed
the receiver's descriptor          it has mapped the segment
its mapping, and that of its forks the last view is gone, or the process is
================================== =======================

So ``flock(LOCK_EX | LOCK_NB)`` on the own description succeeds exactly when nobody can look into the segment any more; there is
no message back, nothing to count, and a dead peer gives all back.  The receiver maps privately, so its writes stay its own.

The sender could write into what is leased, where a sealed segment forbids it: leases are for peers that trust each other.  The
size is sealed against shrinking all the same, so a reader cannot be killed by SIGBUS.

Bounds: one large message in :data:`STEADY_SECONDS` is no flow, and keeps nothing.  What is kept at all is at most
:data:`MOST_SEGMENTS` segments and :func:`most_kept` bytes in a process.  What was not used for as long is given up at the next
large message or garbage collection, in a wait of this package that turns out long (:func:`idly`), and all of it at once when
the last channel that used it is closed.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import math
import mmap
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from fdshare import locks, system
from fdshare.handle import FdHandle, Handles, own
from fdshare.native import Poll

__all__ = ["give_up", "idly", "kept", "leave", "lease", "most_kept", "poll_idly", "trim_unused"]

_T = TypeVar("_T")

ENABLED = system.HAVE_MEMFD and os.path.isdir("/proc/self/fd")
"""Whether segments are recycled; read at each use, so that tests can switch it off."""

STEADY_SECONDS = 5.0
"""Two large messages within this time are a flow; what was unused for as long is given up."""

MOST_KEPT = 1 << 30
"""Most bytes kept in a process, however large the machine."""

MOST_SEGMENTS = 8
"""Most segments kept in a process: each takes a descriptor or two, and with more under way memory bounds a flow."""

_GRAIN = 1 << 20
"""Segments are multiples of this, bytes, so that messages of nearly one size share them."""

_CHUNK = 1 << 20
"""Bytes copied at a time: a copy holds the interpreter's lock, this one for some 0.15 ms."""

_MOST_MILLISECONDS = 2**31 - 1
"""What poll(2) takes."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, absent from the mmap module: maps pages that are there in one call."""


@functools.cache
def most_kept() -> int:
    """Return the most bytes of segments that this process keeps: a sixteenth of the machine's memory, at most MOST_KEPT."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return MOST_KEPT // 4
    return min(MOST_KEPT, memory // 16)


class _Segment:
    """A memfd of this process; whoever took it out of ``kept`` owns it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.written = 0  # bytes from the start whose pages are there
        self.used = time.monotonic()
        self._mapping: mmap.mmap | None = None
        self._owner = Handles([own(os.memfd_create, "fdshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)])
        os.ftruncate(self._fd, capacity)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        if _trim_at_collection not in gc.callbacks:
            gc.callbacks.append(_trim_at_collection)

    @property
    def _fd(self) -> int:
        return self._owner[0].fileno()

    def close(self) -> None:
        """Let go of it; the pages stay as long as somebody holds a lease."""
        self._owner.close()
        self._mapping = None

    def is_free(self) -> bool:
        """Whether nobody holds a lease."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def lease(self) -> FdHandle:
        """Return a description of its own that keeps the segment from being written."""
        handle = own(os.open, f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            handle.close()
            raise
        return handle

    def write(self, views: list[memoryview], size: int) -> None:
        """Write from the start.

        Raises:
            OSError: no space (ENOSPC, ENOMEM).
        """
        # Fresh pages: the kernel makes and fills them in one step, and says where it cannot.
        copy = self._copy_in if size <= self.written and self._is_mapped() else self._write_at
        offset = 0
        for view in views:
            copy(view, offset)
            offset += len(view)
        self.written = max(size, self.written)

    def _is_mapped(self) -> bool:
        """Map the segment where it is not; False where there is no address space for it."""
        if self._mapping is None:
            try:
                self._mapping = mmap.mmap(self._fd, self.capacity)
            except OSError:
                return False
            try:
                self._mapping.madvise(_POPULATE_WRITE, 0, self.written & -mmap.PAGESIZE)
            except OSError:
                pass  # an older kernel: each page is mapped when it is written
        return True

    def _copy_in(self, view: memoryview, offset: int) -> None:
        assert self._mapping is not None
        for begin in range(0, len(view), _CHUNK):
            piece = view[begin : begin + _CHUNK]
            self._mapping[offset + begin : offset + begin + len(piece)] = piece

    def _write_at(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            offset += count
            view = view[count:]


_lock: Any = locks.make_rlock()
"""Of all that follows.  Signal handlers and the garbage collector may run in the middle of a call that has it, and must not
wait for that call, nor find things half done: see :func:`_is_inside`."""

kept: list[_Segment] = []
"""What is kept now, the longest unused first; always the same list, so that a look costs next to nothing."""
_users: weakref.WeakSet[Any] = weakref.WeakSet()
_last = -STEADY_SECONDS  # when a large message was last written


def lease(views: list[memoryview], size: int, user: object) -> FdHandle | None:
    """Write ``size`` bytes into a recycled segment and return a lease of it.

    Args:
        views: flat byte views, in order.
        user: on whose behalf; :func:`leave` tells when it is gone.

    Returns:
        None where recycling does not pay, or cannot be had: the caller makes a segment for this message alone.

    Raises:
        OSError: no space.
    """
    global _last
    if _is_inside():
        return None
    now = time.monotonic()
    steady, _last = now - _last < STEADY_SECONDS, now
    with _lock:
        trim(now)
        if not steady:
            return None
        try:
            segment = _take(size)
        except OSError:  # no descriptor left for it, or files may not be as large
            _clear()
            return None
        if segment is None:
            return None
        _users.add(user)
    try:
        handle = segment.lease()
    except OSError:
        segment.close()
        return None  # /proc is not there, or not ours after a change of user; or no descriptor is left
    try:
        segment.write(views, size)
    except BaseException:
        handle.close()
        segment.close()
        raise
    segment.used = now
    with _lock:
        if _users:
            kept.append(segment)
            return handle
    segment.close()  # its channel was closed meanwhile
    return handle


def _take(size: int) -> _Segment | None:
    """Take the smallest free segment that fits out of the kept ones, or a new one."""
    system.check_file_size(size)
    fitting = [segment for segment in kept if segment.capacity >= size]
    for segment in sorted(fitting, key=lambda segment: segment.capacity):
        if segment.capacity <= max(2 * size, _GRAIN) and segment.is_free():
            kept.remove(segment)
            return segment
    capacity = -(-size // _GRAIN) * _GRAIN
    system.check_file_size(capacity)
    room = most_kept() - capacity - sum(segment.capacity for segment in kept)
    for segment in tuple(kept):  # oldest use first
        if room >= 0 and len(kept) < MOST_SEGMENTS:
            break
        if segment.is_free():
            kept.remove(segment)
            segment.close()
            room += segment.capacity
    return _Segment(capacity) if room >= 0 and len(kept) < MOST_SEGMENTS else None


def trim(now: float) -> None:
    """Give up what was not used for a while; the lock is held."""
    while kept and now - kept[0].used > STEADY_SECONDS:
        kept.pop(0).close()


def trim_unused() -> None:
    """Give up what was not used for a while."""
    if kept and not _is_inside():
        with _lock:
            trim(time.monotonic())


def _is_inside() -> bool:
    """Whether this runs in the middle of a call of its own thread here, as in a signal handler."""
    return bool(_lock._is_owned())


def leave(user: object) -> None:
    """Tell that ``user`` will send no more; without users nothing is kept."""
    if _users and user in _users:
        _users.discard(user)
        if not _users:
            give_up()


def idly(wait: Callable[[float | None], _T], seconds: float | None) -> _T:
    """Return ``wait(seconds)``; where that turns out long, what is kept is given up meanwhile.

    A process that has sent its results and waits for more work does nothing else at which this could be done.

    Args:
        wait: waits at most for the seconds it is given, None for ever; what it returns is true where it need not wait on.
        seconds: for how long altogether; where the system takes no such number, it returns early.
    """
    while kept and (seconds is None or seconds > STEADY_SECONDS):
        found = wait(STEADY_SECONDS)
        if found:
            return found
        trim_unused()
        seconds = None if seconds is None else seconds - STEADY_SECONDS
    return wait(None if seconds is None else min(seconds, _MOST_MILLISECONDS / 1000))


def poll_idly(poll: Poll, seconds: float | None) -> list[tuple[int, int]]:
    """Return what ``poll`` finds within ``seconds``, None for ever; see :func:`idly`."""
    if kept:
        return idly(lambda left: poll.poll(_milliseconds(left)), seconds)
    return poll.poll(_milliseconds(seconds))


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(max(0, min(seconds * 1000, _MOST_MILLISECONDS)))


def give_up() -> None:
    """Keep nothing for now."""
    if not _is_inside():
        with _lock:
            _clear()


def _clear() -> None:
    while kept:
        kept.pop().close()


def _trim_at_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop":
        trim_unused()


def _forget_after_fork() -> None:
    """The child shares the parent's descriptions, so it could not tell the parent's lease from its own."""
    global _lock
    _lock = locks.make_rlock()
    _users.clear()
    _clear()


os.register_at_fork(after_in_child=_forget_after_fork)
