"""``Mapping``: memory that several processes have mapped, each with its descriptor, found again by address and by file.

A mapping lives as long as anything looks into it, and its descriptor as long as the mapping: views, arrays and whatever else
exports its memory hold it, and nobody has to close anything.  Two tables know the mappings of this process:

============ ============================ ==================================================================
by           finds                        so that
============ ============================ ==================================================================
address      whose memory a buffer is     an array, however it was derived, travels as a reference
device, file what was mapped already      memory that comes again, or comes back, is the same memory as before
============ ============================ ==================================================================

A memory file is sealed against shrinking and growing as soon as it has its size, and whoever receives one looks at that
before he maps it, so that no access to it can end in SIGBUS.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import gc
import mmap
import operator
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from fdshare import locks, memory
from fdshare.errors import DecodeError, SealError
from fdshare.handle import FdHandle, hand_over

__all__ = [
    "Holder",
    "Mapping",
    "address_of",
    "find",
    "is_sealed",
    "map_shared",
    "mapped",
]

# The numbers are the same on Linux and FreeBSD; where there are no memory files, fcntl lacks the names.
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE = 0x1, 0x2, 0x4, 0x8
SEAL_FUTURE_WRITE = 0x10
"""Of Linux 5.1: no new mapping can write, those that are there still can."""


class Descriptor:
    """Owns a descriptor, which is closed when the last reference goes: by C functions alone, where an interrupt cannot strike.

    A ``__del__`` is Python code: a KeyboardInterrupt that is raised at its beginning is lost, and the descriptor with it.
    """

    __slots__ = ("__weakref__", "fd")

    fd: int

    def __init__(self, handle: FdHandle) -> None:
        """Spend ``handle``."""
        self.fd = handle.fileno()
        closer = _Closer(self, operator.methodcaller("close"))  # called as methodcaller(closer)
        closer.close = int  # does nothing
        _closers[self.fd] = closer  # a weak reference has to be alive when its object goes
        hand_over(handle, _arm_closer, closer, partial(os.close, self.fd))


class _Closer(weakref.ref[Descriptor]):
    __slots__ = ("close",)

    close: Callable[[], object]


_arm_closer: Any = vars(_Closer)["close"].__set__  # of the slot: a C function
_closers: dict[int, _Closer] = {}


class Mapping(mmap.mmap):
    """Shared memory as this process has it mapped; made by the functions below."""

    descriptor: Descriptor
    """Also of the mapping that takes the place of this one."""
    start = 0
    """Its address."""
    extent = 0
    """Its size in bytes."""
    file = (0, 0)
    """Device and inode number."""
    entry: weakref.ref[Mapping] | None = None
    """What stands for it in the tables."""
    holder: weakref.ref[Holder] | None = None

    @property
    def fd(self) -> int:
        """The borrowed descriptor."""
        return self.descriptor.fd


class Holder:
    """What all holders of a mapping in this process hold in its place, so that it can be replaced when it is sealed."""

    __slots__ = ("__weakref__", "_mapping")

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping

    @classmethod
    def of(cls, mapping: Mapping) -> Holder:
        """Return the holder of a mapping, a new one where there is none."""
        with _changing:
            holder = None if mapping.holder is None else mapping.holder()
            if holder is None:
                holder = cls(mapping)
                mapping.holder = weakref.ref(holder)
            return holder

    def get(self) -> Mapping:
        """Return the mapping; wait while it is being replaced."""
        with _sealing:
            mapping = self._mapping
            if mapping.closed:
                self._mapping = mapping = _map(mapping.descriptor)
                mapping.holder = weakref.ref(self)
            return mapping

    def references(self) -> int:
        """Return how many refer to the mapping, this holder and this call included."""
        mapping = self._mapping
        return sys.getrefcount(mapping)

    def seal(self) -> None:
        """Make the memory unchangeable for everybody, for ever.

        Raises:
            SealError: something could still write into it; it stays as it is.
        """
        if not memory.HAVE_MEMFD:
            raise SealError(errno.ENOTSUP, "this system has no memory files that can be sealed")
        with _sealing:
            fd = self.get().fd
            if _seals(fd) & SEAL_WRITE:
                return
            # A view is a reference, and so is an array that NumPy made of one: that exports nothing, and would be left with an
            # address at which nothing is.
            if self.references() > _UNUSED:
                gc.collect()  # what only a cycle of garbage holds is held by nobody
            if self.references() > _UNUSED:
                raise SealError(
                    errno.EBUSY,
                    "something in this process still looks into the memory, a view of its buf or an array: let go of it first",
                )
            # Nobody has it, and nobody can take it now.  Forgotten first: its addresses may be others' as soon as it is closed.
            _forget(self._mapping)
            mmap.mmap.close(self._mapping)
            try:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_WRITE | SEAL_SEAL)
            except OSError as error:
                raise SealError(
                    error.errno or errno.EBUSY,
                    "the memory is mapped for writing elsewhere, by a process that received it or was forked from this one: "
                    "seal before you send",
                ) from error
            finally:
                self.get()  # maps it again, readably or as before; no variable here, since the error keeps this frame


# --- the tables ---------------------------------------------------------------------------------------------------------
# What stands for a mapping outlives it, dead, until it is swept.

_by_address: dict[int, tuple[int, weakref.ref[Mapping]]] = {}  # start: (end, mapping)
_by_file: dict[tuple[int, int], weakref.ref[Mapping]] = {}
_starts: list[int] | None = []
"""The keys of ``_by_address`` in order; None where they have changed."""
_sweep_at = 64
"""Entries from which on the dead ones are swept: twice what was alive the last time, so that sweeping costs little."""

_changing = locks.make_rlock()
"""Held while the tables change."""
_sealing = locks.make_rlock()
"""Held while a mapping is replaced, and by whoever takes one that others hold: what was taken before is counted as a
reference.  Taken before the other."""


def _after_fork() -> None:
    global _changing, _sealing
    _changing = locks.make_rlock()  # another thread of the parent may have held it
    _sealing = locks.make_rlock()


os.register_at_fork(after_in_child=_after_fork)


def _enter(mapping: Mapping) -> None:
    global _starts
    entry = mapping.entry = weakref.ref(mapping)
    with _changing:
        if max(len(_by_address), len(_by_file)) >= _sweep_at:
            _sweep()
        _by_address[mapping.start] = (mapping.start + mapping.extent, entry)
        _by_file[mapping.file] = entry  # last: what is found here is known there
        _starts = None


def _sweep() -> None:
    global _sweep_at
    for start, (_, entry) in list(_by_address.items()):
        if entry() is None:
            del _by_address[start]
    for file, entry in list(_by_file.items()):
        if entry() is None:
            del _by_file[file]
    _sweep_at = max(64, 2 * len(_by_address), 2 * len(_by_file))


def _forget(mapping: Mapping) -> None:
    global _starts
    with _changing:
        if _by_file.get(mapping.file) is mapping.entry:
            del _by_file[mapping.file]
        if _by_address.get(mapping.start, (0, None))[1] is mapping.entry:
            del _by_address[mapping.start]
        _starts = None


def find(address: int, size: int) -> tuple[Mapping, int] | None:
    """Return the mapping in which ``size`` bytes at ``address`` lie, and their offset there; None where they do not."""
    global _starts
    starts = _starts
    if starts is None:
        with _changing:
            starts = _starts = sorted(_by_address)
    for place in range(bisect.bisect_right(starts, address) - 1, -1, -1):
        end, entry = _by_address.get(starts[place], (0, None))
        mapping = None if entry is None else entry()
        if mapping is not None and not mapping.closed:
            inside = address < end and address + size <= end
            return (mapping, address - mapping.start) if inside else None
        # It is gone, or never was there in full: what lies before it may reach further.
    return None


# --- addresses ----------------------------------------------------------------------------------------------------------


class _Buffer(ctypes.Structure):
    """``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


def address_of(view: Any) -> int:
    """Return where the memory of a contiguous buffer begins.

    Raises:
        BufferError, TypeError: it has none, or it is not contiguous.
    """
    buffer = _Buffer()
    # One after the other by C functions alone: an interrupt between them would leave the memory exported for ever.
    any(map(operator.call, (partial(_get_buffer, view, buffer, 0), partial(_release_buffer, buffer))))
    return buffer.buf or 0


# --- mapping ------------------------------------------------------------------------------------------------------------

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

if sys.version_info >= (3, 13):

    def _map_file(fd: int, size: int, prot: int) -> Mapping:
        mapping = Mapping(fd, size, flags=mmap.MAP_SHARED, prot=prot, trackfd=False)
        mapping.start = address_of(mapping)
        return mapping

else:
    # Before 3.13 a mmap object keeps a duplicate of its descriptor; an anonymous one has none, and is then mapped over.
    _libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
    _libc_mmap.restype = ctypes.c_void_p
    _libc_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _MAP_FIXED = 0x10  # the same number on Linux, macOS and FreeBSD

    def _map_file(fd: int, size: int, prot: int) -> Mapping:
        mapping = Mapping(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=prot)
        mapping.start = address = address_of(mapping)
        if _libc_mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return mapping


def map_shared(handle: FdHandle, status: os.stat_result | None = None, seals: int | None = None) -> Mapping:
    """Map a file, writably where its seals and its descriptor allow, and spend ``handle``.

    Args:
        status, seals: of the file, where the caller has asked already.

    Raises:
        OSError, MemoryError, ValueError, OverflowError: it cannot be mapped; ``handle`` is spent too.
    """
    # An owner of its own: a handle that came with a message is closed with the message where the rest of that fails, and
    # this mapping may have been found by another message meanwhile.
    return _map(Descriptor(handle), status, seals)


def _map(descriptor: Descriptor, status: os.stat_result | None = None, seals: int | None = None) -> Mapping:
    fd = descriptor.fd
    status = status or os.fstat(fd)
    size = status.st_size
    writable = not (_seals(fd) if seals is None else seals) & (SEAL_WRITE | SEAL_FUTURE_WRITE)
    try:
        mapping = _map_file(fd, size, _READ_WRITE if writable else mmap.PROT_READ)
    except PermissionError:
        if not writable:
            raise
        mapping = _map_file(fd, size, mmap.PROT_READ)  # a descriptor that was opened for reading
    mapping.descriptor = descriptor
    mapping.extent = size
    mapping.file = status.st_dev, status.st_ino
    _enter(mapping)
    return mapping


def _seals(fd: int) -> int:
    """Return the seals of a file; 0 for one that cannot have any."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) if memory.HAVE_MEMFD else 0
    except OSError:
        return 0


def mapped(fd: int, take: Callable[[], FdHandle]) -> Mapping:
    """Return the mapping of a file that came from another process: the one that is there already, or a new one of all of it.

    Args:
        fd: its descriptor, borrowed.
        take: gives the handle for a new mapping, which spends it.

    Raises:
        DecodeError: it is not memory that can be mapped safely, or there is no room.
    """
    status = os.fstat(fd)
    with _sealing:  # so that there is one mapping of a file, and nobody gets it while it is replaced
        entry = _by_file.get((status.st_dev, status.st_ino))
        mapping = None if entry is None else entry()
        if mapping is not None and not mapping.closed:
            return mapping
        seals = _seals(fd)
        if memory.HAVE_MEMFD and not seals & SEAL_SHRINK:
            raise DecodeError("shared memory arrived that is not sealed against shrinking")
        if not status.st_size:
            raise DecodeError("shared memory arrived that is empty")
        try:
            return map_shared(take(), status, seals)
        except (OSError, MemoryError, ValueError, OverflowError) as error:
            raise DecodeError(f"no room to map shared memory of {status.st_size} bytes: {error}") from error


# --- sealing ------------------------------------------------------------------------------------------------------------


def is_sealed(fd: int) -> bool:
    """Whether nobody can change a file any more, nor shorten it."""
    seals = SEAL_WRITE | SEAL_SHRINK
    return _seals(fd) & seals == seals


_UNUSED = Holder(object()).references()  # type: ignore[arg-type]
"""References to a mapping that nobody looks into, as this interpreter counts them."""
