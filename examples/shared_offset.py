"""Two processes, one open file, one offset.

Shows: sending a file duplicates its descriptor, as dup(2) does, and both descriptors name one *open file description*: where
one process writes, the other goes on.  Opening the file a second time by its name gives a description, and an offset, of its
own.  The files are unbuffered here, so that every write is one system call; what a buffered writer still holds is flushed
when it is sent.

Run::

    python examples/shared_offset.py

Exits with 1 where the offsets are not as they should be.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile

from fdshare import Channel, Pipe

TURNS = 3


def writer(channel: Channel) -> None:
    """The child: receive the file, then write one line on each request, and tell where it began and ended."""
    with channel.recv() as file:
        for turn in channel:
            began = file.tell()
            file.write(b"turn %d, child\n" % turn)
            channel.send((began, file.tell()))


def main() -> int:
    ours, theirs = Pipe()
    child = multiprocessing.get_context("spawn").Process(target=writer, args=(theirs,))
    child.start()
    theirs.close()

    errors = []
    with tempfile.NamedTemporaryFile(buffering=0) as named, open(named.name, "r+b", buffering=0) as file:
        with ours:
            ours.send(file)
            for turn in range(TURNS):
                began = file.tell()
                file.write(b"turn %d, parent\n" % turn)
                middle = file.tell()
                ours.send(turn)
                child_began, child_ended = ours.recv()
                print(
                    f"turn {turn}: parent wrote {began} to {middle}, child wrote {child_began} to {child_ended}"
                )
                if child_began != middle or file.tell() != child_ended:
                    errors.append(f"turn {turn}: the offset is not shared")
        with open(named.name, "rb", buffering=0) as again:
            print(f"opened again by name: offset {again.tell()}, while the shared one is {file.tell()}")
            content = again.readall()
        expected = b"".join(b"turn %d, parent\nturn %d, child\n" % (turn, turn) for turn in range(TURNS))
        if content != expected:
            errors.append(f"the file holds {content!r}")
        print(f"the file holds {len(content.splitlines())} lines, none overwritten")
    child.join()
    if child.exitcode:
        errors.append(f"the child ended with {child.exitcode}")
    for error in errors:
        print(f"shared_offset: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
