"""Sockets in the file system: a listening one at a path, never half made; and short ways to long paths.

A listener's file appears at its path at once, listening, with its mode.  Until then it is in a directory of its own that nobody
else may enter, and that is locked as long as it is in use::

    remove the .NAME-xxxxxxxx of those that were killed
    mkdir .NAME-xxxxxxxx (0700), bind with the mode and listen inside
      --> link to PATH                     nothing was there
      --> look who is there                somebody listens: EADDRINUSE
            --> take it to .NAME-xxxxxxxx  it is dead: removed, and again; alive after all (another start's): given back
    remove the directory; wait for those that others of this user have now
      --> is it still at PATH?             no: another start has won, EADDRINUSE

Who starts after the link finds somebody who listens, and who had looked before has a directory: when those are gone, what is at
PATH stays there.  No lock is needed that strangers could hold.

The directory may be somebody else's, who can exchange names in it between two calls.  So it is opened once, and everything goes
by descriptors from there; what is changed is in a directory that was seen to be this user's alone.

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
from functools import partial

import attrs

from fdshare.handle import FdHandle, own

__all__ = ["Identity", "fits", "listen_at", "remove", "short_for_bind", "short_for_connect"]

MAX_PATH = 100
"""Bytes of a socket's path that fit everywhere (104 on BSD, 108 on Linux, with a terminator)."""

LOCK_SECONDS = 5.0
"""Longest wait for another start of this user, which takes a millisecond, so that this one was stopped in the middle."""

LOCK_TICK_SECONDS = 0.002

Identity = tuple[int, int]
"""Device and inode of a socket's file."""

HAVE_PROC = sys.platform == "linux"
"""Whether a descriptor is a way to its file; read at each use, so that tests can switch it off."""

MAX_ENTRIES = 100_000
"""Entries of the directory that are looked at for those of other starts: 50 ms, in a directory that somebody has filled."""

_RANDOM_SIZE = 4
"""Bytes that tell private directories apart."""

_OLD = ".old"
"""What a dead listener's file is called on its way to its end."""

_BY_NAME = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_OURS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

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


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino


def remove(path: str, expected: Identity) -> None:
    """Remove the file at ``path`` if it is still the expected one.

    Raises:
        OSError: it is, and may not be removed.
    """
    directory, name = os.path.split(path)
    try:
        with own(os.open, directory or ".", _BY_NAME) as parent:
            _remove_at(parent.fileno(), name, expected)
    except FileNotFoundError:
        pass


def _remove_at(parent: int, name: str, expected: Identity) -> None:
    if _identity(os.stat(name, dir_fd=parent, follow_symlinks=False)) == expected:
        os.unlink(name, dir_fd=parent)


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
    try:
        parent = own(os.open, directory, _BY_NAME)
    except OSError as error:
        raise _cannot_make(error, directory) from error
    with parent:
        place = _Place(path, directory, name, parent.fileno())
        for private in place.private_ones():
            _sweep(place, private)
        mine = _listen_in_private(place, sock, mode, backlog)
        try:
            _confirm(place, mine)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                _remove_at(place.parent, name, mine)
            raise
    return mine


def _cannot_make(error: OSError, directory: str) -> OSError:
    what = "the directory of the socket is not there" if error.errno == errno.ENOENT else error.strerror
    return OSError(error.errno, f"cannot make a socket here: {what}", directory)


@attrs.frozen
class _Place:
    """Where a file is to be: ``parent`` is the descriptor of the directory, which counts where names could be exchanged."""

    path: str
    directory: str
    name: str
    parent: int

    def stat(self) -> os.stat_result:
        """Return what is there.

        Raises:
            FileNotFoundError: nothing.
        """
        return os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)

    def way(self, fd: int, name: str, *directories: str) -> str:
        """Return a path to a name in the directory of ``fd``, which is those ``directories`` below this one."""
        if HAVE_PROC and os.path.isdir("/proc/self/fd"):
            return f"/proc/self/fd/{fd}/{name}"
        return os.path.join(self.directory, *directories, name)

    @property
    def prefix(self) -> str:
        """How the private directories of whoever starts here are called."""
        return f".{self.name[:40]}-"

    def private_ones(self) -> list[str]:
        """Return the names of those that are there; none where the directory may be written and not read."""
        try:
            with (
                own(partial(os.open, dir_fd=self.parent), ".", os.O_RDONLY | os.O_DIRECTORY) as listing,
                os.scandir(listing.fileno()) as entries,
            ):
                names = [entry.name for _, entry in zip(range(MAX_ENTRIES), entries, strict=False)]
        except OSError:
            return []
        prefix, size = self.prefix, len(self.prefix) + 2 * _RANDOM_SIZE
        return [name for name in names if len(name) == size and name.startswith(prefix)]


def _enter(place: _Place, private: str) -> FdHandle | None:
    """Open a private directory of this user; None where there is none of that name.

    Raises:
        OSError: it may not be read, or no descriptor is left.
    """
    try:
        handle = own(partial(os.open, dir_fd=place.parent), private, _OURS)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE):
            raise
        return None  # gone, or no directory
    found = os.fstat(handle.fileno())
    if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
        return handle
    handle.close()
    return None


def _lock(handle: FdHandle, how: int) -> bool:
    """Lock a private directory; False where another process has it, OSError where the file system knows no locks."""
    try:
        fcntl.flock(handle.fileno(), how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_private(place: _Place, private: str) -> FdHandle | None:
    """Make a private directory and lock it; None where another name is to be tried.

    Raises:
        OSError: of the directory that it is to be in.
    """
    try:
        os.mkdir(private, 0o700, dir_fd=place.parent)
    except FileExistsError:
        return None
    except OSError as error:
        raise _cannot_make(error, place.directory) from error
    try:
        handle = _enter(place, private)
    except PermissionError:  # the umask has taken our own bits
        with own(partial(os.open, dir_fd=place.parent), private, _BY_NAME | os.O_NOFOLLOW) as shut:
            os.chmod(place.way(shut.fileno(), ".", private), 0o700)
        handle = _enter(place, private)
    if handle is None:  # swept, or somebody else's directory is in its place
        return None
    try:
        os.fchmod(handle.fileno(), 0o700)
        with contextlib.suppress(FileNotFoundError):
            locked = _lock_if_possible(handle)
            found = os.stat(private, dir_fd=place.parent, follow_symlinks=False)
            if locked and _identity(found) == _identity(os.fstat(handle.fileno())):
                return handle
    except BaseException:
        handle.close()
        raise
    handle.close()
    return None


def _lock_if_possible(handle: FdHandle) -> bool:
    try:
        return _lock(handle, fcntl.LOCK_EX)
    except OSError:
        return True


def _listen_in_private(place: _Place, sock: socket.socket, mode: int, backlog: int) -> Identity:
    """Bind and listen in a private directory, put the file in its place, and remove the directory."""
    name = place.name
    inner = name if len(os.fsencode(name)) <= _NAME_ROOM else "s"
    private, handle, inside = "", None, -1
    try:
        for _ in range(_MAX_NAMES):
            private = place.prefix + os.urandom(_RANDOM_SIZE).hex()
            handle = _make_private(place, private)
            if handle is not None:
                break
            with contextlib.suppress(
                OSError
            ):  # swept, or locked by somebody who waits for those that were here before
                os.rmdir(private, dir_fd=place.parent)
        else:
            raise OSError(
                errno.EACCES, "cannot make a socket here: others exchange its names", place.directory
            )
        inside = handle.fileno()
        with contextlib.suppress(OSError):  # BSD has no modes of sockets
            os.fchmod(sock.fileno(), mode)
        with short_for_bind(place.way(inside, inner, private)) as short:
            sock.bind(short)
        if stat.S_IMODE(os.stat(inner, dir_fd=inside, follow_symlinks=False).st_mode) != mode:
            os.chmod(inner, mode, dir_fd=inside)  # what the umask has taken; nobody else gets in here
        if sock.type != socket.SOCK_DGRAM:
            sock.listen(backlog)
        mine = _identity(os.stat(inner, dir_fd=inside, follow_symlinks=False))
        try:
            _put_in_place(place, inside, inner, private)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                _remove_at(place.parent, name, mine)
            raise
        return mine
    finally:  # one call in each block: an interrupt comes after a call, and must not keep the next one from its work
        try:
            if inside >= 0:
                os.unlink(inner, dir_fd=inside)
        except OSError:  # renamed
            pass
        finally:
            try:
                os.rmdir(private, dir_fd=place.parent)
            except OSError:  # it was not made; or there is something in it that the next start will look at
                pass
            finally:
                if handle is not None:
                    handle.close()


_MAX_NAMES = 100
"""Names to try: one is taken as seldom as a sweep comes between its making and its lock; more often, somebody is playing."""


def _put_in_place(place: _Place, inside: int, inner: str, private: str) -> None:
    while True:
        links = True
        try:
            os.link(inner, place.name, src_dir_fd=inside, dst_dir_fd=place.parent, follow_symlinks=False)
            return
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            links = False
        try:
            found = place.stat()
        except FileNotFoundError:  # removed since; or there are no hard links
            if links:
                continue
            os.rename(inner, place.name, src_dir_fd=inside, dst_dir_fd=place.parent)
            return
        with contextlib.suppress(FileNotFoundError):
            _is_dead(place.way(place.parent, place.name), found, place.path)
            _take(place, inside, private)


def _take(place: _Place, inside: int, private: str) -> None:
    """Remove a dead listener's file, by way of the private directory: what is found there may be another one by now.

    Raises:
        OSError: EADDRINUSE: only another user may remove it.
    """
    try:
        os.rename(place.name, _OLD, src_dir_fd=place.parent, dst_dir_fd=inside)
    except FileNotFoundError:
        pass
    except PermissionError as error:  # in a directory like /tmp only the owner may replace a file
        what = "the socket of a dead listener is in the way, of another user: only that one may replace it"
        raise OSError(errno.EADDRINUSE, what, place.path) from error
    finally:
        try:
            _drop_old(place, inside, private)
        except BaseException:  # an interrupt: there is no third one of those
            _drop_old(place, inside, private)
            raise


def _drop_old(place: _Place, inside: int, private: str) -> None:
    """Remove what was taken to a private directory; give it back if it is not dead."""
    try:
        found = os.stat(_OLD, dir_fd=inside, follow_symlinks=False)
        dead = _is_dead(place.way(inside, _OLD, private), found, place.path)
    except FileNotFoundError:
        return
    except OSError:  # it is alive, or no socket
        dead = False
    if not dead:
        try:
            os.link(_OLD, place.name, src_dir_fd=inside, dst_dir_fd=place.parent, follow_symlinks=False)
        except FileExistsError:  # a third one has the place, and this one will find out
            pass
        except OSError:  # no hard links, or not to what is another user's
            os.rename(_OLD, place.name, src_dir_fd=inside, dst_dir_fd=place.parent)
            return
    os.unlink(_OLD, dir_fd=inside)


def _sweep(place: _Place, private: str) -> None:
    """Remove a private directory of a listener that was killed while it started."""
    try:
        handle = _enter(place, private)
    except OSError:
        return
    if handle is None:
        return
    with handle, contextlib.suppress(OSError):  # locked, or without locks: it may be in use
        if _lock(handle, fcntl.LOCK_EX):
            inside = handle.fileno()
            _drop_old(place, inside, private)
            for name in os.listdir(inside):
                os.unlink(name, dir_fd=inside)
            os.rmdir(private, dir_fd=place.parent)


def _confirm(place: _Place, mine: Identity) -> None:
    """Wait until nobody is left who may have looked before our file was there, and see whether it still is.

    Raises:
        OSError: EADDRINUSE: it is not.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    for private in place.private_ones():
        with contextlib.suppress(OSError):
            while (handle := _enter(place, private)) is not None:
                with handle:
                    if _lock(handle, fcntl.LOCK_SH) or time.monotonic() >= deadline:
                        break
                time.sleep(LOCK_TICK_SECONDS)
    try:
        if _identity(place.stat()) == mine:
            return
    except FileNotFoundError:
        pass
    raise OSError(errno.EADDRINUSE, "another listener that starts has taken the place just now", place.path)


def _is_dead(way: str, found: os.stat_result, path: str) -> bool:
    """Whether nobody listens there any more: True.

    Args:
        way: how to get there.
        path: what to call it.

    Raises:
        FileNotFoundError: it was removed.
        OSError: EADDRINUSE: somebody does, or it cannot be told.
    """
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EADDRINUSE, "a file that is no socket is in the way, and stays", path)
    try:
        alive = is_alive(way)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = f"a socket of uid {found.st_uid} is in the way, and cannot be asked ({error.strerror})"
        raise OSError(errno.EADDRINUSE, what, path) from error
    if alive:
        raise OSError(errno.EADDRINUSE, f"a process of uid {found.st_uid} listens here already", path)
    return True
