"""A worker of examples/privsep.py that has been taken over: it tries to get what it was not given, and writes what came of it.

    hostile_worker.py MODE ALLOWED SECRET HELPER_PID CHANNEL

Everything that it needs is imported first: in the empty directory there is nothing to import from.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import pickle
import socket
import sys
from collections.abc import Callable
from typing import Any

import privsep

from fdshare import Channel, FdShareError, TypedCodec, wire

LARGER = TypedCodec(*privsep.MESSAGES, max_bytes=1 << 20)
SYS_PIDFD_GETFD = 438


def tried(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the result as text, or what went wrong."""
    try:
        return f"got {function(*arguments)!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except FdShareError as error:
        return type(error).__name__


def ask(helper: Channel, path: str) -> str:
    helper.send(privsep.Open(path))
    return reply_of(helper)


def reply_of(helper: Channel) -> str:
    reply = helper.recv(timeout=20)
    if isinstance(reply, privsep.Refused):
        return f"refused: {reply.reason}"
    with reply.file:
        return f"opened: {os.pread(reply.file.fileno(), 100, 0).decode()}"


def steal_descriptor(pid: int) -> int:
    """Take the helper's descriptor 0 by pidfd_getfd(2)."""
    pidfd = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.syscall(SYS_PIDFD_GETFD, pidfd, 0, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return found


def alone(pid: int) -> dict[str, str]:
    """What it can do without the helper."""
    return {
        "open shadow": tried(os.open, "/etc/shadow", os.O_RDONLY),
        "go up": tried(os.open, "../../../../etc/shadow", os.O_RDONLY),
        "look around": tried(os.listdir, "/"),
        "write here": tried(os.open, "/new", os.O_WRONLY | os.O_CREAT, 0o600),
        "become root": tried(os.setresuid, 0, 0, 0),
        "join root": tried(os.setgroups, [0]),
        "leave": tried(os.chroot, "/"),
        "make a device": tried(os.mknod, "/disk", 0o060600, os.makedev(8, 0)),
        "kill the helper": tried(os.kill, pid, 0),
        "steal a descriptor": tried(steal_descriptor, pid),
        "who": tried(lambda: (os.getresuid(), os.getresgid(), os.getgroups())),
    }


def with_the_file(helper: Channel, path: str) -> dict[str, str]:
    """What a descriptor that it was given is good for."""
    helper.send(privsep.Open(path))
    with helper.recv(timeout=20).file as file:
        fd = file.fileno()
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR)
        return {
            "write": tried(os.write, fd, b"x"),
            "truncate": tried(os.ftruncate, fd, 0),
            "map for writing": tried(mmap.mmap, fd, 1, mmap.MAP_SHARED, mmap.PROT_WRITE),
            "open again": tried(os.open, f"/proc/self/fd/{fd}", os.O_RDWR),
            "change its mode": tried(os.fchmod, fd, 0o666),
            "use it as a directory": tried(os.fchdir, fd),
        }


def of_ctypes() -> list[int]:
    """The descriptor of libffi, if any: from 3.5 on it keeps the file it was loaded from open, once ctypes is imported."""
    return [fd for fd in range(1024) if "libffi.so" in tried(os.readlink, f"/proc/self/fd/{fd}")]


def descriptors(*own: int) -> list[int]:
    """The numbers that are open, beside those of the standard streams and its own."""
    return [fd for fd in range(1024) if fd > 2 and fd not in own and tried(os.fstat, fd) != "EBADF"]


def paths(allowed: str, secret: str) -> list[str]:
    """Ways out, and things that are no regular files."""
    names = [
        "../secret",
        "sub/../../secret",
        "sub/up/secret",
        "link",
        "dirlink/shadow",
        "self/link",
        "self/plain",
    ]
    names += ["fifo", "socket", "sub", "", ".", "..", "plain\0", "plain/x", "nothing", "x" * 5000]
    outside = [
        "/etc/shadow",
        secret,
        "/proc/1/root/etc/shadow",
        "/proc/self/environ",
        "/dev/mem",
        "",
        ".",
        "..",
        "plain",
    ]
    return (
        [f"{allowed}/{name}" for name in names]
        + outside
        + [allowed, f"/{allowed}/plain", f"{allowed}-not/plain"]
    )


def other_messages(channel: int) -> dict[str, str]:
    """What the helper makes of messages that it does not expect."""
    bare = socket.socket(fileno=os.dup(channel))
    with Channel(socket.socket(fileno=os.dup(channel)), codec=LARGER) as helper, bare:
        found = {}
        helper.send(privsep.Refused("I refuse"))
        found["its own class"] = reply_of(helper)
        helper.send(privsep.Open("x" * 9000))
        found["too large"] = reply_of(helper)
        # By a segment, which is a descriptor: some kernels refuse it here already.
        sent = tried(helper.send, privsep.Open("x" * 500_000))
        found["far too large"] = reply_of(helper) if sent == "got None" else sent
        for name, payload in {
            "garbage": b"\xc1\xff",
            "nested": b"\x91" * 8000,
            "claim": b"\xdd\xff\xff\xff\xff",
            "framed pickle": pickle.dumps(privsep.Open("/etc/shadow")),
        }.items():
            bare.send(wire.pack(wire.MESSAGE, payload_size=len(payload)) + payload)
            found[name] = reply_of(helper)
        return found


def end(helper: Channel) -> str:
    """What ends the connection: the error of the next receive."""
    return tried(lambda: helper.recv(timeout=20))


def main() -> None:
    mode, allowed, secret, pid, channel = sys.argv[1:4] + [int(argument) for argument in sys.argv[4:6]]
    own = [channel, *of_ctypes()]
    with Channel(socket.socket(fileno=channel), codec=privsep.AT_THE_WORKER) as helper:
        privsep.confine()
        report: dict[str, Any] = {}
        if mode == "ask":
            report["descriptors"] = descriptors(*own)
            report["alone"] = alone(pid)
            report["good"] = [
                ask(helper, f"{allowed}/{name}") for name in ("plain", "sub/deep", "./sub//deep")
            ]
            report["paths"] = {path: ask(helper, path) for path in paths(allowed, secret)}
            report["file"] = with_the_file(helper, f"{allowed}/plain")
            report["messages"] = other_messages(channel)
            report["still there"] = ask(helper, f"{allowed}/plain")
        elif mode == "pickle":
            with socket.socket(fileno=os.dup(channel)) as bare:
                bare.send(pickle.dumps(privsep.Open("/etc/shadow")))
            report["end"] = end(helper)
        elif mode == "descriptors":
            with socket.socket(fileno=os.dup(channel)) as bare:
                packet = wire.pack(wire.MESSAGE, 0, 1, payload_size=1) + b"\x90"
                report["sent"] = tried(socket.send_fds, bare, [packet], [0] * 100)
            if report["sent"].startswith("got"):
                report["end"] = end(helper)
            else:
                report["still there"] = ask(helper, f"{allowed}/plain")
        elif mode == "flood":
            report["sent"] = 0
            try:
                while True:
                    helper.send(privsep.Open(f"{allowed}/plain"), timeout=20)
                    report["sent"] += 1
            except FdShareError as error:
                report["end"] = type(error).__name__
        sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
