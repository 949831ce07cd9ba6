"""``Backlog``: the bound on the memory that large arguments take while their tasks are not done.

A call is encoded before ``submit`` returns, so each large argument is a copy from then on, where the standard executor keeps a
reference.  Beyond ``max_inflight`` bytes ``submit`` therefore waits until tasks are done; but one task more than there are
workers is always taken, so that no worker waits.

Who would wait for himself does not wait: the pool's own thread (callbacks), a call out of the midst of another one (finalizers,
signal handlers), a thread that runs an asyncio event loop, which the tasks may need.  Nor does anybody wait on while the
pool's thread is held up by a callback: it may need a lock that is held around ``submit``.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from _thread import allocate_lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdshare.pool.manager import Manager
    from fdshare.pool.tasks import Task

__all__ = ["LARGE", "Backlog"]

TICK_SECONDS = 0.05
"""How often a waiting ``submit`` looks whether a callback holds up the pool's thread."""

CALLBACK_SECONDS = 0.1
"""How long a callback may take before nobody waits for the pool's thread any more."""

LOG_SECONDS = 5.0
"""After this time a waiting ``submit`` says so in the log."""

logger = logging.getLogger("fdshare.pool")

LARGE = 16 * 1024
"""Calls of fewer bytes are not counted: Python's objects around them take more memory than the call."""


class Backlog:
    """The pool's part that counts bytes."""

    lock: Any
    manager: Manager | None
    max_workers: int

    def __init__(self, max_inflight: int | None) -> None:
        self.max_inflight = max_inflight
        self.load = 0  # bytes
        self.loads = 0  # tasks
        self._held_up: list[Any] = []
        self.in_callback: float | None = None
        """Since when the pool's thread is in a callback (time.monotonic())."""

    def attend_all(self) -> None:
        """See to it that the manager reads all answers.  Lock held."""
        raise NotImplementedError

    def check_open(self) -> None:
        """Raise where no more tasks are taken."""
        raise NotImplementedError

    def admit(self, task: Task, size: int) -> None:
        """Wait until there is room for a large call, then count it as the task's.

        Raises:
            RuntimeError, BrokenProcessPool: the pool takes none any more.
        """
        if size < LARGE:
            return
        if self.lock._is_owned() or self._is_needed():
            since = None
        else:
            since = time.monotonic()
        while True:
            with self.lock:
                self.check_open()
                if since is None or self._has_room(size):
                    # No call, and so no interrupt, in between.
                    self.load += size
                    self.loads += 1
                    task.size = size
                    return
                waiter = allocate_lock()
                waiter.acquire()
                self._held_up.append(waiter)
                self.attend_all()
            try:
                since = self._wait(waiter, since)
            finally:
                with self.lock:
                    if waiter in self._held_up:
                        self._held_up.remove(waiter)

    def _wait(self, waiter: Any, since: float) -> float | None:
        """Wait until somebody says that there is room; return ``since``, or None where it is no use to wait."""
        while not waiter.acquire(timeout=TICK_SECONDS):
            now, in_callback = time.monotonic(), self.in_callback
            if in_callback is not None and now - in_callback > CALLBACK_SECONDS:
                return None
            if since <= now - LOG_SECONDS < since + TICK_SECONDS:
                logger.info("submit waits for tasks to be done: their arguments take %d bytes", self.load)
        return since

    def _has_room(self, size: int) -> bool:
        return (
            self.max_inflight is None
            or self.load + size <= self.max_inflight
            or self.loads <= self.max_workers
        )

    def _is_needed(self) -> bool:
        """Whether tasks may need this very thread to go on."""
        if threading.current_thread() is self.manager:
            return True
        events = sys.modules.get("asyncio.events")
        return events is not None and events._get_running_loop() is not None

    def discharge(self, task: Task) -> None:
        """Count a task's call no more."""
        with self.lock:
            if task.size:
                self.load -= task.size
                self.loads -= 1
                task.size = 0
                self.let_go()

    def let_go(self) -> None:
        """Have everybody who waits look again.  Lock held."""
        while self._held_up:
            self._held_up.pop().release()
