"""Memory that travels: segments, written once by the sender, complete before their descriptor is sent.

======== ================================== ============================================================
kind     for                                the receiver
======== ================================== ============================================================
pipe     up to a mebibyte                   copies: a third of the time that a memfd's fresh pages take
memfd    more                               maps it privately, without a copy, once it has seen seals and size
lease    half of that, in a steady flow     maps it likewise; the segment is used again, see recycle.py
file     more, without ``memfd_create``     copies: nothing keeps an unlinked file from being truncated
======== ================================== ============================================================

No space is an error at the sender.  A memfd sealed against shrinking cannot end its reader with SIGBUS; one that is sealed
against writing too stays as it is, whoever made it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable
from itertools import starmap
from typing import Any, Literal, TypeVar

from fdshare import recycle, system
from fdshare.errors import DecodeError, FdLimitError, NoSpaceError
from fdshare.handle import FdHandle, format_of, own, unarmed

__all__ = ["HAVE_MEMFD", "HAVE_PIPE_SIZE", "Form", "map_segment", "prepare_to_map", "write_segment"]

T = TypeVar("T")

Form = Literal["sealed", "leased", "copied", "checked", "regular"]
"""What a receiver does with a segment: maps it, maps it where it trusts the sender, copies it; and where it does not trust
the sender: copies it once it is sealed, or once it is a regular file."""

HAVE_MEMFD = system.HAVE_MEMFD
"""Whether segments are memfds; read at each use, so that tests can switch it off."""

_SEALS: int = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if HAVE_MEMFD else 0
)  # typeshed knows them on Linux only

HAVE_PIPE_SIZE = hasattr(fcntl, "F_SETPIPE_SZ")
"""Whether a pipe can be made large; read at each use, so that tests can switch it off."""

MAX_PIPE = 1 << 20
"""Largest segment that is a pipe, bytes: the default of Linux's fs.pipe-max-size for unprivileged users."""

MIN_LEASE = 1 << 19
"""Smallest segment that is recycled, bytes.  Measured round trips of 1 MiB: 0.34 ms, by a pipe 0.45; of 256 KiB: equal."""

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_IOV_MAX = 1024
"""Buffers that one writev takes (IOV_MAX of Linux, macOS and FreeBSD)."""

_NO_LARGE_PIPE = (errno.EPERM, errno.EBUSY, errno.EAGAIN, errno.EINVAL, errno.ENOMEM)
"""How a system says that this user may not have a pipe so large, or has too many of them."""

_NO_SPACE = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


def write_segment(parts: Iterable[Any], user: object = None, *, piped: bool = True) -> tuple[FdHandle, Form]:
    """Write ``parts`` (bytes-like, in order) into a segment.

    Args:
        user: on whose behalf segments may be recycled, see :func:`recycle.lease`; None where they may not, as for a receiver
            that does not trust this process.
        piped: whether a pipe will do; it does not where the receiver must be sure that no read blocks.

    Returns:
        the segment's handle, and what it is.

    Raises:
        NoSpaceError: it does not fit (ENOSPC, ENOMEM, EDQUOT; EFBIG where RLIMIT_FSIZE forbids a file of that size).
        FdLimitError: no descriptor left for it (EMFILE, ENFILE).
    """
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    size = sum(map(len, views))
    try:
        if user is not None and recycle.ENABLED and HAVE_MEMFD and size >= MIN_LEASE:
            leased = recycle.lease(views, size, user)
            if leased is not None:
                return leased, "leased"
        if piped and HAVE_PIPE_SIZE and size <= MAX_PIPE:
            pipe = _write_pipe(views, size)
            if pipe is not None:
                return pipe, "copied"
        system.check_file_size(size)
        sealed = HAVE_MEMFD
        handle = (
            own(os.memfd_create, "fdshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if sealed else _unlinked()
        )
    except OSError as error:
        raise _typed(error, 0) from error
    try:
        _write_all(handle.fileno(), views)
        if sealed:
            fcntl.fcntl(handle.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except BaseException as error:
        written = os.fstat(handle.fileno()).st_size
        handle.close()
        if isinstance(error, OSError):
            raise _typed(error, written) from error
        raise
    return handle, "sealed" if sealed else "copied"


def _write_pipe(views: list[memoryview], size: int) -> FdHandle | None:
    """Return the read end of a pipe that holds it all; None where this user may not have one so large."""
    reader, writer = unarmed(), unarmed()
    try:
        # Stored by the loop itself, so that no interrupt comes between the call and the owners.
        for reader._fd, writer._fd in starmap(os.pipe2, ((os.O_CLOEXEC | os.O_NONBLOCK,),)):
            break
        fcntl.fcntl(writer._fd, fcntl.F_SETPIPE_SZ, size)
        whole = os.writev(writer._fd, views[:_IOV_MAX]) == size
        writer.close()
        if whole:
            return reader
    except BaseException as error:  # an interrupt during the copy above all
        writer.close()
        reader.close()
        if isinstance(error, OSError) and error.errno in _NO_LARGE_PIPE:
            return None
        raise
    reader.close()
    return None


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


def _write_all(fd: int, views: list[memoryview]) -> None:
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


def map_segment(handle: FdHandle, size: int, form: Form) -> memoryview:
    """Return the segment's ``size`` bytes as private, writable memory, and close ``handle``.

    A sealed or leased segment is mapped without a copy (a write makes private copies of pages); others are read.  The
    memory is freed when the last view of it is gone; no descriptor is kept.

    Raises:
        DecodeError: the seals are missing, or it is shorter than said.
    """
    with handle:
        fd = handle.fileno()
        if not size:
            return memoryview(bytearray())
        if (
            form == "regular" and format_of(fd) != stat.S_IFREG
        ):  # from a pipe, others could take what is being waited for
            raise DecodeError("a message's segment is not a regular file")
        if form in ("copied", "regular"):
            return _mapped(_read, fd, size)
        try:  # first of all: of a memfd nothing blocks, where a mere fstat may on a file system of the sender's own
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise DecodeError("a message's segment is not a memfd") from error
        needed = fcntl.F_SEAL_SHRINK | (0 if form == "leased" else fcntl.F_SEAL_WRITE)
        if seals & needed != needed:
            raise DecodeError(f"a message's segment is not sealed (seals {seals:#x})")
        actual = os.fstat(fd).st_size
        if actual < size:
            raise DecodeError(f"a segment has {actual} bytes where its message says {size}")
        if form == "checked":
            return _mapped(_read, fd, size)
        return memoryview(_mapped(_map_private, fd, size))


def _mapped(function: Callable[[int, int], T], fd: int, size: int) -> T:
    try:
        return function(fd, size)
    except DecodeError:
        raise
    except (
        OSError,
        MemoryError,
        ValueError,
        OverflowError,
    ) as error:  # the last: more than 32 bits can address
        raise DecodeError(f"no memory for a message's segment of {size} bytes: {error}") from error


def _read(fd: int, size: int) -> memoryview:
    """Copy a segment that is not sealed; the sender may still shorten it, or never have filled it."""
    kind = format_of(fd)
    if kind == stat.S_IFIFO:
        os.set_blocking(fd, False)  # a pipe that is not full cannot keep us waiting
    elif kind != stat.S_IFREG or os.fstat(fd).st_size < size:
        raise DecodeError(f"a segment is not the file of {size} bytes that its message says")
    # Small blocks come from the heap, whose pages are there already.
    view = memoryview(bytearray(size) if size <= MAX_PIPE else mmap.mmap(-1, size, flags=_ANONYMOUS))
    done = 0
    while done < size:
        try:
            count = (
                os.readv(fd, [view[done:]]) if kind == stat.S_IFIFO else os.preadv(fd, [view[done:]], done)
            )
        except BlockingIOError:
            count = 0
        if not count:
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

    def _map_private(fd: int, size: int) -> mmap.mmap | memoryview:
        try:
            prepare_to_map()
            import ctypes
        except (
            ImportError,
            OSError,
        ):  # out of reach, as after a change of root or user: the same, more slowly
            return _read(fd, size)
        mapping = mmap.mmap(-1, size, flags=_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if _libc_mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != address:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of a segment failed: {os.strerror(code)}")
        return mapping

    _MAP_FIXED = 0x10  # the same number on Linux, macOS and FreeBSD
