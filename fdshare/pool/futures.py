"""``TaskFuture``: a future that can still cancel what no worker has begun, and whose waiting thread may fetch the answer itself.

The standard Future makes a Condition for itself, which takes longer than all else of it.  This one makes it when somebody
asks: ``wait``, ``as_completed``, a callback.  Whoever asks thereby says that he relies on the manager thread, so a thread that
reads the answer for itself (see leading.py) gives way to it.
"""

from __future__ import annotations

import threading
import time
from _thread import allocate_lock
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import _base as states
from typing import TYPE_CHECKING, Any

from fdshare import locks, parcel
from fdshare.pool.leading import lead

if TYPE_CHECKING:
    from fdshare.pool.pool import Pool
    from fdshare.pool.tasks import Task

__all__ = ["TaskFuture"]

MANAGER_SECONDS = 0.1
"""How long a look at a future waits for the manager to settle it, seconds: the manager may be in somebody's callback."""

_PENDING, _RUNNING, _FINISHED = states.PENDING, states.RUNNING, states.FINISHED
_SETTLED = (_FINISHED, states.CANCELLED, states.CANCELLED_AND_NOTIFIED)


class _Waiter:
    """A thread that waits for one future, among the ``_waiters`` of it."""

    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self.lock.acquire()

    def add_result(self, future: Future[Any]) -> None:
        """Wake the thread."""
        self.lock.release()

    add_exception = add_cancelled = add_result


class TaskFuture(Future[Any]):
    """A future of the pool.

    It is "running" once its call was sent to a worker; while that worker has not begun it, it can still be cancelled.
    """

    _task: Task | None = None
    """The way back to the pool, until the call is settled."""
    watched: threading.Condition | None = None
    """What others wait on; None until somebody asks for it."""

    def __init__(self, pool: Pool) -> None:  # not the standard one's, see above
        self._pool = pool
        self._number = pool.futures = pool.futures + 1
        self._lock = locks.make_rlock()
        self._state = _PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]  # an attribute there
        condition = self.watched
        if condition is None:
            self._look()
            condition = self.__dict__.setdefault("watched", threading.Condition(self._lock))
            self._rely_on_manager()
        return condition

    def _rely_on_manager(self) -> None:
        """Send away who leads, after having made sure that nobody begins to."""
        task = self._task
        if task is not None and (worker := task.worker) is not None and worker.is_led:
            task.pool.attend(worker)

    def _look(self) -> None:
        """Settle it if its answer lies unseen in the kernel; from now on the manager is to see it."""
        task = self._task
        if task is None or (worker := task.worker) is None or not worker.is_led:
            return
        lead(task, self, 0.0)
        if self._state in _SETTLED:
            return
        if parcel.has_arrived(worker.channel):
            self._is_settled_in(MANAGER_SECONDS)
        else:
            task.pool.attend(worker)

    # --- for whoever waits -------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Any:
        """Return what the call returned.

        Args:
            timeout: seconds to wait for it; None waits for ever.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it is not done by then.
            BaseException: what the call raised.
        """
        try:
            if self._number == self._pool.futures:  # no other was made since
                self._pool.streak += 1
                self._number = 0  # counted
            if self._state not in _SETTLED:
                self._wait(timeout)
            if self._exception is not None:
                raise self._exception
            if self._state != _FINISHED:
                raise CancelledError
            return self._result
        finally:
            self = None  # type: ignore[assignment]  # the traceback of an exception refers to this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised; None where it returned.

        Args:
            timeout: seconds to wait for it; None waits for ever.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it is not done by then.
        """
        if self._state not in _SETTLED:
            self._wait(timeout)
        if self._state != _FINISHED:
            raise CancelledError
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        task = self._task
        deadline = None if timeout is None else time.monotonic() + timeout
        if task is not None and (timeout is None or timeout > 0):
            lead(task, self, deadline)
        else:
            self._look()
        if self._state in _SETTLED:
            return
        if not self._is_settled_in(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError

    def _is_settled_in(self, timeout: float | None) -> bool:
        """Wait for the manager to settle it; return whether it did.

        By a lock of one's own.  An interrupt in a Condition may leave it locked for ever, and the manager waiting for it.
        """
        waiter = _Waiter()
        with self._lock:
            if self._state in _SETTLED:
                return True
            self._waiters.append(waiter)
        try:
            self._rely_on_manager()
            waiter.lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return self._state in _SETTLED

    def done(self) -> bool:
        """Whether the call is settled."""
        if self._state not in _SETTLED:
            self._look()
        return self._state in _SETTLED

    def running(self) -> bool:
        """Whether the call was sent and is not settled."""
        return not self.done() and self._state == _RUNNING

    @property
    def may_be_led(self) -> bool:
        """Whether nobody relies on the manager to settle it; see leading.py."""
        return not self._waiters and not self._done_callbacks and self.watched is None

    # --- for the pool -----------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Mark the call as sent; False where it was cancelled before.  The pool's lock is held, and whoever cancels takes it."""
        if self._state == _PENDING:
            self._state = _RUNNING
            return True
        return self._state == _RUNNING  # taken back from a worker, and sent again

    def set_result(self, result: Any) -> None:
        """Settle it with a result.

        Raises:
            InvalidStateError: it is settled already.
        """
        with self._lock:
            if self._state in _SETTLED:
                raise InvalidStateError(f"{self._state}: {self!r}")
            self._result = result
            self._state = _FINISHED
            for waiter in self._waiters:
                waiter.add_result(self)
            if self.watched is not None:
                self.watched.notify_all()
        if self._done_callbacks:
            self._invoke_callbacks()

    def set_exception(self, exception: BaseException | None) -> None:
        """Settle it with an exception.

        Raises:
            InvalidStateError: it is settled already.
        """
        with self._lock:
            if self._state in _SETTLED:
                raise InvalidStateError(f"{self._state}: {self!r}")
            self._exception = exception
            self._state = _FINISHED
            for waiter in self._waiters:
                waiter.add_exception(self)
            if self.watched is not None:
                self.watched.notify_all()
        if self._done_callbacks:
            self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        pool = self._pool
        outer, own = pool.in_callback, threading.current_thread() is pool.manager
        if own:
            pool.in_callback = time.monotonic()
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:  # noqa: BLE001 -- sys.exit() too: it must not end the thread that serves all tasks
                states.LOGGER.exception("exception calling callback for %r", self)
        if own:
            pool.in_callback = outer

    def cancel(self) -> bool:
        """Cancel the call unless a worker has begun it; return whether it is cancelled."""
        task = self._task
        if task is not None and task.pool.withdraw(task):
            self.cancel_withdrawn()
        return super().cancel()

    def cancel_withdrawn(self) -> None:
        """Become cancelled, now that the pool has let go of the call."""
        with self._condition:
            if self._state == _RUNNING:  # it was sent, and taken back
                self._state = _PENDING
        if super().cancel() and self._state == states.CANCELLED:
            self.set_running_or_notify_cancel()
