"""Locks of one process, whose ``with`` no interrupt gets into: the ones of threading, but for CPython 3.14.

A ``with`` takes a lock by a call of ``__enter__``, and its block begins with the next instruction.  CPython 3.14 looks for
signals after that call, which the versions before and after it do not: where the handler raises, as for KeyboardInterrupt, the
lock is held for ever and nobody is inside.  There a lock is taken by the step of an iterator, after which nothing looks (see
rights.py), in a function of Python, whose return does not either.  To give it back is one call of C, as it always was:
a function of Python could be interrupted before its first line.
"""

from __future__ import annotations

import sys
import threading
from itertools import repeat, starmap
from typing import Any

__all__ = ["make_lock", "make_rlock"]

_OPTIONAL = (
    "locked",
    "_release_save",
    "_acquire_restore",
    "_is_owned",
)  # the last three are an RLock's, for Condition


class _Entered:
    """A lock of threading behind a ``with`` that is entered whole or not at all."""

    # An instance's own __exit__, which is looked up on the type all the same: a slot of that.
    __slots__ = ("__exit__", "__weakref__", "_takes", "acquire", "release", *_OPTIONAL)

    def __init__(self, lock: Any) -> None:
        self.__exit__ = lock.__exit__
        self._takes = starmap(lock.acquire, repeat(()))
        self.acquire, self.release = lock.acquire, lock.release
        for name in _OPTIONAL:
            if hasattr(lock, name):
                setattr(self, name, getattr(lock, name))

    def __enter__(self) -> Any:
        for taken in self._takes:
            return taken  # no call any more: signals are looked for after each
        raise AssertionError("an endless iterator has ended")


def _make_entered_lock() -> Any:
    return _Entered(threading.Lock())


def _make_entered_rlock() -> Any:
    return _Entered(threading.RLock())


LOOKS_BETWEEN = sys.version_info[:2] == (3, 14)
"""Whether this Python looks for signals between the taking of a lock and the block."""


# By the names of now: gevent and its like may have put others there since the import.
make_lock: Any = _make_entered_lock if LOOKS_BETWEEN else lambda: threading.Lock()
make_rlock: Any = _make_entered_rlock if LOOKS_BETWEEN else lambda: threading.RLock()
