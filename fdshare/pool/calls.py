"""Calls as messages: ``encode_call`` in the parent, ``FunctionCache`` in the worker.

A call is encoded as ``(function, args, kwargs)``.  To look a function up by its name takes longer than all the rest of a small
call, and one that no other process can import (of an interactive ``__main__``, a lambda, a closure) costs ten times as much
by value.  So a function is encoded once, the call is ``(number, code, args, kwargs)``, and each worker keeps what it has
loaded under that number.  That must not show: what goes by value is kept only where a fresh copy would be the same, which
:func:`_snapshot` decides.
"""

from __future__ import annotations

import dis
import itertools
import pickle
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from fdshare.codec import PROTOCOL, Outgoing, PickleCodec, raise_undecodable
from fdshare.errors import FdShareError
from fdshare.wire import ALWAYS_INLINE

__all__ = ["FunctionCache", "encode_call", "encode_result", "run_chunk", "typed"]

MAX_FUNCTIONS = 256
"""Most functions a worker keeps: those used last."""

MAX_CODE = 16 * 1024
"""Largest encoded function that is sent beside its number, bytes: it travels with each call, so that any worker can take any."""

_encode = PickleCodec().encode
_encode_alike = PickleCodec(alike=True).encode
_numbers = itertools.count(1)
_PLAIN = frozenset((int, float, bool, type(None)))
"""What pickle alone encodes as the codec does, in half of its time; and small, or else it is encoded twice."""

_ATOMS = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    type(...),
    types.BuiltinFunctionType,
    types.ModuleType,
)


@attrs.define(eq=False)
class _Encoded:
    """A function's number and code, and what it was made from."""

    number: int
    code: bytes
    snapshot: list[Any]


_known: weakref.WeakKeyDictionary[Callable[..., Any], _Encoded] = weakref.WeakKeyDictionary()
_named: dict[int, tuple[int, bytes, weakref.ref[Any]]] = {}
"""Number and code of functions that go by name, by their id while they live."""
_named_alike: dict[int, tuple[int, bytes, weakref.ref[Any]]] = {}
"""The same for workers that are forks of this process."""
_fixed: weakref.WeakKeyDictionary[types.CodeType, bool] = weakref.WeakKeyDictionary()


def encode_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, alike: bool = False
) -> bytes | Outgoing:
    """Encode a call.

    Args:
        alike: whether the workers are forks of this process.

    Raises:
        NotSendableError: something in it cannot travel.
        BaseException: what any ``__reduce__`` raised beside Exceptions.
    """
    encode = _encode_alike if alike else _encode
    if type(function) is types.FunctionType:
        named = (_named_alike if alike else _named).get(id(function))
        if named is not None:
            call = named[0], named[1], args, kwargs
            if not kwargs and _PLAIN.issuperset(map(type, args)):
                message = pickle.dumps(call, PROTOCOL)
                if len(message) <= ALWAYS_INLINE:
                    return message
            return encode(call)
        encoded = _encoded(function, alike)
        if encoded is not None:
            return encode((encoded.number, encoded.code, args, kwargs))
    return encode((function, args, kwargs))


def encode_result(value: Any) -> bytes | Outgoing:
    """Encode what a call returned.

    Raises:
        NotSendableError, BaseException: as for :func:`encode_call`.
    """
    if type(value) in _PLAIN:
        message = pickle.dumps(value, PROTOCOL)
        if len(message) <= ALWAYS_INLINE:
            return message
    return _encode(value)


def _encoded(function: types.FunctionType, alike: bool) -> _Encoded | None:
    """Return the function's code from an earlier call or made now; None where it must be encoded anew each time."""
    encode, names = (_encode_alike, _named_alike) if alike else (_encode, _named)
    if "<" not in function.__qualname__ and isinstance(message := encode(function), bytes):
        if len(names) >= MAX_FUNCTIONS:
            names.clear()
        key = id(function)
        forget = weakref.ref(function, lambda _: names.pop(key, None))
        names[key] = number, _, _ = next(_numbers), message, forget
        return _Encoded(number, message, [])
    snapshot: list[Any] = []
    if not _snapshot(function, snapshot, set()):
        return None
    known = _known.get(function)
    if known is not None and _same(known.snapshot, snapshot):
        return known
    message = encode(function)
    if isinstance(message, bytes):
        code = message
    else:
        if message.fds or message.buffers:
            message.failed()
            return None
        code = b"".join(message.payload)
    if len(code) > MAX_CODE:
        return None
    known = _known[function] = _Encoded(next(_numbers), code, snapshot)
    return known


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(_is, before, now))


def _is(one: Any, other: Any) -> bool:
    return one is other


def _snapshot(function: types.FunctionType, found: list[Any], seen: set[int]) -> bool:
    """Add to ``found`` whatever a copy of ``function`` would be made from; False where a copy would have a state of its own."""
    if id(function) in seen:
        return True
    seen.add(id(function))
    code = function.__code__
    if function.__dict__ or not _is_fixed(code):
        return False
    values: list[Any] = [code, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    try:
        values.extend(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:  # a cell that is still empty
        return False
    space = function.__globals__
    for name in _global_names(code):
        if name in space:
            values += name, space[name]
    found += values
    return all(_is_constant(value, found, seen) for value in values)


def _is_constant(value: Any, found: list[Any], seen: set[int]) -> bool:
    if isinstance(value, _ATOMS) or type(value) is types.CodeType:
        return True
    if type(value) is tuple or type(value) is frozenset:
        return all(_is_constant(item, found, seen) for item in value)
    if isinstance(value, type | types.FunctionType):
        module = sys.modules.get(value.__module__)
        if module is not None and value.__module__ != "__main__" and "<" not in value.__qualname__:
            return True  # goes by name
        return isinstance(value, types.FunctionType) and _snapshot(value, found, seen)
    return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_fixed(code: types.CodeType) -> bool:
    """Whether running this code leaves the function's own cells and globals as they are."""
    known = _fixed.get(code)
    if known is None:
        known = _fixed[code] = not any(
            instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
            or (
                instruction.opname in ("STORE_DEREF", "DELETE_DEREF")
                and instruction.argval in part.co_freevars
            )
            for part in _codes(code)
            for instruction in dis.get_instructions(part)
        )
    return known


def _global_names(code: types.CodeType) -> Iterator[str]:
    for part in _codes(code):
        yield from part.co_names


def typed(error: BaseException, kind: type[FdShareError]) -> BaseException:
    """Return ``error``, or one of ``kind`` where whoever asks the future for its result would be ended by it: SystemExit."""
    if isinstance(error, Exception | KeyboardInterrupt):
        return error
    instead = kind(f"{type(error).__name__}({error}) was raised by pickling")
    instead.__cause__ = error
    return instead


class FunctionCache:
    """The functions that a worker has loaded."""

    def __init__(self) -> None:
        self._functions: OrderedDict[int, Callable[..., Any]] = OrderedDict()

    def load(self, number: int, code: bytes) -> Callable[..., Any]:
        """Return the function with this number, loading it where it is new.

        Raises:
            DecodeError: it cannot be loaded here.
        """
        function = self._functions.get(number)
        if function is None:
            try:
                function = self._functions[number] = pickle.loads(code)
            except Exception as error:  # noqa: BLE001 -- raised again
                raise_undecodable(error)
            if len(self._functions) > MAX_FUNCTIONS:
                self._functions.popitem(last=False)
        else:
            self._functions.move_to_end(number)
        return function


def run_chunk(function: Callable[..., Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
    """Run ``function`` on each tuple of arguments: one task of ``map`` with a chunksize."""
    return [function(*args) for args in chunk]
