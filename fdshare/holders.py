"""Whether the thread whose number stands in a robust mutex can still hold it: for what the kernel passes over.

A robust mutex is told apart from others' by the number of its holder's thread, and the kernel, which walks a dying thread's list,
compares that number with the thread's own.  So it leaves some taken, for ever:

===================================== ================================================================================
left taken                            why
===================================== ================================================================================
by a thread that executes a program   it is given the main thread's number before the list is walked
beyond 2,048 held by one thread       the walk ends there (ROBUST_LIST_LIMIT)
===================================== ================================================================================

Whoever finds such a mutex taken asks here.  A number that no thread has is no holder's.  One that a thread has, perhaps by now,
is no holder's either where its process does not map the mutex; only the same user may look at that, in a /proc of its own
PID namespace.
"""

from __future__ import annotations

import fcntl
import os

from fdshare.handle import own

__all__ = ["forked_away", "is_gone", "is_holder", "namespace"]

_GET_PID_NAMESPACE = 0xFF << 8 | 5
"""PIDFD_GET_PID_NAMESPACE of linux/pidfd.h, from Linux 6.11."""

_namespace: int | None = None


def namespace() -> int:
    """Return what tells this process's PID namespace from others; 0 where the system does not tell.

    Numbers of threads mean something in one such namespace only.
    """
    global _namespace
    if _namespace is None:
        _namespace = _ask_namespace()
    return _namespace


def _ask_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        pass
    try:
        with (
            own(os.pidfd_open, os.getpid()) as me,
            own(fcntl.ioctl, me.fileno(), _GET_PID_NAMESPACE) as found,
        ):
            return os.fstat(found.fileno()).st_ino
    except (OSError, AttributeError):  # no pidfds in this Python
        return 0


def forked_away() -> bool:
    """In a forked child: whether it is in another PID namespace than its parent, which has no number here then."""
    global _namespace
    if os.getppid():
        return False
    _namespace = None
    return True


def is_gone(thread: int) -> bool:
    """Whether no thread has this number."""
    try:
        os.getpgid(thread)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def is_holder(thread: int, inode: int) -> bool:
    """Whether the thread may hold a mutex in a memory file: False only where it certainly does not."""
    if is_gone(thread):
        return False
    try:
        if not _is_proc_ours():
            return True
        with open(f"/proc/{thread}/maps", "rb") as maps:
            # What is mapped all the while is found, whatever else changes.
            return any(b" %d " % inode in line for line in maps)
    except ProcessLookupError:  # it has no memory any more, waited for or not
        return False
    except OSError:  # no /proc, another user's
        return True


def _is_proc_ours() -> bool:
    """Whether the numbers in /proc are those of this PID namespace; raises OSError where there is none."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"NSpid:"):
                return len(line.split()) == 2  # in an outer one's, the outer number comes first
    return True  # a kernel without such namespaces
