"""``Task``, one call on its way through the pool."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any

import attrs

from fdshare.parcel import Message, Parcel

if TYPE_CHECKING:
    from fdshare.pool.futures import TaskFuture
    from fdshare.pool.mapping import Slot
    from fdshare.pool.pool import Pool
    from fdshare.pool.workers import Worker

__all__ = ["CALL", "KIND_BITS", "Task"]

KIND_BITS = 3
KIND_MASK = (1 << KIND_BITS) - 1
# A message's tag is the task's number and one of these.  From the parent:
CALL, STOP = 0, 1
# From a worker:
RESULT, ERROR, READY, INITIALIZER_FAILED, CANNOT_RECEIVE = 0, 1, 2, 3, 4

logger = logging.getLogger("fdshare.pool")
logger.addHandler(logging.NullHandler())  # silent unless the program asks for it

_numbers = itertools.count(1)


@attrs.define(eq=False, slots=True)
class Task:
    """One call: its encoded form until a worker has it, its future until that is settled."""

    pool: Pool
    future: TaskFuture | Slot
    timeout: float | None = None
    """Seconds it may run."""
    retries: int = 0
    """How often it may run again after the death of its worker."""
    message: Message | None = None
    """None while a worker's inbox holds it."""
    number: int = attrs.field(factory=_numbers.__next__, init=False)
    size: int = attrs.field(default=0, init=False)
    """Bytes by which it counts for ``max_inflight``."""
    worker: Worker | None = attrs.field(default=None, init=False)
    decided: bool = attrs.field(default=False, init=False)
    """Its answer or its worker's end is known, though its future is not settled yet: too late to cancel it."""
    timed_out: bool = attrs.field(default=False, init=False)
    choked_since: float | None = attrs.field(default=None, init=False)
    """Since when the system has refused to carry its descriptors (time.monotonic())."""

    def release(self) -> None:
        """Let go of the encoded call and its descriptors, and of the future's way back to this task."""
        message, self.message = self.message, None
        if isinstance(message, Parcel):
            message.close()
        if self.size:
            self.pool.discharge(self)
        self.future._task = None

    def finish(self, value: Any) -> None:
        """Settle the future with a result."""
        self.release()
        try:
            self.future.set_result(value)
        except InvalidStateError:
            logger.warning("task %d: somebody else has settled its future", self.number)

    def fail(self, error: BaseException) -> None:
        """Settle the future with an exception."""
        self.release()
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            logger.warning("task %d: somebody else has settled its future", self.number)
