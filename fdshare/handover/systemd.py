"""What a service tells systemd (sd_notify(3)); without systemd there is no NOTIFY_SOCKET, and nothing is told.

What systemd gives a service, its sockets, comes by ``fdshare.listen_fds``.

====================== ==============================================================================================
a service tells        which means
====================== ==============================================================================================
READY=1                it serves (also the end of RELOADING)
RELOADING=1            a handover has begun; MONOTONIC_USEC says when, as Type=notify-reload wants it
MAINPID=               this process is the service from now on
FDSTORE=1, FDNAME=     keep this descriptor, and give it back in LISTEN_FDS should the service have to be started again
FDSTOREREMOVE=1        forget it
BARRIER=1              close this descriptor once all that was sent before was looked at
====================== ==============================================================================================
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Iterable

from fdshare.handle import HasFileno, own_pipe
from fdshare.rights import send_fds

__all__ = ["barrier", "notify", "notifying", "reloading", "serving"]

logger = logging.getLogger("fdshare.handover")

PATIENCE = 5.0
"""Seconds that systemd has to take a datagram, or to come to a barrier.  It needs milliseconds; a hung one must not stop us."""


def notifying() -> bool:
    """Whether somebody wants to be told (NOTIFY_SOCKET)."""
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def notify(*lines: str, fds: Iterable[HasFileno | int] = ()) -> bool:
    """Send ``lines`` (``NAME=value``) and descriptors as one datagram; return whether it was sent.

    Nothing is raised where it cannot be: a service manager that does not listen must not stop a service.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not notifying():
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(address)
            send_fds(sock, ["\n".join(lines).encode()], fds)
    except OSError as error:
        logger.warning("cannot tell the service manager %s: %s", lines[0], error)
        return False
    return True


def serving(pid: int) -> list[str]:
    """Return the lines that make ``pid`` the service's main process, ready; 0 where it has no number here, and says so itself."""
    return [f"MAINPID={pid}", "READY=1"] if pid else ["READY=1"]


def reloading() -> list[str]:
    """Return the lines that begin a reload."""
    return ["RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"]


def barrier() -> bool:
    """Wait, but not for longer than PATIENCE, until the service manager has looked at everything; return whether it has."""
    if not notifying():
        return True
    reader, writer = own_pipe()
    with reader:
        with writer:
            if not notify("BARRIER=1", fds=[writer]):
                return False
        poll = select.poll()
        poll.register(reader.fileno(), 0)  # the end of its last writer comes unasked
        return bool(poll.poll(PATIENCE * 1000))
