"""``map`` over a pool: calls in, results out in their order.

Nobody sees the futures of ``map``, so it does without: a :class:`Slot` has the part of a future's interface that the pool needs,
and all slots of one ``map`` share one lock for the only one who waits, the iterator.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fdshare.pool.calls import run_chunk

if TYPE_CHECKING:
    from fdshare.pool.executor import ProcessPoolExecutor
    from fdshare.pool.tasks import Task

__all__ = ["Slot", "map_calls"]

_WAITING, _DONE, _FAILED, _CANCELLED = range(4)


class _Sleeper:
    """The iterator of one ``map``, as seen by those who wake it."""

    __slots__ = ("awaited", "lock")

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self.lock.acquire()
        self.awaited: Slot | None = None

    def sleep(self, slot: Slot, deadline: float | None) -> None:
        """Wait until ``slot`` is settled.

        Raises:
            TimeoutError: the deadline (time.monotonic()) has passed.
        """
        self.awaited = slot
        try:
            while slot.state == _WAITING:  # looked at after ``awaited`` was set, so that no wake is missed
                timeout = -1 if deadline is None else max(0.0, deadline - time.monotonic())
                timeout = min(timeout, threading.TIMEOUT_MAX)
                if not self.lock.acquire(timeout=timeout) and slot.state == _WAITING:
                    raise TimeoutError
        finally:
            self.awaited = None

    def wake(self) -> None:
        """End the wait; a wake too many is harmless."""
        self.awaited = None
        try:
            self.lock.release()
        except RuntimeError:
            pass  # it is awake


class Slot:
    """The place of one result."""

    __slots__ = ("_task", "sleeper", "state", "value")

    may_be_led = False
    """It is the manager who settles it; see leading.py."""

    def __init__(self, sleeper: _Sleeper) -> None:
        self._task: Task | None = None
        self.sleeper = sleeper
        self.state = _WAITING
        self.value: Any = None

    def start(self) -> bool:
        """Mark the call as sent; False where it was cancelled before."""
        return self.state == _WAITING

    def _settle(self, state: int, value: Any) -> None:
        self.value = value
        self.state = state
        if self.sleeper.awaited is self:
            self.sleeper.wake()

    def set_result(self, value: Any) -> None:
        """Settle it with a result."""
        self._settle(_DONE, value)

    def set_exception(self, error: BaseException) -> None:
        """Settle it with an exception."""
        self._settle(_FAILED, error)

    def cancel(self) -> bool:
        """Cancel the call unless a worker has begun it; return whether it is cancelled."""
        task = self._task
        if task is not None and task.pool.withdraw(task):
            self.cancel_withdrawn()
        return self.state == _CANCELLED

    def cancel_withdrawn(self) -> None:
        """Become cancelled, now that the pool has let go of the call."""
        from concurrent.futures import CancelledError

        self._settle(_CANCELLED, CancelledError())

    def result(self, deadline: float | None) -> Any:
        """Wait for the result and return it, once; raise what the call has raised.

        Raises:
            TimeoutError: the deadline (time.monotonic()) has passed.
        """
        if self.state == _WAITING:
            self.sleeper.sleep(self, deadline)
        value, self.value = self.value, None
        if self.state == _DONE:
            return value
        try:
            raise value
        finally:
            value = None  # its traceback refers to this frame


def map_calls(
    executor: ProcessPoolExecutor,
    function: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    submit: Callable[..., Any],
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[Any]:
    """Submit the calls and return the iterator over their results; see ``ProcessPoolExecutor.map``.

    Args:
        submit: called as ``submit(executor, slot, function, args)``.

    Raises:
        ValueError, TypeError: chunksize or buffersize makes no sense.
    """
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None:
        if not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
    deadline = None if timeout is None else time.monotonic() + timeout
    calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
    if chunksize > 1:
        calls = zip(itertools.repeat(function), _chunks(calls, chunksize), strict=False)
        function = run_chunk
    sleeper = _Sleeper()
    slots: deque[Slot] = deque()

    def send(owner: ProcessPoolExecutor, args: tuple[Any, ...]) -> None:
        slot = Slot(sleeper)
        submit(owner, slot, function, args)
        slots.append(slot)

    try:
        for args in calls if buffersize is None else itertools.islice(calls, buffersize):
            send(executor, args)
    except BaseException:
        for slot in slots:
            slot.cancel()
        raise
    refill = None
    if buffersize is not None:
        # Neither the iterator nor what it waits for may keep the executor alive.
        reference = weakref.ref(executor)

        def refill() -> None:
            owner = reference()
            if owner is not None and (args := next(calls, None)) is not None:
                send(owner, args)

    results = _results(slots, deadline, refill)
    return results if chunksize == 1 else _flattened(results)


def _chunks(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    while chunk := list(itertools.islice(calls, size)):
        yield chunk


def _results(slots: deque[Slot], deadline: float | None, refill: Callable[[], None] | None) -> Iterator[Any]:
    """Yield the results in order; cancel what is left when the caller has enough, or something failed."""
    try:
        while slots:
            if refill is not None:
                refill()
            yield _taken(
                slots.popleft(), deadline
            )  # kept by no name here, so that it is freed when the caller drops it
    finally:
        for slot in slots:
            slot.cancel()


def _taken(slot: Slot, deadline: float | None) -> Any:
    try:
        return slot.result(deadline)
    finally:
        slot.cancel()  # where the time was up


def _flattened(results: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in results:
        chunk.reverse()
        while chunk:
            yield chunk.pop()
