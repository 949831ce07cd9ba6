"""One of two unrelated processes: opens a file and sends its descriptor to whoever listens on a socket path.

Shows: ``send_fds``, bare SCM_RIGHTS.  The peer needs no fdshare, nor Python: it gets one message, a line with the file's
name and one descriptor.  Its partner is fd_receiver.py.

Run, in two terminals::

    python examples/fd_receiver.py /tmp/fds.sock
    python examples/fd_sender.py /tmp/fds.sock README.md

Exits with 1 where the file cannot be opened or nobody listens.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

from fdshare import send_fds


def main() -> int:
    parser = argparse.ArgumentParser(description="send an open file to the process that listens on a socket")
    parser.add_argument("socket", help="path of the listening AF_UNIX socket")
    parser.add_argument("file")
    options = parser.parse_args()

    try:
        with open(options.file, "rb") as file, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(options.socket)
            line = os.fsencode(os.path.basename(options.file)) + b"\n"
            sent = send_fds(sock, [line], [file])
            if sent < len(line):  # a stream may take less; the descriptors went with the first byte
                sock.sendall(line[sent:])
            print(f"process {os.getpid()} sent its descriptor {file.fileno()}, {options.file}")
    except OSError as error:
        print(f"fd_sender: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
