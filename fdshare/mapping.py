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
before he maps it, so that no access to it can end in SIGBUS.  All of its pages are there from the start: no space is an
error of the one who asks for it.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fdshare import memory
from fdshare.errors import DecodeError, FdLimitError, NoSpaceError, SealError
from fdshare.handle import FdHandle, _arm, hand_over, own, unarmed

__all__ = ["Mapping", "address_of", "allocate", "copy_in", "find", "open_mapping", "seal"]

NAME = "fdshare-shared"
"""What /proc/*/maps and lsof show of it."""

_CHUNK = 64 << 20
"""Bytes reserved in one call: some 10 ms, after which an interrupt is heard; a signal makes the kernel begin the call anew."""

_CHECKED_FROM = 64 << 20
"""Sizes from here on, bytes, are held against the memory that is left; smaller ones find it out by themselves."""

_MAX_GROUPS = 64
"""Most control groups, each inside the next, that are asked for their limit."""

_ZEROS = memoryview(bytes(1 << 20))

# The numbers are the same on Linux and FreeBSD; where there are no memory files, fcntl lacks the names.
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 0x1, 0x2, 0x4, 0x8
_SEAL_FUTURE_WRITE = 0x10
"""Of Linux 5.1: no new mapping can write, those that are there still can."""


class Mapping(mmap.mmap):
    """Shared memory as this process has it mapped; made by the functions below.

    It owns its descriptor.  One that was sealed is closed and has a successor, which is read-only.
    """

    handle: FdHandle | None = None
    start = 0
    """Its address."""
    file = (0, 0)
    """Device and inode number."""
    size_mapped = 0
    """Bytes; known also when it is closed."""
    successor: Mapping | None = None
    reference: weakref.ref[Mapping] | None = None
    """What stands for it in the tables."""

    def current(self) -> Mapping:
        """Return this mapping, or the one that took its place.

        Raises:
            OSError: it has to be mapped again, and there is no room.
        """
        mapping = self
        while mapping.closed:
            with _sealing:
                if mapping.successor is None:
                    assert mapping.handle is not None
                    mapping.successor = _map(mapping.handle, mapping.size_mapped)
            mapping = mapping.successor
        return mapping

    @property
    def fd(self) -> int:
        """The borrowed descriptor."""
        assert self.handle is not None
        return self.handle.fileno()

    def __del__(self) -> None:
        _forget(self)  # before the address can belong to something else
        if self.handle is not None:
            self.handle.close()


# --- the tables ---------------------------------------------------------------------------------------------------------
# Read without a lock, by single operations.  A mapping may go at any time, also inside of what holds the lock.

_by_address: dict[int, tuple[int, weakref.ref[Mapping]]] = {}  # start: (end, mapping)
_by_file: dict[tuple[int, int], weakref.ref[Mapping]] = {}
_starts: list[int] | None = []
"""The keys of ``_by_address`` in order; None where they have changed."""

_changing = threading.RLock()
_sealing = threading.RLock()  # taken before the other


def _after_fork() -> None:
    global _changing, _sealing
    _changing, _sealing = (
        threading.RLock(),
        threading.RLock(),
    )  # other threads of the parent may have held them


os.register_at_fork(after_in_child=_after_fork)


def _enter(mapping: Mapping) -> None:
    global _starts
    reference = mapping.reference = weakref.ref(mapping)
    with _changing:
        _by_file[mapping.file] = reference
        _by_address[mapping.start] = (mapping.start + mapping.size_mapped, reference)
        _starts = None


def _forget(mapping: Mapping) -> None:
    global _starts
    reference = mapping.reference
    with _changing:
        if _by_file.get(mapping.file) is reference is not None:
            del _by_file[mapping.file]
        if _by_address.get(mapping.start, (0, None))[1] is reference is not None:
            del _by_address[mapping.start]
        _starts = None


def find(address: int, size: int) -> tuple[Mapping, int] | None:
    """Return the mapping in which ``size`` bytes at ``address`` lie, and their offset there; None where they do not."""
    global _starts
    starts = _starts
    if starts is None:
        starts = _starts = sorted(list(_by_address))  # noqa: C414 -- list() is one step, sorted() is not
    place = bisect.bisect_right(starts, address) - 1
    if place < 0:
        return None
    entry = _by_address.get(starts[place])
    if entry is None or address + size > entry[0] or address >= entry[0]:
        return None
    mapping = entry[1]()
    if mapping is None or mapping.closed:
        return None
    return mapping, address - mapping.start


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
    _get_buffer(view, buffer, 0)
    address = buffer.buf or 0
    _release_buffer(buffer)
    return address


# --- mapping ------------------------------------------------------------------------------------------------------------

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

if sys.version_info >= (3, 13):

    def _map_shared(fd: int, size: int, prot: int) -> Mapping:
        return Mapping(fd, size, flags=mmap.MAP_SHARED, prot=prot, trackfd=False)

else:
    # Before 3.13 a mmap object keeps a duplicate of its descriptor; an anonymous one has none, and is then mapped over.
    _libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
    _libc_mmap.restype = ctypes.c_void_p
    _libc_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _MAP_FIXED = 0x10  # the same number on Linux, macOS and FreeBSD

    def _map_shared(fd: int, size: int, prot: int) -> Mapping:
        mapping = Mapping(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=prot)
        address = address_of(mapping)
        if _libc_mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return mapping


def _map(handle: FdHandle, size: int) -> Mapping:
    """Map a file of which ``size`` bytes are there, writably where its seals and its descriptor allow, and spend ``handle``."""
    fd = handle.fileno()
    writable = not _seals(fd) & (_SEAL_WRITE | _SEAL_FUTURE_WRITE)
    try:
        mapping = _map_shared(fd, size, _READ_WRITE if writable else mmap.PROT_READ)
    except PermissionError:
        if not writable:
            raise
        mapping = _map_shared(fd, size, mmap.PROT_READ)  # a descriptor that was opened for reading
    status = os.fstat(fd)
    mapping.size_mapped = size
    mapping.file = status.st_dev, status.st_ino
    mapping.start = address_of(mapping)
    # A handle of its own: one that came with a message is closed with the message where the rest of that fails, and
    # this mapping may have been found by another message meanwhile.
    mapping.handle = unarmed()
    hand_over(handle, _arm, mapping.handle, fd)
    _enter(mapping)
    return mapping


def _seals(fd: int) -> int:
    """Return the seals of a file; 0 for one that cannot have any."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) if memory.HAVE_MEMFD else 0
    except OSError:
        return 0


def open_mapping(handle: FdHandle) -> Mapping:
    """Consume a descriptor that was received: map the whole file, or find it mapped already.

    Raises:
        DecodeError: it is not memory that can be mapped safely, or there is no room.
    """
    with handle:
        status = os.fstat(handle.fileno())
        reference = _by_file.get((status.st_dev, status.st_ino))
        mapping = None if reference is None else reference()
        if mapping is not None:
            return mapping.current()
        if memory.HAVE_MEMFD and not _seals(handle.fileno()) & _SEAL_SHRINK:
            raise DecodeError("shared memory arrived that is not sealed against shrinking")
        if not status.st_size:
            raise DecodeError("shared memory arrived that is empty")
        try:
            return _map(handle, status.st_size)
        except (OSError, MemoryError, ValueError, OverflowError) as error:
            raise DecodeError(f"no room to map shared memory of {status.st_size} bytes: {error}") from error


# --- making -------------------------------------------------------------------------------------------------------------


def allocate(size: int) -> Mapping:
    """Return new memory of ``size`` bytes, at least one, all of them zero and there.

    Raises:
        NoSpaceError, FdLimitError
    """
    return _new(size, lambda fd: _reserve(fd, size))


def copy_in(parts: Sequence[memoryview]) -> Mapping:
    """Return new memory with the content of ``parts``, one after the other; at least one byte.

    Raises:
        NoSpaceError, FdLimitError
    """
    return _new(sum(part.nbytes for part in parts), lambda fd: memory._write_all(fd, [*parts]))


def _new(size: int, fill: Callable[[int], object]) -> Mapping:
    if size >= _CHECKED_FROM:
        _check_room(size)
    try:
        handle = (
            own(os.memfd_create, NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            if memory.HAVE_MEMFD
            else memory._unlinked()
        )
        with handle:
            fill(handle.fileno())
            if memory.HAVE_MEMFD:
                fcntl.fcntl(handle.fileno(), fcntl.F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
            return _map(handle, size)
    except (OSError, MemoryError, ValueError, OverflowError) as error:
        raise _typed(error, size) from error


def _reserve(fd: int, size: int) -> None:
    """Make ``size`` bytes of an empty file be there, zeroed, or fail."""
    try:
        for offset in range(0, size, _CHUNK):
            os.posix_fallocate(fd, offset, min(_CHUNK, size - offset))
    except (AttributeError, OSError) as error:  # macOS has no such call, and not every file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.lseek(fd, 0, os.SEEK_SET)
        for offset in range(0, size, len(_ZEROS)):
            memory._write_all(fd, [_ZEROS[: size - offset]])


def _typed(error: Exception, size: int) -> Exception:
    """Return the typed error for shared memory that could not be made."""
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    if isinstance(error, FdLimitError | NoSpaceError):
        return error
    if number in memory._NO_SPACE:
        return NoSpaceError(number, f"no room for shared memory of {size} bytes: {error}")
    if number in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return FdLimitError(
            number,
            f"no descriptor left for shared memory (limit {limit}): close some",
            needed=1,
            limit=limit,
        )
    return error


def _check_room(size: int) -> None:
    """Refuse what the machine, or this process's control group, cannot have room for.

    Asked for more than there is, Linux gives no error but kills a process.  What is left may be gone a moment later; this
    is for requests that are wrong by far.
    """
    left = min(_left_on_machine(), _group_limit()) if memory.HAVE_MEMFD else sys.maxsize
    if size > left:
        raise NoSpaceError(
            errno.ENOMEM, f"no room for shared memory of {size} bytes: {left} bytes of memory are left"
        )


def _left_on_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in file)}
        return 1024 * (int(fields["MemAvailable"]) + int(fields["SwapFree"]))
    except (OSError, KeyError, ValueError, IndexError):
        return sys.maxsize


@functools.cache
def _group_limit() -> int:
    """Return the least of the limits of the control groups around this process, bytes."""
    least = sys.maxsize
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return least
    for _, controllers, path in lines:
        if not controllers:
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        steps = path.strip("/").split("/")[:_MAX_GROUPS]
        for depth in range(len(steps) + 1):
            try:
                with open(os.path.join(root, *steps[:depth], name), encoding="ascii") as limit:
                    least = min(least, int(limit.read()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return least


# --- sealing ------------------------------------------------------------------------------------------------------------


def seal(mapping: Mapping) -> Mapping:
    """Make the memory unchangeable for everybody, for ever; return the mapping that takes the place of this one.

    Raises:
        SealError: something could still write into it; it stays as it is.
    """
    with _sealing:
        mapping = mapping.current()
        fd = mapping.fd
        if not memory.HAVE_MEMFD:
            raise SealError(errno.ENOTSUP, "this system has no memory files that can be sealed")
        if _seals(fd) & _SEAL_WRITE:
            return mapping
        try:
            mapping.close()
        except BufferError as error:
            raise SealError(
                errno.EBUSY,
                "this memory is still looked into by a view of its buf, or an array on it: let go of them first",
            ) from error
        # Mapped again, readably or as before, by current().
        _forget(mapping)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_WRITE | _SEAL_SEAL)
        except OSError as error:
            raise SealError(
                error.errno or errno.EBUSY,
                "another process has this memory mapped for writing (a receiver, or a child that was forked): "
                "seal it before you send it",
            ) from error
        finally:
            mapping = mapping.current()
        return mapping


def is_sealed(mapping: Mapping) -> bool:
    """Whether nobody can change the memory any more."""
    return bool(_seals(mapping.current().fd) & _SEAL_WRITE)
