"""Where the broker listens: a socket in a private directory, and the sweeping after processes that were killed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys

from fdshare.credentials import is_own_user
from fdshare.handle import own
from fdshare.rights import refuse_all
from fdshare.socketfile import MAX_PATH
from fdshare.socketfile import short_for_bind as short_path  # for connect too: the names are short

__all__ = ["listen", "remove", "short_path"]

BACKLOG = 1024
"""Connections that the kernel keeps while the sender is busy; the system may allow fewer, and then connect waits."""

_PREFIX = "fdshare-"
_UNFINISHED = ".new"


def _directory() -> str:
    """Return a directory of mode 0700 that is ours: the one of this user, which is easy to sweep, if nobody is in the way."""
    from tempfile import gettempdir, mkdtemp

    base = gettempdir()
    if len(os.fsencode(base)) > MAX_PATH - 50 and not sys.platform.startswith("linux"):
        base = "/tmp"
    path = os.path.join(base, f"{_PREFIX}{os.geteuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    try:
        with own(os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC) as handle:
            found = os.fstat(handle.fileno())
            if _is_ours(found):
                if found.st_mode & 0o077:  # somebody has opened it
                    os.fchmod(handle.fileno(), 0o700)
                return path
    except FileNotFoundError:  # removed by its last user just now
        return _directory()
    except OSError:  # no directory, or one that we may not read
        pass
    # Somebody else was here first, or might have been.
    return mkdtemp(prefix=_another(), dir=base)


def _another() -> str:
    """Return how the names of directories begin that take the place of the usual one: no other program's do."""
    return f"{_PREFIX}{os.geteuid()}-broker-"


def _is_ours(found: os.stat_result) -> bool:
    """Whether a directory is this user's for certain."""
    return stat.S_ISDIR(found.st_mode) and is_own_user(found.st_uid)


def listen() -> tuple[socket.socket, str]:
    """Return a listening socket and its path."""
    while True:
        path = os.path.join(_directory(), f"{os.getpid()}-{os.urandom(4).hex()}")
        unfinished = path + _UNFINISHED
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A socket that is bound and does not listen yet looks like one whose process has died, so it gets the
            # name by which others judge only when it listens.
            with short_path(unfinished) as short:
                listener.bind(short)
            refuse_all(listener)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            os.rename(unfinished, path)
        except FileNotFoundError:  # the directory went with its last user: again
            listener.close()
            continue
        except BaseException:
            listener.close()
            raise
        return listener, path


def remove(path: str) -> None:
    """Remove a socket, those that killed processes have left beside it, and the directory when it is empty."""
    directory = os.path.dirname(path)
    try:
        os.unlink(path)
    except OSError:
        pass
    base, name = os.path.split(directory)
    beside = []
    if name != f"{_PREFIX}{os.geteuid()}":  # one of several: those of killed processes lie beside it
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            beside = [
                entry
                for entry in entries
                if entry.name.startswith(_PREFIX) and _is_ours(entry.stat(follow_symlinks=False))
            ]
    _sweep(directory)
    _remove_if_empty(directory)
    for entry in beside:
        # An empty one may be any program's, unless its name says that it is of a broker.
        if _sweep(entry.path) or entry.name.startswith(_another()):
            _remove_if_empty(entry.path)


def _remove_if_empty(directory: str) -> None:
    with contextlib.suppress(OSError):  # somebody else uses it
        os.rmdir(directory)


def _sweep(directory: str) -> bool:
    """Remove the sockets of processes that have ended; whether there were any."""
    swept = False
    try:
        names = os.listdir(directory)
    except OSError:
        return swept
    for name in names:
        pid = name.partition("-")[0]
        if not pid.isdigit() or int(pid) == os.getpid() or _lives(int(pid)):
            continue
        path = os.path.join(directory, name)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, short_path(path) as short:
                sock.setblocking(False)
                sock.connect(short)
        except ConnectionRefusedError:  # of another pid namespace it would have answered
            with contextlib.suppress(OSError):
                os.unlink(path)
                swept = True
        except OSError:
            pass
    return swept


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
