"""The probes of ``fdshare doctor`` for who and where: credentials, security, places for sockets, processes, libraries."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import platform
import pwd
import select
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import fdshare
from fdshare import rendezvous
from fdshare.command.probes import first_line
from fdshare.command.probing import Finding, ok, probe, warn
from fdshare.credentials import peer_credentials
from fdshare.datagrams import ask_credentials, recv_signed, send_signed
from fdshare.handle import own

__all__: list[str] = []

PATIENCE = 20.0
"""Seconds that a process may take to start and answer; a spawned one needs 0.1 on an idle machine."""


# --- who ---------------------------------------------------------------------------------------------------------------


@probe("who", "user", without="the user has no name here")
def _() -> Finding:
    uid, gid = os.geteuid(), os.getegid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container that was given a number
        name = "?"
    return ok(f"{name}, uid {uid}, gid {gid}", uid=uid, gid=gid, name=name)


@probe(
    "who",
    "credentials of a peer",
    without="a listener cannot tell who connects, and refuses everybody",
    needed=True,
)
def _() -> Finding:
    here, there = socket.socketpair()
    with here, there:
        peer = peer_credentials(here)
    if (peer.uid, peer.gid) != (os.geteuid(), os.getegid()):
        raise OSError(errno.EIO, f"the kernel says uid {peer.uid}, gid {peer.gid} of this very process")
    if peer.pid != os.getpid():
        return warn("uid and gid", "the system does not tell a peer's pid", pid=False)
    return ok("pid, uid and gid", pid=True)


# Of linux/socket.h, for Pythons that do not know them.
_SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)
_SO_PASSRIGHTS = getattr(socket, "SO_PASSRIGHTS", 83)


def _only_on_linux() -> None:
    if sys.platform != "linux":
        raise OSError(errno.ENOTSUP, "only Linux has it")


@probe(
    "who",
    "pidfd of a peer",
    without="a peer is known by its pid, which may be another process's by then (Linux 6.5)",
)
def _() -> Finding:
    _only_on_linux()
    here, there = socket.socketpair()
    with here, there, own(here.getsockopt, socket.SOL_SOCKET, _SO_PEERPIDFD) as process:
        poll = select.poll()
        poll.register(process.fileno(), select.POLLIN)
        if poll.poll(0):
            raise OSError(errno.EIO, "this process is told to have ended")
    return ok("SO_PEERPIDFD")


@probe("who", "credentials with a message", without="a datagram does not tell who sent it (Linux's do)")
def _() -> Finding:
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        ask_credentials(receiver)
        send_signed(sender, [b"x"])
        peer = recv_signed(receiver, 1).credentials
    if peer is None or (peer.pid, peer.uid) != (os.getpid(), os.geteuid()):
        raise OSError(errno.EIO, f"the kernel says {peer} of this very process")
    return ok("SCM_CREDENTIALS: pid, uid and gid of each sender")


@probe(
    "who",
    "refusing descriptors",
    without="a socket cannot refuse them; what comes is closed on arrival (Linux 6.16)",
)
def _() -> Finding:
    _only_on_linux()
    here, there = socket.socketpair()
    with here, there:
        there.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        try:
            fdshare.send_fds(here, [b"x"], [here.fileno()])
        except PermissionError:
            return ok("SO_PASSRIGHTS: the sender gets EPERM")
    raise OSError(errno.EIO, "SO_PASSRIGHTS is accepted and does nothing")


# --- security ------------------------------------------------------------------------------------------------------------


def _in_child(function: Callable[[], int]) -> int:
    """Run ``function`` in a forked child, and return what it returns (0 to 254).

    Raises:
        OSError: it raised there.
    """
    pid = os.fork()
    if not pid:
        code = 255
        try:
            code = function()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 255 or code < 0:
        raise OSError(errno.EIO, "the attempt failed in a child process")
    return code


@probe("events", "locks", without="a Lock would stay taken when its holder dies")
def _() -> Finding:
    """Let a child die with a lock."""
    with contextlib.closing(fdshare.Lock()) as lock:
        if _in_child(lambda: int(not lock.acquire(blocking=False))):
            raise OSError(errno.EIO, "a child does not get a lock that nobody holds")
        if not lock.acquire(timeout=PATIENCE):
            raise OSError(errno.EIO, "a dead process holds it")
        told = lock.abandoned
        lock.release()
        kind = {"robust": "robust mutexes", "file": "locks of files"}.get(lock._mutex.kind, lock._mutex.kind)
    if not told:
        raise OSError(errno.EIO, "nothing tells that the holder died")
    return ok(f"{kind}: the kernel lets go for a dead holder, and the next one is told", kind=kind)


_SYS_PIDFD_GETFD = 438  # the same on every architecture since Linux 5.6


def _take_from_parent() -> int:
    """Take a copy of the parent's standard error by pidfd_getfd, return the error's number or 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    with own(os.pidfd_open, os.getppid()) as parent:
        fd = libc.syscall(_SYS_PIDFD_GETFD, parent.fileno(), 2, 0)
        return 0 if fd >= 0 else ctypes.get_errno()


@probe(
    "security",
    "taking descriptors",
    without="no pidfd_getfd: descriptors move only when they are sent (Linux 5.6)",
)
def _() -> Finding:
    """Try ``pidfd_getfd`` from a child on its parent, which no relation allows under Yama."""
    _only_on_linux()
    code = _in_child(_take_from_parent)
    scope = first_line("/proc/sys/kernel/yama/ptrace_scope")
    values: dict[str, Any] = {"allowed": code == 0, "yama_ptrace_scope": int(scope) if scope else None}
    yama = f"Yama's ptrace_scope is {scope}" if scope else "no Yama here"
    if code == 0:
        return ok(f"any process of this user may take them from another, unsent ({yama})", **values)
    if code == errno.EPERM:
        return ok(f"forbidden between strangers ({yama}); fdshare sends and does not take", **values)
    raise OSError(code, os.strerror(code))


@probe("security", "modules and sandboxes", without="this system does not tell (only Linux does)")
def _() -> Finding:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        status = dict(line.split(":", 1) for line in file if ":" in line)
    modules = first_line("/sys/kernel/security/lsm")
    seccomp = {"0": "none", "1": "strict", "2": "filter"}.get(status.get("Seccomp", "").strip(), "unknown")
    enforcing = first_line("/sys/fs/selinux/enforce") == "1"
    found = f"modules: {modules or 'not told'}; seccomp: {seccomp}" + (
        "; SELinux enforces" if enforcing else ""
    )
    values = {
        "lsm": modules.split(",") if modules else [],
        "seccomp": seccomp,
        "selinux_enforcing": enforcing,
    }
    if enforcing:
        advice = "SELinux drops what the receiver's domain may not use: recv raises DescriptorsLostError then"
        return warn(found, advice, **values)
    return ok(found, **values)


# --- places ------------------------------------------------------------------------------------------------------------


def _talk_at(listener: socket.socket, address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        client.connect(address)
    listener.accept()[0].close()


@probe("places", "directory for sockets", without="the broker has nowhere to listen: set TMPDIR", needed=True)
def _() -> Finding:
    """Listen where the broker would, and connect."""
    listener, path = rendezvous.listen()
    try:
        directory = os.path.dirname(path)
        there = os.stat(directory)
        with listener, rendezvous.short_path(path) as short:
            _talk_at(listener, short)
    finally:
        listener.close()
        rendezvous.remove(path)
    base = os.stat(os.path.dirname(directory))
    values = {
        "path": directory,
        "mode": f"{stat.S_IMODE(there.st_mode):04o}",
        "owner": there.st_uid,
        "path_bytes": len(os.fsencode(path)),
    }
    found = f"{directory} (mode {values['mode']}), paths of {values['path_bytes']} bytes"
    if base.st_mode & stat.S_IWOTH and not base.st_mode & stat.S_ISVTX:
        advice = f"{os.path.dirname(directory)} may be written by all and is not sticky: chmod +t"
        return warn(found, advice, **values)
    return ok(found, **values)


@probe("places", "runtime directory", without="for sockets of your own, make a directory of mode 0700")
def _() -> Finding:
    path = os.environ.get("XDG_RUNTIME_DIR")
    if not path:
        return ok(
            "XDG_RUNTIME_DIR is not set: for sockets of your own, make a directory of mode 0700", path=None
        )
    there = os.stat(path)
    mode = stat.S_IMODE(there.st_mode)
    values = {"path": path, "mode": f"{mode:04o}", "owner": there.st_uid}
    found = f"{path} (mode {mode:04o}, uid {there.st_uid})"
    if there.st_uid != os.geteuid() or mode & 0o077:
        return warn(found, "it should be yours and of mode 0700", **values)
    return ok(found, **values)


@probe("places", "long paths", without="paths of sockets must stay below 104 bytes")
def _() -> Finding:
    with tempfile.TemporaryDirectory(prefix="fdshare-") as base:
        directory = os.path.join(base, "d" * 120)
        os.mkdir(directory)
        path = os.path.join(directory, "socket")
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
            rendezvous.short_path(path) as short,
        ):
            listener.bind(short)
            listener.listen()
            _talk_at(listener, short)
    return ok(f"a path of {len(path)} bytes, by way of its directory", bytes=len(path))


@probe(
    "places",
    "abstract names",
    without="use paths; they have permissions, which names without a file have not",
)
def _() -> Finding:
    _only_on_linux()
    name = f"\0fdshare-doctor-{os.getpid()}-{os.urandom(4).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(name)
        listener.listen()
        _talk_at(listener, name)
    return ok("work; any user may connect to them, so fdshare takes one only where it is asked for by name")


# --- processes ------------------------------------------------------------------------------------------------------------


def _answer(channel: fdshare.Channel) -> None:
    """Run in a process that is being tried: send back what came."""
    with channel:
        channel.send(fdshare.move(channel.recv(timeout=PATIENCE)), timeout=PATIENCE)


def _start(method: str) -> float:
    """Start a process, give it a channel, and exchange a descriptor with it; return the seconds it took.

    Raises:
        OSError: it did not answer.
    """
    started = time.perf_counter()
    here, there = fdshare.Pipe()
    process: Any = multiprocessing.get_context(method).Process(target=_answer, args=(there,))  # type: ignore[attr-defined]
    with here, own(os.open, os.devnull, os.O_RDONLY | os.O_CLOEXEC) as sent:
        with there:
            process.start()
        try:
            here.send(sent, timeout=PATIENCE)
            here.recv(timeout=PATIENCE).close()
        except (fdshare.FdShareError, TimeoutError) as error:
            raise OSError(errno.EIO, "a process does not start, or does not answer") from error
        finally:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
    return time.perf_counter() - started


def _probe_start(method: str) -> None:
    @probe("processes", method, without="choose another start method")
    def _() -> Finding:
        if method not in multiprocessing.get_all_start_methods():
            raise OSError(errno.ENOTSUP, "this system has not got it")
        seconds = _start(method)
        default = (
            multiprocessing.get_start_method(allow_none=True)
            or multiprocessing.get_context().get_start_method()
        )
        found = f"a process exchanged a descriptor after {seconds * 1e3:.0f} ms"
        return ok(found + (", the default" if method == default else ""), milliseconds=seconds * 1e3)


for _method in ("spawn", "forkserver", "fork"):
    _probe_start(_method)


# --- software ------------------------------------------------------------------------------------------------------------


@probe("software", "system", without="")
def _() -> Finding:
    system = os.uname()
    found = f"{system.sysname} {system.release} on {system.machine}"
    return ok(found, system=system.sysname, release=system.release, machine=system.machine)


@probe("software", "Python", without="")
def _() -> Finding:
    return ok(
        f"{platform.python_implementation()} {platform.python_version()}", version=platform.python_version()
    )


_OPTIONAL = ("numpy", "msgspec", "psutil", "rich")
"""What some of fdshare's modules work with, in the order of how much they are missed."""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@probe("software", "libraries", without="")
def _() -> Finding:
    versions = {name: _version(name) for name in _OPTIONAL}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    found = [there] * bool(there) + [f"not installed, and optional: {absent}"] * bool(absent)
    return ok("; ".join(found), **versions)
