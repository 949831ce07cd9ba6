"""The manager thread: waits for answers, deaths, deadlines and shutdown, and sleeps in the kernel in between.

States of a worker, as the parent sees them::

    starting --READY--> ready --(STOP sent, at its limit, or to be killed)--> leaving --pidfd--> gone
        |                 |                                                                       ^
        +-----------------+------------------ pidfd: it died ------------------------------------+

What becomes of a dead worker's tasks: those it has answered are done, as their answers are still in the channel; those still in
its inbox were never begun and run elsewhere; the one that is in neither place is the one it was running.
"""

from __future__ import annotations

import logging
import os
import selectors
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from fdshare import parcel
from fdshare.errors import DecodeError, FdLimitError, PeerClosedError, TaskTimeoutError
from fdshare.handle import FdHandle, own
from fdshare.pool.errors import WorkerDiedError, manner
from fdshare.pool.pool import CHOKED_SECONDS
from fdshare.pool.tasks import (
    ERROR,
    INITIALIZER_FAILED,
    KIND_BITS,
    KIND_MASK,
    READY,
    Task,
)

if TYPE_CHECKING:
    from fdshare.pool.pool import Pool
    from fdshare.pool.workers import Worker

__all__ = ["Manager", "running"]

logger = logging.getLogger("fdshare.pool")

MAX_STARTUP_DEATHS = 4
"""So many workers in a row may die before they are ready; then the pool is broken, rather than starting more for ever."""

BATCH = 64
"""Most answers taken from one worker before the others are looked at."""

CHOKED_TICK = 0.01
"""Seconds until the next try where the system has no room for descriptors; nothing can wake us for that."""

running: set[Manager] = set()
"""Managers whose thread is to be ended before the interpreter exits."""

os.register_at_fork(after_in_child=running.clear)

ABRUPT = "A process in the process pool was terminated abruptly while the future was running or pending."


class Manager(threading.Thread):
    """Settles futures, replaces workers, ends the pool."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(name="fdshare-pool")
        self.pool = pool
        self.exiting = False
        self._poller = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = _wakers()
        self._poller.register(self._wake_reader.fileno(), selectors.EVENT_READ, None)
        self._choked: dict[Worker, float] = {}  # whose answers do not fit into this process, and since when
        self._dying: set[Worker] = set()  # dead, and choked
        self._startup_deaths = 0

    # --- called by any thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        running.add(self)
        try:
            super().start()
        except BaseException:
            running.discard(self)
            raise

    def wake(self) -> None:
        """Make the thread look around."""
        writer = self._wake_writer
        try:
            os.write(writer.fileno(), (1).to_bytes(8, sys.byteorder))
        except OSError:
            pass  # it has ended, or has been told already

    def watch(self, worker: Worker) -> None:
        """Begin to look after a worker."""
        self._poller.register(worker.sentinel(), selectors.EVENT_READ, (worker, True))
        self._poller.register(worker.channel, selectors.EVENT_READ, (worker, False))

    def close(self) -> None:
        """Let go of the descriptors."""
        self._poller.close()
        self._wake_reader.close()
        self._wake_writer.close()

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the pool is shut down and its workers are gone."""
        try:
            while not self._is_over():
                self._turn()
        except BaseException as error:
            logger.critical("the pool's manager has failed", exc_info=True)
            self._break(error)
            raise
        finally:
            self._end()

    def _end(self) -> None:
        """Wait for workers that are left after a failure, and close everything."""
        pool = self.pool
        with pool.lock:
            workers, pool.workers = dict(pool.workers), {}
            pool.closing = True
        for worker in workers.values():
            worker.process.join()
            worker.close()
        running.discard(self)
        with pool.lock:
            self.close()

    def _is_over(self) -> bool:
        """Whether everything is done; tell the workers to stop once no task is left."""
        pool = self.pool
        if not (pool.closing or self.exiting or pool.broken is not None):
            return False
        with pool.lock:
            if pool.starting or pool.purge():
                return False
            for worker in pool.workers.values():
                worker.stop()
            if not pool.workers:
                pool.closing = True
                return True
        return False

    def _turn(self) -> None:
        pool = self.pool
        dead: list[Worker] = []
        for key, _ in self._poller.select(self._timeout()):
            if key.data is None:
                os.read(self._wake_reader.fileno(), 4096)
                continue
            worker, died = key.data
            if died:
                dead.append(worker)
            elif worker not in self._choked:
                self._take_answers(worker)
        for worker in dead:
            self._bury(worker)
        now = time.monotonic()
        if pool.timed:
            self._enforce_limits(now)
        if pool.choked or self._choked:
            self._try_choked(now)
        if pool.outcomes:
            pool.settle()

    def _timeout(self) -> float | None:
        """Seconds until something is due; None while nothing is."""
        pool = self.pool
        due = [CHOKED_TICK] if pool.choked or self._choked else []
        if pool.timed:
            now = time.monotonic()
            with pool.lock:
                for worker in pool.workers.values():
                    if (limit := worker.deadline()) is not None:
                        due.append(max(0.0, limit - now))
        return min(due, default=None)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _take_answers(self, worker: Worker, most: int = BATCH) -> bool:
        """Take what a worker has sent, give it more to do, then settle the futures; return whether there may be more."""
        pool = self.pool
        messages: list[parcel.Message] = []
        try:
            while len(messages) < most:
                message = parcel.receive_now(worker.channel)
                if message is None:
                    break
                messages.append(message)
        except PeerClosedError:
            pass
        except FdLimitError:
            self._choke(worker)
        except OSError as error:  # an answer that was lost on the way: which one, its end will show
            worker.error = error
            worker.kill()
        if not messages:
            return False
        answers = []
        with pool.lock:
            for message in messages:
                tag = parcel.tag_of(message)
                number = tag >> KIND_BITS
                if number:
                    task = worker.assigned.pop(number, None)
                    if task is not None:
                        pool.timed -= task.timeout is not None
                        task.worker = None
                    answers.append((task, tag & KIND_MASK, message))
                else:
                    self._note(worker, tag & KIND_MASK, message)
            if answers:
                worker.note_answers(len(answers), time.monotonic())
            pool.fill(worker)
        for task, kind, message in answers:
            self._settle(worker, task, kind, message)
        return len(messages) == most

    def _note(self, worker: Worker, kind: int, message: parcel.Message) -> None:
        """Take in what a worker tells of itself.  Lock held."""
        if kind == READY:
            worker.ready = True
            worker.since = time.monotonic()
            self._startup_deaths = 0
            return
        worker.leaving = worker.leaves = True
        try:
            worker.refused, worker.error = parcel.open_message(worker.channel, message)
        except BaseException as error:  # noqa: BLE001 -- what it raises is what there is to know
            worker.error = error
        if kind == INITIALIZER_FAILED:
            broken = BrokenProcessPool(
                "a worker's initializer raised an exception, so the pool is not usable anymore: "
                f"{type(worker.error).__name__}: {worker.error}"
            )
            broken.__cause__ = worker.error
            self.pool.broken = broken

    def _settle(self, worker: Worker, task: Task | None, kind: int, message: parcel.Message) -> None:
        counts = self.pool.counts
        try:
            value = parcel.open_message(worker.channel, message)
        except BaseException as error:  # noqa: BLE001 -- sys.exit() while a result is unpickled, too
            value, kind = error, ERROR
        if task is None:  # answered twice: an interrupt between sending and knowing that it was sent
            return
        if kind != ERROR:
            counts["done"] += 1
            task.finish(value)
            return
        counts["failed"] += 1
        if not isinstance(value, BaseException):
            value = DecodeError(f"a task's exception arrived as {type(value).__name__}")
        task.fail(value)

    # --- deaths ------------------------------------------------------------------------------------------------------

    def _bury(self, worker: Worker) -> None:
        """See to what a dead worker has left, and replace it."""
        pool = self.pool
        if worker not in self._dying:
            self._dying.add(worker)
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
                worker.leaving = True
                while recalled := worker.recall(BATCH):
                    pool.timed -= sum(task.timeout is not None for task in recalled)
                    tasks += recalled
        except FdLimitError:
            self._choke(worker)
            return
        finally:
            with pool.lock:
                pool.requeue(task for task in tasks if task.number != worker.refused)
                pool.outcomes += [
                    (task, self._reason(task, worker, None))
                    for task in tasks
                    if task.number == worker.refused
                ]
        self._dying.remove(worker)
        self._poller.unregister(worker.channel)
        worker.process.join()
        self._account_for(worker, worker.process.exitcode)

    def _account_for(self, worker: Worker, exitcode: int | None) -> None:
        """Settle what a dead worker was running, and replace it."""
        pool = self.pool
        with pool.lock:
            lost = list(worker.assigned.values())
            worker.assigned.clear()
            pool.timed -= sum(task.timeout is not None for task in lost)
            pool.workers.pop(worker.pid, None)
            if worker.idle:
                pool.idle.remove(worker)
                worker.idle = False
            expected = not lost and not worker.killed and (worker.left == 0 or worker.leaves)
            self._note_death(worker, exitcode, expected)
            again = []
            for task in lost:
                task.worker = None
                if (
                    task.retries > 0
                    and not task.timed_out
                    and pool.broken is None
                    and task.message is not None
                ):
                    task.retries -= 1
                    again.append(task)
                else:
                    pool.outcomes.append((task, self._reason(task, worker, exitcode)))
            pool.requeue(again)
        worker.close()
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
        if not pool.restart and worker.error is None:
            pool.broken = BrokenProcessPool(
                "A child process terminated abruptly, the process pool is not usable anymore"
            )
        elif self._startup_deaths > MAX_STARTUP_DEATHS:
            pool.broken = BrokenProcessPool(
                f"{self._startup_deaths} workers in a row have died before they were ready, "
                f"the last one by {manner(exitcode)}; the process pool is not usable anymore"
            )

    def _reason(self, task: Task, worker: Worker, exitcode: int | None) -> BaseException:
        """Return the exception for a task that was with a worker when it ended."""
        if task.timed_out:
            return TaskTimeoutError(
                f"the task ran past its limit of {task.timeout:g} s; its worker was killed"
            )
        if worker.error is not None:
            return worker.error
        if not self.pool.restart:
            return BrokenProcessPool(ABRUPT)
        return WorkerDiedError(
            f"worker {worker.pid} died while it ran this task: {manner(exitcode)}",
            pid=worker.pid,
            exitcode=exitcode,
        )

    def _replace(self, expected: bool) -> None:
        """Start another worker where one is missing."""
        pool = self.pool
        with pool.lock:
            over = (pool.closing or self.exiting) and not pool.purge()
            if over or len(pool.workers) + pool.starting >= pool.max_workers:
                pool.fill_all()
                return
            pool.starting += 1
        try:
            pool.start_one()
        except BaseException as error:  # noqa: BLE001 -- too many processes, an interpreter that is ending, …
            logger.warning("a worker could not be replaced: %s", error)
            with pool.lock:
                alone = not pool.workers and not pool.starting
            if alone:
                broken = BrokenProcessPool(f"no worker is left and none can be started: {error}")
                broken.__cause__ = error
                self._break(broken)
                return
        else:
            pool.counts["restarts"] += not expected
        with pool.lock:
            pool.fill_all()

    def _break(self, error: BaseException) -> None:
        """Fail every task and end every worker."""
        pool = self.pool
        with pool.lock:
            if not isinstance(error, BrokenProcessPool):
                broken = BrokenProcessPool(f"the pool's manager has failed: {error!r}")
                broken.__cause__ = error
                error = broken
            pool.broken = error
            tasks = list(pool.pending)
            pool.pending.clear()
            for worker in pool.workers.values():
                tasks += worker.assigned.values()
                worker.assigned.clear()
                worker.kill()
            pool.timed = 0
            for task in tasks:
                if task.future._task is not None:
                    broken = BrokenProcessPool(ABRUPT)
                    broken.__cause__ = error
                    pool.outcomes.append((task, broken))
        pool.settle()

    # --- limits ------------------------------------------------------------------------------------------------------

    def _enforce_limits(self, now: float) -> None:
        """Kill workers whose task runs past its limit, and nobody else's task with them."""
        pool = self.pool
        for worker in list(pool.workers.values()):
            limit = worker.deadline()
            if limit is None or limit > now:
                continue
            with pool.lock:
                worker.leaving = True  # it gets nothing new
                task = next(iter(worker.assigned.values()), None)
                # What it has not begun is taken away, so that it cannot begin anything when it ends this one just now.
                pool.requeue(pool.take_back(worker))
            while self._take_answers(worker):
                pass
            with pool.lock:
                if task is not None and task.number in worker.assigned:
                    task.timed_out = True
                    worker.kill()
                    logger.warning(
                        "task %d is past its limit of %s s: killing worker %d",
                        task.number,
                        task.timeout,
                        worker.pid,
                        extra={"worker": worker.pid, "task": task.number},
                    )
                else:
                    worker.leaving = worker.error is not None
                    worker.since = now
                pool.fill_all()
                if not worker.leaving:
                    pool.fill(worker)

    def _choke(self, worker: Worker) -> None:
        """Put aside a worker whose messages bring more descriptors than fit into this process."""
        self._choked.setdefault(worker, time.monotonic())
        self._poller.unregister(worker.channel)

    def _try_choked(self, now: float) -> None:
        """Try again what had no room for its descriptors, and give up what has waited for too long."""
        pool = self.pool
        for worker, since in list(self._choked.items()):
            if now - since > CHOKED_SECONDS:
                self._drop_one(worker)
                since = now
            del self._choked[worker]
            self._poller.register(worker.channel, selectors.EVENT_READ, (worker, False))
            if worker in self._dying:
                self._bury(worker)
            else:
                self._take_answers(worker)
            if worker in self._choked:
                self._choked[worker] = since
        with pool.lock:
            pool.choked = False
            pool.fill_all()

    def _drop_one(self, worker: Worker) -> None:
        """Fail one task whose answer, or whose call in a dead worker's inbox, brings descriptors that do not fit."""
        pool = self.pool
        dropped = parcel.discard(worker.channel) or parcel.discard(worker.inbox)
        if dropped is None:
            return
        tag, error = dropped
        with pool.lock:
            task = worker.assigned.pop(tag >> KIND_BITS, None)
            if task is not None:
                pool.timed -= task.timeout is not None
                pool.outcomes.append((task, error))


def _wakers() -> tuple[FdHandle, FdHandle]:
    if hasattr(os, "eventfd"):
        reader = own(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return reader, reader
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    return FdHandle(ends[0]), FdHandle(ends[1])
