"""New shared memory: its space is reserved first, so that no space is an error of the one who asks for it.

All pages of it are there before anybody sees it.  A hole in a memory file is filled by whoever touches it first, and where there
is no room then, that process is killed by SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import resource
import sys
from collections.abc import Callable, Sequence

from fdshare import memory, system
from fdshare.errors import FdLimitError, NoSpaceError
from fdshare.handle import own
from fdshare.shared.mapping import SEAL_GROW, SEAL_SHRINK, Mapping, map_shared

__all__ = ["allocate", "copy_in"]

NAME = "fdshare-shared"
"""What /proc/*/maps and lsof show of it."""

_CHUNK = 64 << 20
"""Bytes reserved in one call: some 10 ms, after which an interrupt is heard; a signal makes the kernel begin the call anew."""

_CHECKED_FROM = 64 << 20
"""Sizes from here on, bytes, are held against the memory that is left; smaller ones find it out by themselves."""

_MAX_GROUPS = 64
"""Most control groups, each inside the next, that are asked for their limit."""

_ZEROS = memoryview(bytes(1 << 20))


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
        system.check_file_size(size)
        handle = (
            own(os.memfd_create, NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            if memory.HAVE_MEMFD
            else memory._unlinked()
        )
        with handle:
            fill(handle.fileno())
            if memory.HAVE_MEMFD:
                fcntl.fcntl(handle.fileno(), fcntl.F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW)
            return map_shared(handle)
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
    """Refuse what the machine, this process's control group, or the disk cannot have room for.

    Asked for more memory than there is, Linux gives no error but kills a process; and a disk would be filled before it says no.
    What is left may be gone a moment later; this is for requests that are wrong by far.
    """
    if memory.HAVE_MEMFD:
        left, what = min(_left_on_machine(), _group_limit()), "bytes of memory are"
    else:
        left, what = _left_on_disk(), "bytes on the disk are"
    if size > left:
        raise NoSpaceError(
            errno.ENOMEM if memory.HAVE_MEMFD else errno.ENOSPC,
            f"no room for shared memory of {size} bytes: {left} {what} left",
        )


def _left_on_disk() -> int:
    """Return how much may be written where the files without a name are made."""
    from tempfile import gettempdir

    try:
        status = os.statvfs(gettempdir())
    except OSError:  # making one will say why
        return sys.maxsize
    return status.f_bavail * status.f_frsize


def _left_on_machine() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in file)}
        return 1024 * (int(fields["MemAvailable"]) + int(fields["SwapFree"]))
    except (OSError, KeyError, ValueError, IndexError):  # no /proc: what there is at all
        return _whole_machine()


@functools.cache
def _whole_machine() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
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
