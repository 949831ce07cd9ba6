"""Memory that travels: sealed memfd segments, written once by the sender and mapped privately by the receiver.

A segment is complete before its descriptor is sent: no space is an error at the sender.  The receiver trusts it only after
it has seen the seals (nobody can write or truncate it any more, which would mean SIGBUS) and the size.  Where the system has no
``memfd_create``, an unlinked file in a private directory serves; it cannot be sealed, so the receiver copies it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from fdshare.errors import DecodeError, FdLimitError, NoSpaceError
from fdshare.handle import FdHandle, own

__all__ = ["HAVE_MEMFD", "map_segment", "prepare_to_map", "write_segment"]

T = TypeVar("T")

HAVE_MEMFD = hasattr(os, "memfd_create")
"""Whether segments are memfds; read at each use, so that tests can switch it off."""

_SEALS: int = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if HAVE_MEMFD else 0
)  # typeshed knows them on Linux only

_IOV_MAX = 1024
"""Buffers that one writev takes (IOV_MAX of Linux, macOS and FreeBSD)."""

_NO_SPACE = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


def write_segment(parts: Iterable[Any]) -> tuple[FdHandle, bool]:
    """Write ``parts`` (bytes-like, in order) into a new segment.

    Returns:
        the segment's handle, and whether it is sealed (False: an ordinary unlinked file).

    Raises:
        NoSpaceError: it does not fit (ENOSPC, ENOMEM, EFBIG, EDQUOT).
        FdLimitError: no descriptor left for it (EMFILE, ENFILE).
    """
    sealed = HAVE_MEMFD
    try:
        handle = (
            own(os.memfd_create, "fdshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if sealed else _unlinked()
        )
    except OSError as error:
        raise _typed(error, 0) from error
    try:
        _write_all(handle.fileno(), list(parts))
        if sealed:
            fcntl.fcntl(handle.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except BaseException as error:
        size = os.fstat(handle.fileno()).st_size
        handle.close()
        if isinstance(error, OSError):
            raise _typed(error, size) from error
        raise
    return handle, sealed


def _typed(error: OSError, written: int) -> OSError:
    """Return the typed error for a segment that could not be made."""
    if error.errno in _NO_SPACE:
        return NoSpaceError(
            error.errno, f"no room for a message's segment after {written} bytes: {error.strerror}"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return FdLimitError(
            error.errno,
            f"no descriptor left for a message's segment (limit {limit}): close some",
            needed=1,
            limit=limit,
        )
    return error


def _write_all(fd: int, parts: Sequence[Any]) -> None:
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    first = 0
    while first < len(views):
        written = os.writev(fd, views[first : first + _IOV_MAX])
        while first < len(views) and written >= len(views[first]):
            written -= len(views[first])
            first += 1
        if written:
            views[first] = views[first][written:]


def _unlinked() -> FdHandle:
    """Open a new file without a name, in a directory that only this user may enter."""
    import tempfile

    directory = tempfile.mkdtemp(prefix="fdshare-")  # mode 0700
    path = os.path.join(directory, "segment")
    try:
        handle = own(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
    finally:
        os.rmdir(directory)
    return handle


def map_segment(handle: FdHandle, size: int, *, sealed: bool) -> memoryview:
    """Return the segment's ``size`` bytes as private, writable memory, and close ``handle``.

    A sealed segment is mapped without a copy (a write makes private copies of pages); others are read.  The
    memory is freed when the last view of it is gone; no descriptor is kept.

    Raises:
        DecodeError: the seals are missing, or it is shorter than said.
    """
    with handle:
        fd = handle.fileno()
        actual = os.fstat(fd).st_size
        if actual < size:
            raise DecodeError(f"a segment has {actual} bytes where its message says {size}")
        if not size:
            return memoryview(bytearray())
        if not sealed:
            return _mapped(_read, fd, size)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise DecodeError("a message's segment is not a memfd") from error
        needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
        if seals & needed != needed:
            raise DecodeError(f"a message's segment is not sealed (seals {seals:#x})")
        return memoryview(_mapped(_map_private, fd, size))


def _mapped(function: Callable[[int, int], T], fd: int, size: int) -> T:
    try:
        return function(fd, size)
    except (OSError, MemoryError, ValueError) as error:
        raise DecodeError(f"no memory for a message's segment of {size} bytes: {error}") from error


def _read(fd: int, size: int) -> memoryview:
    view = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    done = 0
    while done < size:
        count = os.preadv(fd, [view[done:]], done)
        if not count:  # truncated meanwhile: it is nobody's promise that it stays
            raise DecodeError(f"a segment ends after {done} bytes where its message says {size}")
        done += count
    return view


if sys.version_info >= (3, 13):

    def prepare_to_map() -> None:
        """Load what mapping needs, while a message can still wait."""

    def _map_private(fd: int, size: int) -> mmap.mmap:
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY, trackfd=False)

else:
    # Before 3.13 a mmap object keeps a duplicate of its descriptor for life, so a thousand arrays would hold a
    # thousand descriptors.  An anonymous mapping keeps none; the segment is then mapped over it.
    _libc_mmap: Any = None

    def prepare_to_map() -> None:
        """Load what mapping needs, while a message can still wait."""
        global _libc_mmap
        if _libc_mmap is None:
            import ctypes

            function = ctypes.CDLL(None, use_errno=True).mmap
            function.restype = ctypes.c_void_p
            function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
            _libc_mmap = function

    def _map_private(fd: int, size: int) -> mmap.mmap:
        import ctypes

        prepare_to_map()
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if _libc_mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != address:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of a segment failed: {os.strerror(code)}")
        return mapping

    _MAP_FIXED = 0x10  # the same number on Linux, macOS and FreeBSD
