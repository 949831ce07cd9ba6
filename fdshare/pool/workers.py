"""``Worker``, what the parent knows and holds of one worker process, and how one is started."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import attrs

from fdshare import parcel, system
from fdshare.channel import Channel, Pipe
from fdshare.errors import DescriptorsLostError, FdLimitError, PeerClosedError, ProtocolError
from fdshare.handle import FdHandle, own, own_pipe
from fdshare.pool import worker as process_side
from fdshare.pool.leading import Lead, Seat
from fdshare.pool.tasks import KIND_BITS, STOP, Task

__all__ = ["Worker", "new_worker", "start_worker"]

FIRST_DEPTH = 2
"""Tasks a worker may hold while nothing is known of how long they take: one to run, one to find when it is done."""

MAX_DEPTH = 32
"""Most tasks a worker may hold."""

QUEUED_SECONDS = 0.002
"""How much work a worker may hold in advance: enough that it never waits for the parent between short tasks."""

SHORT_SECONDS = QUEUED_SECONDS / (MAX_DEPTH - FIRST_DEPTH)
"""Tasks that take less go out MAX_DEPTH at a time."""

_STOP_MESSAGE = parcel.seal(pickle.dumps(None, 5), STOP)


@attrs.define(eq=False)
class Worker:
    """One worker process.

    ``channel`` is the parent's end of the connection; ``inbox`` is a duplicate of the worker's own end, from which tasks are
    taken back that the worker has not begun: before it dies, after it died, or because another one is idle.
    """

    process: Any
    channel: Channel
    inbox: Channel
    life: FdHandle
    """Hangs up in the worker when this process is gone."""
    left: int | None
    """How many more tasks it may be given; None for no limit."""
    theirs: FdHandle = attrs.field(kw_only=True)
    """The worker's end of ``life``, until it is started."""
    death: FdHandle | None = None
    """A pidfd; None where the system has none and the process's own sentinel must do."""
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

    def sentinel(self) -> int:
        """Borrow the descriptor that becomes readable when the process has ended."""
        return self.process.sentinel if self.death is None else self.death.fileno()

    def deadline(self) -> float | None:
        """Return when the task that it is running is past its limit (time.monotonic()); None without one."""
        if not self.ready or self.killed:
            return None
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
        owners = self.channel, self.inbox, self.life, self.theirs, self.death
        return [owner.fileno() for owner in owners if owner is not None and not owner.closed]

    def kill(self) -> None:
        """Kill it."""
        self.leaving = self.killed = True
        self.process.kill()

    def discard(self) -> None:
        """Kill it, if it was started, and let go of everything."""
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.close()

    def close(self) -> None:
        """Let go of every descriptor; the process has ended or will, as its life line does."""
        if self.process.pid is not None and self.process.exitcode is not None:
            self.process._popen.close()  # but not the Process itself, which others may look at
        self.channel.close()
        self.inbox.close()
        self.life.close()
        self.theirs.close()
        if self.death is not None:
            self.death.close()
        if self.seat is not None:
            self.seat.bell.close()
            self.seat = None


def new_worker(
    context: Any,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
    max_tasks: int | None,
    fragile: bool,
) -> Worker:
    """Make all that a worker needs but its process.

    Raises:
        OSError: no descriptor left; nothing is left behind.
    """
    if context.get_start_method() == "forkserver":
        _preload()
    ours, inbox = Pipe()
    try:
        reader, writer = own_pipe()
    except BaseException:
        ours.close()
        inbox.close()
        raise
    process_side.arm(reader)
    process = context.Process(
        target=process_side.main,
        args=(inbox, reader, Setup(initializer, initargs) if initializer else None, max_tasks, fragile),
    )
    worker = Worker(process, ours, inbox, writer, max_tasks, theirs=reader)
    if ours.transport != "seqpacket":
        worker.ahead, worker.depth = False, 1
    return worker


def start_worker(worker: Worker, nascent: list[Worker]) -> None:
    """Start the process of a worker that :func:`new_worker` made.

    Args:
        nascent: holds the worker while it is being started, for the fork handler to tell it from the others.

    Raises:
        OSError, pickle.PicklingError, …: it could not be started; the worker is closed.
    """
    process = worker.process
    nascent.append(worker)
    try:
        process.start()
        worker.pid = process.pid
        if system.HAVE_PIDFD:
            worker.death = own(os.pidfd_open, process.pid)
    except BaseException:
        worker.discard()
        raise
    finally:
        nascent.remove(worker)
        worker.theirs.close()


def _preload() -> None:
    """Have the fork server import what a worker needs, unless it runs already: a worker starts in 5 ms instead of 90."""
    from multiprocessing import forkserver

    server = forkserver._forkserver
    modules = getattr(server, "_preload_modules", None)
    if modules is not None and process_side.__name__ not in modules:
        server.set_forkserver_preload([*modules, process_side.__name__])


class Setup:
    """An initializer and its arguments, for multiprocessing to pickle: in its way, or else as a message is encoded."""

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments

    def __call__(self) -> object:
        return self.function(*self.arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import ForkingPickler

        both = self.function, self.arguments
        try:
            # Not pickled twice: what the process is to inherit may be named once.
            return rebuild_setup, (pickle.loads, bytes(ForkingPickler.dumps(both)))
        except Exception:  # noqa: BLE001 -- pickle raises many; as a message it may work, or say why not
            from fdshare.handoff import reduce_outside

            function, arguments = reduce_outside(both)
            return rebuild_setup, (function, *arguments)


def rebuild_setup(rebuild: Callable[..., Any], *arguments: Any) -> Setup:
    """Return the setup that was pickled; raises what loading it does."""
    return Setup(*rebuild(*arguments))
