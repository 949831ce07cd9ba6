"""The probes of ``fdshare doctor`` for descriptors: transports, limits, memory.

Each tries the thing itself, on objects of its own, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import fdshare
from fdshare import memory, system, wire
from fdshare.choosing import socketpair
from fdshare.command.probing import Finding, ok, probe, warn
from fdshare.handle import own, own_pipe
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.rights import open_descriptors

__all__ = ["bytes_in_words", "first_line"]

MIB = 2**20


def bytes_in_words(size: int) -> str:
    """Return a number of bytes in the largest unit that it fills."""
    for unit, scale in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size // scale} {unit}"
    return f"{size} bytes"


def first_line(path: str) -> str:
    """Return the first line of a small file of the system's, "" where it is not there or not ours to read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


# --- transports --------------------------------------------------------------------------------------------------------


def _carries(transport: str) -> Finding:
    here, there = fdshare.Pipe(transport=transport)
    with here, there, own(os.open, os.devnull, os.O_RDONLY | os.O_CLOEXEC) as sent:
        started = time.perf_counter()
        here.send({"descriptor": sent}, timeout=5)
        with there.recv(timeout=5)["descriptor"] as received:
            seconds = time.perf_counter() - started
            if not os.path.samestat(os.fstat(received.fileno()), os.fstat(sent.fileno())):
                raise OSError(errno.EIO, "another descriptor arrived than was sent")
    return ok(f"a message with a descriptor arrived after {seconds * 1e6:.0f} us", microseconds=seconds * 1e6)


@probe(
    "transports", "seqpacket", without="channels use the stream transport; two readers cannot share one end"
)
def _() -> Finding:
    return _carries("seqpacket")


@probe(
    "transports",
    "stream",
    without="fdshare cannot work here: AF_UNIX sockets do not pass descriptors",
    needed=True,
)
def _() -> Finding:
    return _carries("stream")


@probe("transports", "descriptors in a packet", without="messages with many descriptors fail", needed=True)
def _() -> Finding:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        fdshare.send_fds(here, [b"x"], [here.fileno()] * wire.MAX_FDS_PER_PACKET)
    return ok(
        f"{wire.MAX_FDS_PER_PACKET} at once; more travel as a bundle", descriptors=wire.MAX_FDS_PER_PACKET
    )


@probe(
    "transports", "largest packet", without="without SEQPACKET there are no packets, only frames of any size"
)
def _() -> Finding:
    here, there = socketpair("seqpacket")
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        buffer = here.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        largest = _largest(here, there)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BUFFER)
        raised = _largest(here, there)
    values = {"default": largest, "raised": raised, "sndbuf": buffer}
    for name in ("wmem_default", "wmem_max"):
        if text := first_line(f"/proc/sys/net/core/{name}"):
            values[name] = int(text)
    found = f"{largest} bytes by default, {raised} with the largest buffer allowed"
    if largest < wire.PACKET_SIZE:
        advice = f"messages over {largest} bytes take a segment: sysctl net.core.wmem_default=212992"
        return warn(found, advice, **values)
    return ok(found, **values)


_MOST_BUFFER = 2**30
"""Bytes to ask for; the kernel cuts it to what it allows."""


def _largest(sender: socket.socket, receiver: socket.socket) -> int:
    """Find the largest packet that one may send, by halving the distance between what passed and what did not."""
    low, high = 0, 1 << 26
    while high - low > 1:
        size = (low + high) // 2
        try:
            sender.send(bytes(size))
            receiver.recv(1)
            low = size
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN):
                raise
            high = size
    return low


@probe("transports", "waiting for many channels", without="ChannelSet asks each channel at every turn (poll)")
def _() -> Finding:
    here, there = fdshare.Pipe()
    with here, there, fdshare.ChannelSet([here, there]) as channels:
        there.send(None, timeout=5)
        if channels.select(timeout=5) != [here]:
            raise OSError(errno.EIO, "the wrong channel was ready")
    name = "epoll" if system.HAVE_EPOLL else "kqueue" if hasattr(select, "kqueue") else "poll"
    return ok(name, mechanism=name)


# --- limits ------------------------------------------------------------------------------------------------------------

FEW_DESCRIPTORS = 1024
"""A soft limit below this one is under the usual default of every system."""


@probe("limits", "descriptors of a process", without="the limit is not known")
def _() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = soft
    with suppress(OSError, ValueError), _limit_of_descriptors(hard):
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    values = {"soft": soft, "hard": hard, "open": open_descriptors()}
    found = f"{_number(soft)} (soft)" + (
        f", can be raised to {_number(raised)} (hard)" if raised != soft else ", which is also the hard limit"
    )
    if soft != resource.RLIM_INFINITY and soft < FEW_DESCRIPTORS:
        if raised > soft:
            advice = f"raise it before many descriptors are received: ulimit -S -n {_number(raised)}"
        else:
            advice = "let whoever sets the hard limit raise it (limits.conf, LimitNOFILE= of a service, docker --ulimit)"
        return warn(found, advice, **values)
    return ok(found, **values)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


@contextmanager
def _limit_of_descriptors(soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


_TRIAL_LIMIT = 64
"""Soft limit under which the probe below sends: small, so that little is in flight, and more than a message has."""


@probe("limits", "descriptors in flight", without="the limit is not known")
def _() -> Finding:
    """Send descriptors that nobody takes under a small limit, and see whether the kernel minds."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    here, there = socket.socketpair()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = _TRIAL_LIMIT if hard == resource.RLIM_INFINITY else min(_TRIAL_LIMIT, hard)
    with here, there, _limit_of_descriptors(limit):
        here.setblocking(False)
        try:
            for _ in range(limit + 2):
                fdshare.send_fds(here, [b"x"], [here.fileno()])
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            found = f"{_number(soft)} for all processes of this user together (the soft limit of the one that sends)"
            if soft < FEW_DESCRIPTORS:
                advice = (
                    "senders with many descriptors wait or get FdLimitError: raise the soft limit (ulimit -n)"
                )
                return warn(found, advice, limited=True, limit=soft)
            return ok(found, limited=True, limit=soft)
    return ok("no limit for this user (on Linux: root, by CAP_SYS_RESOURCE)", limited=False)


_NEARLY = 0.9
"""The part of all that the system has from which on a warning is due."""


@probe("limits", "open files of the system", without="this system does not tell (only Linux does)")
def _() -> Finding:
    with open("/proc/sys/fs/file-nr", encoding="utf-8") as file:
        used, _, most = map(int, file.read().split())
    found = f"{used} of {most if most < 2**62 else 'unlimited'}"
    if used > _NEARLY * most:
        return warn(found, "close some, or raise it: sysctl fs.file-max", used=used, most=most)
    return ok(found, used=used, most=most)


# --- memory ------------------------------------------------------------------------------------------------------------


@probe(
    "memory", "sealed memory files", without="messages over 1 MiB go through an unlinked file and are copied"
)
def _() -> Finding:
    with own(os.memfd_create, "fdshare-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) as segment:
        fd = segment.fileno()
        os.write(fd, b"content")
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != seals:
            raise OSError(errno.EIO, "the seals do not hold")
        for change in (lambda: os.ftruncate(fd, 0), lambda: os.pwrite(fd, b"other", 0)):
            with suppress(PermissionError):
                change()
                raise OSError(errno.EIO, "a sealed file can be changed")
        with mmap.mmap(fd, 7, access=mmap.ACCESS_COPY) as mapping:
            mapping[:1] = b"C"
            if os.pread(fd, 7, 0) != b"content":
                raise OSError(errno.EIO, "a private mapping is not private")
    values = {}
    if noexec := first_line("/proc/sys/vm/memfd_noexec"):
        values["memfd_noexec"] = int(noexec)
    return ok("created, sealed, mapped privately", **values)


@probe("memory", "size of files", without="")
def _() -> Finding:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most == resource.RLIM_INFINITY:
        return ok("unlimited")
    advice = "larger messages and shared memory are refused (NoSpaceError): raise it, ulimit -f"
    return warn(f"at most {bytes_in_words(most)} (RLIMIT_FSIZE)", advice, most=most)


@probe("memory", "large pipes", without="messages up to 1 MiB take a memory file, which takes longer")
def _() -> Finding:
    values = {}
    for name in ("pipe-max-size", "pipe-user-pages-soft", "pipe-user-pages-hard"):
        if text := first_line(f"/proc/sys/fs/{name}"):
            values[name.replace("-", "_")] = int(text)
    reader, writer = own_pipe()
    with reader, writer:
        size = 0
        for asked in (memory.MAX_PIPE >> n for n in count()):
            try:
                size = fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, asked)
                break
            except PermissionError:
                if asked <= mmap.PAGESIZE:
                    raise
    found = f"{bytes_in_words(size)} (F_SETPIPE_SZ)"
    if size < memory.MAX_PIPE:
        advice = f"this user's pipes are full, or sysctl fs.pipe-max-size is below {memory.MAX_PIPE}"
        return warn(found, advice, size=size, **values)
    return ok(found, size=size, **values)


@probe("memory", "free memory", without="this system does not tell (only Linux does)")
def _() -> Finding:
    with open("/proc/meminfo", encoding="utf-8") as file:
        said = dict(line.split(":", 1) for line in file)
    free = int(said["MemAvailable"].split()[0]) * 1024
    values = {"available": free}
    found = f"{bytes_in_words(free)} available"
    limit = first_line("/sys/fs/cgroup/memory.max")
    if limit.isdecimal():
        left = int(limit) - int(first_line("/sys/fs/cgroup/memory.current") or 0)
        values["cgroup_left"] = left
        found += f", {bytes_in_words(max(0, left))} left in this control group"
        free = min(free, left)
    if free < DEFAULT_MAX_INFLIGHT:
        advice = "large messages in flight (max_inflight, 256 MiB a channel) may not fit: NoSpaceError at the sender"
        return warn(found, advice, **values)
    return ok(found, **values)


LITTLE_SPACE = 64 * MIB
"""Free bytes below which a large message of everyday size does not fit: the usual /dev/shm of a container."""


def _space(directory: str, who: str) -> Finding:
    """Make a file in a directory that nobody can find again, and see how much room there is."""
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE) if hasattr(os, "posix_fallocate") else file.write(
            b"x"
        )
        there = os.fstatvfs(file.fileno())
    free = there.f_bavail * there.f_frsize
    found = f"{directory}, {bytes_in_words(free)} free"
    values = {"path": directory, "free": free, "size": there.f_blocks * there.f_frsize}
    if free < LITTLE_SPACE:
        return warn(found, f"{who}: make room there", **values)
    return ok(found, **values)


@probe(
    "memory",
    "shared memory file system",
    without="multiprocessing.shared_memory and PyTorch miss it; fdshare does not",
)
def _() -> Finding:
    return _space("/dev/shm", "multiprocessing.shared_memory and PyTorch put arrays there (fdshare does not)")


@probe("memory", "temporary directory", without="nowhere to put the broker's socket: set TMPDIR", needed=True)
def _() -> Finding:
    return _space(tempfile.gettempdir(), "segments go there where there are no memory files")


# --- descriptors for events ---------------------------------------------------------------------------------------------


@probe("events", "eventfd", without="events take a pipe, which is two descriptors")
def _() -> Finding:
    with own(os.eventfd, 2, os.EFD_CLOEXEC | os.EFD_NONBLOCK) as event:
        os.eventfd_write(event.fileno(), 1)
        if os.eventfd_read(event.fileno()) != 3:
            raise OSError(errno.EIO, "it does not count")
    return ok("counts")


@probe("events", "pidfd", without="a process is known by its number, which may belong to another one by then")
def _() -> Finding:
    with own(os.pidfd_open, os.getpid()) as process:
        signal.pidfd_send_signal(process.fileno(), 0)
        poll = select.poll()
        poll.register(process.fileno(), select.POLLIN)
        if poll.poll(0):
            raise OSError(errno.EIO, "this process is told to have ended")
    return ok("opens, polls, takes signals")
