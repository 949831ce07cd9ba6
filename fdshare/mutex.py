"""Mutual exclusion that the kernel ends when the holder dies: two mechanisms behind one small set of calls.

========== ============================================ ==============================================================
mechanism  what travels                                 how the kernel notices a death
========== ============================================ ==============================================================
robust     a sealed memory file with a pthread mutex    it walks the dying thread's list of robust mutexes
file       a file of eight bytes                        it drops the dying process's lock on the file
========== ============================================ ==============================================================

Robust is the rule: no system call unless one must wait, a wait with a time limit in the kernel, and it holds for threads as
for processes.  File is for systems without robust mutexes (macOS), and for Pythons without ctypes.  There the bytes are the
holder's mark, zero while nobody is inside.  The lock of an open description would belong to sender and receiver alike, as they
share it; so each process opens the file anew through /proc, and a forked child drops its parent's.  Without /proc it is a record
lock of fcntl, which belongs to the process and excludes the others all the same; that one is gone as soon as the
process closes *any* descriptor of the file, which the mark tells afterwards.

Calls are made by iterators and not by name: between a C function's return and the assignment of what a loop over it gives there
is no place for an interrupt (see rights.py), so a robust mutex that was taken is always known to be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import repeat, starmap
from typing import TYPE_CHECKING

from fdshare import holders, locks, memory, preload, system
from fdshare.errors import DecodeError
from fdshare.handle import own
from fdshare.handlers import is_from_handler
from fdshare.pthread import (
    DIED,
    PAGE_SIZE,
    PROCESS_SHARED,
    ROBUST,
    THREAD,
    WAITERS,
    Mapping,
    layout_name,
    the_library,
)
from fdshare.travelling import Kept, keep

if TYPE_CHECKING:
    from ctypes import c_uint32

__all__ = [
    "BUSY",
    "FOREIGN",
    "LOST",
    "OWNER_DIED",
    "FileMutex",
    "Mutex",
    "RobustMutex",
    "make_mutex",
    "open_mutex",
]

preload.load("ctypes")  # a lock may arrive after a change of root or user

BUSY = errno.EBUSY
OWNER_DIED: int = getattr(errno, "EOWNERDEAD", 130)  # absent where there are no robust mutexes
LOST = errno.ENOLCK

FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.0005, 0.01
"""How often a file lock is tried while waiting with a time limit, which the kernel does not offer: less and less often."""


class Mutex:
    """What :class:`fdshare.Lock` stands on; each iterator makes one call a step and gives its error number."""

    kind: str
    tries: Iterator[int]
    """Takes it: 0, OWNER_DIED (one has it, as its last holder died inside), or BUSY."""
    mends: Iterator[int]
    """After OWNER_DIED: makes it an ordinary one again."""
    unlocks: Iterator[int]
    """Gives it back: 0, LOST, or EPERM, as it is not this thread's."""

    def waits(self, seconds: float | None) -> Iterator[int]:
        """Return an iterator over one attempt to take it within ``seconds``: 0, OWNER_DIED or ETIMEDOUT."""
        raise NotImplementedError

    signals: float | None = None
    """Seconds that the main thread, which runs signal handlers, may wait at a time; None where a wait returns for a signal."""
    looks: float | None = None
    """Seconds that any thread may wait before it looks whether the mutex is forsaken; None where it never is."""

    def is_foreign(self) -> bool:
        """Whether this process cannot use it, as it is in another PID namespace."""
        return False

    def is_forsaken(self) -> bool:
        """Whether the holder is gone, and the kernel has not noticed: then it is free from now on."""
        return False

    def is_held(self) -> bool:
        """Whether somebody is inside; raises NotImplementedError where that cannot be told."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what this process opened to reach it; nobody of this process is inside."""

    def abandon(self) -> None:
        """Called where the object goes while a thread of this process is inside."""


# --- a robust mutex of pthread, in shared memory -----------------------------------------------------------------------

HAVE_ROBUST = True
"""Whether robust mutexes may be used where they are there; read at each use, so that tests can switch it off."""

_MAGIC = b"fdshare lock 1\0\0"
_MUTEX_AT = 128
"""Where in the page the mutex lies: behind the magic number and the layout's name.  What is left is more than any
pthread_mutex_t takes (40 to 64 bytes)."""

_SEALS: int = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if memory.HAVE_MEMFD else 0
)  # typeshed knows them on Linux only

_NAMESPACE = struct.Struct("=Q")
_NAMESPACE_AT = 96
"""Where in the page stands the PID namespace that it was made in; see holders.py."""

LOOK_SECONDS, LAST_LOOK_AFTER_SECONDS = 0.5, 8.0
"""How long the same holder is waited for before it is looked at closely, and at most between two such looks: each reads all
that the holder's process has mapped."""

SIGNAL_SECONDS = 0.05
"""How long the main thread waits in the kernel at a time: no C function of pthread returns for a signal."""


def _is_robust_here() -> bool:
    if not (HAVE_ROBUST and memory.HAVE_MEMFD):
        return False
    try:
        the_library()
    except (ImportError, AttributeError):
        return False
    return True


FOREIGN = "a lock is of use in one PID namespace only: the kernel tells its holders apart by their numbers"

_looking = locks.make_rlock()
"""Of all mutexes: held while one of them is looked at, which nothing waits long for, and reentrant for a garbage collection."""


class RobustMutex(Mutex):
    """A pthread mutex, robust and shared between processes, alone in a sealed memory file.

    It is of the normal kind: the others compare numbers of threads at every step.  The kernel does at a death, so whoever is
    killed while it waits gives up what a thread of its number holds.  Two PID namespaces may both have that number, so
    neither takes a mutex of the other.
    """

    kind = "robust"
    signals = SIGNAL_SECONDS
    looks = LOOK_SECONDS

    def __init__(self, fd: int, *, fresh: bool) -> None:
        try:
            library = self._library = the_library()
        except (ImportError, AttributeError) as error:
            raise DecodeError(f"a lock needs robust mutexes and ctypes here too: {error}") from error
        head = _MAGIC + layout_name()
        if fresh:
            os.ftruncate(fd, PAGE_SIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        else:
            _check_page(fd)
        self._mapping = Mapping(library, fd)
        start = self._mapping.address
        assert start is not None
        self._pointer = pointer = library.pointer(start + _MUTEX_AT)
        if fresh:
            attributes = library.attributes()
            for code in (
                library.init_attributes(attributes),
                library.set_shared(attributes, PROCESS_SHARED),
                library.set_robust(attributes, ROBUST),
                library.init(pointer, attributes),
            ):
                if code:
                    raise OSError(code, f"a lock cannot be made: {os.strerror(code)}")
            library.memmove(start + _NAMESPACE_AT, _NAMESPACE.pack(holders.namespace()), _NAMESPACE.size)
            library.memmove(start, head, len(head))
        elif library.string_at(start, len(head)) != head:
            raise DecodeError("this is not a lock, or it was made with another C library")
        (self._namespace,) = _NAMESPACE.unpack(library.string_at(start + _NAMESPACE_AT, _NAMESPACE.size))
        if self.is_foreign():
            raise DecodeError(FOREIGN)
        self._fd = fd  # the Lock's
        self._inode = os.fstat(fd).st_ino
        self._word = library.word and library.word.from_address(start + _MUTEX_AT)
        self._suspect, self._look_at, self._pause = 0, 0.0, LOOK_SECONDS
        arguments = repeat((pointer,))
        self.tries = starmap(library.trylock, arguments)
        self.mends = starmap(library.consistent, arguments)
        self.unlocks = starmap(library.unlock, arguments)

    def waits(self, seconds: float | None) -> Iterator[int]:
        library = self._library
        if seconds is None:
            return starmap(library.lock, ((self._pointer,),))
        moment = library.moment_in(min(seconds, threading.TIMEOUT_MAX))
        return starmap(library.timed, ((self._pointer, *library.clock, moment),))

    def is_foreign(self) -> bool:
        here = holders.namespace()
        return bool(here and self._namespace) and here != self._namespace

    def is_held(self) -> bool:
        if self._word is None:
            raise NotImplementedError("only glibc's mutexes tell whether they are held")
        return bool(self._word.value & THREAD) and not self.is_forsaken()

    def is_forsaken(self) -> bool:
        if self._word is None or not self._namespace or self._namespace != holders.namespace():
            return False
        word, holder = self._word, self._word.value & THREAD
        if not (holder and (holders.is_gone(holder) or self._is_time_to_look(holder))):
            return False
        # One at a time, of all threads and processes: between another's look and its verdict a third one might get in.
        with _looking:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._free_unless_held(word, holder)
            except (OSError, ValueError) as error:  # another looks; closed meanwhile
                if is_from_handler(error):
                    raise
                return False
            finally:
                if self._fd >= 0:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _free_unless_held(self, word: c_uint32, holder: int) -> bool:
        gone = not holders.is_holder(holder, self._inode)
        if gone and word.value & (THREAD | DIED) == holder:
            # As the kernel writes it.  The holder changes it no more, and a waiter is woken for nothing rather than never.
            word.value = DIED | WAITERS
        return gone

    def _is_time_to_look(self, holder: int) -> bool:
        now = time.monotonic()
        if holder != self._suspect:
            self._suspect, self._pause = holder, LOOK_SECONDS
        elif now >= self._look_at:
            self._pause = min(2 * self._pause, LAST_LOOK_AFTER_SECONDS)
        else:
            return False
        self._look_at = now + self._pause
        return self._pause > LOOK_SECONDS

    def close(self) -> None:
        with _looking:  # at no descriptor of somebody else, who may be given the number
            self._fd = -1

    def abandon(self) -> None:
        # The kernel's list of what the thread holds points into the page: it stays mapped.
        self._mapping.address = None


def _check_page(fd: int) -> None:
    """Raise DecodeError where using the page could end in SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise DecodeError("this is not a lock: not a memory file") from error
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != PAGE_SIZE:
        raise DecodeError("this is not a lock: not a sealed page")


# --- a lock on a file ---------------------------------------------------------------------------------------------------

HAVE_REOPEN = True
"""Whether /proc may be asked for a description of one's own; read at each use, so that tests can switch it off."""

_MARK_SIZE = 8
_FREE = bytes(_MARK_SIZE)

_FLOCK = struct.Struct(
    "@hhqqi4x"
)  # l_type, l_whence, l_start, l_len (0: to the end), l_pid (0: of the description)


class _Inside:
    """Which thread of this process is inside a file mutex, however many objects of it there are."""

    __slots__ = ("__weakref__", "lock", "thread")

    def __init__(self) -> None:
        self.lock = locks.make_lock()
        self.thread = 0


_guard = locks.make_lock()  # of the next one
_insides: weakref.WeakValueDictionary[tuple[int, int], _Inside] = weakref.WeakValueDictionary()
_file_mutexes: weakref.WeakSet[FileMutex] = weakref.WeakSet()


class FileMutex(Mutex):
    """A lock on a file, and a mark in it."""

    kind = "file"

    def __init__(self, fd: int, *, fresh: bool) -> None:
        if fresh:
            os.pwrite(fd, _FREE, 0)
        status = os.fstat(fd)
        if status.st_size != _MARK_SIZE:
            raise DecodeError("this is not a lock: not a file of eight bytes")
        self._fd = fd  # the Lock's
        self._file = (status.st_dev, status.st_ino)
        self._inside = self._find_inside()
        self._own = self._reopen()
        self._mark = _FREE
        self.tries = starmap(self._take, repeat((0.0,)))
        self.mends = repeat(0)
        self.unlocks = starmap(self._give_back, repeat(()))
        _file_mutexes.add(self)

    def waits(self, seconds: float | None) -> Iterator[int]:
        return starmap(self._take, ((seconds,),))

    def _find_inside(self) -> _Inside:
        with _guard:
            return _insides.setdefault(self._file, _Inside())

    def forked(self) -> None:
        """In a forked child: let go of the parent's lock, which its description would hold on to."""
        self._let_go()
        self._own = self._reopen()
        self._inside = self._find_inside()

    def close(self) -> None:
        _file_mutexes.discard(self)
        self._let_go()

    def _let_go(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def is_held(self) -> bool:
        inside = self._inside
        if not inside.lock.acquire(blocking=False):
            return True
        try:
            free = self._lock_file(time.monotonic())
            if free:
                self._set(fcntl.F_UNLCK, wait=False)
            return not free
        finally:
            inside.lock.release()

    def abandon(self) -> None:
        self.close()
        self._inside.thread = 0
        self._inside.lock.release()

    def _take(self, seconds: float | None) -> int:
        inside = self._inside
        deadline = None if seconds is None else time.monotonic() + seconds
        if not inside.lock.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX)):
            return BUSY if not seconds else errno.ETIMEDOUT
        try:
            if self._lock_file(deadline):
                mark = os.pread(self._fd, _MARK_SIZE, 0)
                self._mark = secrets.token_bytes(_MARK_SIZE)
                os.pwrite(self._fd, self._mark, 0)
                inside.thread = threading.get_ident()
                return 0 if mark == _FREE else OWNER_DIED
        except BaseException:
            self._set(fcntl.F_UNLCK, wait=False)
            inside.lock.release()
            raise
        inside.lock.release()
        return BUSY if not seconds else errno.ETIMEDOUT

    def _give_back(self) -> int:
        if self._inside.thread != threading.get_ident():
            return errno.EPERM
        lost = os.pread(self._fd, _MARK_SIZE, 0) != self._mark
        self._inside.thread = 0
        if not lost:
            os.pwrite(self._fd, _FREE, 0)
        self._set(fcntl.F_UNLCK, wait=False)
        self._inside.lock.release()
        return LOST if lost else 0

    def _lock_file(self, deadline: float | None) -> bool:
        pause = FIRST_LOOK_SECONDS
        while not self._set(fcntl.F_WRLCK, wait=deadline is None):
            left = (deadline or 0.0) - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, LAST_LOOK_SECONDS)
        return True

    def _set(self, type: int, *, wait: bool) -> bool:
        try:
            if self._own is not None:
                command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
                fcntl.fcntl(self._own.fileno(), command, _FLOCK.pack(type, os.SEEK_SET, 0, 0, 0))
            else:
                wanted = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._fd, fcntl.LOCK_UN if type == fcntl.F_UNLCK else wanted)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _reopen(self) -> Kept | None:
        """Return a description of this process alone; None where it cannot be, as a record lock excludes the others too."""
        if not (HAVE_REOPEN and hasattr(fcntl, "F_OFD_SETLK")):
            return None
        try:
            return keep(own(os.open, f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC))
        except OSError:  # no /proc, no right, no room
            return None


def _after_fork() -> None:
    global _guard, _looking
    _guard, _looking = locks.make_lock(), locks.make_rlock()
    _insides.clear()
    for mutex in list(_file_mutexes):
        mutex.forked()


os.register_at_fork(after_in_child=_after_fork)


# --- the choice -----------------------------------------------------------------------------------------------------------


def make_mutex() -> tuple[Kept, Mutex]:
    """Return a new mutex and the descriptor it stands on.

    Raises:
        OSError: no descriptor or no memory left.
    """
    if _is_robust_here():
        system.check_file_size(PAGE_SIZE)
        handle = keep(own(os.memfd_create, "fdshare-lock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        return handle, RobustMutex(handle.fileno(), fresh=True)
    if memory.HAVE_MEMFD:
        handle = keep(own(os.memfd_create, "fdshare-lock", os.MFD_CLOEXEC))
    else:
        handle = keep(memory._unlinked())
    return handle, FileMutex(handle.fileno(), fresh=True)


def open_mutex(fd: int, kind: str) -> Mutex:
    """Return a mutex of ``kind`` that another process made, at a borrowed descriptor.

    Raises:
        DecodeError: it is none, or cannot be used here.
    """
    for mutex in (RobustMutex, FileMutex):
        if mutex.kind == kind:
            return mutex(fd, fresh=False)
    raise DecodeError(f"a lock of an unknown kind: {kind!r:.60}")
