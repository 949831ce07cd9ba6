"""A work queue of open files: finders open them and exit, workers that open nothing hash them, one worker is killed.

    python examples/work_queue.py --workers 3 fdshare docs

The queue is two descriptors; whoever has them puts and gets, and an item is an open file.  What a finder has put outlives
it.  What a worker has taken is gone with it, so each says what it takes before it works; the main program waits for
reports and for the end of workers at once, and puts the file of one that died into the queue again.  Linux only, for
``ProcessHandle``.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import fdshare
from fdshare import ProcessHandle, Queue, Semaphore, move


def find(folder: Path, tasks: Queue, reports: Queue) -> None:
    """Run in a finder: open what is in a folder, put it into the queue, and exit."""
    found = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        tasks.put((path, move(path.open("rb"))))
        found += 1
    reports.put(("found", os.getpid(), found, None))


def work(tasks: Queue, reports: Queue, deaths: Semaphore) -> None:
    """Run in a worker: hash files until the queue is closed, or die over one, as long as deaths are left."""
    for path, file in tasks:
        with file:
            reports.put(("took", os.getpid(), path, None))
            if deaths.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGKILL)
            reports.put(("done", os.getpid(), path, hashlib.file_digest(file, "sha256").hexdigest()))


def collect(tasks: Queue, reports: Queue, finders: int, workers: set[ProcessHandle]) -> dict[Path, str]:
    """Wait for the hash of every file that was found; put again what dead workers had taken."""
    expected = 0
    digests: dict[Path, str] = {}
    taken: dict[int, Path] = {}
    while finders or len(digests) < expected:
        ready = fdshare.wait([reports, *workers])
        while not reports.empty():
            what, pid, value, digest = reports.get()
            if what == "found":
                finders, expected = finders - 1, expected + value
            elif what == "took":
                taken[pid] = value
            else:
                digests[taken.pop(pid)] = digest
        for worker in workers & set(ready):  # its reports were all there before its end
            workers.remove(worker)
            path = taken.pop(worker.pid, None)
            print(f"a worker ended with {worker.exitcode} and had taken {path}")
            if path is not None:
                tasks.put((path, move(path.open("rb"))))
    return digests


def main() -> None:
    """Hash the files of some folders, and see that none was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    with Queue() as tasks, Queue() as reports:
        finders = [context.Process(target=find, args=(folder, tasks, reports)) for folder in options.folders]
        deaths = Semaphore(1)
        workers = [
            context.Process(target=work, args=(tasks, reports, deaths)) for _ in range(options.workers)
        ]
        for process in finders + workers:
            process.start()
        handles = {ProcessHandle(worker) for worker in workers}
        digests = collect(tasks, reports, len(finders), handles)
        tasks.close()  # the workers' loops end
        for process in finders + workers:
            process.join()

    killed = [worker.exitcode for worker in workers].count(-signal.SIGKILL)
    wrong = [
        path
        for folder in options.folders
        for path in folder.rglob("*")
        if path.is_file() and digests.get(path) != hashlib.sha256(path.read_bytes()).hexdigest()
    ]
    print(
        f"{len(digests)} files by {options.workers} workers, {killed} killed, {len(wrong)} wrong or missing"
    )
    raise SystemExit(bool(wrong) or killed != 1)


if __name__ == "__main__":
    main()
