"""Processes that start and end listeners at one path, half of them by SIGKILL: ``listener_stress.py DIRECTORY SECONDS``.

Whoever listens holds a lock that the kernel gives back at its death; exit status 1 where two listened at a time, where a
live one lost its path, or where anything but "address in use" kept one from starting.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import sys
import time
import traceback

import fdshare

WORKERS = 6


def live_once(directory: str) -> None:
    """Listen for a few milliseconds if nobody does, and end in one of two ways."""
    path = os.path.join(directory, "sock")
    try:
        listener = fdshare.Listener(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        os.sched_yield()
        return
    lock = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another one listens
    until = time.monotonic() + random.random() * 0.004
    while time.monotonic() < until:
        try:
            listener.accept(0.0).close()
        except TimeoutError:
            pass
    found = os.stat(path)
    if (found.st_dev, found.st_ino) != listener._identity:
        raise RuntimeError("somebody has taken the path of a live listener")
    if random.random() < 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(lock)
    listener.close()


def work(directory: str, end: float) -> int:
    """Live again and again; return the exit status."""
    try:
        while time.monotonic() < end:
            live_once(directory)
    except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the parent
        traceback.print_exc()
        return 1
    return 0


def main(directory: str, seconds: str) -> int:
    """Keep ``WORKERS`` processes alive until the end; return 1 where one has failed."""
    end = time.monotonic() + float(seconds)
    children: set[int] = set()
    lives, failed = 0, 0
    while time.monotonic() < end or children:
        while len(children) < WORKERS and time.monotonic() < end:
            lives += 1
            pid = os.fork()
            if not pid:
                random.seed(lives)
                os._exit(work(directory, end))
            children.add(pid)
        pid, status = os.wait()
        children.discard(pid)
        failed += os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
