"""The other of two unrelated processes: listens on a socket path, receives one open file and prints it.

Shows: ``recv_fds``, bare SCM_RIGHTS.  What arrives is an ``FdHandle``, the descriptor's only owner, close-on-exec from its
first moment; ``to_file()`` consumes it into an ordinary file object.  Its partner is fd_sender.py, or any program in any
language that sends a line and a descriptor.

Run, in two terminals::

    python examples/fd_receiver.py /tmp/fds.sock
    python examples/fd_sender.py /tmp/fds.sock README.md

The file's bytes go to standard output, the account to standard error.  Exits with 1 where anything but one descriptor comes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys

from fdshare import FdHandle, recv_fds


def main() -> int:
    parser = argparse.ArgumentParser(description="receive one open file over a socket and print it")
    parser.add_argument("socket", help="path to listen on; it must not exist yet")
    path = parser.parse_args().socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)  # only this user may connect (Linux wants write permission for that)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        try:
            listener.listen(1)
            print(f"fd_receiver: process {os.getpid()} listens on {path}", file=sys.stderr, flush=True)
            peer, _ = listener.accept()
        finally:
            os.unlink(path)

    data = b""
    handles: list[FdHandle] = []
    with peer:
        while not data.endswith(b"\n"):  # a stream: the line may come in pieces
            more, received = recv_fds(peer, 4096, 1)  # each time: a plain recv() throws descriptors away
            data += more
            handles += received
            if not more:
                break
    if len(handles) != 1:
        for handle in handles:
            handle.close()
        print(f"fd_receiver: expected one descriptor, got {len(handles)}", file=sys.stderr)
        return 1
    number = handles[0].fileno()
    with handles[0].to_file("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.flush()
        name = ascii(os.fsdecode(data.rstrip(b"\n")))[1:-1]  # terminals obey what is not printable
        print(f"fd_receiver: {name} came as descriptor {number}, {file.tell():,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
