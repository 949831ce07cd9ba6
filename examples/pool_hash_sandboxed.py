"""Hash many files in workers that may not open files themselves: the parent opens, a descriptor is the permission.

    python examples/pool_hash_sandboxed.py examples docs

Each worker becomes `nobody` where the parent is root, and may neither write a file nor start a process.  What it can read is
what the parent chose to open, read-only.  That is a guard against mistakes: a worker that was taken over could answer with a
pickle that runs code in the parent.  Against that, see `privsep.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from fdshare import FdHandle, ProcessPoolExecutor, move

NOBODY = 65534


def enter_sandbox() -> None:
    """Run first in each worker: give up what it does not need."""
    import fdshare.pool.calls  # noqa: F401 -- nothing can be imported afterwards where the directory is private

    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # it starts no process


def digest(name: str, handle: FdHandle) -> tuple[str, str]:
    """Run in a worker: hash a file that was opened elsewhere."""
    with handle, open(handle.fileno(), "rb", closefd=False) as file:
        return name, hashlib.file_digest(file, "sha256").hexdigest()


def may_open(path: str) -> bool:
    """Run in a worker: could it have opened the file itself?"""
    try:
        with open(path, "rb"):
            return True
    except PermissionError:
        return False


def files_under(paths: list[str]) -> Iterator[Path]:
    """Yield the regular files named, and those below the directories named."""
    for path in map(Path, paths):
        yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def main() -> None:
    """Print a line for each file, as sha256sum does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    paths = list(files_under(options.paths))

    def opened() -> Iterator[object]:
        for path in paths:
            yield move(FdHandle(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))

    with ProcessPoolExecutor(options.workers, initializer=enter_sandbox) as pool:
        # No more than 64 files are open at a time, however many there are.
        for name, hexdigest in pool.map(digest, map(str, paths), opened(), buffersize=64):
            print(f"{hexdigest}  {name}")
        private = [str(path) for path in paths if not path.stat().st_mode & 0o007]
        if os.geteuid() == 0 and private:
            verb = "could" if pool.submit(may_open, private[0]).result() else "could not"
            print(f"{private[0]}: the worker itself {verb} open it")


if __name__ == "__main__":
    main()
