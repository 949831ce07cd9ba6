"""The private names of the standard executor that tests and monitoring tools look at, as views of a :class:`Pool`."""

from __future__ import annotations

import threading
from typing import Any

from fdshare.pool.pool import Pool
from fdshare.pool.tasks import Task

__all__ = ["KILL", "TERMINATE", "StandardNames"]

TERMINATE, KILL = "terminate", "kill"
"""The operations of ``_force_shutdown``, as the standard executor calls them and as the methods of a process are called."""


class _NoQueue:
    """Stands for the standard executor's queue of calls, which has a thread; here there is neither."""

    def close(self) -> None:
        """Do nothing."""

    def join_thread(self) -> None:
        """Do nothing."""


class StandardNames:
    """Views, mixed into the executor."""

    _pool: Pool
    _call_queue = _NoQueue()

    @property
    def _processes(self) -> dict[int, Any]:
        with self._pool.lock:
            return {worker.pid: worker.process for worker in self._pool.workers.values()}

    @property
    def _pending_work_items(self) -> dict[int, Task]:
        """The tasks that are not done, each with its ``future``."""
        with self._pool.lock:
            tasks = [task for task in self._pool.pending if task.message is not None]
            for worker in self._pool.workers.values():
                tasks += worker.assigned.values()
            return {task.number: task for task in tasks}

    @property
    def _max_workers(self) -> int:
        return self._pool.max_workers

    @property
    def _mp_context(self) -> Any:
        return self._pool.context

    @property
    def _broken(self) -> str | bool:
        return False if self._pool.broken is None else str(self._pool.broken)

    @property
    def _shutdown_lock(self) -> Any:
        return self._pool.lock

    @property
    def _force_shutting_down(self) -> bool:
        return self._pool.ended

    @_force_shutting_down.setter
    def _force_shutting_down(self, ended: bool) -> None:
        self._pool.ended = ended

    @property
    def _executor_manager_thread(self) -> threading.Thread | None:
        return self._pool.manager
