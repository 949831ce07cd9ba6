"""The codec of a handover: plain values and descriptors; what is pickled stays so until somebody asks for it.

The generations may be of two users, and either may have been taken over.  So neither unpickles what the other says on its own:
a successor loads the states that its program asks for, and connections where it takes any (``adopt=True``); a predecessor
loads nothing.  A payload is::

    offset size field
         0    4 text size     bytes, little-endian
         4    4 descriptors   of the plain part; they come last
         8      text          JSON: [kind, fields]
                pickle        as a Channel without a codec sends it, with all other descriptors, and its buffers; or nothing

In the fields ``{"$fd": index}`` stands for a descriptor, and ``{"$pickle": 0}`` for the pickle.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import attrs

from fdshare import wire
from fdshare.codec import Incoming, Outgoing, PickleCodec
from fdshare.errors import DecodeError, MessageTooLargeError
from fdshare.handle import FdHandle, Handles
from fdshare.limits import Limits

__all__ = ["OF_PREDECESSORS", "OF_SUCCESSORS", "PLAIN", "Message", "Pickle", "Pickled"]

MAX_TEXT = 8 << 20
"""Bytes of the plain part of a message: 2 KiB for each of 4096 listeners."""

MAX_QUESTION = 64 << 10
"""Bytes of what a successor says: all that fits into one packet, so that it has no use for descriptors, and none are let in."""

_SIZES = struct.Struct("<II")
_PICKLE = PickleCodec()

Message = tuple[str, dict[str, Any]]


@attrs.frozen(eq=False)
class Pickle:
    """Stands in a message for a value that travels as a pickle; at most one of them."""

    value: Any


@attrs.frozen(eq=False)
class Pickled:
    """A pickle that has come, with its descriptors; nothing of it was looked at."""

    _message: Incoming

    def load(self) -> Any:
        """Unpickle it, which runs what its sender says; it is spent.

        Raises:
            DecodeError: it cannot be rebuilt here; its descriptors are closed.
        """
        return _PICKLE.decode(self._message)

    def close(self) -> None:
        """Close its descriptors."""
        self._message.close()


class _Codec:
    name = "handover"

    def __init__(self, limits: Limits | None) -> None:
        self.limits = limits

    def encode(self, obj: Message) -> Outgoing:
        """Encode a message.

        Raises:
            NotSendableError: a value that is to be pickled cannot travel.
            TypeError: another one is not plain.
            MessageTooLargeError: its plain part is over MAX_TEXT.
        """
        kind, fields = obj
        handles: list[FdHandle] = []
        pickles: list[Pickle] = []

        def stand_in(value: object) -> dict[str, int]:
            if isinstance(value, FdHandle):
                handles.append(value)
                return {_FD: len(handles) - 1}
            if isinstance(value, Pickle) and not pickles:
                pickles.append(value)
                return {_PICKLED: 0}
            raise TypeError(f"{type(value).__name__} is no plain value")

        text = json.dumps([kind, fields], default=stand_in).encode()
        if len(text) > MAX_TEXT:
            raise MessageTooLargeError(f"{len(text)} bytes of plain values; MAX_TEXT is {MAX_TEXT}")
        numbers = [handle.fileno() for handle in handles]
        encoded = _PICKLE.encode(pickles[0].value) if pickles else Outgoing()
        out = encoded if isinstance(encoded, Outgoing) else Outgoing([encoded])
        out.payload.insert(0, _SIZES.pack(len(text), len(handles)) + text)
        out.fds += numbers
        out._owners += handles
        return out

    def decode(self, message: Incoming) -> Message:
        """Rebuild a message, but for what is pickled.

        Raises:
            DecodeError: it is none; its descriptors are closed.
        """
        handles = list(message.handles)
        message.handles.release()
        try:
            return _rebuild(memoryview(message.payload), handles, message.buffers)
        except BaseException as error:
            Handles(handles).close()
            if isinstance(error, Exception):  # whatever JSON may lead to, a RecursionError for one
                raise DecodeError(f"not a message of a handover: {type(error).__name__}: {error}") from error
            raise


_FD, _PICKLED = "$fd", "$pickle"


def _rebuild(view: memoryview, handles: list[FdHandle], buffers: list[memoryview]) -> Message:
    """Put a message together.

    Raises:
        ValueError, and what struct and JSON raise: its parts do not belong together.
    """
    size, count = _SIZES.unpack_from(view)
    end = _SIZES.size + size
    if end > len(view) or size > MAX_TEXT or count > len(handles):
        raise ValueError(f"{size} bytes and {count} descriptors, of {len(view)} and {len(handles)}")
    first = len(handles) - count
    plain = dict(enumerate(handles[first:]))
    pickles = [Pickled(Incoming(view[end:], Handles(handles[:first]), buffers))]

    def take(value: dict[str, Any]) -> Any:
        if value.keys() == {_FD}:
            return plain.pop(value[_FD])
        if value.keys() == {_PICKLED}:
            return pickles.pop()
        return value

    try:
        kind, fields = json.loads(bytes(view[_SIZES.size : end]), object_hook=take)
        if not isinstance(kind, str) or not isinstance(fields, dict) or plain:
            raise ValueError("its values are not as they are to be")
        if pickles and (end < len(view) or first or buffers):
            raise ValueError("there is more than it speaks of")
    finally:
        for pickled in pickles:
            pickled._message.handles.release()
    return kind, fields


OF_PREDECESSORS = _Codec(Limits(MAX_QUESTION, 0))
"""What a predecessor speaks: to it, nobody sends a descriptor or a large message."""

OF_SUCCESSORS = _Codec(None)
"""What a successor speaks: states are of any size."""

PLAIN = Limits(MAX_TEXT, wire.MAX_DESCRIPTORS)
"""What a successor takes before its program has asked for anything that is pickled."""
