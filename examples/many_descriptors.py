"""A thousand open files in one message.

Shows: a message is any object with any number of descriptors inside.  The kernel takes 253 at once; fdshare takes care of the
rest, and the message still arrives whole or not at all.  What occurs twice in a message is sent once, and arrives as one object.

Run::

    python examples/many_descriptors.py --count 1000

Exits with 1 where a file is missing, holds something else, or is not where it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time

from fdshare import Channel, Pipe

SPARE = 100  # descriptors that the interpreter and the channel need besides


def reader(channel: Channel) -> None:
    """The child: read the file under each name, and report what they held."""
    files = channel.recv()
    report = {name: int(file.read()) for name, file in files.items() if name != "first"}
    channel.send((report, files["first"] is files["file 0"]))
    for file in files.values():
        file.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="send many open files in one message")
    parser.add_argument("--count", type=int, default=1000, help="how many (default: %(default)s)")
    count = parser.parse_args().count
    if count < 1:
        parser.error("--count must be at least 1")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            print(
                f"many_descriptors: this system allows {hard} descriptors, {needed} are needed",
                file=sys.stderr,
            )
            return 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))  # the child inherits it

    ours, theirs = Pipe()
    child = multiprocessing.get_context("spawn").Process(target=reader, args=(theirs,))
    child.start()
    theirs.close()

    files = {}
    for number in range(count):
        # It has no name: only its descriptor leads to it.
        file = files[f"file {number}"] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed below
        file.write(b"%d" % number)
        file.seek(0)
    files["first"] = files["file 0"]  # one file under two names

    with ours:
        start = time.perf_counter()
        ours.send(files)
        sending = time.perf_counter() - start
        report, same = ours.recv()
    child.join()
    for file in files.values():
        file.close()

    print(
        f"sent {count:,} open files in one message: {sending * 1e3:.1f} ms, {sending / count * 1e6:.1f} us each"
    )
    print(
        f"process {child.pid} read {len(report):,} of them; the one with two names arrived as one object: {same}"
    )
    expected = {f"file {number}": number for number in range(count)}
    return 0 if report == expected and same and child.exitcode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
