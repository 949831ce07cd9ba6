"""``TypedCodec``: a closed set of message classes, encoded without pickle, checked on arrival: for peers that are not trusted.

What arrives passes, in this order, and is refused at the first that fails:

1. the packet's header, against :class:`fdshare.limits.Limits`: bytes and descriptors, before any is spent;
2. the number of values and their nesting (:func:`scan`), where the bytes or the types allow too many;
3. msgspec, in C: every value is of its declared type, nothing is missing, nothing is added;
4. sets, dicts and flags: how much memory they take and, where a sender can choose hashes, how much time (costs.py);
5. each descriptor: what it is and what it is open for; and all of them have a place in the message;
6. the message class itself, with its validators.

So a message takes at most five times ``max_bytes`` of memory (text may need four bytes a character), and some 100 bytes for each
of ``max_items``.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

from fdshare.codec import Incoming, Outgoing, undecodable
from fdshare.errors import DecodeError, MessageTooLargeError, NotSendableError
from fdshare.handle import NO_HANDLES
from fdshare.limits import Limits
from fdshare.typed.costs import Cost, scan
from fdshare.typed.fields import Receiving, Sending
from fdshare.wire import ALWAYS_INLINE, MAX_DESCRIPTORS, MAX_FDS_PER_PACKET

if TYPE_CHECKING:
    from fdshare.typed.schema import Schema, Wrong

__all__ = ["TypedCodec"]

DEFAULT_MAX_BYTES = 16 << 20
"""Bytes of one encoded message, unless told otherwise: larger things travel as a descriptor better."""

DEFAULT_MAX_ITEMS = 1 << 17
"""Values in one message, unless told otherwise; each takes a byte at least, so a smaller message need not be counted."""

DEFAULT_MAX_DEPTH = 64
"""Levels of nesting in one message, unless told otherwise: each takes two Python calls, of which there may be a thousand."""

MAX_REASON = 500
"""Characters of an error about a message that arrived: it may quote what the peer has sent."""

_LARGEST_DEPTH = 250
"""Most that ``max_depth`` may be, for the same reason."""


class TypedCodec:
    """A codec for a closed set of attrs classes, without pickle; for both ends of a channel, one of which may be hostile.

    Fields are bool, int, float, str, bytes, None, enums, Literal, list, tuple, set, frozenset, dict, unions, attrs classes; and
    descriptors: FdHandle, BinaryIO, TextIO, socket.socket, Channel, each with ``Annotated[..., Descriptor(...)]`` where
    more is to be said.  Both ends need the same classes; bounds may differ, as each end has its own.

    Needs msgspec: ``pip install 'fdshare[typed]'``.

    Args:
        message_types: the attrs classes that may be sent by themselves; classes in their fields come along.
        max_bytes: most bytes of one encoded message, sent or received.
        max_items: most values in one message, containers and fields each counted; a set counts for three and its elements
            for two each, a dict for two, a combination of flags for five.
        max_depth: most levels of nesting in one message; at most 250.
        max_fds: most descriptors of one message, both ways, unless the next two say otherwise.
        send_fds, recv_fds: most descriptors of one message, sent and received.  With ``recv_fds=0`` none at all can come, and a
            message of more than 64 KiB neither, as it would come in a segment, which is one.

    Raises:
        ImportError: msgspec is not installed.
        TypeError: a field is of a type that cannot be checked.
        ValueError: no classes, two of one name, a bound that makes no sense, or classes nested deeper than ``max_depth``.
    """

    def __init__(
        self,
        *message_types: type,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_items: int = DEFAULT_MAX_ITEMS,
        max_depth: int = DEFAULT_MAX_DEPTH,
        max_fds: int = MAX_FDS_PER_PACKET,
        send_fds: int | None = None,
        recv_fds: int | None = None,
    ) -> None:
        try:
            from fdshare.typed.schema import Schema, Wrong
        except ImportError as error:
            raise ImportError(f"TypedCodec needs msgspec: pip install 'fdshare[typed]' ({error})") from error
        self.message_types = message_types
        self.max_bytes = _bound("max_bytes", max_bytes, 1, None)
        self.max_items = _bound("max_items", max_items, 1, None)
        self.max_depth = _bound("max_depth", max_depth, 1, _LARGEST_DEPTH)
        max_fds = _bound("max_fds", max_fds, 0, MAX_DESCRIPTORS)
        self.send_fds = max_fds if send_fds is None else _bound("send_fds", send_fds, 0, MAX_DESCRIPTORS)
        self.recv_fds = max_fds if recv_fds is None else _bound("recv_fds", recv_fds, 0, MAX_DESCRIPTORS)
        self._schema: Schema = Schema(message_types)
        if self._schema.depth > self.max_depth:
            raise ValueError(
                f"these classes are nested {self._schema.depth} levels deep; max_depth is {self.max_depth}"
            )
        self._pack, self._unpack = self._schema.root.pack, self._schema.root.unpack
        self._to_bytes, self._from_bytes = self._schema.coders()
        self._wrong: type[Wrong] = Wrong
        self._always_scan = self._schema.recursive
        self._counted = self._schema.counted
        self._no_cost = Cost(self.max_items)
        self.name: str = f"typed:{hashlib.sha256(self._schema.text.encode()).hexdigest()[:32]}"
        """What both ends must agree on: a hash of the classes, their fields and types."""
        self._nothing = Receiving(NO_HANDLES, self)
        self.limits = Limits(
            self.max_bytes, self.recv_fds if self._schema.descriptors else 0, none=not self.recv_fds
        )
        """What a channel checks on the header of each packet."""

    def encode(self, obj: Any) -> bytes | Outgoing:
        """Encode a message; nothing is changed in it, whatever is to be moved.

        Raises:
            NotSendableError: it is none of the classes, or something in it is not of its declared type; says what and where.
            MessageTooLargeError: over a bound.
        """
        sending = Sending(self, Cost(self.max_items) if self._counted else self._no_cost)
        try:
            data = self._encode(obj, sending)
        except BaseException:
            if sending.out is not None:
                sending.out.failed()
            raise
        if sending.out is None:
            return data if len(data) <= ALWAYS_INLINE else Outgoing([data])
        sending.out.payload = [data]
        return sending.out

    def _encode(self, obj: Any, sending: Sending) -> bytes:
        try:
            data = self._to_bytes(self._pack(obj, sending))
            if self._always_scan or len(data) + sending.cost.extra > self.max_items:
                scan(data, self.max_items - sending.cost.extra, self.max_depth)
            if self._schema.bounded:
                self._schema.check_bounds(data, self._from_bytes)
        except self._wrong as wrong:
            raise _not_sendable(
                "message" + "".join(reversed(wrong.path)), wrong.value, wrong.reason
            ) from wrong
        except RecursionError as error:
            raise MessageTooLargeError(
                f"the message is nested too deeply; max_depth is {self.max_depth}"
            ) from error
        except DecodeError as error:
            raise MessageTooLargeError(str(error)) from error
        if len(data) > self.max_bytes:
            raise MessageTooLargeError(f"a message of {len(data)} bytes; max_bytes is {self.max_bytes}")
        if sending.out is not None and len(sending.out.fds) > self.send_fds:
            raise MessageTooLargeError(
                f"{len(sending.out.fds)} descriptors in one message; send_fds is {self.send_fds}"
            )
        return data

    def decode(self, message: Incoming) -> Any:
        """Rebuild the message.

        Raises:
            DecodeError: it is not one of these classes, or breaks a bound; its descriptors are closed.
        """
        handles = message.handles
        receiving = Receiving(handles, self) if handles or self._counted else self._nothing
        failed = True
        try:
            payload = message.payload
            # Again, for whoever has no channel that looks at headers.
            if message.buffers or len(payload) > self.max_bytes or len(handles) > self.recv_fds:
                raise DecodeError(
                    f"over a bound: {len(payload)} bytes (max_bytes is {self.max_bytes}), "
                    f"{len(handles)} descriptors (recv_fds is {self.recv_fds}), {len(message.buffers)} buffers"
                )
            items = None
            if self._always_scan or len(payload) > self.max_items:
                items = scan(payload, self.max_items, self.max_depth)
            if self._counted:
                receiving.cost = Cost(self.max_items, payload, items)
            assert self._unpack is not None  # of every class
            obj = self._unpack(self._from_bytes(payload), receiving)
            if handles:
                receiving.check_all_taken()
            failed = False
            return obj
        except Exception as error:
            refusal = undecodable(error)
            if refusal is error and not isinstance(error, DecodeError):
                raise  # of a signal handler
            text = str(refusal)
            if len(text) <= MAX_REASON and text.isprintable():
                raise refusal from error
            # What the peer has sent must not fill a log, nor speak to a terminal; not by a chained traceback either.
            text = "".join(c if c.isprintable() else "?" for c in text[:MAX_REASON])
            raise DecodeError(f"{text}\N{HORIZONTAL ELLIPSIS}") from None
        finally:
            if handles:
                receiving.close(failed)

    def __repr__(self) -> str:
        return f"TypedCodec({', '.join(cls.__name__ for cls in self.message_types)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A channel that is handed to a child process takes its codec along."""
        bounds = {
            name: getattr(self, name)
            for name in ("max_bytes", "max_items", "max_depth", "send_fds", "recv_fds")
        }
        return functools.partial(TypedCodec, *self.message_types, **bounds), ()


def _bound(name: str, value: int, least: int, most: int | None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        raise ValueError(
            f"{name} is an integer from {least}{'' if most is None else f' to {most}'}, not {value!r}"
        )
    return value


def _not_sendable(path: str, value: Any, reason: str) -> NotSendableError:
    type_name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return NotSendableError(
        f"cannot send {path} ({type_name}): {reason}", path=path, type_name=type_name, reason=reason
    )
