"""Privilege separation: a helper that is root opens what a policy allows; a worker that is nobody gets read-only descriptors.

    sudo python examples/privsep.py --allow /etc/ssl --allow /var/log /var/log/dmesg /etc/ssl/openssl.cnf /etc/shadow

The worker sits in an empty directory (chroot), as `nobody`, and has nothing but one channel: not even the terminal.  What it asks
for is a path; what it gets is a descriptor of a regular file, open for reading, or a refusal.  No pickle: each message is of
one of four classes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import PurePosixPath
from typing import Annotated

import attrs

from fdshare import (
    Channel,
    DecodeError,
    Descriptor,
    FdHandle,
    MessageTooLargeError,
    NotSendableError,
    TypedCodec,
)

NOBODY = 65534

PATIENCE = 5.0
"""Seconds that the worker has to take an answer, and to end once it was given up, before the helper kills it."""

MAX_REASON = 500
"""Characters of a refusal: with a path in it that the worker chose, it might not go into a message."""


@attrs.frozen
class Open:
    """The worker asks for a file."""

    path: str


@attrs.frozen
class Opened:
    """The helper gives it: checked at both ends to be a regular file, open for reading and nothing else."""

    file: Annotated[FdHandle, Descriptor(kinds={"file"}, access="r")]


@attrs.frozen
class Refused:
    """The helper does not."""

    reason: str


@attrs.frozen
class Report:
    """The worker tells what it found; there is no answer."""

    text: str


MESSAGES = (Open, Opened, Refused, Report)
AT_THE_HELPER = TypedCodec(
    *MESSAGES, max_bytes=8192, send_fds=1, recv_fds=0
)  # the worker can send it no descriptor at all
AT_THE_WORKER = TypedCodec(*MESSAGES, max_bytes=8192, send_fds=0, recv_fds=1)


# --- the helper, which is root -----------------------------------------------------------------------------------------


class Policy:
    """Regular files below some directories.

    No link is followed, at any step, and nothing goes up: so a path cannot lead out.  The directories must be such that the
    worker cannot write in them, or it could link a file of others into one.
    """

    def __init__(self, directories: list[str]) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC  # pinned now: renaming one later changes nothing
        self._roots = {PurePosixPath(path): FdHandle(os.open(path, flags)) for path in directories}

    def open(self, path: str) -> FdHandle:
        """Open a file for reading.

        Raises:
            OSError, ValueError: it is not allowed, or not there.
        """
        wanted = PurePosixPath(path)
        root = next((root for root in self._roots if wanted != root and wanted.is_relative_to(root)), None)
        if root is None or ".." in wanted.parts:
            raise PermissionError("not below a directory that the policy names")
        *parents, name = wanted.relative_to(root).parts
        directory, flags = self._roots[root].fileno(), os.O_NOFOLLOW | os.O_CLOEXEC
        with ExitStack() as stack:
            for parent in parents:
                below = FdHandle(os.open(parent, os.O_PATH | os.O_DIRECTORY | flags, dir_fd=directory))
                directory = stack.enter_context(below).fileno()
            # Not blocking: the open of a FIFO would wait for its writer.
            flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
            file = stack.enter_context(FdHandle(os.open(name, flags, dir_fd=directory)))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PermissionError("not a regular file")
            return FdHandle(file.detach())

    def close(self) -> None:
        """Close the directories."""
        for handle in self._roots.values():
            handle.close()


def answer(request: object, policy: Policy) -> Opened | Refused:
    """Do what the worker asks for, or say why not."""
    if not isinstance(request, Open):
        return Refused("only Open is answered")
    try:
        return Opened(policy.open(request.path))
    except (OSError, ValueError) as error:
        return Refused(shown(error.strerror or str(error) if isinstance(error, OSError) else str(error)))


def shown(text: str) -> str:
    """Return what may be sent of a text that somebody else has chosen: its beginning, in printable characters."""
    return ascii(text[:MAX_REASON])[1:-1][:MAX_REASON]


def serve(worker: Channel, policy: Policy) -> None:
    """Answer until the worker is gone, breaks the protocol, or does not take its answers."""
    while True:
        reply: Opened | Refused
        try:
            request = worker.recv()
            if isinstance(request, Report):
                print(ascii(request.text)[1:-1])  # at most max_bytes; terminals obey what is not printable
                continue
            reply = answer(request, policy)
        except DecodeError:
            reply = Refused("no message of this protocol")
        except OSError:
            return
        try:
            give(worker, reply)
        except OSError:
            return
        finally:
            if isinstance(reply, Opened):
                reply.file.close()


def give(worker: Channel, reply: Opened | Refused) -> None:
    """Send an answer; a refusal in the place of a file that is none of a file system, though its mode is a regular one's.

    Raises:
        OSError: the worker is gone, or does not take it.
    """
    try:
        worker.send(reply, timeout=PATIENCE)
    except NotSendableError as error:  # as those below /proc and /sys
        worker.send(Refused(shown(str(error))), timeout=PATIENCE)


# --- the worker, which is nobody ---------------------------------------------------------------------------------------


def confine() -> None:
    """Give up everything but what is open: run in the worker, as its first act."""
    os.chroot(".")  # the empty directory that it was started in
    os.chdir("/")
    os.setgroups([])
    os.setregid(NOBODY, NOBODY)
    os.setreuid(NOBODY, NOBODY)


def work(helper: Channel, paths: list[str]) -> int:
    """Report the SHA-256 of each file; return how many were refused."""
    refused = 0
    for path in paths:
        try:
            helper.send(Open(path))
        except (MessageTooLargeError, NotSendableError, UnicodeError) as error:  # too long, or no text
            helper.send(Report(f"{shown(path)}: refused: {shown(str(error))}"))
            refused += 1
            continue
        match helper.recv(timeout=PATIENCE):
            case Opened(handle):
                with handle, open(handle.fileno(), "rb", closefd=False) as file:
                    helper.send(Report(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {shown(path)}"))
            case Refused(reason):
                helper.send(Report(f"{shown(path)}: refused: {reason}"))
                refused += 1
    return refused


def run_worker(command: list[str], policy: Policy, output: int = subprocess.DEVNULL) -> int:
    """Start a worker in an empty directory, serve it, and return its exit status.

    It is a program of its own, so that nothing of the helper's memory is in it, and in a session of its own, without a terminal
    that it could read from or type into.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tempfile.TemporaryDirectory() as empty, Channel(ours, codec=AT_THE_HELPER) as channel:
        os.chmod(empty, 0o555)
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=empty,
                env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        with process:
            try:
                serve(channel, policy)
            finally:  # whatever ends it, nobody waits for a worker that does not end
                channel.close()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
        return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--allow", action="append", default=[], metavar="DIRECTORY", help="files below it may be read"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("privsep.py has privileges to separate only where it is root", file=sys.stderr)
        return 2
    if options.worker is not None:
        with Channel(socket.socket(fileno=options.worker), codec=AT_THE_WORKER) as helper:
            confine()
            return 1 if work(helper, options.paths) else 0
    command = [sys.executable, os.path.abspath(__file__), *options.paths, "--worker"]
    with closing(Policy(options.allow)) as policy:
        return run_worker(command, policy)


if __name__ == "__main__":
    sys.exit(main())
