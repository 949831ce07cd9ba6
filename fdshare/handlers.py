"""Whether an exception is what a signal handler has raised, and so none of ours to translate, or to go on after."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

__all__ = ["is_from_handler"]

_CO_VARARGS = 4  # inspect.CO_VARARGS


def is_from_handler(error: BaseException) -> bool:
    """Whether a signal handler raised ``error`` in the middle of what the caller has called.

    A handler is known by its frame: alone among functions, it is given its caller's frame, that of the code it interrupts.
    One that has let go of that argument is looked for among the handlers that are set now.
    """
    entry = error.__traceback__
    entry = None if entry is None else entry.tb_next  # not the frame that has caught it
    if entry is None:
        return False
    current = set(_codes_of_handlers())
    while entry is not None:
        frame = entry.tb_frame
        if frame.f_code in current or any(one is frame.f_back for one in _frames_given_to(frame)):
            return True
        entry = entry.tb_next
    return False


def _frames_given_to(frame: FrameType) -> Iterator[FrameType]:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & _CO_VARARGS)
    for name in code.co_varnames[:count]:
        value = frame.f_locals.get(name)
        for one in value if type(value) is tuple else (value,):
            if type(one) is FrameType:
                yield one


def _codes_of_handlers() -> Iterator[CodeType]:
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        for function in (handler, vars(type(handler)).get("__call__")):
            code = getattr(function, "__code__", None)
            if code is not None:
                yield code
