"""SCM_RIGHTS: descriptors beside bytes, owned from the system call on; and the bare form for peers that are not fdshare.

A signal handler that raises (KeyboardInterrupt) runs after a call, on a jump back, or on entry to a function, and at no other
bytecode.  So a system call whose result must not be lost is the iterator of a loop that ends at once: ``for arrived
in map(Arrived, starmap(sock.recvmsg, ...)): break`` stores the owner of what came without a gap.
"""

from __future__ import annotations

import _socket
import array
import errno
import os
import resource
import select
import socket
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import starmap
from typing import Any

from fdshare import native
from fdshare.disposal import close_later
from fdshare.errors import DescriptorsLostError, FdLimitError, MessageTooLargeError, ProtocolError
from fdshare.handle import (
    NO_HANDLES,
    FdHandle,
    HandleList,
    Handles,
    HasFileno,
    as_fd,
    format_of,
    own,
    received,
    to_socket,
)
from fdshare.wire import MAX_FDS_PER_PACKET

__all__ = ["Arrived", "recv_fds", "send_fds"]

_CREDENTIALS = 64
"""Bytes for credentials and a pidfd, should somebody ask for them."""

CONTROL_SIZE = socket.CMSG_SPACE(4 * MAX_FDS_PER_PACKET) + _CREDENTIALS
"""Bytes of control buffer for every read: the most descriptors of one packet, and credentials.
A smaller one would lose descriptors, and leak them on macOS."""


def control_size(descriptors: int) -> int:
    """Return the bytes of control buffer for so many descriptors of one packet, and for credentials."""
    return socket.CMSG_SPACE(4 * descriptors) + _CREDENTIALS


SCM_PIDFD = 4 if sys.platform == "linux" else -1  # absent from the socket module

# Plain ints: each operation on the socket module's IntFlags takes longer than a system call.
CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))  # absent on macOS
NOW = int(socket.MSG_DONTWAIT)
PEEK = int(socket.MSG_PEEK)
PEEK_INSTALLS = sys.platform == "linux"
"""Whether a peek gives the descriptors too, which tells whether they fit; read at each use, so that tests can switch it off.
Elsewhere numbers come that are none: zeros on macOS (sopeek_scm_rights in XNU's bsd/kern/uipc_socket.c), halves of the kernel's
addresses on FreeBSD (uipc_soreceive_stream_or_seqpacket in its sys/kern/uipc_usrreq.c)."""
SEND = int(getattr(socket, "MSG_NOSIGNAL", 0))
SEND_NOW = SEND | NOW
TRUNCATED = int(socket.MSG_TRUNC)
CONTROL_TRUNCATED = int(socket.MSG_CTRUNC)
RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))


def descriptor_limit() -> int:
    """Return the soft limit of descriptors of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_PROC = "/proc/self/fd"


def _listing() -> str | None:
    """Return the directory that lists this process's descriptors; None where there is none."""
    if sys.platform == "linux":
        return _PROC if os.path.isdir(_PROC) else None  # not in every chroot
    # Where fdescfs(5) is not mounted, as is usual on FreeBSD, this is a plain directory of devfs with 0, 1 and 2.  CPython's
    # _posixsubprocess.c tells the two apart in the same way.
    if sys.platform == "darwin" or os.stat("/dev/fd").st_dev != os.stat("/dev").st_dev:
        return "/dev/fd"
    return None


_BATCH = 1024
"""Descriptors that one poll looks at."""


def _batch_open(numbers: range) -> list[int]:
    probe = native.poll()
    for number in numbers:
        probe.register(number, select.POLLIN)  # macOS looks at nothing where nothing is asked for
    closed = {number for number, found in probe.poll(0) if found & select.POLLNVAL}
    return [number for number in numbers if number not in closed]


def open_numbers() -> list[int]:
    """Return the numbers of the descriptors that this process has open; one of them may be the listing's own, and closed by now.

    Raises:
        OSError: no descriptor left for a listing.
    """
    directory = _listing()
    if directory is not None:
        return [int(name) for name in os.listdir(directory)]
    limit = descriptor_limit()
    batches = (range(first, min(first + _BATCH, limit)) for first in range(0, limit, _BATCH))
    return [number for batch in batches for number in _batch_open(batch)]


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(open_numbers()) - (_listing() is not None)


def has_room_for(count: int) -> bool:
    """Whether ``count`` more descriptors fit under the limit of this process, as far as one can tell without opening them."""
    limit = descriptor_limit()
    if sys.platform != "linux" and count <= min(limit, _BATCH) and limit <= _INT_MAX:
        if not _batch_open(range(limit - count, limit)):
            return True
    try:  # the size of the table, never less than what is open: one short file instead of a listing
        with open("/proc/self/status", "rb") as status:
            slots = next(int(line[7:]) for line in status if line.startswith(b"FDSize:"))
        if slots + count <= limit:
            return True
    except (OSError, StopIteration):  # in a chroot, most likely
        if is_top_free(count):
            return True
    try:
        return open_descriptors() + count <= limit
    except OSError:  # not even one more
        return False


_MAX_PROBES = 64
_MOST_PROBED = 256
"""Most numbers that a poll object is kept for: more than one packet brings.  There is one for each power of two, since a peer
chooses how many its packets bring."""
_probes: dict[tuple[int, int], tuple[select.poll, list[tuple[int, int]]]] = {}


def is_top_free(count: int) -> bool:
    """Whether the ``count`` highest descriptor numbers are unused, which proves room for as many, in one system call.

    Some more are looked at.  Holds as long as no other thread opens something.
    """
    limit = descriptor_limit()
    if limit < count or limit > _INT_MAX:
        return False
    if count > _MOST_PROBED:
        firsts = range(limit - count, limit, _BATCH)
        return not any(_batch_open(range(first, min(first + _BATCH, limit))) for first in firsts)
    size = min(limit, 1 << (count - 1).bit_length())
    found = _probes.pop((limit, size), None)  # no two threads may be in one poll object
    if found is None:
        numbers = range(limit - size, limit)
        probe = native.poll()
        for number in numbers:
            probe.register(number, select.POLLIN)
        found = probe, [(number, select.POLLNVAL) for number in numbers]
    is_free = found[0].poll(0) == found[1]
    if len(_probes) >= _MAX_PROBES:
        _probes.clear()
    _probes[limit, size] = found
    return is_free


_INT_MAX = 2**31 - 1


def limit_error(needed: int) -> FdLimitError:
    """Return the error for a message that stays queued because its descriptors do not fit."""
    limit = descriptor_limit()
    return FdLimitError(
        errno.EMFILE,
        f"a message brings {needed} descriptors and there is no room for them (limit {limit}): it stays queued; "
        "close some or raise RLIMIT_NOFILE, and receive again",
        needed=needed,
        limit=limit,
    )


class Adopted(tuple[Any, ...]):
    """The result of ``recvmsg`` whose descriptors were adopted."""

    _handles: HandleList

    def adopt(self) -> HandleList:
        """Return the descriptors as handles, the same list at each call; they belong to that list."""
        return self._handles

    def close(self) -> None:
        """Close all of its descriptors."""
        self.adopt().close()


class Arrived(Adopted):
    """The result of ``recvmsg`` as the owner of the descriptors in it, from the C call on, until :meth:`adopt`."""

    def adopt(self) -> HandleList:
        """Return the descriptors as handles, the same list at each call; they belong to that list now."""
        if not self[1]:
            self._handles = NO_HANDLES
        else:
            handles = self.__dict__.setdefault("_handles", Handles())
            # An interrupt inside leaves the list shorter: the rest is still ours.
            handles.extend(map(received, numbers_in(self[1])[len(handles) :]))
            if len(self[1]) > 1 or self[1][0][:2] != RIGHTS:
                _close_pidfds(self[1])
        self.__class__ = Adopted  # type: ignore[assignment]  # and with it goes __del__
        return self._handles

    def __del__(self) -> None:
        if self[1]:
            for fd in numbers_in(self[1])[len(self.__dict__.get("_handles", ())) :]:
                os.close(fd)
            _close_pidfds(self[1])


def _close_pidfds(ancillary: Iterable[tuple[int, int, bytes]]) -> None:
    """Close what the kernel adds on its own where somebody has set SO_PASSPIDFD on the socket."""
    for level, type, data in ancillary:
        if (level, type) == (socket.SOL_SOCKET, SCM_PIDFD):
            pidfd = int.from_bytes(data, sys.byteorder, signed=True)
            if pidfd >= 0:  # an error otherwise: the sender has ended, or there was no room
                os.close(pidfd)


def numbers_in(ancillary: Iterable[tuple[int, int, bytes]]) -> array.array[int]:
    """Return the descriptors in what ``recvmsg`` gave, close-on-exec."""
    numbers = array.array("i")
    for level, type, data in ancillary:
        if (level, type) == RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if not CLOEXEC:
        for fd in numbers:
            os.set_inheritable(fd, False)
    return numbers


def rights(fds: Sequence[int]) -> list[tuple[int, int, Any]]:
    """Return the ancillary data that carries ``fds``: one control message, as some systems deliver only one."""
    return [(*RIGHTS, array.array("i", fds))] if fds else []


def has_room_for_one() -> bool:
    """Whether one more descriptor can be opened; if so, missing ones were not dropped for want of room."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def lost(expected: int, received: int) -> DescriptorsLostError:
    """Return the error for descriptors that were dropped on the way."""
    return DescriptorsLostError(
        f"{received} of {expected} descriptors arrived: the kernel or a security module dropped the others, "
        "for want of room or of permission; those that came were closed",
        expected=expected,
        received=received,
    )


def make_bundle(fds: Sequence[int]) -> FdHandle:
    """Return a socket that holds ``fds`` in batches, to travel in a packet in their place.

    Raises:
        OSError: EMFILE, ETOOMANYREFS, EBADF.
    """
    # Sockets of C alone own themselves from the call on; socket.socketpair has Python in between.
    for reader, writer in starmap(_socket.socketpair, ((socket.AF_UNIX, socket.SOCK_STREAM),)):  # noqa: B007
        break
    try:
        for first in range(0, len(fds), MAX_FDS_PER_PACKET):
            writer.sendmsg([b"\0"], rights(fds[first : first + MAX_FDS_PER_PACKET]), SEND_NOW)
        return own(reader.detach)
    finally:
        reader.close()
        writer.close()


def keep_in_flight(fds: Sequence[int], more: Sequence[int] = (), *, again: bool = False) -> FdHandle | None:
    """Return a bundle of ``fds`` and ``more`` for a message that is to wait; None where duplicates of them do.

    When a process closes any descriptor of a file, a duplicate too, the kernel drops all record locks (fcntl, lockf) that it
    has on the file.  What is in flight has no number here, and is let go of without that.

    Args:
        fds: those on which there may be locks, now or later.
        again: whether it may be sent more than once.

    Raises:
        OSError: EMFILE, EBADF.
    """
    if not PEEK_INSTALLS or not any(map(_may_be_locked, fds)):
        return None
    if again and len(fds) + len(more) > MAX_FDS_PER_PACKET:
        return None  # read batch by batch, and gone then
    try:
        return make_bundle([*fds, *more])
    except OSError as error:
        if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS):
            return None  # too many wait so: rather lose a lock, if there is one, than the message
        raise


def _may_be_locked(fd: int) -> bool:
    return format_of(fd) not in (0, stat.S_IFSOCK)


def unbundle(bundle: FdHandle, total: int) -> Handles:
    """Take ``total`` descriptors out of a bundle, which is closed.

    Those of one batch are copied out of it, so that a bundle which others hold too can be sent again.

    Raises:
        DescriptorsLostError: there are not as many; those that came were closed.
        ProtocolError: it is not a bundle.
    """
    handles = Handles()
    whole = total <= MAX_FDS_PER_PACKET and PEEK_INSTALLS
    flags = CLOEXEC | NOW | (PEEK if whole else 0)
    try:
        with to_socket(bundle) as sock:
            while len(handles) < total:
                for batch in map(Arrived, starmap(sock.recvmsg, ((1, CONTROL_SIZE, flags),))):
                    adopted = batch.adopt()
                    count = len(adopted)
                    handles += adopted
                    adopted.release()
                if whole or not count or batch[2] & CONTROL_TRUNCATED:  # bytes alone could go on for ever
                    break
    except OSError as error:
        handles.close()
        if error.errno == errno.EMSGSIZE:  # of BSD, where a batch does not fit
            raise lost(total, 0) from error
        raise ProtocolError(f"a bundle of descriptors cannot be read: {error}") from error
    if len(handles) != total:
        handles.close()
        raise lost(total, len(handles))
    return handles


def recv_warily(sock: socket.socket, size: int) -> bytes:
    """Return what has come from who is not trusted; nothing where he has gone, or where descriptors came with it.

    A plain read would close those, and wait for that.

    Raises:
        BlockingIOError: nothing has.
    """
    try:
        for arrived in map(Arrived, starmap(sock.recvmsg, ((size, CONTROL_SIZE, CLOEXEC | NOW),))):
            if not arrived.adopt():  # credentials may be there: what is accepted inherits SO_PASSCRED
                return bytes(arrived[0])
            drop(arrived)
    except BlockingIOError:
        raise
    except OSError:
        pass
    return b""


def drop(arrived: Arrived) -> None:
    """Close descriptors that a peer had no business to send, without waiting for that."""
    handles = arrived.adopt()
    for handle in handles:
        close_later(handle.detach())
    handles.release()


_SO_PASSRIGHTS = 83
"""Of Linux 6.16, absent from the socket module: whether descriptors may come at all."""


def refuse_all(sock: socket.socket) -> None:
    """Let no descriptor come to ``sock``, nor to what it accepts: the sender gets EPERM, where the kernel has that.

    Before listen(2) or connect(2); after that, what has come is there.
    """
    if sys.platform == "linux":
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        except OSError:
            pass  # an older kernel, or a socket that is closed already


# --- bare SCM_RIGHTS -------------------------------------------------------------------------------------------------


def send_fds(sock: socket.socket, buffers: Iterable[Any], fds: Iterable[HasFileno | int]) -> int:
    """Send bytes with descriptors to a peer that need not be fdshare.

    Args:
        sock: a connected AF_UNIX socket.
        buffers: bytes-like pieces; at least one byte together, since descriptors without data are lost on a stream.
        fds: numbers, or objects with ``fileno()``; they stay the caller's.

    Returns:
        how many bytes were sent; on a stream that may be fewer than given, and the descriptors have gone with the first.

    Raises:
        ValueError: no data.
        MessageTooLargeError: more than 253 descriptors (SCM_MAX_FD of Linux).
        OSError: as sendmsg(2): EBADF, EPIPE, ETOOMANYREFS, EAGAIN, …
    """
    pieces = [memoryview(piece).cast("B") for piece in buffers]
    owners = list(fds)  # alive until they are sent, also those that a generator made
    numbers = [as_fd(owner) for owner in owners]
    if numbers and not any(map(len, pieces)):
        raise ValueError("descriptors need at least one byte of data: a stream loses them otherwise")
    if len(numbers) > MAX_FDS_PER_PACKET:
        raise MessageTooLargeError(
            f"{len(numbers)} descriptors; one sendmsg takes at most {MAX_FDS_PER_PACKET}"
        )
    return sock.sendmsg(pieces, rights(numbers), SEND)


def recv_fds(sock: socket.socket, bufsize: int, maxfds: int) -> tuple[bytes, list[FdHandle]]:
    """Receive bytes with descriptors from a peer that need not be fdshare.

    Args:
        sock: a connected AF_UNIX socket.
        bufsize: most bytes to receive.
        maxfds: most descriptors to accept.

    Returns:
        the data (empty at the end of the connection), and the descriptors, close-on-exec, now the caller's.

    Raises:
        DescriptorsLostError: the kernel dropped some (no room, a security module); those that came were closed.
        ProtocolError: more than ``maxfds`` came; all of them were closed.
        MessageTooLargeError: a packet (of SEQPACKET) is longer than ``bufsize``; its descriptors were closed.
        OSError: as recvmsg(2).
    """
    try:
        for arrived in map(Arrived, starmap(sock.recvmsg, ((bufsize, CONTROL_SIZE, CLOEXEC),))):  # noqa: B007 -- see above
            break
    except OSError as error:
        if (
            error.errno == errno.EMSGSIZE
        ):  # of BSD, where they do not fit and are gone; the bytes they came with are still there
            sock.recv(bufsize, NOW)
            raise lost(1, 0) from error
        raise
    return arrived[0], take_checked(arrived, bufsize, maxfds)


def take_checked(arrived: Arrived, bufsize: int, maxfds: int) -> list[FdHandle]:
    """Return the descriptors of what arrived, with the checks of :func:`recv_fds`."""
    handles = arrived.adopt()
    if arrived[2] & CONTROL_TRUNCATED:
        handles.close()
        raise lost(len(handles) + 1, len(handles))
    if arrived[2] & TRUNCATED:
        handles.close()
        raise MessageTooLargeError(
            f"a packet is longer than the {bufsize} bytes asked for, and the rest of it is gone"
        )
    if len(handles) > maxfds:
        handles.close()
        raise ProtocolError(f"{len(handles)} descriptors arrived; at most {maxfds} were asked for")
    result = list(handles)
    handles.release()
    return result
