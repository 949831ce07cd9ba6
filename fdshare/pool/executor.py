"""``ProcessPoolExecutor``: the standard library's, for calls and results that hold anything a channel carries.

The way of the data::

    |================ parent process ================|============== worker process ==============|

      submit()                                          (one socketpair a worker)
        | encode: the call is bytes and descriptors now
        v
      Pool --- an idle worker? ---- send ------------> inbox --- receive, decode, run, encode --+
        |                                                |                                       |
        | none                                           | taken back by the parent's duplicate  |
        v                                                | of the inbox: cancelled, worker dead, |
      pending <------------------------------------------+ or another worker idle                |
        ^                                                                                        |
        | give more                                                                              |
      Manager (thread, epoll) <-------- receive, decode, settle the future <------- send --------+
        ^                                                                                        |
        +------------- pidfd of each worker: it died                                             |
                                                                                                 |
      result() <--- receive, decode: where it waits for the only task of that worker ------------+

A task is in exactly one place: in ``pending``, in a worker's inbox, or in a worker's hands; a packet is atomic, so there is
nothing in between.  The kernel knows the place even of a worker that was killed, and no lock is shared between processes.
Nothing polls: the parent wakes for answers, deaths and deadlines only.  Who reads an answer, the manager or the thread that waits
for it, is told in leading.py.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Executor
from typing import Any, TypeVar

from fdshare.codec import Outgoing
from fdshare.errors import NotSendableError
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.pool import manager as managers
from fdshare.pool.calls import encode_call, typed
from fdshare.pool.compat import KILL, TERMINATE, StandardNames
from fdshare.pool.futures import TaskFuture
from fdshare.pool.mapping import Slot, map_calls
from fdshare.pool.pool import Pool
from fdshare.pool.stats import PoolStats, stats_of
from fdshare.pool.tasks import Task

__all__ = ["PoolView", "ProcessPoolExecutor"]

T = TypeVar("T")

TERMINATE_SECONDS = 2.0
"""How long ``terminate_workers`` leaves a worker to end by SIGTERM, which a task may handle to clean up."""

_exiting = False

_NO_ARGUMENTS: dict[str, Any] = {}


def _before_exit() -> None:
    """Let every pool finish its tasks before the interpreter goes; called before non-daemon threads are joined."""
    global _exiting
    _exiting = True
    threads = list(managers.running)
    for manager in threads:
        manager.exiting = True
        manager.wake()
    for manager in threads:
        manager.join()


# As the standard executor does: atexit would be too late, as threads are joined before it.
threading._register_atexit(_before_exit)  # type: ignore[attr-defined]


def _cpu_count() -> int:
    count = getattr(os, "process_cpu_count", os.cpu_count)()
    return count or 1


class ProcessPoolExecutor(StandardNames, Executor):
    """Runs calls in worker processes; a drop-in for ``concurrent.futures.ProcessPoolExecutor``.

    Args:
        max_workers: how many processes at most; None for one a processor.
        mp_context: how processes are started, as ``multiprocessing.get_context`` returns it; None for the default.
        initializer, initargs: called in each worker before its first task.
        max_tasks_per_child: tasks after which a worker is replaced; None for no limit; not with the start method fork.
        restart_workers: whether a dead worker is replaced and only its task fails; False breaks the whole pool, as the
            standard executor does.
        max_inflight: most bytes of large arguments whose tasks are not done, before ``submit`` waits for some to be; None for
            no bound.  One task more than there are workers is always taken; see backlog.py for who never waits.

    Raises:
        ValueError, TypeError: as the standard executor.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        restart_workers: bool = True,
        max_inflight: int | None = DEFAULT_MAX_INFLIGHT,
    ) -> None:
        if max_workers is None:
            max_workers = _cpu_count()
        elif max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if mp_context is None:
            mp_context = mp.get_context("spawn") if max_tasks_per_child is not None else mp.get_context()
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
            if mp_context.get_start_method(allow_none=False) == "fork":
                raise ValueError(
                    "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; "
                    "supply a different mp_context."
                )
        if max_inflight is not None and max_inflight <= 0:
            raise ValueError("max_inflight must be None or > 0")
        pool = Pool(
            max_workers,
            mp_context,
            initializer,
            tuple(initargs),
            max_tasks_per_child,
            restart_workers,
            max_inflight,
        )
        self._pool = pool

        def collected(_: object, pool: Pool = pool) -> None:
            pool.closing = pool.collected = True
            pool.wake()

        self._collected = weakref.ref(self, collected)

    # --- calls -------------------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """Schedule ``fn(*args, **kwargs)`` and return its future.

        The call is encoded before this returns: its files and sockets may be closed and its arrays changed at once.
        What cannot be encoded is the future's exception.  Waits while the large arguments of other tasks take more than
        ``max_inflight`` bytes.

        Raises:
            RuntimeError: after shutdown.
            BrokenProcessPool: the pool is broken.
            OSError: no worker can be started; or there are no descriptors or no memory left for the arguments, which are
                as they were (FdLimitError, NoSpaceError).
            MessageTooLargeError: the arguments are over a bound of wire.py.
        """
        future = TaskFuture(self._pool)
        self._submit(future, fn, args, kwargs)
        return future

    def _submit(
        self,
        future: TaskFuture | Slot,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] = _NO_ARGUMENTS,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        pool = self._pool
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if pool.closing or pool.broken is not None or pool.abandoned:
            pool.check_open()
        try:
            message = encode_call(function, args, kwargs, alike=pool.forks)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- any __reduce__ may raise anything
            pool.grow()
            future.start()
            future.set_exception(typed(error, NotSendableError))
            return
        task = Task(pool, future, timeout, retries)
        try:
            pool.submit(task, message)
        except BaseException:
            task.release()
            if isinstance(message, Outgoing):
                message.failed()
            raise
        if isinstance(message, Outgoing):
            message.sent()

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: Any = None,
    ) -> Iterator[T]:
        """Return an iterator over ``map(fn, *iterables)``, with the calls made by the workers.

        Args:
            timeout: seconds from now after which ``next()`` raises TimeoutError.
            chunksize: how many calls make one task.
            buffersize: most tasks whose results have not been yielded yet, so that endless iterables work; None takes the
                iterables in at once.
            progress: True, a description, or a running ``rich.progress.Progress``: draw how far it is.

        Raises:
            ValueError, TypeError: chunksize or buffersize makes no sense.
            ImportError: ``progress`` without rich.
        """
        return self._map(None, 0, fn, iterables, timeout, chunksize, buffersize, progress)

    def _map(
        self,
        task_timeout: float | None,
        retries: int,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        progress: Any,
    ) -> Iterator[T]:
        def submit(owner: ProcessPoolExecutor, slot: Slot, function: Any, args: tuple[Any, ...]) -> None:
            owner._submit(slot, function, args, _NO_ARGUMENTS, task_timeout, retries)

        results = map_calls(self, fn, iterables, submit, timeout, chunksize, buffersize)
        if progress is None or progress is False:
            return results
        from fdshare.pool.progress import show_progress

        pool = self._pool
        sizes = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
        total = min(sizes) if sizes and len(sizes) == len(iterables) else None
        return show_progress(results, progress, total, lambda: stats_of(pool))

    def options(self, *, timeout: float | None = None, retries: int = 0) -> PoolView:
        """Return a view of this pool whose ``submit`` and ``map`` have their own rules.

        Args:
            timeout: seconds a task may run, counted from its beginning; then its worker is killed and the task fails with
                TaskTimeoutError.  So it does where its worker is not ready in that time and five seconds after its start, or
                longer where others took more than one to be.  None for no limit.
            retries: how often a task may run again after its worker has died under it.  It must bear being run twice.

        Raises:
            ValueError, TypeError: they make no sense.
        """
        if timeout is not None and not timeout > 0:
            raise ValueError("timeout must be None or > 0")
        if not isinstance(retries, int):
            raise TypeError("retries must be an integer")
        if retries < 0:
            raise ValueError("retries must be >= 0")
        return PoolView(self, timeout, retries)

    def stats(self) -> PoolStats:
        """Return a snapshot: each worker's pid, state, task age, tasks done and resident memory; tasks queued, running, done,
        failed; workers restarted.  Raises nothing.
        """
        return stats_of(self._pool)

    # --- the end -----------------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, finish those there are, end the workers.

        Args:
            wait: whether to return only when all of that is done.
            cancel_futures: cancel every task that no worker has begun.

        Raises:
            RuntimeError: it would have to wait for itself, inside a callback of one of its futures.
        """
        pool = self._pool
        with pool.lock:
            pool.closing = True
            pool.attend_all()
            pool.let_go()
        if cancel_futures:
            pool.withdraw_all(begun_by_order=True)
        pool.wake()
        manager = pool.manager
        if wait and manager is not None and not pool.abandoned:
            manager.join()

    def terminate_workers(self) -> None:
        """End all workers at once by SIGTERM; tasks that wait are cancelled, those that run fail.

        Does not wait for their end.  Who has not ended after two seconds, because it ignores the signal or is stopped, is killed.

        Raises:
            PermissionError: a worker has changed its user.
        """
        self._force_shutdown(operation=TERMINATE)

    def kill_workers(self) -> None:
        """End all workers at once by SIGKILL; tasks that wait are cancelled, those that run fail.

        Does not wait for their end.

        Raises:
            PermissionError: a worker has changed its user.
        """
        self._force_shutdown(operation=KILL)

    def _force_shutdown(self, operation: str) -> None:
        """End all workers; under the standard executor's name, since others put something of their own in its place."""
        if operation not in (TERMINATE, KILL):
            raise ValueError(f"Unsupported operation: {operation!r}")
        pool = self._pool
        with pool.lock:
            pool.closing = pool.ended = True
            pool.let_go()
            if operation == TERMINATE and pool.kill_at is None:
                pool.kill_at = time.monotonic() + TERMINATE_SECONDS
        pool.withdraw_all(begun_by_order=False)
        pool.wake()
        with pool.lock:
            for worker in pool.workers.values():
                getattr(worker.process, operation)()


class PoolView:
    """A pool with rules of its own for its tasks; made by :meth:`ProcessPoolExecutor.options`."""

    def __init__(self, executor: ProcessPoolExecutor, timeout: float | None, retries: int) -> None:
        self._executor = executor
        self._timeout = timeout
        self._retries = retries

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> TaskFuture:
        """Schedule a call as ``ProcessPoolExecutor.submit`` does.

        Raises:
            RuntimeError, BrokenProcessPool, OSError, MessageTooLargeError: as there.
        """
        future = TaskFuture(self._executor._pool)
        self._executor._submit(future, fn, args, kwargs, self._timeout, self._retries)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: Any = None,
    ) -> Iterator[T]:
        """Map as ``ProcessPoolExecutor.map`` does; ``timeout`` here is of the whole, and a task is a chunk.

        Raises:
            ValueError, TypeError, ImportError: as there.
        """
        return self._executor._map(
            self._timeout, self._retries, fn, iterables, timeout, chunksize, buffersize, progress
        )
