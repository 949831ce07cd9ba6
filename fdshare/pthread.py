"""The C library's robust mutexes, by ctypes: what they are called, how a page that holds one is mapped, what stands in one.

ctypes is loaded when a lock is first made or received.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from itertools import starmap
from typing import Any

__all__ = [
    "DIED",
    "PAGE_SIZE",
    "PROCESS_SHARED",
    "ROBUST",
    "THREAD",
    "WAITERS",
    "Library",
    "Mapping",
    "layout_name",
    "the_library",
]

PAGE_SIZE = 4096
"""Bytes of the memory file: the least that can be mapped."""

WAITERS, DIED, THREAD = 0x8000_0000, 0x4000_0000, 0x3FFF_FFFF
"""What stands in the word that a robust mutex and the kernel share (FUTEX_WAITERS, _OWNER_DIED, _TID_MASK)."""

ROBUST = PROCESS_SHARED = 1  # of glibc, musl and FreeBSD alike
_MONOTONIC = 1 if sys.platform == "linux" else 4
_MAP_SHARED = 1
_READ_WRITE = 3


def layout_name() -> bytes:
    """Name the layout of a mutex: two processes can only share one if their C libraries agree on it."""
    try:
        library = (os.confstr("CS_GNU_LIBC_VERSION") or "other").split(" ")[0]
    except (ValueError, OSError):
        library = "other"
    return f"{sys.platform} {library} {struct.calcsize('P')}".encode()[:63].ljust(64, b"\0")


class Library:
    """The C functions, found once.

    Raises:
        ImportError: this Python has no ctypes.
        AttributeError: this system has no robust mutexes.
    """

    def __init__(self) -> None:
        import ctypes

        def typed(function: Any, *arguments: Any) -> Any:
            function.argtypes = arguments
            function.restype = ctypes.c_int
            return function

        # PyDLL keeps the interpreter's lock: right for what never waits, and the faster of the two.
        quick, slow = ctypes.PyDLL(None), ctypes.CDLL(None)
        self.pointer = pointer = ctypes.c_void_p
        self.trylock = typed(quick.pthread_mutex_trylock, pointer)
        self.consistent = typed(quick.pthread_mutex_consistent, pointer)
        self.unlock = typed(quick.pthread_mutex_unlock, pointer)
        self.lock = typed(slow.pthread_mutex_lock, pointer)
        self._now: Callable[[], float] = time.monotonic
        self.clock: tuple[int, ...] = (_MONOTONIC,)
        try:  # glibc 2.30 and later; others go by a clock that somebody may set
            self.timed = typed(slow.pthread_mutex_clocklock, pointer, ctypes.c_int, pointer)
        except AttributeError:
            self.timed = typed(slow.pthread_mutex_timedlock, pointer, pointer)
            self._now, self.clock = time.time, ()
        self.init = typed(quick.pthread_mutex_init, pointer, pointer)
        self.init_attributes = typed(quick.pthread_mutexattr_init, pointer)
        self.set_shared = typed(quick.pthread_mutexattr_setpshared, pointer, ctypes.c_int)
        self.set_robust = typed(quick.pthread_mutexattr_setrobust, pointer, ctypes.c_int)
        mmap = ctypes.PyDLL(None, use_errno=True).mmap
        self.mmap = typed(mmap, pointer, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_ssize_t)
        self.mmap.restype = pointer
        self.munmap = typed(quick.munmap, pointer, ctypes.c_size_t)
        self.attributes = ctypes.c_uint64 * 8  # more than any pthread_mutexattr_t takes
        self._moment = ctypes.c_long * 2
        # The first of its members on every machine; other libraries have it elsewhere.
        self.word = ctypes.c_uint32 if b" glibc " in layout_name() else None
        self.errno, self.string_at, self.memmove = ctypes.get_errno, ctypes.string_at, ctypes.memmove

    def moment_in(self, seconds: float) -> Any:
        """Return the moment at which ``timed`` is to give up."""
        end = self._now() + seconds
        return self._moment(int(end), int(end % 1 * 1_000_000_000))


_library: Library | None = None


def the_library() -> Library:
    global _library
    if _library is None:
        _library = Library()
    return _library


class Mapping:
    """The page in this process's memory, until nobody refers to it any more."""

    address: int | None = None

    def __init__(self, library: Library, fd: int) -> None:
        self._munmap = library.munmap
        failed = library.pointer(-1).value
        for address in starmap(library.mmap, ((None, PAGE_SIZE, _READ_WRITE, _MAP_SHARED, fd, 0),)):
            if address == failed:
                raise OSError(library.errno(), f"a lock cannot be mapped: {os.strerror(library.errno())}")
            self.address = address
            break

    def __del__(self) -> None:
        if self.address is not None:
            self._munmap(self.address, PAGE_SIZE)
