"""Sockets in the file system: a listening one at a path, never half made; and short ways to long paths.

A listener's file appears at its path at once, listening, with its mode.  Until then it is in a directory of its own that nobody
else may enter::

    mkdir .NAME-xxxxxxxx (0700), bind and chmod and listen inside
      --> link to PATH                               nothing was there: done, whoever else starts loses
      --> lock the directory, look who is there      somebody listens: EADDRINUSE
            --> rename over PATH                     a dead listener's file, which only a holder of the lock replaces

Whether somebody listens is asked with a datagram socket: a connection would be a guest who never speaks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator

from fdshare.handle import own

__all__ = ["Identity", "fits", "identity", "listen_at", "remove", "short_for_bind", "short_for_connect"]

MAX_PATH = 100
"""Bytes of a socket's path that fit everywhere (104 on BSD, 108 on Linux, with a terminator)."""

LOCK_SECONDS = 5.0
"""Longest wait for the directory's lock: another listener that starts holds it for a millisecond, so this is somebody else's."""

LOCK_TICK_SECONDS = 0.002

Identity = tuple[int, int]
"""Device and inode of a socket's file."""

HAVE_PROC = sys.platform == "linux"
"""Whether a descriptor is a way to its file; read at each use, so that tests can switch it off."""

_NAME_ROOM = MAX_PATH - len("/proc/self/fd/2147483647/")


def fits(path: str) -> bool:
    """Whether bind and connect take a path as it is."""
    return len(path if path.isascii() else os.fsencode(path)) <= MAX_PATH


@contextlib.contextmanager
def _linked(target: str) -> Iterator[str]:
    """Give a short symbolic link to ``target``, in a private directory."""
    from tempfile import gettempdir, mkdtemp

    base = gettempdir()
    directory = mkdtemp(prefix="fdshare-", dir=base if len(os.fsencode(base)) < MAX_PATH // 3 else "/tmp")
    link = os.path.join(directory, "l")
    try:
        os.symlink(os.path.abspath(target), link)
        try:
            yield link
        finally:
            os.unlink(link)
    finally:
        os.rmdir(directory)


@contextlib.contextmanager
def short_for_bind(path: str) -> Iterator[str]:
    """Give a way to a new name that is short enough for bind; the name itself must be .

    Raises:
        OSError: the directory is not there, or cannot be entered.
    """
    directory, name = os.path.split(path)
    if fits(path):
        yield path
    elif HAVE_PROC and os.path.isdir("/proc/self/fd"):
        with own(os.open, directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as handle:
            yield f"/proc/self/fd/{handle.fileno()}/{name}"
    else:
        with _linked(directory) as link:
            yield os.path.join(link, name)


@contextlib.contextmanager
def short_for_connect(path: str) -> Iterator[str]:
    """Give a way to an existing socket's file that is short enough for connect.

    Raises:
        OSError: it is not there, or cannot be reached.
    """
    if fits(path):
        yield path
    elif HAVE_PROC and os.path.isdir("/proc/self/fd"):
        with own(os.open, path, os.O_PATH | os.O_CLOEXEC) as handle:
            yield f"/proc/self/fd/{handle.fileno()}"
    else:
        with _linked(path) as link:
            yield link


def identity(path: str) -> Identity:
    """Return which file is at ``path``.

    Raises:
        OSError: none.
    """
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def remove(path: str, expected: Identity) -> None:
    """Remove the file at ``path`` if it is still the expected one.

    Raises:
        OSError: it is, and may not be removed.
    """
    try:
        if identity(path) == expected:
            os.unlink(path)
    except FileNotFoundError:
        pass


def is_alive(path: str) -> bool:
    """Whether some process has the socket at ``path`` open.

    Raises:
        OSError: that cannot be told (EACCES), or nothing is there (ENOENT).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe, short_for_connect(path) as short:
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            return False
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # a socket of another type, and alive
                raise
    return True


def listen_at(sock: socket.socket, path: str, mode: int, backlog: int) -> Identity:
    """Bind a new socket to ``path`` and let it listen; return which file it is.

    Args:
        path: absolute.
        mode: permission bits of the file; connecting takes the permission to write.

    Raises:
        OSError: EADDRINUSE where somebody listens there already, or the file is no socket; ENOENT, EACCES of the directory.
    """
    directory, name = os.path.split(path)
    private = _make_private(directory, name)
    inner = os.path.join(private, name if len(os.fsencode(name)) <= _NAME_ROOM else "s")
    try:
        with short_for_bind(inner) as short:
            sock.bind(short)
        try:
            os.chmod(inner, mode)
            if sock.type != socket.SOCK_DGRAM:
                sock.listen(backlog)
            mine = identity(inner)
            try:
                _put_in_place(inner, path)
            except BaseException:
                remove(path, mine)
                raise
        finally:
            with contextlib.suppress(FileNotFoundError):  # renamed
                os.unlink(inner)
    finally:
        os.rmdir(private)
    return mine


def _make_private(directory: str, name: str) -> str:
    while True:
        private = os.path.join(directory, f".{name[:40]}-{os.urandom(4).hex()}")
        try:
            os.mkdir(private, 0o700)
            os.chmod(private, 0o700)  # whatever the umask takes away
        except FileExistsError:
            continue
        except OSError as error:
            what = (
                "the directory of the socket is not there" if error.errno == errno.ENOENT else error.strerror
            )
            raise OSError(error.errno, f"cannot make a socket here: {what}", directory) from error
        return private


def _put_in_place(inner: str, path: str) -> None:
    if _link(inner, path):
        return
    with _locked(os.path.dirname(path)):
        while True:
            try:
                found = os.lstat(path)
                if _is_dead(path, found) and (found.st_dev, found.st_ino) == identity(path):
                    break
            except (
                FileNotFoundError
            ):  # removed since; or there are no hard links, and the lock alone keeps two apart
                if _link(inner, path):
                    return
                if not os.path.lexists(path):
                    break
        try:
            os.rename(inner, path)
        except PermissionError as error:  # in a directory like /tmp only the owner may replace a file
            what = (
                "the socket of a dead listener is in the way, of another user: only that one may replace it"
            )
            raise OSError(errno.EADDRINUSE, what, path) from error


def _link(inner: str, path: str) -> bool:
    try:
        os.link(inner, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return False
    return True


def _is_dead(path: str, found: os.stat_result) -> bool:
    """Whether nobody listens there any more: True.

    Raises:
        FileNotFoundError: it was removed.
        OSError: EADDRINUSE: somebody does, or it cannot be told.
    """
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EADDRINUSE, "a file that is no socket is in the way, and stays", path)
    try:
        alive = is_alive(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = f"a socket of uid {found.st_uid} is in the way, and cannot be asked ({error.strerror})"
        raise OSError(errno.EADDRINUSE, what, path) from error
    if alive:
        raise OSError(errno.EADDRINUSE, f"a process of uid {found.st_uid} listens here already", path)
    return True


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Keep other listeners from replacing files in ``directory``, where it can be locked."""
    try:
        handle = own(os.open, directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it may be written and not read
        yield
        return
    with handle:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(LOCK_TICK_SECONDS)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
