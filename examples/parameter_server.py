"""Several processes train one model: its parameters are an array in shared memory, a lock guards them, one process is killed.

    python examples/parameter_server.py --workers 3 --steps 200

Each worker reads the parameters, computes a gradient from data of its own, and puts it into the array, all in place: nothing is
sent but the array and the lock, once.  One worker kills itself while it holds the lock and has written half of its step.
The kernel releases the lock, the next holder is told so, and repairs what was left half done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal

import numpy as np
from numpy.typing import NDArray

from fdshare import Lock, shared_array

TRUTH = np.array([2.0, -3.0, 0.5, 1.0])
RATE = 0.05

Array = NDArray[np.float64]


def repair(model: Array, backup: Array) -> None:
    """Run by whoever gets the lock after a holder died: put back what was there before its step."""
    model[:] = backup


def train(
    seed: int, steps: int, dies: bool, model: Array, backup: Array, counts: NDArray[np.int64], lock: Lock
) -> None:
    """Run in a worker: take ``steps`` steps, each with a few measurements of its own."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        x = random.normal(size=(16, len(TRUTH)))
        y = x @ TRUTH + random.normal(scale=0.01, size=16)
        with lock:
            if lock.abandoned:
                repair(model, backup)
                counts[1] += 1
            now = model.copy()
        change = RATE * x.T @ (y - x @ now) / len(y)  # the work, outside of the lock
        with lock:
            if lock.abandoned:
                repair(model, backup)
                counts[1] += 1
            backup[:] = model
            if dies and step == steps // 2:
                model[:2] = np.nan  # half written
                os.kill(os.getpid(), signal.SIGKILL)
            model += change
            counts[0] += 1


def main() -> None:
    """Train, and see what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    model, backup = shared_array((2, len(TRUTH)))
    counts = shared_array(2, np.int64)  # steps taken, repairs
    lock = Lock()
    workers = [
        context.Process(target=train, args=(seed, options.steps, seed == 0, model, backup, counts, lock))
        for seed in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with lock:
        if lock.abandoned:
            repair(model, backup)
            counts[1] += 1
    killed = [worker.exitcode for worker in workers].count(-signal.SIGKILL)
    expected = (options.workers - 1) * options.steps + options.steps // 2
    error = float(np.abs(model - TRUTH).max())
    print(
        f"{counts[0]} steps by {options.workers} workers, {killed} killed inside the lock, {counts[1]} repair"
    )
    print(f"the model is {np.round(model, 2).tolist()}, off by {error:.3f} at most")
    good = killed == 1 and counts.tolist() == [expected, 1] and error < 0.1
    lock.close()
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
