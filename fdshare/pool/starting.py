"""``Starter``: how a pool's workers come to be, and what all of them have in common.

With the start method fork the first ones are forked where the first task is submitted, before the pool has a thread; all that
come later are forked by the template process, see there.  Should that be gone, they are spawned.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fdshare import rights
from fdshare.errors import FdLimitError
from fdshare.pool import birth
from fdshare.pool import worker as process_side
from fdshare.pool.life import LifeLine
from fdshare.pool.started import Started, start
from fdshare.pool.template import Template, TemplateChild

if TYPE_CHECKING:
    from fdshare.pool.workers import Worker

__all__ = ["Starter", "limit_told"]

logger = logging.getLogger("fdshare.pool")

DESCRIPTORS = 3
"""What a worker costs its parent: the two ends of its channel, and what tells of its end."""

START_DESCRIPTORS = 7
"""What starting a process takes for a moment: the worker's life line, two pipes, and two more.  Looked for before, as where
there is no room multiprocessing leaves pipes open, and its fork server dies of a client that has connected and can do no more."""

SPARE_DESCRIPTORS = 32
"""So many the program is to have beside its workers, or else these make do with fewer."""


class Starter:
    """Starts worker processes for one pool."""

    def __init__(
        self,
        context: Any,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        max_tasks: int | None,
        fragile: bool,
    ) -> None:
        self.forks = context.get_start_method(allow_none=False) == "fork"
        self.context = context
        self._setup = Setup(initializer, initargs) if initializer else None
        self._max_tasks = max_tasks
        self._fragile = fragile
        self._scarce = False
        self._life: LifeLine | None = None
        self._template: Template | None = None

    def open(self, workers: int) -> None:
        """Get ready to start as many.

        Raises:
            OSError: no descriptor left.
        """
        self._scarce = is_scarce(workers)
        self._life = LifeLine()

    def fork_template(self) -> None:
        """Fork the template process.

        Raises:
            OSError: no descriptor or no process left.
        """
        self._template = Template(self._line, partial(self._make, self.context))

    def start_here(self, worker: Worker, context: Any = None) -> Started:
        """Start a worker's process in multiprocessing's way.

        Raises:
            OSError, pickle.PicklingError, …: it could not be started.
        """
        context = context or self.context
        method = context.get_start_method()
        self._line.check_room(START_DESCRIPTORS)
        if method == "forkserver":
            _preload()
        reader, worker.life = self._line.end()
        with reader:
            process = self._make(context, worker.inbox, reader)
            try:
                start(process, forks=method == "fork")
                return Started(process, scarce=self._scarce)
            except BaseException:
                if process.pid is not None:
                    process.kill()
                    process.join()
                raise

    def start_safely(self, worker: Worker) -> Started | TemplateChild:
        """Start a worker's process beside the threads that there are, with whose locks it is to have nothing to do.

        Raises:
            OSError, pickle.PicklingError, …: it could not be started.
        """
        if not self.forks:
            return self.start_here(worker)
        try:
            if self._template is None:
                raise ChildProcessError("there is no process that forks workers")
            reader, worker.life = self._line.end()
            with reader:
                return self._template.start_worker(worker.inbox, reader, scarce=self._scarce)
        except ChildProcessError as error:
            logger.warning("a worker is spawned, as it cannot be forked: %s", error)
            return self.start_here(worker, multiprocessing.get_context("spawn"))

    @property
    def _line(self) -> LifeLine:
        assert self._life is not None
        return self._life

    def _make(self, context: Any, *ends: Any) -> Any:
        arguments = (*ends, self._setup, self._max_tasks, self._fragile)
        process = context.Process(target=process_side.main, args=arguments)
        if context.get_start_method() != "fork":
            process._name = birth.WorkerName(process.name)
        return process

    def forget_setup(self) -> None:
        """Let go of the initializer and its arguments."""
        self._setup = None

    def filenos(self) -> list[int]:
        """Borrow the descriptors that a fork inherits."""
        line = [] if self._life is None else [self._life.fileno()]
        return line if self._template is None else line + self._template.filenos()

    def close(self) -> None:
        """End what workers have in common; they have ended, or do so now."""
        if self._template is not None:
            self._template.close()
        self._close_line()

    def let_go(self) -> None:
        """In a forked child: close what is the parent's."""
        if self._template is not None:
            self._template.let_go()
        self._close_line()

    def _close_line(self) -> None:
        self._template = None
        line, self._life = self._life, None
        if line is not None:
            line.close()


def is_scarce(workers: int) -> bool:
    """Whether so many workers would leave hardly a descriptor to the program, so that each is to cost two and not three."""
    limit = rights.descriptor_limit()
    wanted = DESCRIPTORS * workers + SPARE_DESCRIPTORS
    return limit != resource.RLIM_INFINITY and wanted > limit - len(rights.open_numbers())


@contextlib.contextmanager
def limit_told() -> Iterator[None]:
    """Raise FdLimitError where there is no descriptor left for a worker or a call."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE) or isinstance(error, FdLimitError):
            raise
        limit = rights.descriptor_limit()
        text = f"{os.strerror(error.errno)} (limit {limit}): close some or raise RLIMIT_NOFILE"
        raise FdLimitError(error.errno, text, needed=1, limit=limit) from error


def _preload() -> None:
    """Have the fork server import what a worker needs, unless it runs already: a worker starts in 5 ms instead of 90.

    And not the main module, as it would from CPython 3.14 on: one without a guard, or of stdin, ends the server.  Each worker
    imports it, as before 3.14.
    """
    from multiprocessing import forkserver

    server = forkserver._forkserver
    _renew_server(server)
    modules = getattr(server, "_preload_modules", None)
    if modules is not None and (process_side.__name__ not in modules or "__main__" in modules):
        others = (name for name in modules if name not in ("__main__", process_side.__name__))
        server.set_forkserver_preload([*others, process_side.__name__])


def _renew_server(server: Any) -> None:
    """Forget a fork server that is the parent's, after a fork, or whose end somebody else has waited for."""
    pid = getattr(server, "_forkserver_pid", None)
    if pid is None:
        return
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        fd, server._forkserver_alive_fd = server._forkserver_alive_fd, None
        server._forkserver_address = server._forkserver_pid = None
        os.close(fd)


class Setup:
    """An initializer and its arguments, for multiprocessing to pickle: in its way, or else as a message is encoded."""

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments

    def __call__(self) -> object:
        return self.function(*self.arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        both = self.function, self.arguments
        try:
            # Not pickled twice: what the process is to inherit may be named once.
            return rebuild_setup, (pickle.loads, birth.pickled(both))
        except Exception:  # noqa: BLE001 -- pickle raises many; as a message it may work, or say why not
            from fdshare.handoff import reduce_outside

            function, arguments = reduce_outside(both)
            return rebuild_setup, (function, *arguments)


def rebuild_setup(rebuild: Callable[..., Any], *arguments: Any) -> Setup:
    """Return the setup that was pickled; raises what loading it does."""
    return Setup(*rebuild(*arguments))
