"""The pool's own exception, apart from the others because its base is in a module that takes long to import."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

from fdshare.errors import FdShareError

__all__ = ["WorkerDiedError"]


class WorkerDiedError(FdShareError, BrokenProcessPool):
    """The worker that ran this task died; the other tasks and the pool go on.

    ``pid`` (int or None) was its process, ``exitcode`` (int or None) how it ended: negative for a signal, as in
    ``multiprocessing.Process.exitcode``.
    """

    def __init__(self, *args: object, pid: int | None = None, exitcode: int | None = None) -> None:
        super().__init__(*args)
        self.pid = pid
        self.exitcode = exitcode
