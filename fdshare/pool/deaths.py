"""What becomes of a dead worker, of its tasks, and of the pool.

Its answers that are still in the channel count.  What is still in its inbox was never begun and runs elsewhere.  The one task
that is in neither place is the one it was running.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from fdshare import system
from fdshare.errors import FdLimitError, TaskTimeoutError
from fdshare.pool import birth
from fdshare.pool.errors import WorkerDiedError, manner

if TYPE_CHECKING:
    from fdshare.pool.pool import Pool
    from fdshare.pool.tasks import Task
    from fdshare.pool.workers import Worker

__all__ = ["Undertaker"]

logger = logging.getLogger("fdshare.pool")

MAX_STARTUP_EXITS = 4
"""So many workers in a row may exit before they are ready; then the pool is broken, rather than starting more for ever."""

MAX_STARTUP_DEATHS = 40
"""The same for all ends: a signal may be somebody else's doing, such as the system's when memory is short.  The fork server
says 255 where it does not know."""

BATCH = 64
"""Most messages taken from one worker before the others are looked at."""

DEATH_TICK = None if system.HAVE_PIDFD else 1.0
"""How often, in seconds, workers are asked for their ends; None where the kernel tells.  Without pidfds the end of a pipe tells,
which a process that the worker forked may hold open."""

UNWATCHED_TICK = 0.2
"""The same for workers of whose ends no descriptor tells, since there are so few."""

ABRUPT = "A process in the process pool was terminated abruptly while the future was running or pending"

FORCED = "A worker process exited while the pool was being forcefully shut down; work that was still enqueued will not be run"
COLLECTED = (
    "The ProcessPoolExecutor was garbage collected with work pending after its last worker process exited upon reaching "
    "max_tasks_per_child; the pending work is not run, as by the standard executor"
)


class Undertaker:
    """The part of the manager that deals with deaths."""

    pool: Pool
    exiting: bool
    _poller: Any
    _choked: dict[Worker, float]
    _dying: set[Worker]
    _unwatched: set[Worker]
    _startup_deaths: int
    _startup_exits: int

    def _take_answers(self, worker: Worker, most: int = BATCH) -> bool:
        raise NotImplementedError

    def _choke(self, worker: Worker) -> None:
        """Put aside a worker whose messages bring more descriptors than fit into this process."""
        if worker not in self._choked:
            self._choked[worker] = time.monotonic()
            self._poller.unregister(worker.channel.fileno())

    def _ended_unseen(self, seen: list[Worker]) -> list[Worker]:
        """Return the workers that have ended without a word."""
        asked = tuple(self._unwatched if system.HAVE_PIDFD else self.pool.workers.values())
        return [
            worker
            for worker in asked
            if worker not in seen and worker not in self._dying and worker.body and worker.body.has_ended()
        ]

    def _bury(self, worker: Worker) -> None:
        """See to what a dead worker has left, and replace it."""
        pool = self.pool
        if worker not in self._dying:
            self._dying.add(worker)
            with pool.lock:
                worker.leaving = True  # it gets nothing new, and nobody reads its answers but this thread
                pool.attend(worker)
            if worker in self._unwatched:
                self._unwatched.discard(worker)
            else:
                self._poller.unregister(worker.sentinel())
        if worker in self._choked:
            return  # its answers wait for room: see _try_choked
        while self._take_answers(worker):
            pass
        if worker in self._choked:
            return
        tasks: list[Task] = []
        try:
            with pool.lock:
                while recalled := worker.recall(BATCH, ended=True):
                    pool.timed -= sum(task.timeout is not None for task in recalled)
                    tasks += recalled
        except FdLimitError:
            self._choke(worker)
            return
        finally:
            with pool.lock:
                pool.requeue(task for task in tasks if task.number != worker.refused)
                for task in tasks:
                    if task.number == worker.refused:
                        pool.doom(task, self._reason(task, worker, None))
        self._dying.remove(worker)
        self._poller.unregister(worker.channel.fileno())
        assert worker.body is not None
        self._account_for(worker, worker.body.reap())

    def _account_for(self, worker: Worker, exitcode: int | None) -> None:
        """Settle what a dead worker was running, and replace it."""
        pool = self.pool
        with pool.lock:
            lost = list(worker.assigned.values())
            worker.assigned.clear()
            pool.timed -= sum(task.timeout is not None for task in lost)
            pool.workers.pop(worker.pid, None)
            pool.idle = [idle for idle in pool.idle if idle is not worker]
            worker.idle = False
            expected = not lost and not worker.killed and (worker.left == 0 or worker.leaves)
            self._note_death(worker, exitcode, expected)
            again = []
            for task in lost:
                task.worker = None
                if (
                    task.retries > 0
                    and not task.timed_out
                    and not pool.ended
                    and pool.broken is None
                    and task.message is not None
                ):
                    task.retries -= 1
                    again.append(task)
                else:
                    pool.doom(task, self._reason(task, worker, exitcode))
            pool.requeue(again)
            pool.dismiss(worker)
        if pool.broken is not None:
            self._break(pool.broken)
            return
        self._replace(expected)

    def _note_death(self, worker: Worker, exitcode: int | None, expected: bool) -> None:
        """Log a death, and break the pool where that is called for.  Lock held."""
        pool = self.pool
        what = {"worker": worker.pid, "exitcode": exitcode}
        if expected:
            logger.debug("worker %d has left", worker.pid, extra=what)
            return
        logger.warning("worker %d has died: %s", worker.pid, manner(exitcode), extra=what)
        if pool.broken is not None:
            return
        if not worker.ready:
            self._startup_deaths += 1
            self._startup_exits += exitcode in range(255)
        if not worker.ready and exitcode in birth.REASONS:  # the next would do the same
            pool.broken = BrokenProcessPool(birth.REASONS[exitcode])
        elif not pool.restart and worker.error is None:
            pool.broken = BrokenProcessPool(
                f"A child process terminated abruptly ({manner(exitcode)}), the process pool is not usable anymore"
            )
        elif self._startup_exits > MAX_STARTUP_EXITS or self._startup_deaths > MAX_STARTUP_DEATHS:
            pool.broken = BrokenProcessPool(
                f"{self._startup_deaths} workers in a row have died before they were ready, "
                f"the last one by {manner(exitcode)}; the process pool is not usable anymore"
            )

    def _reason(self, task: Task, worker: Worker, exitcode: int | None) -> BaseException:
        """Return the exception for a task that was with a worker when it ended."""
        if task.timed_out and not worker.ready:
            return TaskTimeoutError(
                f"the task's limit of {task.timeout:g} s has passed, and its worker was not ready to begin it"
            )
        if task.timed_out:
            return TaskTimeoutError(
                f"the task ran past its limit of {task.timeout:g} s; its worker was killed"
            )
        if worker.error is not None:
            return worker.error
        if not self.pool.restart:
            return BrokenProcessPool(f"{ABRUPT} ({manner(exitcode)}).")
        return WorkerDiedError(
            f"worker {worker.pid} died while it ran this task: {manner(exitcode)}",
            pid=worker.pid,
            exitcode=exitcode,
        )

    def _replace(self, expected: bool) -> None:
        """Start another worker where one is missing."""
        pool = self.pool
        with pool.lock:
            hindrance = self._hindrance()
            over = (pool.closing or self.exiting) and not self._has_work_for_another()
            wanted = not (hindrance or over) and len(pool.workers) + pool.starting < pool.max_workers
            pool.starting += wanted
            stranded = hindrance and pool.purge() and not (pool.workers or pool.starting)
        if stranded:
            self._break(BrokenProcessPool(hindrance))
        elif not wanted or self._start_another(again=not expected):
            with pool.lock:
                pool.fill_all()

    def _hindrance(self) -> str | None:
        """Say why a worker that has left is not replaced, although there may be work; None where it is.  Lock held."""
        pool = self.pool
        if pool.ended:  # who follows would escape the kill
            return FORCED
        if pool.collected and not pool.restart:
            return COLLECTED
        return None

    def _start_another(self, *, again: bool) -> bool:
        """Start a worker, which ``starting`` counts already; return whether tasks may go on."""
        pool = self.pool
        try:
            pool.start_one(again=again)
        except BaseException as error:  # noqa: BLE001 -- too many processes, an interpreter that is ending, …
            logger.warning("a worker could not be replaced: %s", error)
            with pool.lock:
                pool.short = True
                alone = not pool.workers and not pool.starting
                if alone and isinstance(error, FdLimitError):  # which whoever submits next is told
                    for task in pool.pending:
                        pool.doom(task, error)
                    pool.pending.clear()
                    return False
            if alone:
                broken = BrokenProcessPool(
                    f"A replacement worker process could not be started, and no other is left: {error}"
                )
                broken.__cause__ = error
                self._break(broken)
                return False
        return True

    def _has_work_for_another(self) -> bool:
        """Whether a further worker would find something to do.  Lock held."""
        pool = self.pool
        pool.purge()
        return bool(pool.pending) or any(len(worker.assigned) > 1 for worker in pool.workers.values())

    def _break(self, error: BaseException) -> None:
        """Fail every task and end every worker."""
        pool = self.pool
        with pool.lock:
            if not isinstance(error, BrokenProcessPool):
                broken = BrokenProcessPool(f"the pool's manager has failed: {error!r}")
                broken.__cause__ = error
                error = broken
            pool.broken = error
            pool.let_go()
            tasks = list(pool.pending)
            pool.pending.clear()
            pool.attend_all()
            for worker in pool.workers.values():
                tasks += worker.assigned.values()
                worker.assigned.clear()
                worker.kill()
            pool.timed = 0
            for task in tasks:
                broken = BrokenProcessPool(f"{ABRUPT}: {error}")
                broken.__cause__ = error
                pool.doom(task, broken)
        pool.settle()
