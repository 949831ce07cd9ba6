"""``Raised``, an exception on its way from a worker: its traceback goes first, and arrives also where the exception does not.

Many an exception can be pickled and not unpickled: its ``__init__`` takes what its ``args`` do not hold.  By then the traceback
has been heard, and the error in its place can show what the task had raised.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures.process import _ExceptionWithTraceback, _RemoteTraceback
from typing import Any

__all__ = ["Raised", "explain", "hear_traceback", "rebuild_raised"]


class _Heard(threading.local):
    cause: _RemoteTraceback | None = None


_heard = _Heard()
"""The traceback that this thread has unpickled last."""


class Raised(_ExceptionWithTraceback):
    """An exception with the text of its traceback, to be pickled."""

    def __init__(self, error: BaseException) -> None:
        with warnings.catch_warnings():
            # CPython 3.15 warns, perhaps as an error, where it looks for the lines of a main module that multiprocessing has run.
            warnings.simplefilter("ignore")
            super().__init__(error, error.__traceback__)  # type: ignore[arg-type]  # may be None

    def __reduce__(self) -> Any:
        return rebuild_raised, (_Text(self.tb), self.exc)  # in this order


class _Text:
    def __init__(self, text: Any) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return hear_traceback, (self.text,)


def hear_traceback(text: Any) -> _RemoteTraceback:
    """Return the cause that an exception gets, and remember it for :func:`explain`; never raises."""
    _heard.cause = _RemoteTraceback(text)
    return _heard.cause


def rebuild_raised(cause: _RemoteTraceback, error: Any) -> Any:
    """Return the exception; raises nothing of its own."""
    if isinstance(error, BaseException):
        _heard.cause = None
        error.__cause__ = cause
    return error


def explain(error: BaseException) -> None:
    """Give ``error``, raised in place of an exception that could not be rebuilt by this thread, that one's traceback."""
    cause, _heard.cause = _heard.cause, None
    if cause is not None:
        error.__cause__ = cause
