"""The pool's own exception, apart from the others because its base takes long to import; and a process's end in words."""

from __future__ import annotations

import signal
from concurrent.futures.process import BrokenProcessPool

from fdshare.errors import FdShareError

__all__ = ["WorkerDiedError", "manner"]


class WorkerDiedError(FdShareError, BrokenProcessPool):
    """The worker that ran this task died; the other tasks and the pool go on.

    ``pid`` (int or None) was its process, ``exitcode`` (int or None) how it ended: negative for a signal, as in
    ``multiprocessing.Process.exitcode``.
    """

    def __init__(self, *args: object, pid: int | None = None, exitcode: int | None = None) -> None:
        super().__init__(*args)
        self.pid = pid
        self.exitcode = exitcode


def manner(exitcode: int | None) -> str:
    """Say how a process ended, from its ``exitcode``."""
    if exitcode is None:
        return "an unknown end"
    if exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"
