"""What this system gives: each thing is tried once, since a name may be there and the call be refused.

Under one Python an old kernel knows no such call (ENOSYS), and the filter of a sandbox or a container forbids it (EPERM).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import struct
import sys
from collections.abc import Callable

from fdshare import native

__all__ = ["HAVE_EPOLL", "HAVE_EVENTFD", "HAVE_MEMFD", "HAVE_PIDFD", "HAVE_SEQPACKET"]

_REFUSALS = {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP}
"""What says that there is no such thing; others, such as EMFILE, say nothing of the kind."""


def is_given(make: Callable[[], int]) -> bool:
    """Whether the system makes such a descriptor, which is closed at once.

    Args:
        make: makes one; AttributeError where this Python has no name for the call.
    """
    try:
        os.close(make())
    except AttributeError:
        return False
    except OSError as error:
        return error.errno not in _REFUSALS
    return True


HAVE_MEMFD = hasattr(fcntl, "F_ADD_SEALS") and is_given(
    lambda: os.memfd_create("fdshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
)
"""Memory files that can be sealed: Linux, FreeBSD from 13."""

HAVE_EVENTFD = is_given(lambda: os.eventfd(0, os.EFD_CLOEXEC))
"""Counters with a descriptor: Linux, FreeBSD from 13."""

HAVE_PIDFD = is_given(lambda: os.pidfd_open(os.getpid()))
"""Processes with a descriptor: Linux from 5.3."""


def _make_epoll() -> int:
    with native.epoll() as epoll:
        return os.dup(epoll.fileno())


HAVE_EPOLL = native.epoll is not None and is_given(_make_epoll)
"""epoll: Linux."""


_TIMEVAL = "qq" if int(socket.SO_SNDTIMEO) == 67 else "ll"
"""How a time stands in a socket option. 67 is SO_SNDTIMEO_NEW of Linux, for 32 bits with a time of 64."""

_LONGEST_TIMEVAL = 2**31 - 1
"""Seconds: what any system takes. To wait for more is to wait for ever."""


def timeval(seconds: float) -> bytes:
    """Return a time for SO_SNDTIMEO or SO_RCVTIMEO; 0 is no limit, and what is more than the system takes becomes its most."""
    seconds = min(seconds, _LONGEST_TIMEVAL)
    return struct.pack(_TIMEVAL, int(seconds), int(seconds % 1 * 1e6))


def check_file_size(size: int) -> None:
    """See to it that this process may write a file of ``size`` bytes, memory files among them.

    To be asked before such a write: the kernel's own answer is a signal that ends the process (SIGXFSZ), unless that is ignored.

    Raises:
        OSError: EFBIG; says which limit it is.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(
            errno.EFBIG,
            f"{size} bytes, where this process may write files of {limit} (RLIMIT_FSIZE, ulimit -f)",
        )


HAVE_SEQPACKET = sys.platform == "linux"
"""Whether sockets keep packets whole.  macOS has none of that kind; those of FreeBSD from 15 are streams with marks, where a
packet may be sent in part and is joined to the next one unless both are sent with MSG_EOR (uipc_sosend_stream_or_seqpacket in its
sys/kern/uipc_usrreq.c)."""
