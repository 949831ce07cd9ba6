"""A cat whose child opens the files: the parent never calls open().

Shows: a descriptor is a permission that travels.  The child may run as another user, in another root directory or with
other rights; it opens what it is asked for and sends the open file back over a Channel.  The parent gets an ordinary
file object and reads on from there, with no copying through the child.

Run::

    python examples/cat_child.py README.md LICENSE

The files' bytes go to standard output, the account to standard error.  Exits with 1 where a file cannot be opened.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys

from fdshare import Channel, Pipe, move


def opener(channel: Channel) -> None:
    """The child: open each path that arrives, answer with the open file or with the error."""
    for path in channel:  # ends when the parent closes its side
        try:
            file = open(path, "rb")  # noqa: SIM115 -- it is given away
        except OSError as error:
            channel.send(error)
        else:
            channel.send(move(file))  # move: our own copy closes once the message is with the kernel


def main() -> int:
    parser = argparse.ArgumentParser(description="print files that a child process opens")
    parser.add_argument("file", nargs="+")
    paths = parser.parse_args().file

    ours, theirs = Pipe()
    child = multiprocessing.get_context("spawn").Process(target=opener, args=(theirs,))
    child.start()
    theirs.close()  # the child has its own now; holding on to it would hide the child's end from us

    failures = 0
    with ours:
        for path in paths:
            ours.send(path)
            answer = ours.recv()
            if isinstance(answer, OSError):
                print(f"cat_child: {path}: {answer.strerror}", file=sys.stderr)
                failures += 1
                continue
            with answer as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.flush()
                print(
                    f"cat_child: {path}: opened by process {child.pid}, read by process {os.getpid()} "
                    f"as descriptor {file.fileno()}, {file.tell():,} bytes",
                    file=sys.stderr,
                )
    child.join()
    return 1 if failures or child.exitcode else 0


if __name__ == "__main__":
    sys.exit(main())
