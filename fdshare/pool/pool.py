"""``Pool``: the state that the submitting threads and the manager thread share, and the rules by which tasks go to workers.

Tasks wait in ``pending`` only while no worker has room for one more.  Every method that says "lock held" does nothing that
waits; futures are settled after the lock was released, since callbacks run then.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any

from fdshare import locks, parcel
from fdshare.errors import FdLimitError
from fdshare.pool import birth
from fdshare.pool.backlog import LARGE
from fdshare.pool.leading import STREAK, Leaders
from fdshare.pool.starting import Starter, limit_told
from fdshare.pool.tasks import CALL, KIND_BITS, Task
from fdshare.pool.workers import START_SECONDS, Worker, new_worker, start_worker

if TYPE_CHECKING:
    from fdshare.pool.manager import Manager

__all__ = ["Pool"]

logger = logging.getLogger("fdshare.pool")

CHOKED_SECONDS = 1.0
"""How long a task whose descriptors the system refuses to carry is tried again, before that is its error."""

_pools: set[weakref.ref[Pool]] = set()

_relics: list[Any] = []
"""In a worker: the pool that its parent has."""


class Pool(Leaders):
    """Workers, tasks, and who gets what."""

    def __init__(
        self,
        max_workers: int,
        context: Any,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        max_tasks: int | None,
        restart: bool,
        max_inflight: int | None,
    ) -> None:
        super().__init__(max_inflight)
        self.max_workers = max_workers
        self.context = context
        self.starter = Starter(context, initializer, initargs, max_tasks, not restart)
        self.forks = self.starter.forks
        self.max_tasks = max_tasks
        self.restart = restart
        # Reentrant: a finalizer or a signal handler may submit in the middle of a submit.
        self.lock = locks.make_rlock()
        self.launching = locks.make_lock()
        self.pending: deque[Task] = deque()
        self.workers: dict[int, Worker] = {}
        self.nascent: list[Worker] = []
        self.idle: list[Worker] = []
        self.starting = 0
        self.short = False  # a dead worker could not be replaced at once: whoever needs one tries again
        self.timed = 0  # tasks at workers that have a time limit
        self.choked = False  # the system refused to carry descriptors: try again soon
        self.outcomes: list[tuple[Task, BaseException]] = []  # tasks to fail once the lock is released
        self.closing = False
        self.kill_at: float | None = None  # when terminate_workers has waited for long enough
        self.start_seconds = START_SECONDS
        self.ended = False  # by terminate_workers or kill_workers: nothing is run again
        self.collected = False  # the executor is gone
        self.broken: BaseException | None = None
        self.abandoned = False  # in a forked child
        self.forking: tuple[int, set[int], list[Any]] | None = None
        """Which thread forks the first workers, what the next one must not keep open, and whose that is."""
        self.manager: Manager | None = None
        self.counts = {"done": 0, "failed": 0, "cancelled": 0, "restarts": 0}
        _pools.add(weakref.ref(self, _pools.discard))

    # --- tasks -------------------------------------------------------------------------------------------------------

    def submit(self, task: Task, message: Any) -> None:
        """Take a task: send it to a worker or queue it.

        Args:
            message: the call as ``encode_call`` made it.

        Raises:
            RuntimeError, BrokenProcessPool: the pool takes none any more.
            OSError: no worker can be started.
        """
        if self.manager is None:
            self.launch()
        tag = task.number << KIND_BITS | CALL
        if type(message) is bytes:
            if len(message) >= LARGE:
                self.admit(task, len(message))
            task.message = parcel.seal(message, tag)
        else:
            admit = partial(self.admit, task)
            with limit_told():
                task.message = parcel.seal(message, tag, self, admit, again=task.retries > 0)
        with self.lock:
            if self.closing or self.broken is not None or self.abandoned:
                self.check_open()
            task.future._task = task
            start = False
            if self.pending or not self._give_somebody(task):
                self.pending.append(task)
                start = self._may_start()
                if start:
                    self.starting += 1
        if self.outcomes:
            self.settle()
        if start:
            self._start_for(task)

    def grow(self) -> None:
        """Start a worker for a call that could not be encoded, as the standard executor does: the next one may be better.

        Raises:
            RuntimeError, BrokenProcessPool, OSError: as for :meth:`submit`.
        """
        if self.manager is None:
            self.launch()
        with self.lock:
            self.check_open()
            start = self._may_start()
            self.starting += start
        if start:
            self.start_one()

    def check_open(self) -> None:
        """Raise where no more tasks are taken."""
        if self.abandoned:
            raise RuntimeError("this pool belongs to the parent process: make one of your own after a fork")
        if self.broken is not None:
            raise BrokenProcessPool(str(self.broken)) from self.broken
        if self.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _give_somebody(self, task: Task) -> bool:
        """Send a task to an idle worker, or to the one with least to do once there are as many workers as may be. Lock held."""
        while self.idle:
            worker = self.idle.pop()
            worker.idle = False
            if worker.has_room and not worker.assigned:
                given = self._give(worker, task)
                if not worker.assigned:  # it was not sent after all
                    self._note_idle(worker)
                return given
        if self._may_start():
            return False
        best = None
        for worker in self.workers.values():
            if worker.has_room and (best is None or len(worker.assigned) < len(best.assigned)):
                best = worker
        return best is not None and self._give(best, task)

    def _may_start(self) -> bool:
        return len(self.workers) + self.starting < self.max_workers and (self.short or not self.forks)

    def _give(self, worker: Worker, task: Task) -> bool:
        """Send a task to a worker; False where that would need waiting.  Lock held."""
        message = task.message
        if message is None or not task.future.start():  # withdrawn
            return True
        assigned = worker.assigned
        if not assigned:
            worker.since = time.monotonic()
        assigned[task.number] = task
        task.worker = worker
        sent = False
        try:
            if worker.masked or self.streak >= STREAK:
                self._mask_ahead(worker, task)
            sent = parcel.send_now(worker.channel, message)
        except FdLimitError as error:
            self._choke(task, error)
        except OSError as error:
            self.doom(task, error)
            task.release()
            return True
        finally:
            if not sent:
                assigned.pop(task.number, None)
                task.worker = None
        if not sent:
            return task.message is None
        if not task.retries:
            if isinstance(message, parcel.Parcel):
                message.close()
            task.message = None
        if worker.left is not None:
            worker.left -= 1
        if task.timeout is not None:
            self.timed += 1
            self.wake()
        return True

    def _choke(self, task: Task, error: FdLimitError) -> None:
        """Too many descriptors are in flight for this user: try again soon, but not for ever.  Lock held."""
        now = time.monotonic()
        if task.choked_since is None:
            task.choked_since = now
        elif now - task.choked_since > CHOKED_SECONDS:
            self.doom(task, error)
            task.release()
            return
        if not self.choked:
            self.choked = True
            self.wake()

    def fill(self, worker: Worker) -> None:
        """Give a worker what it has room for, from the queue or from another worker's inbox.  Lock held."""
        pending = self.pending
        while pending and worker.has_room:
            if worker.assigned and len(pending) <= self.starting:
                break  # those that are being started will run them at once
            task = pending.popleft()
            if not self._give(worker, task):
                pending.appendleft(task)
                break
        if worker.assigned or worker.leaving or worker.left == 0:
            return
        if pending or not worker.ready or not self._steal_for(worker):
            self._note_idle(worker)

    def _note_idle(self, worker: Worker) -> None:
        if not worker.idle:
            # The one that was busy last is asked first: it is awake.  One that is still starting is asked last.
            self.idle.insert(len(self.idle) if worker.ready else 0, worker)
            worker.idle = True  # an interrupt before this leaves it in there twice, which does no harm

    def fill_all(self) -> None:
        """Give all workers what they have room for.  Lock held."""
        for worker in sorted(self.workers.values(), key=lambda worker: len(worker.assigned)):
            if not self.pending:
                return
            self.fill(worker)

    def _steal_for(self, thief: Worker) -> bool:
        """Move to an idle worker half of what the busiest one has not begun; return whether it got any.  Lock held."""
        victim, most = None, 1
        for worker in self.workers.values():
            count = len(worker.assigned) + (not worker.ready)
            if count > most and worker is not thief:
                victim, most = worker, count
        if victim is None:
            return False
        for task in self.take_back(victim, most // 2):
            if not self._give(thief, task):
                self.pending.append(task)
        return bool(thief.assigned)

    def take_back(self, worker: Worker, most: int = 1 << 30) -> list[Task]:
        """Take back tasks that a worker has not begun, oldest first.  Lock held."""
        if worker.masked:
            self.attend(worker)
        try:
            tasks = worker.recall(most)
        except FdLimitError:
            return []  # they stay where they are, and will run there
        self.timed -= sum(task.timeout is not None for task in tasks)
        return tasks

    def requeue(self, tasks: Iterable[Task]) -> None:
        """Put tasks back to the head of the queue, in their order.  Lock held."""
        self.pending.extendleft(reversed(list(tasks)))

    def withdraw(self, task: Task) -> bool:
        """Take a task out of the pool for good, unless a worker has begun it; return whether it was."""
        with self.lock:
            worker = task.worker
            if task.future._task is None or task.decided:
                return False
            if worker is not None:
                tasks = self.take_back(worker)
                if task in tasks:
                    tasks.remove(task)
                    worker = None
                self.requeue(tasks)
                self.fill_all()
            if worker is None:
                task.release()
                self.counts["cancelled"] += 1
        if self.outcomes:
            self.settle()
        return worker is None

    def withdraw_all(self, *, begun_by_order: bool) -> None:
        """Cancel every task that no worker has begun.

        Args:
            begun_by_order: whether the first task of a worker that is still starting counts as begun.
        """
        with self.lock:
            tasks: list[Task] = []
            for worker in self.workers.values():
                oldest = next(iter(worker.assigned.values()), None)
                taken = self.take_back(worker)
                if begun_by_order and taken and taken[0] is oldest and self._give(worker, oldest):
                    del taken[0]
                tasks += taken
            tasks += self.pending
            self.pending.clear()
            tasks = [task for task in tasks if task.message is not None]
            for task in tasks:
                task.release()
            self.counts["cancelled"] += len(tasks)
        for task in tasks:
            task.future.cancel_withdrawn()

    def doom(self, task: Task, error: BaseException) -> None:
        """Note that a task fails, for :meth:`settle`.  Lock held."""
        if task.future._task is not None:
            task.decided = True
            self.outcomes.append((task, error))

    def settle(self) -> None:
        """Fail the tasks noted in ``outcomes``.  The lock must not be held."""
        with self.lock:
            outcomes, self.outcomes = self.outcomes, []
            self.counts["failed"] += len(outcomes)
        for task, error in outcomes:
            task.fail(error)

    def purge(self) -> bool:
        """Drop withdrawn tasks from the head of the queue; return whether any task is left anywhere.  Lock held."""
        while self.pending and self.pending[0].message is None:
            self.pending.popleft()
        return bool(self.pending) or any(worker.assigned for worker in self.workers.values())

    # --- workers -----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the manager thread; and before it all workers that are forked, since a fork copies no threads but their locks."""
        from fdshare.pool.manager import Manager

        with self.launching, limit_told():
            if self.manager is not None:
                return
            if not self.forks:
                birth.check_importing()
            with self.lock:
                self.check_open()
            manager = Manager(self)
            try:
                self.starter.open(self.max_workers)
                if self.forks:
                    self._fork_workers(manager)
                self.manager = manager
                manager.start()
            except BaseException:
                self.manager = None
                for worker in self.workers.values():
                    worker.discard()
                self.workers.clear()
                self.idle.clear()
                manager.close()
                raise

    def _fork_workers(self, manager: Manager) -> None:
        """Fork all workers, and do in between as little as may be: after each fork whatever is written to is copied again."""
        workers: list[Worker] = []
        not_theirs = set(manager.filenos())
        try:
            for _ in range(self.max_workers):
                worker = new_worker(self.max_tasks)
                workers.append(worker)
                not_theirs.update(worker.filenos())
            for worker in workers:
                kept = {worker.inbox.fileno()}
                self.forking = threading.get_ident(), not_theirs - kept, [manager, *workers]
                start_worker(worker, self.nascent, self.starter.start_here)
                not_theirs.update(worker.filenos())
            if self.restart:  # last: the workers begin meanwhile
                self.forking = threading.get_ident(), not_theirs, [manager, *workers]
                self.starter.fork_template()
        except BaseException:
            for worker in workers:
                worker.discard()
            raise
        finally:
            self.forking = None
        for worker in workers:
            self.add_worker(worker, manager)

    def start_one(self, *, again: bool = False) -> None:
        """Start a worker, which ``starting`` counts already.

        Args:
            again: whether it is one in place of a dead one.

        Raises:
            Exception: whatever kept it from starting.
        """
        manager = self.manager
        assert manager is not None
        try:
            with limit_told():
                worker = new_worker(self.max_tasks)
                start_worker(worker, self.nascent, self.starter.start_safely)
        except BaseException:
            with self.lock:
                self.starting -= 1
            raise
        with self.lock:
            self.starting -= 1
            self.counts["restarts"] += again
            self.add_worker(worker, manager)
            if self.broken is not None or self.ended:
                worker.kill()
        if self.closing:
            self.wake()
        if self.outcomes:
            self.settle()

    def add_worker(self, worker: Worker, manager: Manager) -> None:
        """Let a started worker take part.  Lock held, or nobody else there yet."""
        self.workers[worker.pid] = worker
        manager.watch(worker)
        self.fill(worker)
        logger.debug("worker %d started", worker.pid, extra={"worker": worker.pid})

    def _start_for(self, task: Task) -> None:
        """Start a worker because ``task`` waits; where that fails and there is no other, the task is not taken."""
        try:
            self.start_one()
        except BaseException as error:
            with self.lock:
                alone = not self.workers and not self.starting
            if isinstance(error, Exception) and not alone:
                logger.warning("no further worker could be started: %s", error)
                with self.lock:
                    self.fill_all()
                return
            self.withdraw(task)
            raise

    def wake(self) -> None:
        """Make the manager look at what has changed."""
        manager = self.manager
        if manager is not None:
            manager.wake()

    def abandon(self) -> None:
        """In a forked child: let go of everything, which is the parent's."""
        self.abandoned = True
        self.lock = locks.make_rlock()
        self.launching = locks.make_lock()
        if self.forking is not None:
            thread, fds, owners = self.forking
            if thread == threading.get_ident():
                # A worker, one of many: to close each of the others by all its objects would copy hundreds of pages.
                # The objects stay for good, so that none closes a number that is another file's by then.
                _relics.append(self)
                for fd in fds:
                    os.close(fd)
                return
            for owner in owners:
                owner.close()
        for worker in self.workers.values():
            if worker.lead is not None:
                worker.lead.valid = False
            worker.masked = False
            worker.close()
        for worker in self.nascent:  # perhaps this very process, which keeps its inbox
            worker.channel.close()
            if worker.life is not None:
                worker.life.close()
        if self.manager is not None:
            self.manager.close()
        for task in self.pending:
            task.release()
        self.workers, self.nascent, self.idle, self.pending = {}, [], [], deque()


def _abandon_all() -> None:
    pools = list(_pools)
    _pools.clear()
    for reference in pools:
        pool = reference()
        if pool is not None:
            pool.abandon()


os.register_at_fork(after_in_child=_abandon_all)
