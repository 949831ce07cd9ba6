"""Modules that only some messages, errors and warnings need: loaded with the first channel, queue, lock or listener.

They are too much for ``import fdshare``, and must not be looked for any later.  A process may change its root or user as soon as
it has its channels, or put itself under a filter of system calls, and then finds no file of Python's any more.
Where one is missing even so, what needs it goes another way or raises an error of fdshare's own.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import sys
from types import ModuleType

__all__ = ["load", "prepare", "warn"]

_NAMES = (
    "cloudpickle",  # what pickle cannot take, and to name what nobody can
    *(["ctypes"] if sys.version_info < (3, 13) else []),  # to map large messages; see memory.py
    "logging",
    "multiprocessing",  # its BufferTooShort
    *(
        ["_colorize"] if sys.version_info >= (3, 15) else []
    ),  # of traceback, which the answers of a pool's workers hold
)

_ENCODINGS = ("ascii", "latin-1")
"""Of text files that arrive; that of UTF-8 is always there."""


def load(name: str) -> ModuleType | None:
    """Return a module, loaded if need be; None where it cannot be."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # the latter where files must not be opened
        return None


@functools.cache
def prepare() -> None:
    """Load them all, once; those that cannot be loaded are missed where they are needed."""
    for name in _NAMES:
        load(name)
    for name in _ENCODINGS:
        try:
            codecs.lookup(name)
        except (LookupError, OSError):
            pass


def warn(text: str, *arguments: object, exc_info: bool = False) -> None:
    """Write a warning to the log "fdshare"; to the standard error where there is no logging."""
    logging = load("logging")
    if logging is not None:
        logging.getLogger("fdshare").warning(text, *arguments, exc_info=exc_info)
    elif sys.stderr is not None:
        sys.stderr.write(f"fdshare: {text % arguments}\n")
