"""The thread that waits for an answer reads it itself, where it is the only one at that worker: no thread between, no switch.

Otherwise the manager thread reads, and wakes whoever waits: that takes two changes of thread more, three times as long.  A
worker's channel has one reader at a time::

    the manager --lead(): its only task is mine, nobody else looks at my future--> the leader
        ^                                                                             |
        +-- the answer is here, is not simple, or an interrupt ----- it leaves -------+
        |                                                                             |
        +-- attend(): somebody else has an interest --------- it is sent away --------+

The leader only looks whether something has come; it takes a message under the pool's lock and only while it leads.  So it
can be sent away at any time, also while its thread is in a signal handler and will not notice for long: whoever gives the
worker a second task, wants to cancel one, adds a callback, waits for the same future, or shuts the pool down does that.
In the manager's epoll the channel is masked meanwhile, and nobody wakes the manager in vain.

A signal handler that raises may strike after any call (see rights.py).  A message that was taken stays in ``worker.unread``
until its future is settled, and settling is a row of assignments.  What an interrupt leaves behind, the manager does.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import time
from collections import deque
from concurrent.futures import _base as states
from typing import TYPE_CHECKING

from fdshare import parcel, system
from fdshare.handle import FdHandle, own
from fdshare.pool.backlog import Backlog
from fdshare.pool.tasks import ERROR, KIND_BITS, KIND_MASK, RESULT

if TYPE_CHECKING:
    from fdshare.pool.futures import TaskFuture
    from fdshare.pool.tasks import Task
    from fdshare.pool.workers import Worker

__all__ = ["STREAK", "Lead", "Leaders", "Seat", "lead"]

_RUNNING, _FINISHED = states.RUNNING, states.FINISHED
_loads = pickle.loads
_MAX_MILLISECONDS = 2**31 - 1


STREAK = 3
"""After so many tasks in a row for whose answers the caller came and waited, he is expected to come for the next one."""


class Lead:
    """One thread's right to read a worker's channel, until somebody takes it away."""

    valid = True


SPARE_SEATS = 2
"""So many seats are kept while nobody sits there: few threads lead at a time, and each costs a descriptor."""


class Seat:
    """Where a worker's leader sleeps: until something comes in the channel, or somebody sends it away."""

    def __init__(self) -> None:
        self.bell: FdHandle = own(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.rung = False
        self._poll = select.poll()
        self._poll.register(self.bell.fileno(), select.POLLIN)
        self._fd = -1
        self.poll = self._poll.poll

    def move_to(self, fd: int) -> None:
        """Stand at another channel."""
        if self._fd != fd:
            former, self._fd = self._fd, -1
            if former >= 0:
                self._poll.unregister(former)
            self._poll.register(fd, select.POLLIN)
            self._fd = fd

    def ring(self) -> None:
        """Wake the leader."""
        self.rung = True
        os.eventfd_write(self.bell.fileno(), 1)

    def silence(self) -> None:
        """Take the bell back."""
        if self.rung:
            try:
                os.eventfd_read(self.bell.fileno())
            except BlockingIOError:
                pass  # it was being rung when an interrupt came
            self.rung = False


def lead(task: Task, future: TaskFuture, deadline: float | None) -> None:
    """Wait for the answer of ``task`` and settle ``future``, where that is up to this thread; else return at once.

    Args:
        deadline: of time.monotonic(), in seconds; one in the past looks without waiting, None waits for ever.
    """
    pool = task.pool
    lock = pool.lock
    mine = Lead()
    worker = None
    try:
        with lock:
            candidate = task.worker
            if candidate is None or not _may_lead(candidate, task):
                return
            worker = candidate
            worker.lead = mine  # from here on the manager leaves the channel alone
            # Whoever looks at the future from now on sees that it is led.
            if not future.may_be_led or not (worker.masked or pool.mask(worker)):
                return
            seat = worker.seat or pool.seat_for(worker)
            if seat is None:
                return
        while True:
            if deadline is None:
                seat.poll()
            else:
                left = (deadline - time.monotonic()) * 1000
                if not seat.poll(math.ceil(min(max(left, 0), _MAX_MILLISECONDS))):
                    return
            with lock:
                if not mine.valid:
                    return
                message = worker.unread
                if message is None:
                    message = parcel.receive_bare_now(worker.channel)
                    if message is None:
                        return  # it has descriptors or a segment
                    if message:
                        worker.unread = message  # before any call
                    else:
                        seat.silence()  # it was rung for the leader before; under the lock, as it may be rung anew
            if message:
                break
        tag = parcel.tag_of(message)
        kind = tag & KIND_MASK
        if tag >> KIND_BITS != task.number or kind > ERROR:
            return
        try:
            value = _loads(message)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 -- whatever it is: the manager gets it too, and deals with it
            return
        if kind == ERROR and not isinstance(value, BaseException):
            return
        counts = pool.counts
        with lock:
            if not mine.valid or future._state != _RUNNING:
                return
            # No call from here on, so no interrupt, until everything is as the manager would leave it.
            if kind == RESULT:
                future._result = value
                counts["done"] += 1
            else:
                future._exception = value
                counts["failed"] += 1
            future._state = _FINISHED
            future._task = None
            task.worker = None
            worker.unread = None
            pool.load -= task.size
            pool.loads -= task.size > 0
            task.size = 0
            del worker.assigned[task.number]
            mine.valid = False
            worker.lead = None
            worker.note_answers(1, time.monotonic())
            pool.after_lead(worker)
            worker = None
    finally:
        if worker is not None:
            mine.valid = False
            if worker.lead is mine:
                worker.lead = None
            try:
                _leave(pool, worker)
            except BaseException:  # an interrupt in the midst of it
                _leave(pool, worker)
                raise


def _may_lead(worker: Worker, task: Task) -> bool:
    """Whether the answer to ``task`` is all that can come, and no rule of the pool needs the manager.  Lock held."""
    return not (
        worker.lead is not None
        or len(worker.assigned) != 1
        or not worker.ready
        or not system.HAVE_EVENTFD
        or worker.leaving
        or task.timeout is not None
        or task.retries
    )


def _leave(pool: Leaders, worker: Worker) -> None:
    """Give the channel back to the manager; twice is harmless."""
    with pool.lock:
        if worker.gone:
            pool._unseat(worker)
            worker.close()
        elif worker.lead is None:
            if worker.seat is not None:
                worker.seat.silence()
            pool.after_lead(worker)


class Leaders(Backlog):
    """The pool's part of it."""

    workers: dict[int, Worker]
    idle: list[Worker]
    pending: deque[Task]
    closing: bool
    broken: BaseException | None
    abandoned: bool
    counts: dict[str, int]

    def __init__(self, max_inflight: int | None) -> None:
        super().__init__(max_inflight)
        self.futures = 0  # how many were made
        self.streak = 0  # how many tasks in a row the caller has waited for, one after the other
        self.untended = False  # idle workers may find something to do
        self.seated: list[Worker] = []  # which have a seat

    def _note_idle(self, worker: Worker) -> None:
        raise NotImplementedError

    def fill(self, worker: Worker) -> None:
        """Give a worker what it has room for.  Lock held."""
        raise NotImplementedError

    def wake(self) -> None:
        """Make the manager look at what has changed."""
        raise NotImplementedError

    def mask(self, worker: Worker) -> bool:
        """Hide a worker's answers from the manager; return whether that is possible.  Lock held."""
        manager = self.manager
        if manager is None or self.broken is not None or self.abandoned:
            return False
        worker.masked = True
        worker.masked = manager.mask(worker)
        return worker.masked

    def attend(self, worker: Worker) -> None:
        """Send a worker's leader away: the manager reads its answers again."""
        with self.lock:
            if worker.lead is not None and worker.lead.valid:
                worker.lead.valid = False
                if worker.seat is not None:
                    worker.seat.ring()
            if worker.masked and worker.assigned:
                self.streak = 0
            self._unmask(worker)
            if worker.unread is not None or parcel.has_arrived(worker.channel):
                self.wake()

    def _unmask(self, worker: Worker) -> None:
        if worker.masked:
            if self.manager is not None:
                self.manager.unmask(worker)
            worker.masked = False

    def seat_for(self, worker: Worker) -> Seat | None:
        """Give a worker a seat, where somebody may have to be sent away; None without a descriptor for it.  Lock held."""
        for other in self.seated:
            if other.lead is None and other.seat is not None:
                seat = other.seat
                seat.move_to(worker.channel.fileno())
                self.seated.append(worker)  # before the other one is without: twice in there is harmless
                worker.seat, other.seat = seat, None
                self.seated.remove(other)
                return seat
        try:
            seat = Seat()
        except OSError:
            return None
        seat.move_to(worker.channel.fileno())
        self.seated.append(worker)
        worker.seat = seat
        return seat

    def _unseat(self, worker: Worker) -> None:
        if worker.seat is not None:
            worker.seat.bell.close()
            worker.seat = None
        while worker in self.seated:
            self.seated.remove(worker)

    def attend_all(self) -> None:
        """The same with all workers.  Lock held."""
        for worker in self.workers.values():
            self.attend(worker)

    def _mask_ahead(self, worker: Worker, task: Task) -> None:
        """Hide an idle worker's next answer from the manager, or show it: a caller who has waited for one task after the other
        will be there for this one too.  Lock held."""
        if len(worker.assigned) > 1:
            if worker.masked:
                self.attend(worker)  # its leader reads no other answers
        elif (
            self.streak >= STREAK
            and task.timeout is None
            and not task.retries
            and worker.left is None
            and worker.ready
            and not self.closing
            and task.future.may_be_led  # asked after ``task.worker`` was set, which others look at before they wait
        ):
            if not worker.masked:
                self.mask(worker)
        else:
            self._unmask(worker)

    def dismiss(self, worker: Worker) -> None:
        """Close a worker that has ended; but not under a thread that sleeps on its descriptors, whose numbers another file would
        get, so that the bell is never heard.  Lock held."""
        self.attend(worker)
        worker.gone = True
        if worker.lead is None:
            self._unseat(worker)
            worker.close()

    def after_lead(self, worker: Worker) -> None:
        """Do what follows an answer that the manager has not seen.  Lock held."""
        self.let_go()
        if len(self.seated) > SPARE_SEATS:
            self._unseat(worker)
        manager = self.manager
        if manager is None or worker.assigned or worker.leaving:
            self.attend(worker)
            return
        if self.streak < STREAK:
            self.attend(worker)
        if worker.left != 0:
            self._note_idle(worker)
        if (
            self.pending
            or self.closing
            or manager.exiting
            or (
                len(self.idle) < len(self.workers)
                and any(len(other.assigned) > 1 for other in self.workers.values())
            )
        ):
            self.untended = True
            self.wake()

    def tend(self) -> None:
        """Find something to do for idle workers.  Lock held."""
        self.untended = False
        for worker in list(self.idle):
            self.fill(worker)
