"""``Worker``, what the parent knows and holds of one worker process, and how one is started."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import attrs

from fdshare import parcel
from fdshare.channel import Channel, Pipe
from fdshare.errors import DescriptorsLostError, FdLimitError, PeerClosedError, ProtocolError
from fdshare.handle import FdHandle
from fdshare.pool.leading import Lead, Seat
from fdshare.pool.started import Started
from fdshare.pool.tasks import KIND_BITS, STOP, Task
from fdshare.pool.template import TemplateChild

__all__ = ["Worker", "new_worker", "start_worker"]

FIRST_DEPTH = 2
"""Tasks a worker may hold while nothing is known of how long they take: one to run, one to find when it is done."""

MAX_DEPTH = 32
"""Most tasks a worker may hold."""

QUEUED_SECONDS = 0.002
"""How much work a worker may hold in advance: enough that it never waits for the parent between short tasks."""

SHORT_SECONDS = QUEUED_SECONDS / (MAX_DEPTH - FIRST_DEPTH)
"""Tasks that take less go out MAX_DEPTH at a time."""

START_SECONDS = 5.0
"""What a worker may take to be ready before the limit of a task counts that waits for it.  Longer where others have shown that it
takes longer."""

MAX_START_SECONDS = 300.0

START_FACTOR = 4
"""So many times longer than another one a worker may take to be ready."""

_STOP_MESSAGE = parcel.seal(pickle.dumps(None, 5), STOP)


@attrs.define(eq=False)
class Worker:
    """One worker process.

    ``channel`` is the parent's end of the connection; ``inbox`` is a duplicate of the worker's own end, from which tasks are
    taken back that the worker has not begun: before it dies, after it died, or because another one is idle.
    """

    channel: Channel
    inbox: Channel
    left: int | None
    """How many more tasks it may be given; None for no limit."""
    life: FdHandle | None = None
    """The parent's end of its life line, where it is not the pool's."""
    body: Started | TemplateChild | None = None
    """Its process, once it is started."""
    assigned: dict[int, Task] = attrs.field(factory=dict)
    """What was sent and not answered, oldest first."""
    depth: int = FIRST_DEPTH
    """How many tasks it may hold."""
    ahead: bool = attrs.field(default=True, kw_only=True)
    """Whether it may hold more than it runs: to take them back, two must read one end, which only whole packets allow."""
    pace: float = 0.0
    """Seconds a task takes, as an average that forgets."""
    since: float = attrs.field(factory=time.monotonic)
    """When the oldest task of ``assigned`` began, at the latest (time.monotonic())."""
    begun: float = attrs.field(factory=time.monotonic, init=False)
    """When it was made (time.monotonic())."""
    done: int = 0
    ready: bool = False
    leaving: bool = False
    """It must not be given more tasks: told to stop, at its limit, or about to be killed."""
    idle: bool = False
    """Whether it is in the pool's list of idle workers."""
    killed: bool = False
    """Whether the pool killed it."""
    leaves: bool = False
    """Whether it said that it will leave."""
    error: BaseException | None = None
    """Why it leaves."""
    refused: int = 0
    """The number of the task that it could not receive."""
    pid: int = -1
    lead: Lead | None = None
    """The right of a thread that reads the channel in the manager's place; see leading.py."""
    masked: bool = False
    """Whether the manager does not see what comes in the channel."""
    unread: bytes | None = None
    """An answer that was taken from the channel and is not settled yet."""
    seat: Seat | None = None
    """Where its leader sleeps; None where nobody can lead."""
    gone: bool = False
    """Whether it is to be closed once its leader has left."""

    @property
    def is_led(self) -> bool:
        """Whether the manager would not see an answer."""
        return self.masked or self.unread is not None

    @property
    def has_room(self) -> bool:
        """Whether it may be given one more task."""
        return len(self.assigned) < self.depth and not self.leaving and self.left != 0

    @property
    def process(self) -> Any:
        """What others look at."""
        assert self.body is not None
        return self.body.process

    def sentinel(self) -> int | None:
        """Borrow the descriptor that becomes readable when the process has ended; None where it is to be asked for."""
        return None if self.body is None else self.body.sentinel

    def deadline(self, start_seconds: float) -> float | None:
        """Return when the task that it is running is past its limit (time.monotonic()); None without one.

        Args:
            start_seconds: what it may take to be ready, whatever the limit.
        """
        if self.killed:
            return None
        if not self.ready:
            limits = [task.timeout for task in self.assigned.values() if task.timeout is not None]
            return max(self.begun + start_seconds, self.since + min(limits)) if limits else None
        for task in self.assigned.values():
            return None if task.timeout is None else self.since + task.timeout
        return None

    def note_answers(self, count: int, now: float) -> None:
        """Learn from ``count`` answers that came until ``now`` how many tasks are worth holding in advance."""
        self.done += count
        took = (now - self.since) / count
        self.since = now
        self.pace = pace = took if not self.pace else 0.75 * self.pace + 0.25 * took
        if self.ahead:
            self.depth = MAX_DEPTH if pace < SHORT_SECONDS else FIRST_DEPTH + int(QUEUED_SECONDS / pace)

    def recall(self, most: int, *, ended: bool = False) -> list[Task]:
        """Take back up to ``most`` tasks that the worker has not begun, oldest first.

        Args:
            ended: whether the worker has; beside one that runs, only whole packets can be read.

        Raises:
            FdLimitError: no room here for the descriptors of the first.
        """
        tasks: list[Task] = []
        if not (self.ahead or ended):
            return tasks
        try:
            while len(tasks) < most:
                message = parcel.receive_now(self.inbox, to_send_on=True)
                if message is None:
                    break
                task = self.assigned.pop(parcel.tag_of(message) >> KIND_BITS, None)
                if task is None:  # a stop message
                    break
                if task.message is None:
                    task.message = message
                elif isinstance(message, parcel.Parcel):
                    message.close()  # the task has kept its own, to be run again
                task.worker = None
                tasks.append(task)
                if self.left is not None:
                    self.left += 1
        except PeerClosedError:
            pass
        except FdLimitError:
            if not tasks:
                raise
        except (ProtocolError, DescriptorsLostError):  # the rest of a frame, of which it has read a part
            if self.ahead:
                raise
        return tasks

    def stop(self) -> None:
        """Tell it to end when it has done what it holds."""
        if not self.leaving:
            self.leaving = self.leaves = True
            parcel.send_now(self.channel, _STOP_MESSAGE)

    def filenos(self) -> list[int]:
        """Borrow all descriptors that this process holds of it."""
        owners = self.channel, self.inbox, self.life
        fds = [owner.fileno() for owner in owners if owner is not None and not owner.closed]
        return fds if self.body is None else fds + self.body.filenos()

    def signal(self, number: int) -> None:
        """Send it a signal.

        Raises:
            PermissionError: it has changed its user.
        """
        if self.body is not None:
            self.body.signal(number)

    def kill(self) -> None:
        """Kill it."""
        self.leaving = self.killed = True
        self.signal(signal.SIGKILL)

    def discard(self) -> None:
        """Kill it, if it was started, and let go of everything."""
        if self.body is not None:
            self.body.signal(signal.SIGKILL)
            self.body.reap()
        self.close()

    def close(self) -> None:
        """Let go of every descriptor; the process has ended or will, as its life line does."""
        self.channel.close()
        self.inbox.close()
        if self.life is not None:
            self.life.close()
        if self.body is not None:
            self.body.close()
        if self.seat is not None:
            self.seat.bell.close()
            self.seat = None


def new_worker(max_tasks: int | None) -> Worker:
    """Make all that a worker needs but its process.

    Raises:
        OSError: no descriptor left; nothing is left behind.
    """
    ours, inbox = Pipe()
    worker = Worker(ours, inbox, max_tasks)
    if ours.transport != "seqpacket":
        worker.ahead, worker.depth = False, 1
    return worker


def start_worker(
    worker: Worker, nascent: list[Worker], begin: Callable[[Worker], Started | TemplateChild]
) -> None:
    """Start the process of a worker that :func:`new_worker` made.

    Args:
        nascent: holds the worker while it is being started, for the fork handler to tell it from the others.
        begin: starts it.

    Raises:
        OSError, pickle.PicklingError, …: it could not be started; the worker is closed.
    """
    nascent.append(worker)
    try:
        worker.body = begin(worker)
        worker.pid = worker.body.pid
    except BaseException:
        worker.discard()
        raise
    finally:
        nascent.remove(worker)
