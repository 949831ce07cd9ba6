"""Objects to packets and back; no I/O.

``encode`` gives either plain bytes (a small message without descriptors: one pickle) or an :class:`Outgoing` with the pickle,
borrowed descriptors and out-of-band buffers.  ``decode`` takes an :class:`Incoming`.  Pickle's C implementation does the
work; the reducers of :mod:`fdshare.reducers` come before everything else, and cloudpickle is asked only when pickle has
failed, since it takes ten times as long.

A payload is a pickle.  Where out-of-band buffers of it lie in shared memory, they are not sent but referred to, and a second
pickle goes before it: byte 0x01, the size of that pickle in 8 bytes, little-endian, and a list of (place among the buffers,
window); see references.py.
"""

from __future__ import annotations

import functools
import pickle
import time
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import attrs

from fdshare import alone, mains, preload, reducers
from fdshare import makefiles as _makefiles  # noqa: F401 -- with files.py, registers how files travel
from fdshare.errors import DecodeError, NotSendableError
from fdshare.handle import NO_HANDLES, FdHandle, HandleList, Handles
from fdshare.handlers import is_from_handler
from fdshare.parts import parts_of
from fdshare.wire import ALWAYS_INLINE, MAX_FDS_PER_PACKET, MAX_INLINE

__all__ = ["Codec", "Incoming", "Outgoing", "PickleCodec", "decode_bare"]

PROTOCOL = 5
"""The pickle protocol: the first with out-of-band buffers (PEP 574), of Python 3.8."""

INLINE_BUFFER = MAX_INLINE - 8192
"""Buffers below this size, bytes, are copied into the pickle: a segment costs more than the copy."""

_MAX_SPARE = 8
"""Encoders kept for the next message; one for each thread that encodes at the same time."""

WINDOWS = b"\x01"
"""First byte of a payload that refers to shared memory; a pickle's is 0x80."""

_MAX_PROBES = 2000
"""Most objects that are tried one by one to find the one that cannot travel."""

_PROBE_SECONDS = 0.5
"""How long they are tried: each one is encoded with all that it holds."""

_MOST_STEPS_DOWN = 8
"""How far the way into what is nested too deeply is told: the rest of it says nothing more."""


@attrs.define(eq=False)
class Outgoing:
    """A message to be sent: what it borrows stays borrowed until :meth:`sent` or :meth:`failed`."""

    payload: list[Any] = attrs.field(factory=list)
    """Bytes-like pieces of the pickle, in order."""
    fds: list[int] = attrs.field(factory=list)
    """Borrowed descriptors, each once."""
    buffers: list[memoryview] = attrs.field(factory=list)
    """Out-of-band buffers, in the order in which the pickle refers to them."""
    windows: list[tuple[int, Any]] = attrs.field(factory=list)
    """What stands for those among them that lie in shared memory, by their place in that order."""
    announced: bool = False
    """Whether the receiver was told already that a packet with so many descriptors will come."""
    _index: dict[int, int] = attrs.field(factory=dict)
    _owners: list[object] = attrs.field(factory=list)
    _consumed: list[Callable[[], object]] = attrs.field(factory=list)
    _temporaries: list[FdHandle] = attrs.field(factory=list)

    def sent(self) -> None:
        """The kernel has it: close what was moved.  What a signal handler raises meanwhile comes out after that."""
        consumed, self._consumed = self._consumed, []
        raised = None
        for close in consumed:
            try:
                close()
            # The message is out: what is no interrupt must not come out of send, and the others must be closed.
            except BaseException as error:  # noqa: BLE001 -- raised below
                if isinstance(error, Exception) and not is_from_handler(error):
                    preload.warn("closing what was moved failed", exc_info=True)
                else:
                    consumed.append(close)  # again, last: it may have been ahead of the close
                    raised = error
        self.failed()
        if raised is not None:
            raise raised

    def failed(self) -> None:
        """It will not be sent: let go of everything, and leave what was to be moved with its owner."""
        self._close_temporaries()
        self._owners.clear()
        self._consumed.clear()

    def _close_temporaries(self) -> None:
        while self._temporaries:
            self._temporaries.pop().close()


def _as_handles(handles: Iterable[FdHandle]) -> HandleList:
    return handles if isinstance(handles, HandleList) else Handles(handles)


@attrs.define(eq=False)
class Incoming:
    """A message that arrived: it owns its descriptors until ``decode`` has handed them on."""

    payload: Any
    handles: HandleList = attrs.field(default=NO_HANDLES, converter=_as_handles)
    buffers: list[memoryview] = attrs.field(factory=list)

    def close(self) -> None:
        """Close every descriptor: nobody will decode it."""
        self.handles.close()


class Codec(Protocol):
    """What a channel needs to know of an encoding.

    A codec with an attribute ``limits`` (see limits.py) is for peers that are not trusted: its channels check what arrives.
    """

    name: str
    """What both ends must agree on, up to 64 printable ASCII characters; told in the hello of a named connection."""

    def encode(self, obj: Any) -> bytes | Outgoing:
        """Return a bare pickle of at most ``wire.ALWAYS_INLINE`` bytes, or the parts of any other message."""
        ...

    def decode(self, message: Incoming) -> Any:
        """Rebuild the object; close what it does not take, whatever happens."""
        ...


class _Lender:
    """The context of reducers, mixed into both picklers."""

    chunks: list[Any]
    outgoing: Outgoing | None
    moving: int
    by_value = False

    def start(self) -> Callable[[Any], object]:
        self.chunks = []
        self.outgoing = None
        self.moving = 0
        return self.chunks.append

    def take_outgoing(self) -> Outgoing:
        """Hand the finished message over, and be ready for the next."""
        outgoing, self.outgoing = self.outgoing or Outgoing(), None
        # Pickle hands a large buffer through as the PickleBuffer that it is.
        outgoing.payload = [
            piece if type(piece) is bytes else memoryview(piece).cast("B") for piece in self.chunks
        ]
        self.chunks.clear()
        self.moving = 0
        return outgoing

    def _out(self) -> Outgoing:
        if self.outgoing is None:
            self.outgoing = Outgoing()
        return self.outgoing

    def lend(self, fd: int, owner: object) -> int:
        out = self._out()
        index = out._index.get(fd)
        if index is None:
            index = out._index[fd] = len(out.fds)
            out.fds.append(fd)
            out._owners.append(owner)
        return index

    def consume(self, close: Callable[[], object]) -> None:
        self._out()._consumed.append(close)

    def borrow_temporary(self, handle: FdHandle) -> None:
        self._out()._temporaries.append(handle)

    def finish(self) -> None:
        """Put the windows of a message before its pickle."""
        if self.outgoing is not None and self.outgoing.windows:
            pieces = self.chunks[:]
            self.chunks.clear()
            self.clear_memo()
            self.dump(self.outgoing.windows)
            size = sum(map(len, self.chunks))
            self.chunks[:] = [WINDOWS + size.to_bytes(8, "little"), *self.chunks, *pieces]

    dump: Callable[[Any], None]  # of the pickler that this is mixed into
    clear_memo: Callable[[], None]

    def on_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a buffer out of the pickle (False) where that is worth a segment."""
        view = buffer.raw()
        if reducers.find_window is not None:
            window = reducers.find_window(view)
            if window is not None:
                out = self._out()
                out.windows.append((len(out.buffers) + len(out.windows), window))
                return False
        if view.nbytes < INLINE_BUFFER:
            return True
        self._out().buffers.append(view)
        return False


class _Sink:
    """A file with nothing but ``write``: pickle hands large bytes through it without copying them."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], object]) -> None:
        self.write = write


class _Encoder(_Lender, pickle.Pickler):
    __slots__ = ("chunks", "moving", "outgoing")  # read for every message, and faster so

    def __init__(self) -> None:
        super().__init__(_Sink(self.start()), PROTOCOL, buffer_callback=self.on_buffer)

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        try:
            reduce = reducers.resolved[cls]
        except KeyError:
            reduce = reducers.find_reducer(cls)
        return NotImplemented if reduce is None else reduce(obj, self)


@functools.cache
def _by_value_encoder() -> type[Any]:
    import cloudpickle

    class ByValueEncoder(_Lender, cloudpickle.CloudPickler):  # type: ignore[misc]  # untyped
        by_value = True

        def __init__(self) -> None:
            super().__init__(_Sink(self.start()), PROTOCOL, buffer_callback=self.on_buffer)

        def reducer_override(self, obj: Any) -> Any:
            reduce = reducers.find_reducer(type(obj))
            reduced = NotImplemented if reduce is None else reduce(obj, self)
            return (
                mains.with_name(obj, super().reducer_override(obj)) if reduced is NotImplemented else reduced
            )

    return ByValueEncoder


def _second_encoder() -> Any:
    """Return what encodes where pickle cannot; where cloudpickle is out of reach, pickle, which names what it does not take."""
    try:
        return _by_value_encoder()()
    except (ImportError, OSError):
        return _Encoder()


_spare: list[_Encoder] = []
_take_spare, _keep_spare = _spare.pop, _spare.append


class _ByNameEncoder(_Encoder):
    """For who has the same main module, even one that nobody can import."""

    by_value = True  # so that reducers leave the choice to pickle


class PickleCodec:
    """The default codec: pickle with reducers, then cloudpickle.  For processes of one user that trust each other.

    Args:
        alike: whether the receiver is a fork of this process, so that it has whatever is defined in the main module.
    """

    name = "pickle"

    def __init__(self, *, alike: bool = False) -> None:
        self._alike = alike

    def encode(self, obj: Any) -> bytes | Outgoing:
        """Encode ``obj``; nothing is changed in it, whatever is to be moved.

        Raises:
            NotSendableError: something in it cannot travel; says what, where, and what to do.
        """
        key = alone.keys.get(type(obj))
        if key is not None:
            known = alone.pickle_of(obj, key)
            if known is not None:
                return Outgoing([known], [obj.fileno()], owners=[obj])
        try:
            encoder = _take_spare()
        except IndexError:
            encoder = _Encoder()
        try:
            encoder.dump(obj)
            out = encoder.outgoing
            if out is not None:
                encoder.finish()
        except Exception as error:
            if encoder.outgoing is not None:
                encoder.outgoing.failed()
            if is_from_handler(error):
                raise
            return _encode_otherwise(obj, error, self._alike)  # any __reduce__ may raise anything
        encoder.clear_memo()
        chunks = encoder.chunks
        if out is None and len(chunks) == 1:
            data: bytes = chunks.pop()
            if len(data) <= ALWAYS_INLINE:
                _keep_spare(encoder)
                return data
            return Outgoing([data])  # and no more of this encoder, which keeps a large memo table
        outgoing = encoder.take_outgoing()
        if len(_spare) < _MAX_SPARE and len(outgoing.fds) < MAX_FDS_PER_PACKET:
            _keep_spare(encoder)
        if key is not None and len(outgoing.payload) == 1:
            alone.remember(obj, bytes(outgoing.payload[0]))
        return outgoing

    def decode(self, message: Incoming) -> Any:
        """Rebuild the object.

        Raises:
            DecodeError: it cannot be rebuilt here; its descriptors are closed.
        """
        handles = message.handles
        if len(handles) == 1 and not message.buffers:
            rebuild = alone.rebuilder(message.payload)
            if rebuild is not None:
                try:
                    return rebuild(handles)
                except BaseException as error:
                    handles.close()
                    if isinstance(error, Exception):
                        raise_undecodable(error)
                    raise
        unpacking = reducers.Unpacking(handles)
        outer, reducers.decoding.message = reducers.decoding.message, unpacking
        failed = True
        try:
            payload, buffers = message.payload, message.buffers
            if payload[:1] == WINDOWS:
                payload, buffers = _with_windows(payload, buffers)
            obj = pickle.loads(payload, buffers=buffers)
            failed = False
            return obj
        except Exception as error:  # noqa: BLE001 -- raised again
            raise_undecodable(error)
        finally:
            reducers.decoding.message = outer
            unpacking.close(failed)


def _with_windows(payload: Any, buffers: list[memoryview]) -> tuple[memoryview, list[Any]]:
    """Return the pickle of a payload that refers to shared memory, and all of its buffers in their order."""
    view, merged = memoryview(payload), list[Any](buffers)
    end = 9 + int.from_bytes(view[1:9], "little")
    if end > len(view):
        raise DecodeError(f"{end} bytes of windows in a payload of {len(view)}")
    for place, window in pickle.loads(view[9:end]):
        merged.insert(place, window)
    return view[end:], merged


def undecodable(error: Exception) -> Exception:
    """Return what to raise for a message that could not be rebuilt because of ``error``.

    What a signal handler has raised meanwhile is not about the message, and stays what it is.
    """
    if isinstance(error, DecodeError) or is_from_handler(error):
        return error
    return DecodeError(f"a message could not be rebuilt: {type(error).__name__}: {error}")


def raise_undecodable(error: Exception) -> NoReturn:
    """Raise what :func:`undecodable` says, from ``error``.

    Raises:
        DecodeError, or what a signal handler has raised.
    """
    refusal = undecodable(error)
    if refusal is error:
        raise error
    raise refusal from error


def decode_bare(data: bytes) -> Any:
    """Rebuild what a bare pickle holds.

    Raises:
        DecodeError: it cannot be rebuilt here.
    """
    try:
        return pickle.loads(data)
    except Exception as error:  # noqa: BLE001 -- raised again
        raise_undecodable(error)


# --- when pickle fails: cloudpickle, and then an error that says where -----------------------------------------


def _encode_otherwise(obj: Any, first: Exception, alike: bool) -> bytes | Outgoing:
    """Try again with cloudpickle; ``first`` is what pickle said."""
    refused = isinstance(first, reducers.Refused)
    of_main = refused and isinstance(first.obj, types.FunctionType | type)  # type: ignore[attr-defined]
    by_name = of_main and mains.importable() is mains.Importable.BY_FORKS
    if by_name and alike and (named := _try_by_name(obj)) is not None:
        return named
    error = _try(_second_encoder(), obj) if of_main or not refused else first
    if isinstance(error, Outgoing):
        return error
    if by_name and not alike and (named := _try_by_name(obj)) is not None:
        return named  # it will do for a fork of this process
    path, culprit, error = _find_culprit(obj, error)
    type_name = f"{type(culprit).__module__}.{type(culprit).__qualname__}".removeprefix("builtins.")
    reason = str(error) or type(error).__name__
    raise NotSendableError(
        f"cannot send {path} ({type_name}): {reason}", path=path, type_name=type_name, reason=reason
    ) from error


def _try_by_name(obj: Any) -> bytes | Outgoing | None:
    """Encode ``obj`` with pickle and the names of the main module; None where that fails."""
    out = _try(_ByNameEncoder(), obj)
    if isinstance(out, Exception):
        return None
    if out.fds or out.buffers or sum(map(len, out.payload)) > ALWAYS_INLINE:
        return out
    return b"".join(out.payload)


def _try(encoder: Any, obj: Any) -> Outgoing | Exception:
    """Encode ``obj``; return the exception where that fails."""
    try:
        encoder.dump(obj)
        encoder.finish()
    except Exception as error:
        if encoder.outgoing is not None:
            encoder.outgoing.failed()
        if is_from_handler(error):
            raise
        return error  # any __reduce__ may raise anything
    outgoing: Outgoing = encoder.take_outgoing()
    return outgoing


def _find_culprit(obj: Any, error: Exception) -> tuple[str, Any, Exception]:
    """Return the path to the innermost part of ``obj`` that cannot be encoded, that part, and why.

    Or the path to a part that holds it, where finding it would take too long.
    """
    path, probes, steps, seen = "message", 0, 0, {id(obj)}
    until = time.monotonic() + _PROBE_SECONDS
    while not (isinstance(error, reducers.Refused) and error.obj is obj):
        steps += 1
        # cloudpickle turns a RecursionError into one of its own
        too_deep = isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)
        if too_deep and steps > _MOST_STEPS_DOWN:
            break
        for step, child in parts_of(obj):
            probes += 1
            if id(child) in seen:
                continue
            if probes > _MAX_PROBES or time.monotonic() > until:
                return path, obj, error
            seen.add(id(child))
            failure = _try(_second_encoder(), child)
            if isinstance(failure, Outgoing):
                failure.failed()
                continue
            obj, path, error = child, path + step, failure
            break
        else:
            break
    return path, obj, error
