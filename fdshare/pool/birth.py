"""What a spawned worker does before it is one: multiprocessing has it import the main module, which may go wrong.

========================================== ===========================================================================
the main module                            the worker
========================================== ===========================================================================
is a file that is not there: of stdin      begins without it; functions of it come by value
starts processes when it is imported       ends by UNGUARDED without a word, and the pool tells once what is missing
fails otherwise                            tells it, and ends by MAIN_FAILED; no other one is tried
========================================== ===========================================================================

multiprocessing lets nobody in so early, but it pickles the name of the process with the orders for the import.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

from fdshare.mains import Importable, importable

__all__ = ["MAIN_FAILED", "REASONS", "UNGUARDED", "WorkerName", "begin", "check_importing", "pickled"]

UNGUARDED, MAIN_FAILED = 249, 250
"""Exit codes that are nobody else's, by which the parent knows."""

REASONS = {
    UNGUARDED: "the main module starts the pool's work when it is imported, and every spawned worker imports it: put that "
    'part under  if __name__ == "__main__":',
    MAIN_FAILED: "the main module cannot be imported in a worker; its traceback is above",
}


_SECOND_TIME = ("bootstrapping phase", "context has already been set")
"""What multiprocessing says to a main module that does the whole program's work over again."""


_BEGIN = (
    "(__import__('sys').path.__setitem__(slice(None), path), "
    f"__import__({__name__!r}, fromlist=['begin']).begin(name))[1]"
)


class WorkerName(str):
    """The name of a process, which has what imports the main module there looked after."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing import process

        # The new process comes to this before it has the sys.path that is with its orders, by which alone it may find us.
        home: Any = process.ORIGINAL_DIR  # type: ignore[attr-defined]
        path = [entry or home or entry for entry in sys.path]
        return eval, (_BEGIN, {"path": path, "name": str(self)})


def begin(name: str) -> str:
    """Called where a name is unpickled; in a worker that is at its very beginning, so see to the import."""
    from multiprocessing import process, spawn

    if getattr(process.current_process(), "_inheriting", False):
        module: Any = spawn
        for verb in ("_fixup_main_from_name", "_fixup_main_from_path"):
            original = getattr(module, verb)
            if not isinstance(original, _Import):
                setattr(module, verb, _Import(original))
    return name


class _Import:
    """One of multiprocessing's two ways to import the main module."""

    def __init__(self, original: Callable[[str], object]) -> None:
        self.original = original

    def __call__(self, where: str) -> None:
        if os.path.isabs(where) and not os.path.exists(where):
            return
        try:
            self.original(where)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the process ends here
            _end(error)


def _end(error: BaseException) -> None:
    unguarded = isinstance(error, SystemExit) or any(text in str(error) for text in _SECOND_TIME)
    with contextlib.suppress(Exception):
        if not unguarded:
            sys.excepthook(type(error), error, error.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    os._exit(UNGUARDED if unguarded else MAIN_FAILED)


def pickled(obj: Any) -> bytes:
    """Pickle ``obj`` as multiprocessing does for a process that it starts.

    Raises:
        Exception: it cannot be pickled so, or would not be found there.
    """
    from multiprocessing.reduction import ForkingPickler

    pickler = ForkingPickler if importable() is Importable.BY_ALL else _away_from_main()
    return bytes(pickler.dumps(obj))


@functools.cache
def _away_from_main() -> Any:
    from multiprocessing.reduction import ForkingPickler

    class AwayFromMain(ForkingPickler):
        def reducer_override(self, obj: Any) -> Any:
            """Refuse what no new process finds."""
            if isinstance(obj, types.FunctionType | type) and obj.__module__ == "__main__":
                raise pickle.PicklingError(f"{obj!r} is of a main module that no new process imports")
            return NotImplemented

    return AwayFromMain


def check_importing() -> None:
    """Raise where a process that is being spawned imports the main module, and would spawn in turn.

    Raises:
        RuntimeError: as multiprocessing does.
    """
    process: Any = sys.modules.get("multiprocessing.process")
    if process is not None and getattr(process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a pool was used before this process has finished its bootstrapping phase: " + REASONS[UNGUARDED]
        )
