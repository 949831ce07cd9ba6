"""The manager thread: waits for answers, deaths, deadlines and shutdown, and sleeps in the kernel in between.

States of a worker, as the parent sees them::

    starting --READY--> ready --(STOP sent, at its limit, or to be killed)--> leaving --pidfd--> gone
        |                 |                                                                       ^
        +-----------------+------------------ pidfd: it died ------------------------------------+
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from fdshare import parcel, recycle, system
from fdshare.errors import DecodeError, FdLimitError, PeerClosedError
from fdshare.handle import FdHandle, own, own_pipe
from fdshare.pool.calls import typed
from fdshare.pool.deaths import BATCH, DEATH_TICK, UNWATCHED_TICK, Undertaker
from fdshare.pool.poller import Poller
from fdshare.pool.pool import CHOKED_SECONDS
from fdshare.pool.raised import explain
from fdshare.pool.tasks import (
    ERROR,
    INITIALIZER_FAILED,
    KIND_BITS,
    KIND_MASK,
    READY,
    Task,
)
from fdshare.pool.workers import MAX_START_SECONDS, START_FACTOR

if TYPE_CHECKING:
    from fdshare.pool.pool import Pool
    from fdshare.pool.workers import Worker

__all__ = ["Manager", "running"]

logger = logging.getLogger("fdshare.pool")

CHOKED_TICK = 0.01
"""Seconds until the next try where the system has no room for descriptors; nothing can wake us for that."""

running: set[Manager] = set()
"""Managers whose thread is to be ended before the interpreter exits."""

os.register_at_fork(after_in_child=running.clear)


class Manager(Undertaker, threading.Thread):
    """Settles futures, replaces workers, ends the pool."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(name="fdshare-pool")
        self.pool = pool
        self.exiting = False
        self._poller = Poller()
        self._wake_reader, self._wake_writer = _wakers()
        self._poller.register(self._wake_reader.fileno(), None)
        self._choked: dict[Worker, float] = {}  # whose answers do not fit into this process, and since when
        self._dying: set[Worker] = set()  # dead, and choked
        self._unwatched: set[Worker] = set()  # of whose ends no descriptor tells
        self._startup_deaths = self._startup_exits = 0

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
        sentinel = worker.sentinel()
        if sentinel is None:
            self._unwatched.add(worker)
            self.wake()
        else:
            self._poller.register(sentinel, (worker, True))
        self._poller.register(worker.channel.fileno(), (worker, False))
        if not self._poller.sees_changes:
            self.wake()

    def mask(self, worker: Worker) -> bool:
        """See a worker's answers no more for a while; return whether that is possible.  The pool's lock is held."""
        masked: bool = self._poller.mask(worker.channel.fileno())
        return masked

    def unmask(self, worker: Worker) -> None:
        """See them again.  The pool's lock is held."""
        self._poller.unmask(worker.channel.fileno())

    def filenos(self) -> list[int]:
        """Borrow the descriptors that a fork inherits."""
        wakers = {self._wake_reader.fileno(), self._wake_writer.fileno()}
        return [*self._poller.filenos(), *wakers, *self.pool.starter.filenos()]

    def close(self) -> None:
        """Let go of the descriptors, and in the parent of what workers have in common."""
        if self.pool.abandoned:
            self.pool.starter.let_go()
        else:
            self.pool.starter.close()
        self._poller.close()
        self._wake_reader.close()
        self._wake_writer.close()

    # --- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the pool is shut down and its workers are gone."""
        with self.pool.launching:
            if self.pool.manager is not self:  # an interrupt has undone the start
                return
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
            pool.attend_all()
            workers, pool.workers = dict(pool.workers), {}
            pool.closing = True
            pool.let_go()
            pool.starter.forget_setup()  # for whoever counts references to it
        for worker in workers.values():
            if worker.body is not None:
                worker.body.reap()
            with pool.lock:
                pool.dismiss(worker)
        running.discard(self)
        recycle.leave(pool)
        with pool.lock:
            self.close()

    def _is_over(self) -> bool:
        """Whether everything is done; tell the workers to stop once no task is left."""
        pool = self.pool
        if not (pool.closing or self.exiting or pool.broken is not None):
            return False
        with pool.lock:
            pool.attend_all()
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
        for data in recycle.idly(self._poller.poll, self._timeout()):
            if data is None:
                self._clear_wake()
                self._take_what_leaders_left()
                continue
            worker, died = data
            if died:
                dead.append(worker)
            elif worker not in self._choked and not worker.masked:  # masked since it was polled
                self._take_answers(worker)
        if DEATH_TICK is not None or self._unwatched:
            dead += self._ended_unseen(dead)
        for worker in dead:
            self._bury(worker)
        now = time.monotonic()
        if pool.timed:
            self._enforce_limits(now)
        if pool.kill_at is not None and now >= pool.kill_at:
            self._kill_all()
        if pool.choked or self._choked:
            self._try_choked(now)
        if pool.outcomes:
            pool.settle()

    def _clear_wake(self) -> None:
        try:
            os.read(self._wake_reader.fileno(), 4096)
        except BlockingIOError:
            pass

    def _take_what_leaders_left(self) -> None:
        """Take answers that are no longer in the kernel, which would tell of them."""
        pool = self.pool
        for worker in list(pool.workers.values()):
            if worker.unread is not None or parcel.has_arrived(worker.channel):
                self._take_answers(worker)
        if pool.untended:
            with pool.lock:
                pool.tend()

    def _timeout(self) -> float | None:
        """Seconds until something is due; None while nothing is."""
        pool = self.pool
        tick = UNWATCHED_TICK if self._unwatched else DEATH_TICK
        if not (pool.timed or pool.choked or self._choked or pool.kill_at):
            return tick
        due = [] if tick is None else [tick]
        due += [CHOKED_TICK] if pool.choked or self._choked else []
        now = time.monotonic()
        due += [] if pool.kill_at is None else [max(0.0, pool.kill_at - now)]
        if pool.timed:
            with pool.lock:
                for worker in pool.workers.values():
                    if (limit := worker.deadline(pool.start_seconds)) is not None:
                        due.append(max(0.0, limit - now))
        return min(due, default=None)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _take_answers(self, worker: Worker, most: int = BATCH) -> bool:
        """Take what a worker has sent, give it more to do, then settle the futures; return whether there was anything."""
        pool = self.pool
        answers = []
        with pool.lock:
            if worker.lead is not None and worker.lead.valid:
                return False
            messages = self._receive(worker, most)
            for message in messages:
                tag = parcel.tag_of(message)
                number = tag >> KIND_BITS
                if number:
                    task = worker.assigned.pop(number, None)
                    if task is not None:
                        pool.timed -= task.timeout is not None
                        task.worker = None
                        task.decided = True
                    answers.append((task, tag & KIND_MASK, message))
                else:
                    self._note(worker, tag & KIND_MASK, message)
            if answers:
                worker.note_answers(len(answers), time.monotonic())
            if messages:
                pool.fill(worker)
        for task, kind, message in answers:
            self._settle(worker, task, kind, message)
        return bool(messages)

    def _receive(self, worker: Worker, most: int) -> list[parcel.Message]:
        """Take the messages that have come from a worker.  Lock held."""
        messages: list[parcel.Message] = []
        if worker.unread is not None:
            messages.append(worker.unread)
            worker.unread = None
        try:
            while len(messages) < most:
                message = parcel.receive_now(worker.channel)
                if message is None:
                    break
                messages.append(message)
                if len(messages) == len(worker.assigned):
                    break  # there can be no more, so save looking
        except PeerClosedError:
            pass
        except FdLimitError:
            self._choke(worker)
        except OSError as error:  # an answer that was lost on the way: which one, its end will show
            worker.error = error
            worker.kill()
        return messages

    def _note(self, worker: Worker, kind: int, message: parcel.Message) -> None:
        """Take in what a worker tells of itself.  Lock held."""
        if kind == READY:
            worker.ready = True
            worker.since = now = time.monotonic()
            self.pool.start_seconds = max(self.pool.start_seconds, START_FACTOR * (now - worker.begun))
            self._startup_deaths = self._startup_exits = 0
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
            value = typed(error, DecodeError)
            if kind == ERROR:
                explain(value)
            kind = ERROR
            if not self.pool.restart and task is not None:
                self._break_by_answer(task, error)
                return
        if task is None:  # answered twice: an interrupt between sending and knowing that it was sent
            return
        if kind != ERROR:
            counts["done"] += 1
            task.finish(value)
            return
        counts["failed"] += 1
        if not isinstance(value, BaseException):
            value = DecodeError(f"a task's exception arrived as {type(value).__name__}")
            explain(value)
        task.fail(value)

    def _break_by_answer(self, task: Task, error: BaseException) -> None:
        """Do as the standard executor does with a result that cannot be decoded."""
        broken = BrokenProcessPool("A result cannot be decoded, the process pool is not usable anymore")
        broken.__cause__ = error
        task.fail(broken)
        self._break(broken)

    # --- limits ------------------------------------------------------------------------------------------------------

    def _enforce_limits(self, now: float) -> None:
        """Kill workers whose task runs past its limit, and nobody else's task with them."""
        pool = self.pool
        for worker in list(pool.workers.values()):
            limit = worker.deadline(pool.start_seconds)
            if limit is None or limit > now:
                continue
            if not worker.ready:
                self._give_up_start(worker)
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

    def _give_up_start(self, worker: Worker) -> None:
        """Kill a worker that does not get ready, and fail the tasks with a limit that wait for it."""
        pool = self.pool
        while self._take_answers(worker):
            pass
        with pool.lock:
            if worker.ready or worker.leaving:
                return
            worker.leaving = True
            waiting = pool.take_back(worker)
            pool.requeue(task for task in waiting if task.timeout is None)
            for task in (*waiting, *worker.assigned.values()):
                if task.timeout is not None:
                    task.timed_out = True
                    if task.worker is None:
                        pool.doom(task, self._reason(task, worker, None))
            logger.warning(
                "worker %d does not get ready: killing it", worker.pid, extra={"worker": worker.pid}
            )
            worker.kill()
            # It may be slow, and not stuck: the next one gets more time, so that tasks come to run in the end.
            pool.start_seconds = min(2 * pool.start_seconds, MAX_START_SECONDS)
            pool.fill_all()

    def _kill_all(self) -> None:
        """End workers that SIGTERM does not end."""
        pool = self.pool
        with pool.lock:
            pool.kill_at = None
            for worker in pool.workers.values():
                logger.warning(
                    "worker %d has outlived SIGTERM: killing it", worker.pid, extra={"worker": worker.pid}
                )
                worker.kill()

    def _try_choked(self, now: float) -> None:
        """Try again what had no room for its descriptors, and give up what has waited for too long."""
        pool = self.pool
        for worker, since in list(self._choked.items()):
            if now - since > CHOKED_SECONDS:
                self._drop_one(worker)
                since = now
            del self._choked[worker]
            with pool.lock:
                self._poller.register(worker.channel.fileno(), (worker, False))
                if worker.masked:
                    self.mask(worker)
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
                pool.doom(task, error)


def _wakers() -> tuple[FdHandle, FdHandle]:
    if system.HAVE_EVENTFD:
        reader = own(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return reader, reader
    ends = own_pipe()
    for end in ends:
        os.set_blocking(end.fileno(), False)
    return ends
