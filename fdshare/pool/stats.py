"""``PoolStats``: what a pool is doing, as a snapshot."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import attrs

from fdshare.pool.futures import TaskFuture

if TYPE_CHECKING:
    from fdshare.pool.pool import Pool
    from fdshare.pool.workers import Worker

__all__ = ["PoolStats", "WorkerStats", "stats_of"]


@attrs.frozen
class WorkerStats:
    """One worker."""

    pid: int
    state: str
    """"starting", "idle", "busy" or "leaving"."""
    task_age: float | None
    """Seconds since its present task began, at most; None without one."""
    queued: int
    """Tasks in its inbox, not begun."""
    done: int
    """Tasks it has answered."""
    resident: int | None
    """Bytes of memory it occupies; None where the system does not tell."""


@attrs.frozen
class PoolStats:
    """A pool at one moment; the counts are of tasks since its beginning."""

    workers: tuple[WorkerStats, ...]
    queued: int
    """Tasks that no worker has begun."""
    running: int
    done: int
    """Tasks that gave a result."""
    failed: int
    """Tasks that ended with an exception, their own or the pool's."""
    cancelled: int
    restarts: int
    """Workers that were started in place of dead ones."""


def _settle_unseen(pool: Pool) -> None:
    """Have answers read that have come and that nobody waits for: the manager may not see those, see leading.py."""
    with pool.lock:
        workers = [worker for worker in pool.workers.values() if worker.masked and worker.lead is None]
        futures = [task.future for worker in workers for task in worker.assigned.values()]
    for future in futures:
        if isinstance(future, TaskFuture):
            future.done()


def stats_of(pool: Pool) -> PoolStats:
    """Take the snapshot."""
    _settle_unseen(pool)
    with pool.lock:
        now = time.monotonic()
        workers = tuple(_worker_stats(worker, now) for worker in pool.workers.values())
        running = sum(worker.state == "busy" for worker in workers)
        queued = sum(task.message is not None for task in pool.pending)
        return PoolStats(
            workers=workers,
            queued=queued + sum(worker.queued for worker in workers),
            running=running,
            done=pool.counts["done"],
            failed=pool.counts["failed"],
            cancelled=pool.counts["cancelled"],
            restarts=pool.counts["restarts"],
        )


def _worker_stats(worker: Worker, now: float) -> WorkerStats:
    held = len(worker.assigned)
    busy = held > 0 and worker.ready
    if worker.leaving:
        state = "leaving"
    elif not worker.ready:
        state = "starting"
    else:
        state = "busy" if busy else "idle"
    return WorkerStats(
        pid=worker.pid,
        state=state,
        task_age=now - worker.since if busy else None,
        queued=held - 1 if busy else held,
        done=worker.done,
        resident=_resident(worker.pid),
    )


def _resident(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None
